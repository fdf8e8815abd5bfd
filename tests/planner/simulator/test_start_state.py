"""What workers hold before the first arrival: it saves loads, and nothing else changes."""

from __future__ import annotations

import pandas as pd
import pytest

from engine.allocation import Policies
from planner.service import build_service
from planner.simulator import Held, SimulationResult, StartState
from tests.simulation_builders import GIB, SIZES, base_pool, constant_profile, controlnet_pool, run, workload_of

LORA_GIB = SIZES.lora_bytes / GIB


def simulated(start: StartState | None, topology: str = "colocated", **policies: float) -> SimulationResult:
    workload = workload_of(
        [0.0, 100.0, 200.0],
        n_steps=10,
        base_model_id=["m", "n", "m"],
        controlnet_ids=[("c",), (), ("c",)],
        lora_ids=[("a",), ("b",), ("a",)],
    )
    pools = [base_pool(1, topology)]
    if topology == "decoupled":
        pools.append(controlnet_pool(1))
    service = build_service(workload, topology, constant_profile(), SIZES, lora_patch_by_step=0)  # type: ignore[arg-type]
    return run(workload, pools, service, policies=Policies(lora_patch_by_step=0, **policies), start=start)  # type: ignore[arg-type]


def counts(result: SimulationResult) -> dict[str, list[int]]:
    return {name: result.requests[name].tolist() for name in ("n_lora_misses", "n_controlnet_misses", "is_switch")}


def test_without_a_state_everything_is_loaded_once() -> None:
    assert counts(simulated(None)) == {
        "n_lora_misses": [1, 1, 0],
        "n_controlnet_misses": [1, 0, 0],
        "is_switch": [1, 1, 0],
    }


def test_what_is_there_is_not_loaded() -> None:
    start = StartState({"base-0": Held(("m",), ("c",))}, ("a",))
    result = simulated(start)
    assert counts(result) == {"n_lora_misses": [0, 1, 0], "n_controlnet_misses": [0, 0, 0], "is_switch": [0, 1, 0]}
    first = result.requests.iloc[0]
    assert (first["switch_s"], first["controlnet_load_s"]) == (0.0, 0.0)
    assert first["lora_wait_s"] == pytest.approx(0.125 + 0.0625)  # attached and detached, not fetched


@pytest.mark.parametrize("policies", [{}, {"replicas_per_host": 2}], ids=["a cache of each", "one tier"])
def test_a_tier_without_room_for_all_keeps_what_was_used_last(policies: dict[str, float]) -> None:
    per_host = policies.get("replicas_per_host", 1)
    start = StartState({}, ("a", "b"))
    result = simulated(start, lora_cache_gib=LORA_GIB / per_host, **policies)
    assert counts(result)["n_lora_misses"] == [1, 1, 1]  # b was used last and stayed; a drives it out, and so on
    result = simulated(StartState({}, ("b", "a")), lora_cache_gib=LORA_GIB / per_host, **policies)
    assert counts(result)["n_lora_misses"] == [0, 1, 1]


def test_a_controlnet_workers_networks_are_its_own() -> None:
    here = simulated(StartState({"controlnet-0": Held((), ("c",))}), "decoupled")
    assert counts(here)["n_controlnet_misses"] == [0, 0, 0]
    elsewhere = simulated(StartState({"base-0": Held((), ("c",))}), "decoupled")
    assert counts(elsewhere)["n_controlnet_misses"] == [1, 0, 0]


def test_ids_that_nobody_uses_and_an_empty_state_change_nothing() -> None:
    plain = simulated(None)
    for start in (StartState(), StartState({"base-0": Held(("x",), ("y",)), "other-7": Held(("m",))}, ("z",))):
        result = simulated(start)
        pd.testing.assert_frame_equal(result.requests, plain.requests)
        pd.testing.assert_frame_equal(result.workers, plain.workers)
