"""Means of stationary queues inside t-intervals over independent replications with fixed seeds.

Each replication starts empty and leaves out the first tenth. An interval at 99.9 % misses once in a thousand by chance; seeds
are fixed, so a test that passes keeps passing, and fails if the model changes the queue.
"""

from __future__ import annotations

import math

import numpy as np

from planner.statistics import summarise, t_interval
from tests.simulation_builders import run_queue

N_REPLICATIONS = 20
N_REQUESTS = 6000


def erlang_c_wait_s(rate_per_s: float, service_s: float, n_servers: int) -> float:
    """Mean wait of M/M/c (Erlang 1917)."""
    load = rate_per_s * service_s
    last = load**n_servers / math.factorial(n_servers) * n_servers / (n_servers - load)
    p_wait = last / (sum(load**k / math.factorial(k) for k in range(n_servers)) + last)
    return p_wait * service_s / (n_servers - load)


def simulated_waits(rate_per_s: float, n_servers: int, service: str, seed: int) -> list[float]:
    means = []
    for child in np.random.SeedSequence(seed).spawn(N_REPLICATIONS):
        rng = np.random.default_rng(child)
        arrival_s = np.cumsum(rng.exponential(1.0 / rate_per_s, N_REQUESTS))
        service_s = {
            "exponential": lambda rng=rng: rng.exponential(1.0, N_REQUESTS),
            "constant": lambda: np.ones(N_REQUESTS),
            "uniform": lambda rng=rng: rng.uniform(0.0, 2.0, N_REQUESTS),
        }[service]()
        result = run_queue(arrival_s, service_s, n_servers)
        means.append(summarise(result, 10.0, warmup_s=float(arrival_s[N_REQUESTS // 10])).queue_wait_mean_s)
    return means


def test_mean_wait_of_many_replicas_is_erlang_c() -> None:
    interval = t_interval(simulated_waits(3.2, 4, "exponential", seed=1), level=0.999)
    assert interval.low < erlang_c_wait_s(3.2, 1.0, 4) < interval.high
    # and the test can tell: five servers, or a load one tenth lower, lie outside
    assert not interval.low < erlang_c_wait_s(3.2, 1.0, 5) < interval.high
    assert not interval.low < erlang_c_wait_s(2.88, 1.0, 4) < interval.high


def test_mean_wait_with_general_services_is_pollaczek_khinchine() -> None:
    rate_per_s = 0.7
    for service, second_moment in (("constant", 1.0), ("uniform", 4.0 / 3.0)):
        interval = t_interval(simulated_waits(rate_per_s, 1, service, seed=2), level=0.999)
        exact_s = rate_per_s * second_moment / (2.0 * (1.0 - rate_per_s))
        assert interval.low < exact_s < interval.high, service
        assert (interval.high - interval.low) / exact_s < 0.25, service  # narrow enough to tell the two apart


def test_rejections_without_waiting_room_follow_erlang_b() -> None:
    from engine.allocation import Policies

    shares = []
    for child in np.random.SeedSequence(3).spawn(N_REPLICATIONS):
        rng = np.random.default_rng(child)
        arrival_s = np.cumsum(rng.exponential(1.0 / 3.0, N_REQUESTS))
        # the loss does not depend on the service law, only on its mean
        result = run_queue(arrival_s, rng.uniform(0.0, 2.0, N_REQUESTS), 4, policies=Policies(queue_limit=0))
        metrics = summarise(result, 10.0, warmup_s=float(arrival_s[N_REQUESTS // 10]))
        shares.append(metrics.n_rejected / metrics.n_offered)
    interval = t_interval(shares, level=0.999)
    blocking = (3.0**4 / 24) / sum(3.0**k / math.factorial(k) for k in range(5))
    assert interval.low < blocking < interval.high
    assert interval.high - interval.low < 0.03
