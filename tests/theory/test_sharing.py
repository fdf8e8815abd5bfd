"""Rates of shared ControlNet workers against the event-per-step reference, and against what max–min fairness means."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.policies.sharing import NEAR, fair_step_rates, wait_in_passing_s
from tests.theory.step_reference import Denoiser, denoise_by_rates, denoise_by_steps


def mean_gap(clients: Sequence[Denoiser]) -> float:
    return float(np.mean(denoise_by_rates(clients)) / np.mean(denoise_by_steps(clients)) - 1.0)


@pytest.mark.parametrize("n_clients", [1, 2, 3, 4, 8])
def test_equal_clients_of_one_worker_take_what_the_steps_take(n_clients: int) -> None:
    clients = [Denoiser(0.037 * k, 60, ((0, 0.05),)) for k in range(n_clients)]
    assert abs(mean_gap(clients)) < 0.01
    # who joins first may be served first at every step: the bound of the design, (clients − 1) services a join, each client joining once
    gaps_s = np.abs(np.subtract(denoise_by_rates(clients), denoise_by_steps(clients)))
    assert gaps_s.max() <= (n_clients - 1) * 0.05 + 1e-9
    if n_clients == 8:
        assert np.mean(denoise_by_steps(clients)) > 3 * 60 * clients[0].period_s  # the worker really was the bottleneck


def coming_and_going(seed: int, gap_s: float, sizes: Sequence[float]) -> list[Denoiser]:
    """150 requests of 30 steps on three workers, each using one or two of them."""
    rng = np.random.default_rng(seed)
    clients = []
    for now_s in np.cumsum(rng.exponential(gap_s, 150)):
        size = float(rng.choice(sizes))
        forwards = tuple((int(w), 0.05 * size) for w in rng.choice(3, rng.integers(1, 3), replace=False))
        clients.append(Denoiser(float(now_s), 30, forwards, 0.04 * size, 0.01 * size, 0.06 * size))
    return clients


@pytest.mark.parametrize("gap_s", [3.0, 1.5, 1.1])
def test_requests_with_equal_forwards_take_on_average_what_the_steps_take(gap_s: float) -> None:
    # Mean over 10 runs within 1 %; one run may miss by more, because near a full worker its path depends on who came first:
    # over 20 seeds a load the largest seen was 1.8 %.
    runs = [coming_and_going(seed, gap_s, [1.0]) for seed in range(10)]
    gaps = [mean_gap(clients) for clients in runs]
    assert abs(np.mean(gaps)) < 0.01
    assert np.max(np.abs(gaps)) < 0.02
    stretch = [np.mean(denoise_by_steps(c)) / np.mean([x.n_steps * x.period_s for x in c]) for c in runs]
    assert np.mean(stretch) > 1.05  # they did share


def sdxl(seed: int, gap_s: float, n_images: Sequence[float], twice: float = 0.0) -> list[Denoiser]:
    """150 requests with the parts that a step of SDXL at 1024² has on an H200; some with two ControlNets on one worker."""
    rng = np.random.default_rng(seed)
    clients = []
    for now_s in np.cumsum(rng.exponential(gap_s, 150)):
        n = float(rng.choice(n_images))
        workers = rng.choice(3, rng.integers(1, 3), replace=False)
        first = 2.0 if rng.random() < twice else 1.0
        forwards = tuple((int(w), 0.0126 * n * (first if k == 0 else 1.0)) for k, w in enumerate(workers))
        n_steps, transfer_s = int(rng.choice([30, 50])), 0.00037 * n * len(workers)
        clients.append(Denoiser(float(now_s), n_steps, forwards, 0.0125 * n, transfer_s, 0.0163 * n))
    return clients


MIXES: dict[str, Callable[[int], list[Denoiser]]] = {
    "forwards of 1, 2 and 4": lambda seed: coming_and_going(seed, 6.0, [1.0, 2.0, 4.0]),
    "the same, busier": lambda seed: coming_and_going(seed, 3.5, [1.0, 2.0, 4.0]),
    "SDXL, 1, 2 and 4 images": lambda seed: sdxl(seed, 1.8, [1.0, 2.0, 4.0]),
    "SDXL, mostly 1 image": lambda seed: sdxl(seed, 1.0, [1.0] * 8 + [2.0, 4.0]),
    "SDXL, two ControlNets on one worker": lambda seed: sdxl(seed, 0.7, [1.0], twice=0.2),
}


@pytest.mark.parametrize("mix", MIXES)
def test_requests_with_unequal_forwards_take_within_a_few_percent_what_the_steps_take(mix: str) -> None:
    # A short forward waits for a long one that it finds running, on a full worker or not. Without waits in passing the mean over
    # six runs was 2.6 to 4.9 % too low in these mixes; with them it was -1.9 to +0.4 %, single runs up to 2.8 %.
    gaps = [mean_gap(MIXES[mix](seed)) for seed in range(6)]
    assert abs(np.mean(gaps)) < 0.025
    assert np.max(np.abs(gaps)) < 0.035


def test_equal_and_nearly_equal_clients_wait_for_nobody_in_passing() -> None:
    assert wait_in_passing_s(10.0, 10.0, 0.05) == 0.0
    assert wait_in_passing_s(10.0, 10.0 / (1 + 0.9 * NEAR), 0.05) == 0.0


def test_a_wait_in_passing_is_half_the_forward_that_is_found_and_at_most_the_difference_of_the_steps() -> None:
    # steps of 0.1 and 0.4 s; the other's forward takes 0.2 s, so half the time it runs, and 0.1 s of it are left
    assert wait_in_passing_s(10.0, 2.5, 0.2) == pytest.approx(0.5 * 0.1)
    # steps of 0.1 and 0.11 s: 0.02 s by chance, but it goes along behind the other, a hundredth later each step
    assert wait_in_passing_s(10.0, 1 / 0.11, 0.0663) == pytest.approx(0.01)


def test_a_client_that_leaves_takes_its_waits_with_it() -> None:
    """One short step beside a long one: slower while both are there, as fast as alone afterwards."""
    long_one, short_one = (
        Denoiser(0.0, 10, ((0, 0.2),), 0.1, 0.0, 0.2),
        Denoiser(0.0, 200, ((0, 0.02),), 0.02, 0.0, 0.08),
    )
    together_s, alone_s = denoise_by_rates([long_one, short_one])[1], denoise_by_rates([short_one])[0]
    wait_s = wait_in_passing_s(1 / 0.1, 1 / 0.4, 0.2)
    long_s = 10 * (0.4 + wait_in_passing_s(1 / 0.4, 1 / 0.1, 0.02))
    n_steps_together = long_s / (0.1 + wait_s)
    assert together_s == pytest.approx(long_s + (200 - n_steps_together) * 0.1, rel=1e-9)
    assert together_s > alone_s == pytest.approx(20.0)


def test_a_fork_waits_for_its_slowest_worker_and_loads_the_other_less() -> None:
    # Worker 0 is full with three clients; the fork's pace there leaves worker 1 below its capacity.
    alone_per_s = [8.0, 8.0, 8.0, 8.0]
    rates = fair_step_rates(alone_per_s, [0, 0, 1, 2, 3], [0, 1, 0, 0, 1], [0.05] * 5, 2)
    assert rates == pytest.approx([1 / 0.15] * 3 + [8.0], rel=1e-12)


@st.composite
def components(draw: st.DrawFn) -> tuple[list[float], list[int], list[int], list[float], int]:
    n_workers = draw(st.integers(1, 4))
    n_clients = draw(st.integers(1, 6))
    alone_per_s, edge_client, edge_worker, edge_demand_s = [], [], [], []
    for client in range(n_clients):
        users = draw(st.lists(st.integers(0, n_workers - 1), min_size=1, max_size=n_workers, unique=True))
        demands = [draw(st.sampled_from([0.02, 0.05, 0.1, 0.15])) for _ in users]
        alone_per_s.append(1.0 / (max(demands) + draw(st.sampled_from([0.02, 0.06, 0.3]))))
        edge_client += [client] * len(users)
        edge_worker += users
        edge_demand_s += demands
    return alone_per_s, edge_client, edge_worker, edge_demand_s, n_workers


@settings(max_examples=150, deadline=None, derandomize=True)
@given(components())
def test_rates_are_max_min_fair(component: tuple[list[float], list[int], list[int], list[float], int]) -> None:
    alone_per_s, edge_client, edge_worker, edge_demand_s, n_workers = component
    rates = fair_step_rates(*component)
    load = np.zeros(n_workers)
    for client, worker, demand_s in zip(edge_client, edge_worker, edge_demand_s, strict=True):
        load[worker] += rates[client] * demand_s
    assert (load <= 1.0 + 1e-9).all()
    for client, rate in enumerate(rates):
        assert 0.0 < rate <= alone_per_s[client]
        if rate < alone_per_s[client]:  # then one of its workers is full, and it is among the fastest there
            mine = {w for c, w in zip(edge_client, edge_worker, strict=True) if c == client}
            assert any(
                load[w] > 1.0 - 1e-9
                and all(rates[c] <= rate * (1 + 1e-9) for c, v in zip(edge_client, edge_worker, strict=True) if v == w)
                for w in sorted(mine)
            )
