"""The compiled tier and the SimPy model tell the same story of the same arrays: who went where, when, and what it cost."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.profile import LatencyProfile
from engine.allocation import Allocation, Policies, Pool
from planner.candidates import shapes_of
from planner.fast import FastRun, prepare, simulate_fast
from planner.fast import arrays as a
from planner.fast.metrics import columns_of, summarise_fast
from planner.fast.run import ENDINGS
from planner.replication import load_inputs, service_table
from planner.scenario import load_scenario
from planner.service import ServiceTable, build_service
from planner.simulator import ProfileFacts, SimulationResult, simulate
from planner.statistics import summarise
from planner.traffic import build_traffic
from planner.workload import Workload
from tests.simulation_builders import SIZES, base_pool, constant_profile, controlnet_pool, workload_of

RELATIVE = 1e-9
"""What the tiers promise each other. They do the same operations in the same order, so it is exact on the machines we saw."""
PROFILE = constant_profile(noise=(0.9, 0.95, 0.98, 1.0, 1.02, 1.1, 1.3))
# the same with loads in two parts: into the host tier, and from there onto the device
TWO_PARTS = constant_profile(noise=(0.9, 0.95, 0.98, 1.0, 1.02, 1.1, 1.3), checkpoint_read=3.3, controlnet_read=0.7)
# 21 GiB for weights: three checkpoints, or one with a few ControlNets, so that every cache turns over
FACTS = ProfileFacts(device_memory_gib=25.0, activation_gib_per_sample=0.5)
NAMES = st.sampled_from(["a", "b", "c", "d"])


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    n = draw(st.integers(1, 60))
    # zero gaps and round service times: many events at one time, so that ties are decided again and again
    pace = draw(st.sampled_from([(0.0, 0.3, 2.0, 9.0), (0.0, 0.25, 0.5), (0.7,)]))
    gaps = draw(st.lists(st.sampled_from(pace), min_size=n, max_size=n))

    def column(values: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(values, min_size=n, max_size=n))

    return workload_of(
        np.cumsum(gaps).tolist(),
        base_model_id=column(draw(st.sampled_from([NAMES, st.just("a")]))),
        n_steps=column(st.sampled_from([1, 7, 30])),
        n_images=column(st.sampled_from([1, 1, 4])),
        controlnet_ids=column(draw(st.sampled_from([st.lists(NAMES, max_size=4).map(tuple), st.just(())]))),
        control_start=column(st.sampled_from([(), (), (0.4,)])),
        control_end=column(st.sampled_from([(), (), (0.5,), (1.0, 0.2)])),
        lora_ids=column(draw(st.sampled_from([st.lists(NAMES, max_size=3, unique=True).map(tuple), st.just(())]))),
        deadline_s=column(draw(st.sampled_from([st.just(np.nan), st.sampled_from([np.nan, 0.0, 5.0, 30.0])]))),
    )


@st.composite
def allocations(draw: st.DrawFn) -> Allocation:
    pools: list[Pool] = []
    for number in range(draw(st.integers(1, 3))):
        topology = draw(st.sampled_from(["diffusers", "colocated", "decoupled", "decoupled"]))
        checkpoints = draw(st.sampled_from([("*",), ("a", "b"), ("a", "*")]))
        hosted = draw(st.sampled_from([("*",), ("a", "b"), ()]))
        pools.append(
            base_pool(
                draw(st.integers(1, 5)), topology, f"base{number}", base_model_ids=checkpoints, controlnet_ids=hosted
            )
        )
    for number in range(draw(st.integers(0, 2))):
        hosted = draw(st.sampled_from([(), ("a", "b"), ("c",), ("d", "*")]))
        pools.append(controlnet_pool(draw(st.integers(1, 3)), *hosted, name=f"controlnet{number}"))
    policies = Policies(
        queue_limit=draw(st.sampled_from([None, 0, 2])),
        lora_cache_gib=draw(st.sampled_from([0.3, 64.0])),
        checkpoint_host_cache_gib=draw(st.sampled_from([7.0, 256.0])),
        controlnet_host_cache_gib=draw(st.sampled_from([3.0, 256.0])),
    )
    return Allocation(tuple(pools), policies=policies)


def both(
    workload: Workload,
    allocation: Allocation,
    services: dict[str, ServiceTable],
    sizes: Any,
    facts: ProfileFacts,
    **more: Any,
) -> tuple[SimulationResult, FastRun]:
    slow = simulate(workload, allocation, services, sizes, facts, **more)
    fast = simulate_fast(prepare(workload, list(services.values())), allocation, services, sizes, facts, **more)
    return slow, fast


def assert_same_story(slow: SimulationResult, fast: FastRun) -> None:
    frame = slow.requests
    outcome = fast.outcome
    states = outcome.states
    assert [ENDINGS[code] for code in states[:, a.ENDING]] == list(zip(frame["status"], frame["reason"], strict=True))
    names = [f"{pool.name}-{number}" for pool in fast.allocation.pools_of("base") for number in range(pool.n_replicas)]
    assert [names[replica] if replica >= 0 else "" for replica in states[:, a.REPLICA]] == frame["worker_id"].tolist()
    assert states[:, a.IS_SWITCH].tolist() == frame["is_switch"].tolist()
    columns = columns_of(fast)
    pairs = {
        "start_s": columns.start_s,
        "end_s": columns.end_s,
        "latency_s": columns.latency_s,
        "denoise_s": columns.denoise_s,
        "denoise_alone_s": columns.denoise_alone_s,
        "switch_s": outcome.times_s[:, a.SWITCH_S],
        "controlnet_load_s": outcome.times_s[:, a.CONTROLNET_LOAD_S],
    }
    if len(outcome.loras):
        pairs |= {"lora_wait_s": outcome.loras[:, a.LORA_WAIT_S], "n_lora_misses": outcome.loras[:, a.LORA_MISSES]}
    if len(outcome.controlnets):
        pairs["n_controlnet_misses"] = outcome.controlnets[:, a.CONTROLNET_MISSES]
    for name, values in pairs.items():
        np.testing.assert_allclose(values, frame[name].to_numpy(np.float64), rtol=RELATIVE, atol=0, err_msg=name)
    assert fast.horizon_s == pytest.approx(slow.horizon_s, rel=RELATIVE)


def assert_same_metrics(slow: SimulationResult, fast: FastRun, slo_s: float, warmup_s: float) -> None:
    if not fast.offered_until_s > warmup_s:
        return
    expected = summarise(slow, slo_s, warmup_s=warmup_s).numbers()
    got = summarise_fast(fast, slo_s, warmup_s=warmup_s).numbers()
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        # sums over the requests may be taken in another order: a thousand roundings of 1e-16, and a share may cancel to 0
        assert got[name] == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), name


@settings(max_examples=150, deadline=None, derandomize=True)
@given(workloads(), allocations(), st.sampled_from([0.0, 3.0]), st.sampled_from([PROFILE, TWO_PARTS]))
def test_random_scenarios_have_the_same_events_and_metrics(
    workload: Workload, allocation: Allocation, warmup_s: float, profile: LatencyProfile
) -> None:
    services = {
        pool.name: build_service(workload, pool.topology, profile, SIZES) for pool in allocation.pools_of("base")
    }
    slow, fast = both(workload, allocation, services, SIZES, FACTS)
    assert_same_story(slow, fast)
    assert_same_metrics(slow, fast, 12.0, warmup_s)


def busy_service(n: int = 1500) -> Workload:
    """Requests of several sizes that keep shared workers full for a long time: rates change with most events."""
    rng = np.random.default_rng(11)
    names = [f"c{k}" for k in range(6)]
    return workload_of(
        np.cumsum(rng.exponential(0.45, n)).tolist(),
        base_model_id=[f"m{k}" for k in rng.zipf(1.6, n) % 7],
        n_steps=[int(k) for k in rng.choice([20, 30, 50], n)],
        n_images=[int(k) for k in rng.choice([1, 2, 4], n)],
        controlnet_ids=[tuple(str(k) for k in rng.choice(names, rng.integers(0, 4), replace=False)) for _ in range(n)],
        lora_ids=[tuple(f"l{k}" for k in rng.zipf(1.4, rng.integers(0, 3)) % 300) for _ in range(n)],
        deadline_s=[float(k) for k in rng.choice([np.nan, 40.0], n)],
    )


def test_a_busy_mixed_fleet_has_the_same_events_and_metrics() -> None:
    workload = busy_service()
    pools = (
        base_pool(12, "decoupled"),
        base_pool(4, "colocated", "other"),
        base_pool(2, "diffusers", "stock", base_model_ids=("m1",)),
        controlnet_pool(2, "c0", "c1", name="popular"),
        controlnet_pool(3),
    )
    services = {p.name: build_service(workload, p.topology, PROFILE, SIZES) for p in pools if p.role == "base"}
    slow, fast = both(workload, Allocation(pools), services, SIZES, FACTS)
    assert fast.workload.n_controlnets.sum() > 1000
    assert (slow.requests["denoise_s"] > 1.01 * slow.requests["denoise_alone_s"]).sum() > 300  # sharing did bind
    assert_same_story(slow, fast)
    assert_same_metrics(slow, fast, 20.0, 60.0)


def test_requests_after_the_cut_are_left_out_in_both() -> None:
    workload = busy_service(300)
    pools = (base_pool(5, "decoupled"), controlnet_pool(2))
    services = {"base": build_service(workload, "decoupled", PROFILE, SIZES)}
    for until_s in (0.0, 40.0, 1e9):
        slow, fast = both(workload, Allocation(pools), services, SIZES, FACTS, until_s=until_s)
        assert fast.n_requests == len(slow.requests)
        assert_same_story(slow, fast)


@pytest.mark.parametrize("topology", ["diffusers", "diffusers_tuned", "colocated", "decoupled"])
def test_a_shipped_scenario_has_the_same_events_and_metrics(topology: Any) -> None:
    scenario, folder = load_scenario("sample:small")
    inputs = load_inputs(scenario, folder)
    workload = build_traffic(scenario, folder).workload
    service = service_table(scenario, inputs, workload, topology, draw=None, noise_seed=3)
    for shape in shapes_of(scenario, topology, workload, service, inputs.sizes, inputs.facts, inputs.gpu_kind):
        allocation = shape.allocation((7, *(2 for _ in shape.controlnet_pools)))
        slow, fast = both(workload, allocation, {"base": service}, inputs.sizes, inputs.facts)
        assert_same_story(slow, fast)
        assert_same_metrics(slow, fast, scenario.slo.latency_s, 300.0)


def test_an_empty_workload_gives_an_empty_run() -> None:
    workload = dataclasses.replace(busy_service(3).subset(np.zeros(3, dtype=np.bool_)), duration_s=10.0)
    services = {"base": build_service(workload, "colocated", PROFILE, SIZES)}
    run = simulate_fast(prepare(workload, list(services.values())), Allocation((base_pool(2),)), services, SIZES, FACTS)
    assert (run.n_requests, run.horizon_s, run.n_events) == (0, 10.0, 0)
