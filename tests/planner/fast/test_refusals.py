"""The compiled tier says no to what it does not model, and finds a place for its compiled code or does without."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core import caching

from engine.allocation import Allocation, Policies
from engine.policies.sharing import fair_step_rates, fill_fair_step_rates
from planner.fast import NotModelledError, cache, loop, prepare, refusal, simulate_fast
from planner.service import ServiceTable
from planner.simulator.world import Failures, World
from tests.simulation_builders import FACTS, SIZES, base_pool, controlnet_pool, workload_of
from traces.problems import InputError

WORKLOAD = workload_of([0.0, 1.0, 2.0], base_model_id="m")
SERVICE = ServiceTable.from_service_s(WORKLOAD, np.array([1.0, 1.0, 1.0]))
PREPARED = prepare(WORKLOAD, [SERVICE])


def test_every_mechanism_that_is_on_is_named() -> None:
    allocation = Allocation((base_pool(1),), policies=Policies(queue_order="sjf", lora_cache_policy="lfu"))  # type: ignore[arg-type]
    with pytest.raises(NotModelledError) as refused:
        simulate_fast(PREPARED, allocation, {"base": SERVICE}, SIZES, FACTS, world=World(failures=Failures(1e5, 60.0)))
    assert refused.value.reasons == ("queue_order", "lora_cache_policy", "failures")
    assert "the SimPy model does" in str(refused.value)


def test_tables_of_controlnet_pools_and_devices_of_two_sizes_in_one_role_are_refused_as_gpu_kinds() -> None:
    pools = (base_pool(1), base_pool(1, name="second"), controlnet_pool(1))
    small = dataclasses.replace(FACTS, device_memory_gib=FACTS.device_memory_gib / 2)
    services = {"base": SERVICE, "second": SERVICE}
    for tables, facts in (
        ({**services, "controlnet": SERVICE}, FACTS),
        (services, {"base": FACTS, "second": small, "controlnet": FACTS}),
    ):
        with pytest.raises(NotModelledError, match="gpu_kinds"):
            simulate_fast(PREPARED, Allocation(pools), tables, SIZES, facts)  # type: ignore[arg-type]


def test_state_that_would_not_fit_is_refused_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal, "STATE_BYTES_MAX", 100)
    with pytest.raises(NotModelledError, match=r"models on 9 replicas \(.* GiB of cache state"):
        simulate_fast(PREPARED, Allocation((base_pool(9),)), {"base": SERVICE}, SIZES, FACTS)


def test_a_table_that_was_not_prepared_is_refused() -> None:
    other = dataclasses.replace(SERVICE)
    with pytest.raises(ValueError, match=r"not one of prepared\.services"):
        simulate_fast(PREPARED, Allocation((base_pool(1),)), {"base": other}, SIZES, FACTS)
    with pytest.raises(ValueError, match="needs service tables of 3 rows"):
        prepare(WORKLOAD, [])


def test_what_the_simpy_model_refuses_is_refused_with_its_sentence() -> None:
    with pytest.raises(InputError, match="has no service table"):
        simulate_fast(PREPARED, Allocation((base_pool(1, name="another"),)), {"base": SERVICE}, SIZES, FACTS)


PROGRAM = """
import sys
import numpy as np
from engine.allocation import Allocation
from planner.fast import prepare, simulate_fast
from planner.fast.loop import run
from tests.simulation_builders import FACTS, SIZES, base_pool, workload_of
from planner.service import ServiceTable
workload = workload_of([0.0, 1.0, 1.5], base_model_id="m")
service = ServiceTable.from_service_s(workload, np.array([2.0, 1.0, 4.0]))
done = simulate_fast(prepare(workload, [service]), Allocation((base_pool(1, base_model_ids=("m",)),)), {"base": service}, SIZES, FACTS)
print(done.outcome.times_s[:, 1].tolist(), sum(run.stats.cache_hits.values()), run.stats.cache_path)
"""


def test_another_process_finds_the_compiled_code_whatever_its_hash_seed() -> None:
    if loop.run.stats.cache_path is None:  # type: ignore[attr-defined]
        pytest.skip("numba may write neither beside the source nor into the user's cache folder here")
    simulate_fast(PREPARED, Allocation((base_pool(1),)), {"base": SERVICE}, SIZES, FACTS)  # compiled and stored by now
    root = Path(__file__).resolve().parents[3]
    for seed in ("0", "7"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], cwd=root, capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        ends, hits, _folder = done.stdout.rsplit(" ", 2)
        assert (ends, hits) == ("[2.0, 3.0, 7.0]", "1")


client = st.floats(0.5, 9.0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 8), st.integers(1, 5))
def test_rates_into_buffers_are_the_same_bits(data: st.DataObject, n_clients: int, n_workers: int) -> None:
    pairs = data.draw(st.lists(st.tuples(st.integers(0, n_clients - 1), st.integers(0, n_workers - 1)), unique=True))
    demand_s = data.draw(st.lists(st.sampled_from([0.05, 0.1, 0.3]), min_size=len(pairs), max_size=len(pairs)))
    alone = data.draw(st.lists(client, min_size=n_clients, max_size=n_clients))
    edges = [c for c, _ in pairs], [w for _, w in pairs], demand_s
    rates = [7.0] * n_clients
    fill_fair_step_rates(
        alone,
        *edges,
        rates,
        [7.0] * n_clients,
        [7] * n_clients,
        [7.0] * n_workers,
        [7.0] * n_workers,
        [7.0] * n_workers,
    )
    assert rates == fair_step_rates(alone, *edges, n_workers)


def test_without_a_folder_to_write_to_every_process_compiles_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    doubled = cache.compiled_once(lambda number: 2 * number)
    assert doubled(21) == 42
    assert doubled.stats.cache_path is None  # type: ignore[attr-defined]


def test_the_name_of_the_stored_code_changes_with_any_file_it_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache.source_digest()
    assert cache.source_digest() == before
    monkeypatch.setattr(cache.sharing, "__file__", __file__)
    assert cache.source_digest() != before
