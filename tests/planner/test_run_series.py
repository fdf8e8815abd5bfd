"""A run over time: slots lose nothing of what the records say, whatever the window; a request's stages sum to its latency."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.run_series import life_of, run_series, slowest, worker_loads
from traces.reader import read_table
from traces.records import REQUEST_RECORD_COLUMNS, WORKER_INTERVAL_COLUMNS

PROMISE_S = 12.0


@pytest.fixture(scope="module")
def tables(tiny_plan) -> tuple[pd.DataFrame, pd.DataFrame]:
    return (
        read_table(tiny_plan.out / "requests.parquet", REQUEST_RECORD_COLUMNS),
        read_table(tiny_plan.out / "workers.parquet", WORKER_INTERVAL_COLUMNS),
    )


@pytest.mark.parametrize("n_slots", [1, 7, 120])
def test_slots_keep_every_request_every_second_of_waiting_and_every_second_of_work(
    tables: tuple[pd.DataFrame, pd.DataFrame], n_slots: int
) -> None:
    requests, workers = tables
    series = run_series(requests, workers, PROMISE_S, n_slots=n_slots)
    # sums over floats in another order: 1e-9 relative
    assert (series.arrivals_per_s * series.slot_s).sum() == pytest.approx(len(requests), rel=1e-9)
    assert (series.waiting_mean * series.slot_s).sum() == pytest.approx(
        requests["queue_wait_s"].sum(), rel=1e-9, abs=1e-9
    )
    assert (series.demand_replicas * series.slot_s).sum() == pytest.approx(
        (requests["end_s"] - requests["start_s"]).sum(), rel=1e-9
    )
    for pool in series.pools:
        mine = workers[workers["pool"] == pool.pool]
        worked_s = (pool.busy_ratio * pool.replicas * series.slot_s).sum()
        assert worked_s == pytest.approx(mine["busy_s"].sum(), rel=1e-9)
        assert (pool.replicas == mine["worker_id"].nunique()).all()


def test_late_requests_are_counted_where_they_arrive(tables: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    requests, workers = tables
    promise_s = float(requests["latency_s"].quantile(0.8))
    series = run_series(requests, workers, promise_s, n_slots=10)
    n_late = np.nansum(series.late_ratio * series.arrivals_per_s * series.slot_s)
    assert n_late == pytest.approx((requests["latency_s"] > promise_s).sum(), rel=1e-9)
    assert n_late > 0


def by_hand(arrival_s: list[float], wait_s: list[float], service_s: float = 1.0) -> tuple[pd.DataFrame, pd.DataFrame]:
    arrival, wait = np.array(arrival_s), np.array(wait_s)
    requests = pd.DataFrame({
        "arrival_s": arrival, "start_s": arrival + wait, "end_s": arrival + wait + service_s, "status": "done", "latency_s": wait + service_s,
    })  # fmt: skip
    workers = pd.DataFrame({
        "worker_id": ["a-0"], "pool": ["a"], "role": ["base"], "state": ["busy"], "start_s": [0.0], "end_s": [4.0], "busy_s": [2.0],
    })  # fmt: skip
    return requests, workers


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20)), min_size=1, max_size=25), st.integers(1, 9)
)  # fmt: skip
def test_the_most_that_wait_in_a_slot_is_what_counting_at_every_moment_gives(
    requests: list[tuple[int, int]], n_slots: int
) -> None:
    arrival, wait = [float(a) for a, _ in requests], [float(w) for _, w in requests]
    series = run_series(*by_hand(arrival, wait), 2.0, n_slots=n_slots, end_s=61.0)
    edges = np.linspace(0.0, 61.0, n_slots + 1)
    for slot in range(n_slots):
        # times are whole seconds: what holds just after each second, and at the slot's begin, is all there is
        moments = [edges[slot], *(second for second in np.arange(0.0, 61.0) if edges[slot] <= second < edges[slot + 1])]
        counts = [sum(a <= moment < a + w for a, w in zip(arrival, wait, strict=True)) for moment in moments]
        assert series.waiting_max[slot] == max(counts)


def test_a_worker_that_is_down_is_no_replica_meanwhile() -> None:
    requests, workers = by_hand([0.0], [0.0])
    down = workers.assign(worker_id="a-1", state="down", start_s=2.0, end_s=4.0, busy_s=0.0)
    series = run_series(requests, pd.concat([workers, down], ignore_index=True), 2.0, n_slots=2, end_s=4.0)
    assert series.pools[0].replicas.tolist() == [2.0, 1.0]
    # 2 s of work spread over 4 s: half a second a second, of two replicas, then of one
    assert series.pools[0].busy_ratio.tolist() == [0.25, 0.5]


@pytest.mark.parametrize(
    ("begin_s", "end_s", "n_slots"), [(5.0, 5.0, 3), (9.0, 1.0, 3), (0.0, 4.0, 0), (0.0, 4.0, 2001)]
)
def test_a_window_without_length_or_without_slots_is_refused(begin_s: float, end_s: float, n_slots: int) -> None:
    with pytest.raises(ValueError, match="needs a window"):
        run_series(*by_hand([0.0], [0.0]), 2.0, n_slots=n_slots, begin_s=begin_s, end_s=end_s)


def test_the_stages_of_every_request_follow_each_other_and_sum_to_its_latency(
    tables: tuple[pd.DataFrame, pd.DataFrame],
) -> None:
    requests, _ = tables
    for name in requests["request_id"]:
        one = life_of(requests, str(name))
        assert one is not None
        assert one.latency_s is not None
        at_s = 0.0
        for stage in one.stages:
            assert stage.duration_s > 0
            assert stage.begin_s == pytest.approx(at_s, abs=1e-9)  # the same sums
            at_s += stage.duration_s
        # up to 1e-6 s are left to rounding before they are called "everything else"
        assert at_s == pytest.approx(one.latency_s, abs=1e-6)


def test_a_request_without_an_image_has_no_stages_and_one_that_is_not_there_is_none(
    tables: tuple[pd.DataFrame, pd.DataFrame],
) -> None:
    requests = tables[0].copy()
    name = str(requests["request_id"][3])
    requests.loc[3, ["status", "reason"]] = ["rejected", "queue full"]
    one = life_of(requests, name)
    assert one is not None
    assert (one.status, one.reason, one.latency_s, one.stages) == ("rejected", "queue full", None, ())
    assert life_of(requests, "nobody") is None
    assert name not in [other for other, _ in slowest(requests, len(requests))]


def test_the_slowest_come_first(tables: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    requests, _ = tables
    ranked = slowest(requests, 10)
    assert len(ranked) == 10
    assert ranked[0][1] == requests["latency_s"].max()
    assert [latency for _, latency in ranked] == sorted((latency for _, latency in ranked), reverse=True)


def test_the_loads_of_the_workers_are_their_recorded_work(tables: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    requests, workers = tables
    duration_s = float(requests["end_s"].max())
    loads = worker_loads(workers, duration_s)
    assert set(loads) == set(workers["worker_id"])
    assert sum(load.busy_ratio for load in loads.values()) == pytest.approx(
        workers["busy_s"].sum() / duration_s, rel=1e-9
    )
