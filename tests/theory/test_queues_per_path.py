"""Per path, no statistics: the simulator's waits equal the exact recursions' on the same arrays."""

from __future__ import annotations

import numpy as np
import pytest

from tests.simulation_builders import run_queue


def kiefer_wolfowitz_waits(arrival_s: np.ndarray, service_s: np.ndarray, n_servers: int) -> np.ndarray:
    """Waits of a FIFO G/G/c queue (Kiefer and Wolfowitz 1955): sorted remaining work, smallest first."""
    work_s = np.zeros(n_servers)
    waits = np.empty(len(arrival_s))
    previous_s = 0.0
    for i, (now_s, need_s) in enumerate(zip(arrival_s, service_s, strict=True)):
        work_s = np.maximum(work_s - (now_s - previous_s), 0.0)
        previous_s = now_s
        waits[i] = work_s[0]
        work_s[0] += need_s
        work_s.sort()
    return waits


def lindley_waits(arrival_s: np.ndarray, service_s: np.ndarray) -> np.ndarray:
    """Waits of a FIFO G/G/1 queue (Lindley 1952)."""
    waits = np.zeros(len(arrival_s))
    for i in range(1, len(arrival_s)):
        waits[i] = max(0.0, waits[i - 1] + service_s[i - 1] - (arrival_s[i] - arrival_s[i - 1]))
    return waits


def random_queue(n_servers: int, seed: int, n: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Bursty arrivals and heavy-tailed services at a load of 0.9."""
    rng = np.random.default_rng(seed)
    service_s = rng.lognormal(0.0, 1.0, n)
    gaps_s = rng.gamma(0.4, 1.0, n)
    gaps_s *= service_s.mean() / (0.9 * n_servers) / gaps_s.mean()
    return np.cumsum(gaps_s), service_s


def assert_same_waits(simulated_s: np.ndarray, exact_s: np.ndarray, horizon_s: float) -> None:
    # Both add and subtract times of the size of the horizon; 4000 roundings of 1.1e-16 of it stay below 1e-12 of it, and a
    # wait is compared to 1e-9 of itself beyond that.
    np.testing.assert_allclose(simulated_s, exact_s, rtol=1e-9, atol=1e-12 * horizon_s)
    assert (exact_s > 0).mean() > 0.2  # the queue really queued


@pytest.mark.parametrize("n_servers", [1, 3, 8])
def test_waits_equal_kiefer_wolfowitz(n_servers: int) -> None:
    arrival_s, service_s = random_queue(n_servers, seed=n_servers)
    result = run_queue(arrival_s, service_s, n_servers)
    exact_s = kiefer_wolfowitz_waits(arrival_s, service_s, n_servers)
    assert_same_waits(result.requests["queue_wait_s"].to_numpy(), exact_s, result.horizon_s)


def test_waits_on_one_replica_equal_lindley() -> None:
    arrival_s, service_s = random_queue(1, seed=11)
    result = run_queue(arrival_s, service_s, 1)
    assert_same_waits(result.requests["queue_wait_s"].to_numpy(), lindley_waits(arrival_s, service_s), result.horizon_s)


def test_equal_arrival_times_are_served_in_order_of_the_trace() -> None:
    result = run_queue([0.0, 0.0, 0.0, 2.0], [2.0, 1.0, 1.0, 1.0], 1)
    assert result.requests["start_s"].tolist() == [0.0, 2.0, 3.0, 4.0]


def test_a_replica_that_becomes_free_at_an_arrival_serves_it() -> None:
    result = run_queue([0.0, 2.0], [2.0, 1.0], 1)
    assert result.requests["queue_wait_s"].tolist() == [0.0, 0.0]
