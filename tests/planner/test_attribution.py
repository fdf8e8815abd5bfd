"""Every nanosecond and micro-dollar of a run belongs to exactly one stage, add-on, checkpoint and tenant."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.allocation import Allocation, Policies
from planner.attribution import (
    STAGES,
    Attribution,
    Weights,
    apportion,
    attribute,
    by_add_on,
    by_checkpoint,
    by_stage,
    by_tenant,
)
from planner.service import build_service
from planner.simulator import simulate
from planner.workload import Workload
from tests.simulation_builders import FACTS, SIZES, base_pool, constant_profile, controlnet_pool, workload_of

COST = 1_234_567_891
PROFILE = constant_profile(noise=(0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.3))


def attributed(workload: Workload, allocation: Allocation, topology: Any) -> tuple[Attribution, Any]:
    service = build_service(workload, topology, PROFILE, SIZES, forward_batch_max=allocation.policies.forward_batch_max)
    result = simulate(workload, allocation, {"base": service}, SIZES, FACTS)
    weights = Weights(
        plain_s=workload.n_steps * 0.1 * service.noise_ratio,
        controlnet_s=np.maximum(service.denoise_alone_s - workload.n_steps * 0.1 * service.noise_ratio, 0.0),
        lora_s=np.zeros(len(workload)),
        remote_work_s=service.controlnet_work_s,
        lora_weight=np.ones(len(workload.lora_names)),
        counts_windows=True,
    )
    allocated_s = result.horizon_s * sum(pool.n_replicas for pool in allocation.pools)
    return attribute(workload, result.requests, weights, allocated_s), result


requests = st.lists(
    st.tuples(
        st.floats(0.0, 20.0), st.sampled_from(["a", "b"]), st.lists(st.sampled_from(["depth", "canny"]), max_size=2),
        st.lists(st.sampled_from(["x", "y", "z"]), max_size=3), st.sampled_from(["", "t1", "t2"]), st.integers(1, 40),
    ),
    min_size=1, max_size=25,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(asked=requests, apart=st.booleans(), batch=st.booleans(), limit=st.sampled_from([None, 1]))
def test_every_division_sums_to_the_same_total_exactly(asked: Any, apart: bool, batch: bool, limit: int | None) -> None:
    asked = sorted(asked, key=lambda row: row[0])
    arrival, checkpoint, controlnets, loras, tenant, steps = map(list, zip(*asked, strict=True))
    workload = workload_of(
        arrival, base_model_id=checkpoint, controlnet_ids=[tuple(x) for x in controlnets], lora_ids=[tuple(x) for x in loras],
        controlnet_scales=[(1.0,) * len(x) for x in controlnets], tenant_id=tenant, n_steps=steps,
    )  # fmt: skip
    topology = "decoupled" if apart else "colocated"
    pools = (base_pool(2, topology), controlnet_pool(1)) if apart else (base_pool(2, topology),)
    policies = Policies(queue_limit=limit, forward_batch_max=8 if batch else None)
    found, result = attributed(workload, Allocation(pools, policies=policies), topology)
    done = result.requests[result.requests["status"] == "done"]
    latency_ns = int(np.rint(done["latency_s"].to_numpy(dtype=float) * 1e9).astype(np.int64).sum())
    assert found.idle_ns >= -len(workload) * 4  # each of a request's few times is rounded to a nanosecond
    for table in (by_stage, by_add_on, by_checkpoint, by_tenant):
        frame = table(found, COST)
        assert int(frame["latency_ns"].sum()) == latency_ns, table
        assert int(frame["gpu_ns"].sum()) == found.allocated_ns, table
        assert int(frame["cost_micro_usd"].sum()) == COST, table


def test_a_stage_has_the_time_that_the_records_say() -> None:
    workload = workload_of([0.0, 50.0], base_model_id="m", controlnet_ids=[("depth",), ()], controlnet_scales=[(1.0,), ()], n_steps=10)  # fmt: skip
    found, result = attributed(workload, Allocation((base_pool(1, base_model_ids=("m",)),)), "colocated")
    noise = build_service(workload, "colocated", PROFILE, SIZES).noise_ratio
    row = dict(zip(STAGES, found.latency_ns[0] / 1e9, strict=True))
    # 10 steps of 0.1 s, and 10 forwards of a ControlNet of 0.05 s, times the request's noise
    assert row["denoise_plain"] == pytest.approx(1.0 * noise[0], abs=2e-9)
    assert row["denoise_controlnet"] == pytest.approx(0.5 * noise[0], abs=2e-9)
    assert row["controlnet_load"] == pytest.approx(float(result.requests["controlnet_load_s"][0]), abs=2e-9)
    assert found.controlnet_latency_ns.tolist() == [round((row["denoise_controlnet"] + row["controlnet_load"]) * 1e9)]
    assert found.latency_ns[1, STAGES.index("denoise_controlnet")] == 0


def test_requests_that_share_a_forward_share_its_gpu_time() -> None:
    workload = workload_of([0.0, 0.0, 0.0], base_model_id="m", n_steps=10)
    pool = base_pool(1, base_model_ids=("m",))
    found, result = attributed(workload, Allocation((pool,), policies=Policies(forward_batch_max=8)), "colocated")
    busy_s = float(result.workers["busy_s"].sum())
    assert result.requests["start_s"].duplicated().any()  # two did run together
    assert found.gpu_ns.sum() / 1e9 == pytest.approx(busy_s, abs=1e-8)


def test_whole_parts_sum_to_the_whole_and_follow_the_weights() -> None:
    parts = apportion(10, [1.0, 1.0, 1.0])
    assert parts.sum() == 10
    assert sorted(parts.tolist()) == [3, 3, 4]
    assert apportion(7, [0.0, 2.0, 0.0]).tolist() == [0, 7, 0]
    with pytest.raises(ValueError, match="nothing to divide"):
        apportion(1, [0.0])
    with pytest.raises(ValueError, match="finite and 0 or more"):
        apportion(1, [-1.0, 2.0])
