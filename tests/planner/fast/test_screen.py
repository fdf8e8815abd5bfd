"""The compiled count of late requests is the textbook's, request by request."""

from __future__ import annotations

import heapq

import numpy as np
import pytest

from planner.fast.screen import n_late


def by_hand(arrival_s: list[float], service_s: list[float], n_servers: int, latency_s: float) -> int:
    free_at_s = [0.0] * n_servers
    late = 0
    for arrival, seconds in zip(arrival_s, service_s, strict=True):
        end = max(arrival, free_at_s[0]) + seconds
        heapq.heapreplace(free_at_s, end)
        late += end - arrival > latency_s
    return late


@pytest.mark.parametrize("n_servers", [1, 2, 3, 8, 37])
def test_it_is_kiefer_and_wolfowitz(n_servers: int) -> None:
    rng = np.random.default_rng(n_servers)
    arrival_s = np.cumsum(rng.exponential(1.0 / n_servers, 3000))
    service_s = rng.exponential(0.95, 3000)
    expected = by_hand(arrival_s.tolist(), service_s.tolist(), n_servers, 4.0)
    assert 0 < expected < 3000
    assert n_late(arrival_s, service_s, n_servers, 4.0, np.inf) == expected


def test_it_stops_once_there_are_too_many() -> None:
    arrival_s, service_s = np.zeros(1000), np.ones(1000)  # request k ends after k + 1 seconds
    assert n_late(arrival_s, service_s, 1, 10.0, 25.0) == 26
    assert n_late(arrival_s, service_s, 1, 10.0, np.inf) == 990
