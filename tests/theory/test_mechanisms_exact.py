"""Mechanisms against queueing theory: per path where the same arrays decide, in mean inside t-intervals elsewhere."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import pytest

from engine.allocation import Policies, TenantShare
from engine.policies.autoscale_settings import Autoscale
from planner.service import ServiceTable
from planner.simulator import SimulationResult
from planner.statistics import t_interval
from tests.simulation_builders import base_pool, run, workload_of

N_REPLICATIONS = 12
N_REQUESTS = 3000


def queue(arrival_s: Any, service_s: Any, n: int, policies: Policies | None = None, **columns: Any) -> SimulationResult:
    autoscale = columns.pop("autoscale", None)
    workload = workload_of(arrival_s, base_model_id="m", **columns)
    service = ServiceTable.from_service_s(workload, np.asarray(service_s))
    return run(workload, [base_pool(n, base_model_ids=("m",), autoscale=autoscale)], service, policies=policies)


def kiefer_wolfowitz(arrival_s: Any, service_s: Any, n: int) -> np.ndarray:
    """Waits of G/G/n, first come, first served."""
    free_s = [0.0] * n
    waits = []
    for now_s, need_s in zip(arrival_s, service_s, strict=True):
        begin_s = max(now_s, free_s[0])
        heapq.heapreplace(free_s, begin_s + need_s)
        waits.append(begin_s - now_s)
    return np.array(waits)


def path(load_per_server: float, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.exponential(1.0, 2000)), rng.lognormal(0.0, 0.8, 2000) * load_per_server * n / np.exp(0.32)


def test_a_tenant_with_two_at_a_time_sees_a_queue_with_two_servers() -> None:
    arrival_s, service_s = path(0.8, 2, 1)
    waits = queue(arrival_s, service_s, 5, Policies(tenant_running_max=2), tenant_id="t").requests["queue_wait_s"]
    # sums of the same numbers in the same order
    assert waits.to_numpy() == pytest.approx(kiefer_wolfowitz(arrival_s, service_s, 2), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("kind", ["hpa", "keda", "kpa", "ray_serve"])
def test_an_autoscaler_with_no_room_to_move_changes_nothing(kind: Any) -> None:
    arrival_s, service_s = path(0.9, 3, 2)
    waits = queue(arrival_s, service_s, 3, autoscale=Autoscale(3, kind, min_replicas=3, interval_s=5.0)).requests
    assert waits["queue_wait_s"].to_numpy() == pytest.approx(
        kiefer_wolfowitz(arrival_s, service_s, 3), rel=1e-9, abs=1e-9
    )


@pytest.mark.parametrize("order", ["priority", "weighted_tenants"])
def test_equal_priorities_and_one_tenant_are_first_come_first_served(order: Any) -> None:
    arrival_s, service_s = path(0.9, 3, 3)
    waits = queue(arrival_s, service_s, 3, Policies(queue_order=order)).requests["queue_wait_s"]
    assert waits.to_numpy() == pytest.approx(kiefer_wolfowitz(arrival_s, service_s, 3), rel=1e-9, abs=1e-9)


def test_mean_waits_of_priority_classes_are_cobhams() -> None:
    # M/G/1, not preemptive (Cobham 1954): W_k = W_0 / ((1 − σ_{k−1})(1 − σ_k)), W_0 = λ E[S²] / 2
    rate, shares = 0.75, np.array([0.3, 0.3, 0.4])
    second_moment = 4.0 / 3.0  # uniform on 0..2
    loads = np.concatenate([[0.0], np.cumsum(rate * shares)])
    exact = rate * second_moment / 2 / ((1 - loads[:-1]) * (1 - loads[1:]))
    means = []
    for child in np.random.SeedSequence(5).spawn(N_REPLICATIONS):
        rng = np.random.default_rng(child)
        arrival_s = np.cumsum(rng.exponential(1.0 / rate, N_REQUESTS))
        service_s = rng.uniform(0.0, 2.0, N_REQUESTS)
        priority = 2 - rng.choice(3, N_REQUESTS, p=shares)  # class 0 is the most urgent
        frame = queue(arrival_s, service_s, 1, Policies(queue_order="priority"), priority=priority.tolist()).requests
        kept = frame.iloc[N_REQUESTS // 10 :]
        means.append([kept["queue_wait_s"][2 - priority[kept.index] == k].mean() for k in range(3)])
    for k in range(3):
        found = t_interval([row[k] for row in means], 0.999)
        assert found.low < exact[k] < found.high, k
        # first come, first served would be 2 for everybody: the test can tell
        assert not found.low < rate * second_moment / 2 / (1 - rate) < found.high, k


def test_the_order_moves_waits_between_classes_but_not_their_sum() -> None:
    # Kleinrock's conservation law, per path: with equal services the sum of waits does not depend on the order
    arrival_s, _ = path(0.9, 1, 6)
    service_s = np.full(len(arrival_s), 0.9)
    rng = np.random.default_rng(6)
    columns = {
        "priority": rng.integers(0, 4, len(arrival_s)).tolist(),
        "tenant_id": rng.choice(["a", "b"], len(arrival_s)).tolist(),
    }
    sums = [
        queue(arrival_s, service_s, 1, Policies(queue_order=order), **columns).requests["queue_wait_s"].sum()  # type: ignore[arg-type]
        for order in ("fifo", "priority", "weighted_tenants")
    ]
    # two thousand sums of up to hundreds of seconds
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-9)


def test_tenants_that_always_wait_share_the_service_by_weight() -> None:
    # start-time fair queueing: while both wait, service over weight differs by at most one request each over its weight
    n = 600
    rng = np.random.default_rng(9)
    service_s = rng.uniform(0.5, 1.5, 2 * n)
    policies = Policies(queue_order="weighted_tenants", tenants=(TenantShare("b", weight=3.0),))
    frame = queue([0.0] * (2 * n), service_s, 1, policies, tenant_id=["a"] * n + ["b"] * n).requests
    frame = frame.assign(need_s=service_s).sort_values("start_s")
    both = frame[frame["start_s"] < frame["start_s"][frame["tenant_id"] == "b"].max()]
    done = {name: both["need_s"].where(both["tenant_id"] == name, 0.0).cumsum().to_numpy() for name in ("a", "b")}
    gap = np.abs(done["a"] / 1.0 - done["b"] / 3.0)
    assert gap.max() <= 1.5 / 1.0 + 1.5 / 3.0 + 1e-9
