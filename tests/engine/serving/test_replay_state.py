"""What an engine holds when a replay's clock starts, as its files say it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from engine.allocation import GIB, Allocation, Pool, read_allocation
from engine.serving.lora_cache import LoraCache
from engine.serving.replay_state import start_state, with_later_sizes, write_state


def engine_like(cache: LoraCache) -> SimpleNamespace:
    ranks = (SimpleNamespace(resident={"base_model_ids": ["m"], "controlnet_ids": ["a", "b"]}),)
    base = SimpleNamespace(spec=SimpleNamespace(role="base"), ranks=ranks)
    loader = SimpleNamespace(spec=SimpleNamespace(role="loader"), ranks=ranks)
    return SimpleNamespace(
        replicas={"base-0": base, "loader-0": loader},
        dispatcher=SimpleNamespace(loras=cache),
        settings=SimpleNamespace(model="tiny", n_loaders=2, store="/models"),
        allocation=Allocation((Pool("base", "base", 1, "cpu"),)),
    )


def cache_with(*names: str) -> LoraCache:
    cache = LoraCache(GIB)
    for number, name in enumerate(names):
        cache.begin_fetch(name, 0.0)
        cache.fetched(name, f"/tier/{name}", 10 + number, 0.0)
    return cache


def test_the_host_tier_is_told_least_recently_used_first() -> None:
    cache = cache_with("a", "b", "c")
    cache.touch("a", 1.0)
    assert cache.held() == {"b": 11, "c": 12, "a": 10}
    assert list(cache.held()) == ["b", "c", "a"]


def test_a_cache_that_grew_keeps_its_order() -> None:
    names = [f"l{k}" for k in range(40)]
    assert list(cache_with(*names).held()) == names


def test_the_state_names_models_and_loras_but_no_folder_of_the_host(tmp_path: Path) -> None:
    engine = engine_like(cache_with("l1"))
    state = start_state(engine)
    assert state["workers"] == {"base-0": {"base_model_ids": ["m"], "controlnet_ids": ["a", "b"]}}
    assert (state["lora_ids"], state["model"], state["n_loaders"], state["has_store"]) == (["l1"], "tiny", 2, True)
    write_state(state, engine, tmp_path)
    assert json.loads((tmp_path / "start.json").read_text()) == state
    assert "/models" not in (tmp_path / "start.json").read_text()
    assert read_allocation(tmp_path / "allocation.json") == engine.allocation


def test_sizes_of_loras_that_came_later_are_added_and_the_start_stays() -> None:
    engine = engine_like(cache_with("l1"))
    state = start_state(engine)
    engine.dispatcher.loras = cache_with("l1", "l2")
    later = with_later_sizes(state, engine)
    assert (later["lora_ids"], later["lora_bytes"]) == (["l1"], {"l1": 10, "l2": 11})


def test_an_engine_that_cannot_be_looked_into_has_an_empty_state(tmp_path: Path) -> None:
    state = start_state(object())
    assert (state["workers"], state["lora_ids"]) == ({}, [])
    write_state(state, object(), tmp_path)
    assert not (tmp_path / "allocation.json").exists()
