"""Checkpoints and ControlNets in two steps: out of the store into a worker's host memory, and from there onto its device."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.allocation import Autoscale, Policies
from planner.service import build_service
from planner.simulator import ProfileFacts, SimulationResult
from tests.simulation_builders import SIZES, base_pool, constant_profile, controlnet_pool, run, workload_of

STORE_S, READ_S, LOAD_S = 8.0, 3.0, 0.25
CONTROLNET_READ_S, CONTROLNET_LOAD_S = 0.75, 0.125
PROFILE = constant_profile(
    checkpoint_read=READ_S, checkpoint_load=LOAD_S, controlnet_read=CONTROLNET_READ_S, controlnet_load=CONTROLNET_LOAD_S
)
# 6.5 GiB for weights: one checkpoint, or up to three ControlNets
SMALL = ProfileFacts(device_memory_gib=7.5, activation_gib_per_sample=0.5)


def switches(checkpoints: list[str], host_gib: float) -> list[float]:
    workload = workload_of([100.0 * k for k in range(len(checkpoints))], n_steps=10, base_model_id=checkpoints)
    service = build_service(workload, "colocated", PROFILE, SIZES)
    policies = Policies(checkpoint_host_cache_gib=host_gib)
    found: list[float] = (
        run(workload, [base_pool(1)], service, facts=SMALL, policies=policies).requests["switch_s"].tolist()
    )
    return found


def test_the_first_use_comes_from_the_store_and_later_ones_from_the_host() -> None:
    first = STORE_S + READ_S + LOAD_S
    assert switches(["m", "n", "m", "m", "n"], host_gib=256.0) == [first, first, LOAD_S, 0.0, LOAD_S]


@pytest.mark.parametrize("host_gib", [0.0, 5.9, 6.0], ids=["none", "smaller than one", "one"])
def test_a_tier_that_does_not_hold_it_reads_it_again(host_gib: float) -> None:
    first = STORE_S + READ_S + LOAD_S
    assert switches(["m", "n", "m"], host_gib) == [first, first, first]


def controlnet_loads(topology: str, host_gib: float) -> SimulationResult:
    nets = ["a", "b", "c", "d", "a"]
    workload = workload_of(
        [100.0 * k for k in range(len(nets))], n_steps=10, base_model_id="m", controlnet_ids=[(net,) for net in nets]
    )
    service = build_service(workload, topology, PROFILE, SIZES)  # type: ignore[arg-type]
    pools = [base_pool(1, topology, base_model_ids=("m",)), *([controlnet_pool(1)] if topology == "decoupled" else [])]
    # in process: 6 GiB of a checkpoint and room for one ControlNet; on a worker of its own room for three
    facts = replace(SMALL, device_memory_gib=9.5) if topology == "colocated" else SMALL
    return run(workload, pools, service, facts=facts, policies=Policies(controlnet_host_cache_gib=host_gib))


@pytest.mark.parametrize("topology", ["colocated", "decoupled"])
def test_a_controlnet_that_was_evicted_comes_back_from_the_host(topology: str) -> None:
    text_s = 0.5  # a ControlNet worker loads meanwhile
    hidden_s = text_s if topology == "decoupled" else 0.0
    fresh = STORE_S + CONTROLNET_READ_S + CONTROLNET_LOAD_S
    kept = controlnet_loads(topology, 256.0).requests["controlnet_load_s"].tolist()
    assert kept == pytest.approx([fresh - hidden_s] * 4 + [max(0.0, CONTROLNET_LOAD_S - hidden_s)])
    without = controlnet_loads(topology, 0.0).requests["controlnet_load_s"].tolist()
    assert without == pytest.approx([fresh - hidden_s] * 5)


def test_a_new_replica_reads_its_checkpoint_and_its_host_tier_holds_no_more_than_that() -> None:
    """Two checkpoints named, room for one on the device: the second is fetched when it is asked for."""
    settings = Autoscale(2, "keda", target=1.0, start_s=60.0)
    workload = workload_of([0.0, 0.0, 110.0, 110.0], n_steps=1000, base_model_id=["m", "m", "n", "n"])  # 101 s each
    service = build_service(workload, "colocated", PROFILE, SIZES)
    pool = base_pool(1, base_model_ids=("m", "n"), autoscale=settings)
    result = run(workload, [pool], service, facts=SMALL)
    loading = result.workers[(result.workers["worker_id"] == "base-1") & (result.workers["state"] == "loading")].iloc[0]
    assert loading["end_s"] - loading["start_s"] == pytest.approx(60.0 + STORE_S + READ_S + LOAD_S)
    by_worker = result.requests[result.requests["base_model_id"] == "n"].set_index("worker_id")["switch_s"].to_dict()
    # the fleet that was there from the start has its models in host memory
    assert by_worker == {"base-0": LOAD_S, "base-1": STORE_S + READ_S + LOAD_S}
