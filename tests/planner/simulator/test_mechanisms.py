"""Each mechanism of the simulator in a case small enough to add up by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engine.allocation import Allocation, Policies
from planner.service import ServiceTable, build_service
from planner.simulator import ProfileFacts, simulate
from tests.simulation_builders import (
    CONSTANT_S,
    FACTS,
    SIZES,
    base_pool,
    constant_profile,
    controlnet_pool,
    run,
    run_queue,
    workload_of,
)
from traces.problems import InputError
from traces.records import REQUEST_RECORD_COLUMNS, WORKER_INTERVAL_COLUMNS, column_names

S = CONSTANT_S
PLAIN_S = 10 * S["unet_step"] + 1.0  # ten steps, text, decode


def simulated(arrival_s: list[float], pools: list[Any], policies: Policies | None = None, **columns: Any):  # type: ignore[no-untyped-def]
    workload = workload_of(arrival_s, **{"n_steps": 10, **columns})
    bases = [pool for pool in pools if pool.role == "base"]
    profile = constant_profile()
    services = {pool.name: build_service(workload, pool.topology, profile, SIZES) for pool in bases}
    return simulate(workload, Allocation(tuple(pools), policies=policies or Policies()), services, SIZES, FACTS)


def test_the_logs_have_the_recorded_columns() -> None:
    result = simulated([0.0], [base_pool(2)])
    assert list(result.requests) == column_names(REQUEST_RECORD_COLUMNS)
    assert list(result.workers) == column_names(WORKER_INTERVAL_COLUMNS)
    assert result.requests["worker_id"].tolist() == ["base-0"]
    idle = result.workers[result.workers["worker_id"] == "base-1"]
    assert idle["state"].tolist() == ["idle"]


def test_a_checkpoint_is_fetched_once_loaded_when_evicted_and_free_while_resident() -> None:
    # 80 GiB less 1 GiB of activations hold 13 checkpoints of 6 GiB: the 14th evicts the first
    names = [f"m{k}" for k in range(14)] + ["m13", "m0"]
    frame = simulated([100.0 * k for k in range(16)], [base_pool(1)], base_model_id=names).requests
    cold_s, warm_s = S["model_fetch"] + S["checkpoint_load"], S["checkpoint_load"]
    assert frame["switch_s"].tolist() == [cold_s] * 14 + [0.0, warm_s]
    assert frame["is_switch"].tolist() == [1] * 14 + [0, 1]


def test_a_pool_that_names_its_checkpoint_starts_with_it() -> None:
    frame = simulated([0.0], [base_pool(1, base_model_ids=("m",))], base_model_id="m").requests
    assert frame["latency_s"].tolist() == [PLAIN_S]


def test_an_idle_replica_that_holds_the_checkpoint_is_preferred() -> None:
    pools = [base_pool(1, base_model_ids=("*",), name="any"), base_pool(1, base_model_ids=("m",), name="warm")]
    frame = simulated([0.0, 1.0], pools, base_model_id="m").requests
    assert frame["worker_id"].tolist() == ["warm-0", "any-0"]


def test_only_pools_that_may_hold_what_is_asked_for_serve() -> None:
    pools = [
        base_pool(1, base_model_ids=("a",), controlnet_ids=(), name="a"),
        base_pool(1, base_model_ids=("b",), controlnet_ids=("canny",), name="b"),
    ]
    frame = simulated(
        [0.0, 0.0, 0.0, 0.0], pools, base_model_id=["b", "a", "a", "c"], controlnet_ids=[("canny",), (), ("canny",), ()]
    ).requests
    assert frame["worker_id"].tolist() == ["b-0", "a-0", "", ""]
    assert frame["status"].tolist() == ["done", "done", "rejected", "rejected"]
    assert frame["reason"].tolist()[2] == "no pool can serve it"


def test_in_process_controlnets_are_loaded_once_and_stay() -> None:
    frame = simulated([0.0, 100.0], [base_pool(1)], controlnet_ids=("canny", "depth")).requests
    load_s = 2 * (S["model_fetch"] + S["controlnet_load"])
    assert frame["controlnet_load_s"].tolist() == [load_s, 0.0]
    assert frame["n_controlnet_misses"].tolist() == [2, 0]
    assert frame["denoise_s"].tolist() == pytest.approx([10 * (S["unet_step"] + 2 * S["controlnet_step"])] * 2)


def test_a_lora_is_fetched_into_host_memory_and_evicted_by_bytes() -> None:
    # two LoRAs of 0.25 GiB fit into 0.5 GiB; x is the least recently used when z comes
    names = [("x",), ("y",), ("x",), ("y",), ("z",), ("x",)]
    frame = simulated(
        [50.0 * k for k in range(6)], [base_pool(1)], Policies(lora_cache_gib=0.5), lora_ids=names
    ).requests
    patch_s = S["lora_attach"] + S["lora_detach"]
    assert frame["n_lora_misses"].tolist() == [1, 1, 0, 0, 1, 1]
    # our engine fetches a file and then checks and pins it: lora_fetch.remote and lora_fetch.local, both S["lora_fetch"] here
    assert frame["lora_wait_s"].tolist() == [patch_s + 2 * S["lora_fetch"] * miss for miss in (1, 1, 0, 0, 1, 1)]


def test_decoupled_hides_a_fetch_behind_the_steps_before_the_patch() -> None:
    pools = [base_pool(1, "decoupled"), controlnet_pool(1)]
    frame = simulated([0.0], pools, lora_ids=("x",), n_steps=40).requests
    hidden_s = 10 * S["unet_step"]  # the patch lands before step 10
    exposed_s = 2 * S["lora_fetch"] - hidden_s  # from the remote store, then checked and pinned
    assert frame["lora_wait_s"].tolist() == [pytest.approx(exposed_s + S["lora_attach"] + S["lora_detach"])]


def test_controlnet_workers_run_beside_the_encoder() -> None:
    pools = [base_pool(1, "decoupled", base_model_ids=("default",)), controlnet_pool(2, "canny", "depth")]
    frame = simulated([0.0], pools, controlnet_ids=("canny", "depth")).requests
    # two workers, whose residuals share the way into the base GPU
    step_s = S["controlnet_step"] + 2 * S["residual_transfer"] + S["decoder_step"] + S["remote_join"]
    assert frame["denoise_s"].tolist() == [pytest.approx(10 * step_s, rel=1e-9)]
    assert frame["latency_s"].tolist() == [pytest.approx(10 * step_s + 1.0, rel=1e-9)]


def test_two_controlnets_on_one_worker_follow_one_another() -> None:
    pools = [base_pool(1, "decoupled", base_model_ids=("default",)), controlnet_pool(1, "canny", "depth")]
    result = simulated([0.0], pools, controlnet_ids=("canny", "depth"))
    step_s = 2 * S["controlnet_step"] + S["residual_transfer"] + S["decoder_step"] + S["remote_join"]
    assert result.requests["denoise_s"].tolist() == [pytest.approx(10 * step_s, rel=1e-9)]
    worker = result.workers[result.workers["role"] == "controlnet"]
    assert worker["busy_s"].tolist() == [pytest.approx(10 * 2 * S["controlnet_step"])]


def test_a_controlnet_active_for_half_the_steps_costs_half() -> None:
    pools = [base_pool(1, "decoupled", base_model_ids=("default",)), controlnet_pool(1, "canny")]
    frame = simulated([0.0], pools, controlnet_ids=("canny",), control_end=(0.5,)).requests
    joined_s = S["controlnet_step"] + S["residual_transfer"] + S["decoder_step"] + S["remote_join"]
    assert frame["denoise_s"].tolist() == [pytest.approx(5 * joined_s + 5 * S["unet_step"], rel=1e-9)]


def test_requests_that_share_a_full_worker_slow_one_another_and_say_so() -> None:
    # 4 clients · 0.05 s of forwards a step in turns: 0.2 s a step instead of 0.122 s alone
    pools = [base_pool(4, "decoupled", base_model_ids=("default",)), controlnet_pool(1, "canny")]
    frame = simulated([0.0] * 4, pools, controlnet_ids=("canny",)).requests
    alone_s = S["controlnet_step"] + S["residual_transfer"] + S["decoder_step"] + S["remote_join"]
    assert frame["denoise_s"].tolist() == pytest.approx([10 * 4 * S["controlnet_step"]] * 4)
    assert frame["denoise_alone_s"].tolist() == pytest.approx([10 * alone_s] * 4)


def test_a_load_onto_a_controlnet_worker_hides_behind_text_encoding() -> None:
    pools = [base_pool(1, "decoupled", base_model_ids=("default",)), controlnet_pool(1)]
    result = simulated([0.0, 50.0], pools, controlnet_ids=("canny",))
    exposed_s = S["model_fetch"] + S["controlnet_load"] - S["text_encode"]
    assert result.requests["controlnet_load_s"].tolist() == [exposed_s, 0.0]
    loader = result.workers[result.workers["role"] == "loader"]
    assert loader[["state", "start_s", "end_s", "n_gpus"]].to_numpy().tolist() == [["loading", 0.0, 9.0, 0]]


def test_a_controlnet_in_use_is_not_evicted() -> None:
    # room for one ControlNet of 2 GiB: the second is streamed while the first is in use, and not kept
    facts = ProfileFacts(device_memory_gib=7.5, activation_gib_per_sample=0.5)
    workload = workload_of([0.0, 10.0, 60.0], n_steps=200, controlnet_ids=[("a",), ("b",), ("a",)])
    service = build_service(workload, "decoupled", constant_profile(), SIZES)
    small = replace(SIZES, controlnet_bytes=int(3.5 * 2**30))
    pools = (base_pool(2, "decoupled", base_model_ids=("default",)), controlnet_pool(1))
    result = simulate(workload, Allocation(pools), {"base": service}, small, facts)
    assert result.requests["n_controlnet_misses"].tolist() == [1, 1, 0]


def test_the_queue_limit_rejects_and_the_deadline_expires() -> None:
    workload = workload_of([0.0, 1.0, 2.0, 3.0], deadline_s=[np.nan, 5.0, np.nan, np.nan])
    service = ServiceTable.from_service_s(workload, np.full(4, 10.0))
    frame = run(workload, [base_pool(1)], service, policies=Policies(queue_limit=2)).requests
    assert frame["status"].tolist() == ["done", "expired", "done", "rejected"]
    assert frame["end_s"].tolist() == [10.0, 6.0, 20.0, 3.0]
    assert frame["reason"].tolist() == ["", "deadline passed in the queue", "", "queue is full"]


def test_an_expired_request_gives_its_place_in_the_queue_back() -> None:
    workload = workload_of([0.0, 1.0, 4.0, 5.0], deadline_s=[np.nan, 2.0, np.nan, np.nan])
    service = ServiceTable.from_service_s(workload, np.full(4, 10.0))
    frame = run(workload, [base_pool(1)], service, policies=Policies(queue_limit=1)).requests
    assert frame["status"].tolist() == ["done", "expired", "done", "rejected"]


def test_requests_after_the_cut_are_left_out_and_those_before_run_to_their_end() -> None:
    result = run_queue([0.0, 1.0, 2.0], [5.0, 5.0, 5.0], 1, until_s=2.0)
    assert result.requests["end_s"].tolist() == [5.0, 10.0]
    assert (result.offered_until_s, result.horizon_s) == (2.0, 10.0)


def test_an_empty_workload_gives_empty_logs() -> None:
    result = run_queue([], [], 2)
    assert len(result.requests) == 0
    assert result.workers["state"].tolist() == ["idle", "idle"]
    assert not result.saturated


def test_what_does_not_fit_a_device_is_refused_with_the_numbers() -> None:
    workload = workload_of([0.0], controlnet_ids=("canny", "depth"))
    service = build_service(workload, "colocated", constant_profile(), SIZES)
    with pytest.raises(InputError, match=r"pool 'base'.*10\.0 GiB.*at most 8\.0 GiB"):
        run(workload, [base_pool(1)], service, facts=ProfileFacts(9.0, 0.5))


def test_service_tables_that_do_not_match_are_refused_together() -> None:
    workload = workload_of([0.0, 1.0])
    table = ServiceTable.from_service_s(workload.subset(np.array([True, False])), np.ones(1))
    pools = (base_pool(1, name="a"), base_pool(1, name="b"))
    with pytest.raises(InputError) as caught:
        simulate(workload, Allocation(pools), {"a": table}, SIZES, FACTS)
    assert len(caught.value.problems) == 2
