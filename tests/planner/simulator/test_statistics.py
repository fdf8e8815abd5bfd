"""What is read out of the logs."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from engine.allocation import Policies
from planner.consistency import BrokenRunError, check_run
from planner.service import ServiceTable, build_service
from planner.statistics import intervals, is_saturated, littles_law_gap, summarise, t_interval, warmup_cut_s
from tests.simulation_builders import SIZES, base_pool, constant_profile, controlnet_pool, run, run_queue, workload_of


def test_attainment_counts_rejected_requests_against_the_service() -> None:
    workload = workload_of([0.0, 1.0, 2.0, 3.0], duration_s=40.0)
    service = ServiceTable.from_service_s(workload, np.full(4, 10.0))
    metrics = summarise(run(workload, [base_pool(1)], service, policies=Policies(queue_limit=1)), 15.0)
    assert (metrics.n_offered, metrics.n_done, metrics.n_rejected) == (4, 2, 2)
    assert metrics.slo_attainment_ratio == 0.25  # latencies are 10 and 19 s
    assert metrics.offered_per_s == 0.1
    assert metrics.goodput_per_s == 1 / 40
    assert metrics.busy_ratio == {"base": 0.5}


def test_requests_with_and_without_add_ons_are_reported_apart() -> None:
    workload = workload_of([0.0, 100.0, 200.0, 300.0], lora_ids=[("x",), (), (), ("x",)])
    service = ServiceTable.from_service_s(workload, np.array([4.0, 1.0, 3.0, 8.0]))
    metrics = summarise(run(workload, [base_pool(1)], service), 10.0)
    assert (metrics.latency_mean_s, metrics.plain_latency_mean_s, metrics.add_on_latency_mean_s) == (4.0, 2.0, 6.0)
    assert metrics.latency_p50_s == 3.5
    assert metrics.lora_warm_hit_ratio == 0.5


def test_the_warm_up_is_left_out_by_arrival() -> None:
    result = run_queue([0.0, 10.0, 20.0], [5.0, 1.0, 3.0], 1)
    metrics = summarise(result, 10.0, warmup_s=10.0)
    assert metrics.n_offered == 2
    assert metrics.latency_mean_s == 2.0
    with pytest.raises(ValueError, match="must be greater"):
        summarise(result, 10.0, warmup_s=20.0)


def test_a_pool_is_busy_for_its_workers_allocated_time() -> None:
    workload = workload_of([0.0] * 4, n_steps=10, controlnet_ids=("canny",), duration_s=100.0)
    service = build_service(workload, "decoupled", constant_profile(), SIZES)
    pools = [base_pool(4, "decoupled", base_model_ids=("default",)), controlnet_pool(2)]
    metrics = summarise(run(workload, pools, service), 10.0)
    assert metrics.busy_ratio["controlnet"] == pytest.approx(4 * 10 * 0.05 / (2 * 100.0))
    assert metrics.loading_ratio["controlnet"] == pytest.approx(
        2 * 9.0 / (2 * 100.0)
    )  # a fetch and load on each worker


def test_mser_finds_the_end_of_a_transient() -> None:
    rng = np.random.default_rng(5)
    service_s = np.where(np.arange(1000) < 200, 6.0, 1.0) + rng.uniform(0, 0.5, 1000)
    result = run_queue(10.0 * np.arange(1000), service_s, 1)
    # batches of five: the cut lies at the change, give or take one batch
    assert abs(warmup_cut_s(result.requests) - 2000.0) <= 50.0


def test_a_steady_run_is_not_cut_short_and_a_tiny_one_not_at_all() -> None:
    steady = run_queue(10.0 * np.arange(1000), np.ones(1000), 1)
    assert warmup_cut_s(steady.requests) == 0.0
    assert warmup_cut_s(run_queue([0.0, 1.0], [1.0, 1.0], 1).requests) == 0.0


@pytest.mark.parametrize(("load", "expected"), [(0.5, False), (0.9, False), (1.1, True), (2.0, True)])
def test_saturation_is_a_load_above_one(load: float, expected: bool) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        arrival_s = np.cumsum(rng.exponential(1.0 / (4 * load), 8000))
        assert run_queue(arrival_s, rng.exponential(1.0, 8000), 4).saturated is expected


def test_saturation_needs_enough_requests_to_tell() -> None:
    growing = np.arange(50.0)
    assert not is_saturated(growing, growing, np.ones(50))


def test_the_t_interval_is_students() -> None:
    values = [1.0, 2.0, 4.0, 7.0]
    interval = t_interval(values, 0.9)
    expected = stats.t.interval(0.9, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx(expected, rel=1e-12)
    assert math.isnan(t_interval([3.0]).low)
    assert t_interval([3.0, math.nan]).n == 1
    with pytest.raises(ValueError, match="at least one"):
        t_interval([math.nan])


def test_intervals_cover_every_figure_of_the_runs() -> None:
    runs = [summarise(run_queue([0.0, 1.0], [1.0, need], 1), 5.0) for need in (1.0, 2.0, 3.0)]
    found = intervals(runs)
    assert found["latency_mean_s"].mean == pytest.approx(1.5)
    assert found["busy_ratio.base"].n == 3
    assert "add_on_latency_mean_s" not in found  # no run has one
    json.dumps([item.to_plain() for item in found.values()], allow_nan=False)
    json.dumps(runs[0].to_plain(), allow_nan=False)


def test_a_broken_log_is_noticed() -> None:
    workload = workload_of([0.0, 1.0, 2.0], base_model_id="m")
    result = run(workload, [base_pool(1)], ServiceTable.from_service_s(workload, np.full(3, 2.0)))
    check_run(result, workload)
    assert littles_law_gap(result) < 1e-12

    def with_column(name: str, values: list[object]):  # type: ignore[no-untyped-def]
        return replace(result, requests=result.requests.assign(**{name: values}))

    for name, values, sentence in (
        ("start_s", [0.0, 1.5, 4.0], "still busy"),
        ("latency_s", [2.0, 3.0, 9.0], "latency other than"),
        ("request_id", ["r0", "r0", "r2"], "each once"),
        ("status", ["done", "gone", "done"], "not known"),
        ("decode_s", [0.0, 1.0, 0.0], "do not fill"),
    ):
        with pytest.raises(BrokenRunError, match=sentence):
            check_run(with_column(name, list(values)), workload)
    with pytest.raises(BrokenRunError, match="more work"):
        check_run(replace(result, workers=result.workers.assign(busy_s=1e6)), workload)
