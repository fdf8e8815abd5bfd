"""Exact results of queueing and caching theory that the simulator is held against: each from its own source, by its own formula."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from calibrate.profile import RESIDUAL_LEVELS

Floats = npt.NDArray[np.float64]
STATES_MAX: Final = 4000
"""Of a truncated chain; the mass beyond is below 1e-12 at the loads allowed."""


def birth_death(births_per_s: Sequence[float], deaths_per_s: Sequence[float]) -> Floats:
    """Stationary distribution of states 0..n: ``births[k]`` leaves k upwards, ``deaths[k]`` leaves k + 1 downwards."""
    ratios = np.log(np.asarray(births_per_s, dtype=np.float64)) - np.log(np.asarray(deaths_per_s, dtype=np.float64))
    logs = np.concatenate([[0.0], np.cumsum(ratios)])
    weights = np.exp(logs - logs.max())
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def erlang_c(load: float, n_servers: int) -> float:
    """Share of requests that wait in M/M/c with offered load ``load`` < c (Erlang 1917)."""
    last = load**n_servers / math.factorial(n_servers) * n_servers / (n_servers - load)
    return last / (sum(load**k / math.factorial(k) for k in range(n_servers)) + last)


def mmc_wait_s(rate_per_s: float, mean_s: float, n_servers: int) -> float:
    """Mean wait of M/M/c."""
    load = rate_per_s * mean_s
    return erlang_c(load, n_servers) * mean_s / (n_servers - load)


def mmck(rate_per_s: float, mean_s: float, n_servers: int, waiting_places: int) -> tuple[float, float]:
    """M/M/c/K with K = c + waiting places: share rejected, mean wait of those accepted."""
    n = n_servers + waiting_places
    p = birth_death([rate_per_s] * n, [min(k + 1, n_servers) / mean_s for k in range(n)])
    waiting = sum(max(0, k - n_servers) * p[k] for k in range(n + 1))
    rejected = float(p[n])
    return rejected, float(waiting / (rate_per_s * (1.0 - rejected)))


def mg1_wait_s(rate_per_s: float, mean_s: float, second_moment_s2: float) -> float:
    """Mean wait of M/G/1 (Pollaczek 1930, Khinchine 1932)."""
    return rate_per_s * second_moment_s2 / (2.0 * (1.0 - rate_per_s * mean_s))


def mdc_wait_s(rate_per_s: float, service_s: float, n_servers: int) -> float:
    """Mean wait of M/D/c: states a service apart follow N' = max(N − c, 0) + Poisson(λD) (Crommelin 1932), solved numerically.

    The chain is stationary at every time, so Little's law on its mean queue gives the wait.
    """
    mean = rate_per_s * service_s
    n = max(60, math.ceil(12 * n_servers / max(1e-3, 1.0 - mean / n_servers)))
    if n > STATES_MAX:
        raise ValueError(f"a load of {mean / n_servers:g} needs {n} states, at most {STATES_MAX} are solved")
    arrivals = np.exp([k * math.log(mean) - mean - math.lgamma(k + 1) for k in range(n)])
    step = np.zeros((n, n))
    for state in range(n):
        left = max(state - n_servers, 0)
        step[state, left:] = arrivals[: n - left]
        step[state, -1] += 1.0 - step[state].sum()
    # p·step = p with the probabilities summing to 1 in place of one redundant equation
    equations = step.T - np.eye(n)
    equations[0, :] = 1.0
    right = np.zeros(n)
    right[0] = 1.0
    p = np.linalg.solve(equations, right)
    waiting = float(np.maximum(np.arange(n) - n_servers, 0) @ p)
    return waiting / rate_per_s


def cobham_waits_s(rate_per_s: float, shares: Sequence[float], mean_s: float, second_moment_s2: float) -> list[float]:
    """Mean wait of each class of M/G/1 with priorities that interrupt nobody, most urgent first (Cobham 1954)."""
    loads = np.concatenate([[0.0], np.cumsum(rate_per_s * mean_s * np.asarray(shares))])
    residual_s = rate_per_s * second_moment_s2 / 2.0
    return [float(value) for value in residual_s / ((1 - loads[:-1]) * (1 - loads[1:]))]


def erlang_a(rate_per_s: float, mean_s: float, n_servers: int, patience_s: float) -> tuple[float, float]:
    """M/M/c+M (Palm 1946): share that gives up in the queue, and mean time in the queue of all, given up or not."""
    n = n_servers + 50 + math.ceil(20 * rate_per_s * patience_s)
    deaths = [min(k, n_servers) / mean_s + max(0, k - n_servers) / patience_s for k in range(1, n + 1)]
    p = birth_death([rate_per_s] * n, deaths)
    waiting = float(np.maximum(np.arange(n + 1) - n_servers, 0) @ p)
    return waiting / patience_s / rate_per_s, waiting / rate_per_s


def fork_join_response_s(rate_per_s: float, mean_s: float) -> float:
    """Mean time until both halves are done: each arrival forks to two M/M/1 queues (Flatto and Hahn 1984; Nelson, Tantawi 1988)."""
    load = rate_per_s * mean_s
    return (12.0 - load) / 8.0 * mean_s / (1.0 - load)


def lru_hit_ratio(popularity: Sequence[float], places: int) -> float:
    """Hit ratio of LRU under independent references (King 1971): a sum over every order of the cached items, so keep them few."""
    p = [float(value) for value in popularity]
    total = 0.0
    for held in itertools.permutations(range(len(p)), places):
        chance, left = 1.0, 1.0
        for item in held:  # the most recently used first
            chance *= p[item] / left
            left -= p[item]
        total += chance * (1.0 - left)
    return total


def noise_moments(quantiles: Sequence[float]) -> tuple[float, float]:
    """First and second moment of a profile's service noise: linear between its quantiles, held at the outermost ones."""
    levels, values = np.asarray(RESIDUAL_LEVELS), np.asarray(quantiles, dtype=np.float64)
    low, high, width = values[:-1], values[1:], np.diff(levels)
    outer = np.array([levels[0], 1.0 - levels[-1]])
    ends = values[[0, -1]]
    first = float(((low + high) / 2 * width).sum() + (outer * ends).sum())
    second = float(((low**2 + low * high + high**2) / 3 * width).sum() + (outer * ends**2).sum())
    return first, second
