"""diagnose from the command line: the present service, and what each change would do to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

HEAD = "request_id,arrival_s,n_steps,base_model_id,controlnet_ids,lora_ids\n"


@pytest.fixture
def busy(tmp_path: Path, question: Path) -> Path:
    """Ninety requests with a ControlNet and a LoRA that keep two stock GPUs busy."""
    arrival_s = np.cumsum(np.random.default_rng(4).exponential(3.0, 90))
    rows = [f'r{i},{at:.3f},10,m,"[""depth""]","[""l{i % 3}""]"\n' for i, at in enumerate(arrival_s)]
    (tmp_path / "trace.csv").write_text(HEAD + "".join(rows), encoding="utf-8")
    question.write_text(
        question.read_text().replace("replications: 2\n", "replications: 2\n  warmup_s: 0\n"), encoding="utf-8"
    )
    return question


def test_a_diagnosis_divides_all_of_the_cost_and_ranks_the_changes(diffplan: Callable, busy: Path) -> None:
    done = diffplan("diagnose", busy, "--topology", "diffusers", "--replicas", 4, "--jobs", 1, "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    total = round(said["present"]["cost_usd_per_month"] * 1e6)
    for table in ("by_stage", "by_add_on", "by_checkpoint", "by_tenant"):
        assert sum(row["cost_micro_usd"] for row in said[table]) == total, table
    savings = [c["saving_usd_per_month"] for c in said["changes"] if c["saving_usd_per_month"] is not None]
    assert savings == sorted(savings, reverse=True)
    by_key = {change["key"]: change for change in said["changes"]}
    assert {"compiled", "kernels", "loras_in_place", "colocated", "decoupled", "one_more.base"} <= set(by_key)
    # stock LoRAs and steps are the slow parts of the provisional profile: taking either away must show
    assert by_key["kernels"]["p95_gain_s"] > 0
    assert by_key["loras_in_place"]["p95_gain_s"] > 0
    # both together are at least as fast as each: the engine has the kernels and the patches
    best = max(by_key["kernels"]["p95_gain_s"], by_key["loras_in_place"]["p95_gain_s"])
    assert by_key["colocated"]["p95_gain_s"] >= best
    assert by_key["one_more.base"]["saving_usd_per_month"] < 0


def test_the_same_change_is_worth_nothing_where_it_is_in_place(diffplan: Callable, busy: Path) -> None:
    done = diffplan("diagnose", busy, "--topology", "colocated", "--replicas", 2, "--jobs", 1, "--json")
    said = json.loads(done.out)
    left_out = {item["words"]: item["why"] for item in said["not_tried"]}
    assert left_out["LoRAs patched in place, everything else as today"].endswith("in place already")
    assert "decoupled" in {change["key"] for change in said["changes"]}


def test_without_a_fleet_the_smallest_that_keeps_the_promise_is_taken_and_said(diffplan: Callable, busy: Path) -> None:
    done = diffplan("diagnose", busy, "--jobs", 1)
    assert done.code == 0, done.err
    assert "You did not say how many GPUs you have" in done.out
    for words in ("Where time and money go", "frequency × weight", "One change at a time", "controlnet depth"):
        assert words in done.out


def test_a_log_of_what_happened_takes_the_simulation_s_place(diffplan: Callable, busy: Path, tmp_path: Path) -> None:
    fleet = ("--topology", "diffusers", "--replicas", 3)
    diffplan("simulate", busy, *fleet, "--out", tmp_path / "sim")
    log = tmp_path / "sim" / "requests.parquet"
    done = diffplan("diagnose", busy, *fleet, "--log", log, "--jobs", 1, "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    # a log that the simulator wrote says what the simulator says
    assert said["measured"]["latency_p95_s"] == pytest.approx(said["present"]["latency_p95_s"], rel=1e-12)
    records = pd.read_parquet(log)
    records["request_id"] = "other-" + records["request_id"]
    records.to_parquet(tmp_path / "other.parquet")
    other = diffplan("diagnose", busy, *fleet, "--log", tmp_path / "other.parquet", "--jobs", 1)
    assert other.code == 2
    assert "has 0 of the trace's 90 requests" in other.err


def test_a_trace_will_do_and_what_it_does_not_say_is_stated(diffplan: Callable, busy: Path, tmp_path: Path) -> None:
    done = diffplan(
        "diagnose",
        tmp_path / "trace.csv",
        "--profile",
        tmp_path / "profile.json",
        "--replicas",
        4,
        "--jobs",
        1,
        "--json",
    )
    assert done.code == 0, done.err
    assert any("promise is taken as 95% within 60 s" in line for line in json.loads(done.out)["assumptions"])


@pytest.mark.parametrize("host_gib", [8, 64])
def test_more_host_memory_is_worth_what_it_keeps_from_the_store(
    diffplan: Callable, question: Path, tmp_path: Path, host_gib: int
) -> None:
    """Three checkpoints of 6.5 GiB by turns on a GPU that holds one: in 8 GiB of host memory each is fetched and read again."""
    profile = json.loads((tmp_path / "profile.json").read_text())
    law = profile["laws"]["engine.checkpoint_load"]
    profile["laws"]["engine.checkpoint_read"] = {**law, "parameters": {"fixed_s": 3.0, "per_unit_s": 0.0}}
    (tmp_path / "profile.json").write_text(json.dumps({**profile, "schema_version": 2}))
    rows = [f'r{i},{40 * i},10,m{i % 3},"[]","[]"\n' for i in range(120)]
    (tmp_path / "trace.csv").write_text(HEAD + "".join(rows), encoding="utf-8")
    text = question.read_text().replace("replications: 2\n", "replications: 2\n  warmup_s: 0\n")
    text += f"gpu:\n  device_memory_gib: 9\npolicies:\n  checkpoint_host_cache_gib: {host_gib}\n"
    question.write_text(text, encoding="utf-8")
    done = diffplan("diagnose", question, "--topology", "colocated", "--replicas", 1, "--jobs", 1, "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    gains = [change["p95_gain_s"] for change in said["changes"] if change["key"] == "checkpoint_cache"]
    if host_gib == 8:
        # all but the first three uses save the read of 3 s and a fetch of 0.5 s and 6.5 GiB at 1.25 ns a byte
        assert gains == [pytest.approx(3.0 + 0.5 + 6.5 * 2**30 * 1.25e-9, rel=0.02)]
    else:
        why = {item["words"]: item["why"] for item in said["not_tried"]}
        assert not gains
        assert why["host memory for checkpoints 4 times as large"] == "it holds all of them already"


def test_contradictions_are_refused(diffplan: Callable, busy: Path) -> None:
    assert "--topology: got 'magic'" in diffplan("diagnose", busy, "--topology", "magic").err
    done = diffplan("diagnose", busy, "--topology", "decoupled", "--replicas", 2)
    assert done.code == 2
    assert "--controlnet-replicas: got 0" in done.err
