"""Autoscalers against sequences worked out by hand from the documented algorithms and their default settings."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.policies import autoscale
from engine.policies.autoscale import (
    NEVER_S,
    change_within,
    hpa_fewest,
    hpa_for_total,
    hpa_for_usage,
    hpa_limited,
    hpa_most,
    hpa_stabilised,
    keda_to_or_from_zero,
    kpa_last_replica,
    kpa_step,
    ray_serve_step,
)


@pytest.mark.parametrize(
    ("total", "n_current", "wanted"),
    [
        (20.0, 4, 4),  # 20 / (5·4) = 1
        (21.9, 4, 4),  # 1.095 is inside the tolerance
        (22.1, 4, 5),  # 1.105 → ⌈4.42⌉
        (18.0, 4, 4),  # 0.9 is inside
        (17.9, 4, 4),  # 0.895 is outside, and ⌈3.58⌉ = 4
        (9.0, 4, 2),
        (0.0, 4, 0),
        (11.0, 0, 3),  # from none there is no tolerance
    ],
)
def test_hpa_for_a_total_divides_and_rounds_up_outside_the_tolerance(total: float, n_current: int, wanted: int) -> None:
    assert hpa_for_total(total, 5.0, n_current, 0.1) == wanted


@pytest.mark.parametrize(
    ("usage_sum", "n_ready", "n_unready", "n_current", "wanted"),
    [
        # Kubernetes' own example: current 200m against a desired 100m doubles; 50m halves
        (2.0 * 4, 4, 0, 4, 8),
        (0.5 * 4, 4, 0, 4, 2),
        (1.05 * 4, 4, 0, 4, 4),
        # 3 ready at 1.6, 1 not ready counts 0: (4.8 / 4) = 1.2 → ⌈1.2·4⌉ = 5, not the ⌈1.6·3⌉ of the ready ones alone
        (4.8, 3, 1, 4, 5),
        # with 3 not ready the mean over all six is 0.8: direction turned, so nothing changes
        (4.8, 3, 3, 6, 6),
        # downwards the unready ones are not counted: ⌈0.5·4⌉
        (2.0, 4, 2, 6, 2),
        (0.0, 0, 3, 3, 3),
    ],
)
def test_hpa_on_usage_leaves_out_replicas_that_are_not_ready(
    usage_sum: float, n_ready: int, n_unready: int, n_current: int, wanted: int
) -> None:
    assert hpa_for_usage(usage_sum, n_ready, n_unready, 1.0, n_current, 0.1) == wanted


def test_hpa_goes_down_only_when_the_window_has_forgotten_every_higher_recommendation() -> None:
    times_s: list[float] = [0.0]
    recommended = [10]  # the controller starts with the current count as its first recommendation
    current, seen = 10, []
    for step in range(1, 25):
        now_s = 15.0 * step
        wanted = 6 if now_s < 60.0 else 4
        current = hpa_stabilised(current, wanted, times_s, recommended, now_s, 0.0, 300.0)
        times_s.append(now_s)
        recommended.append(wanted)
        seen.append(current)
    # 10 of time 0 leaves the window at 300 (strictly inside counts), the last 6 of time 45 at 345
    expected = [10 if 15 * k < 300 else 6 if 15 * k < 345 else 4 for k in range(1, 25)]
    assert seen == expected


def test_hpa_goes_up_with_the_lowest_recommendation_of_an_up_window() -> None:
    assert hpa_stabilised(2, 9, [0.0, 15.0], [2, 5], 30.0, 60.0, 300.0) == 2
    assert hpa_stabilised(2, 9, [0.0, 15.0], [2, 5], 61.0, 60.0, 300.0) == 5
    assert hpa_stabilised(2, 9, [0.0, 15.0], [2, 5], 61.0, 0.0, 300.0) == 9


def test_hpa_default_rates_double_or_add_four_every_15_s_and_may_drop_everything() -> None:
    # from 1, 1000 wanted, a look every 15 s: +4, then doubling beats it from 5 on
    counts, times_s, changes = [1], [], []
    for step in range(6):
        now_s = 15.0 * step
        added = change_within(times_s, changes, now_s, 15.0)
        most = hpa_most(counts[-1], added, 0, 4, 1.0)
        new = hpa_limited(counts[-1], 1000, 1, 60, most, 0)
        times_s.append(now_s)
        changes.append(new - counts[-1])
        counts.append(new)
    assert counts == [1, 5, 10, 20, 40, 60, 60]
    # a second look within the period may only use what is left of it: 5 → started at 1, so 5 is the most
    assert hpa_most(5, 4, 0, 4, 1.0) == 5
    assert hpa_fewest(40, 0, 0, 0, 1.0) == 0
    assert hpa_limited(40, 3, 5, 60, 0, hpa_fewest(40, 0, 0, 0, 1.0)) == 5


def test_hpa_scale_down_policies_take_the_larger_change() -> None:
    # 10 % of 40 leaves 36; five replicas leave 35; what was removed in the period counts
    assert hpa_fewest(40, 0, 0, 0, 0.1) == 36
    assert hpa_fewest(40, 0, 0, 5, 0.1) == 35
    assert hpa_fewest(36, 0, 4, 0, 0.1) == 36
    assert hpa_fewest(36, 0, 4, 5, 0.1) == 35


def test_keda_wakes_at_once_and_sleeps_after_the_cooldown() -> None:
    assert keda_to_or_from_zero(0, 0, 1.0, 0.0, 30.0, 0.0, 300.0) == 1
    assert keda_to_or_from_zero(0, 3, 1.0, 0.0, 30.0, 0.0, 300.0) == 3
    assert keda_to_or_from_zero(0, 0, 5.0, 5.0, 30.0, 0.0, 300.0) == 0  # must exceed the activation
    assert keda_to_or_from_zero(2, 0, 0.0, 0.0, 330.0, 30.0, 300.0) == 2  # exactly the cooldown is not past it
    assert keda_to_or_from_zero(2, 0, 0.0, 0.0, 360.0, 30.0, 300.0) == 0
    assert keda_to_or_from_zero(2, 1, 0.0, 0.0, 9999.0, 30.0, 300.0) == 2


def kpa(stable: float, panic: float, ready: int, now_s: float, since_s: float, most: int) -> tuple[int, float, int]:
    return kpa_step(stable, panic, ready, 0.7, 2.0, 1000.0, 2.0, 60.0, now_s, since_s, most)


def test_knative_divides_by_the_target_and_never_more_than_halves() -> None:
    assert kpa(7.0, 7.0, 10, 100.0, NEVER_S, 0) == (10, NEVER_S, 0)
    assert kpa(7.1, 7.1, 10, 100.0, NEVER_S, 0) == (11, NEVER_S, 0)
    assert kpa(0.0, 0.0, 10, 100.0, NEVER_S, 0) == (5, NEVER_S, 0)
    assert kpa(0.0, 0.0, 1, 100.0, NEVER_S, 0) == (0, NEVER_S, 0)


def test_knative_panics_at_twice_the_capacity_holds_the_peak_and_calms_down_after_a_stable_window() -> None:
    # two ready; panic window sees 2.8 → ⌈4⌉ = 4 = 2·2: panic
    wanted, since_s, most = kpa(1.4, 2.8, 2, 10.0, NEVER_S, 0)
    assert (wanted, since_s, most) == (4, 10.0, 4)
    # still two ready, load higher: the peak grows; load lower: the peak stays, and the panic is 12 s old
    wanted, since_s, most = kpa(1.5, 4.1, 2, 12.0, since_s, most)
    assert (wanted, since_s, most) == (6, 12.0, 6)
    wanted, since_s, most = kpa(1.0, 0.7, 6, 14.0, since_s, most)
    assert (wanted, since_s, most) == (6, 12.0, 6)
    # 72 is not yet after 12 + 60, 74 is
    assert kpa(1.0, 0.7, 6, 72.0, since_s, most) == (6, 12.0, 6)
    assert kpa(1.0, 0.7, 6, 74.0, since_s, most) == (3, NEVER_S, 0)


def test_knative_keeps_the_last_replica_for_the_grace_period() -> None:
    wanted, idle_s = kpa_last_replica(0, 100.0, NEVER_S, 30.0)
    assert (wanted, idle_s) == (1, 100.0)
    assert kpa_last_replica(0, 128.0, idle_s, 30.0) == (1, 100.0)
    assert kpa_last_replica(0, 130.0, idle_s, 30.0) == (0, 100.0)
    assert kpa_last_replica(2, 128.0, idle_s, 30.0) == (2, NEVER_S)


def ray(ongoing: float, running: int, target: int, counter: int, **changed: float) -> tuple[int, int]:
    settings = {"up": 1.0, "down": 1.0, "n_min": 1, "n_max": 100} | changed
    return ray_serve_step(
        ongoing, running, target, 2.0, settings["up"], settings["down"], int(settings["n_min"]), int(settings["n_max"]),
        300, 6000, 6000, counter,
    )  # fmt: skip


def test_ray_serve_acts_after_more_than_delay_over_loop_looks_in_a_row() -> None:
    # 12 ongoing, 2 a replica: 6 wanted; upscale_delay_s 30 at a loop of 0.1 s: 300 looks wait, the 301st acts
    target, counter = 3, 0
    for _ in range(300):
        target, counter = ray(12.0, 3, target, counter)
        assert target == 3
    assert ray(12.0, 3, target, counter) == (6, 0)
    # one look that wants nothing starts the count anew; one that wants less turns it round
    assert ray(6.0, 3, 3, 299) == (3, 0)
    assert ray(2.0, 3, 3, 299) == (3, -1)


def test_ray_serve_factors_soften_the_step_but_never_stall_it() -> None:
    # 8 → 4 wanted at a factor of 0.25: ⌈8 − 1⌉ = 7; 2 → 1 at 0.1: ⌈1.9⌉ = 2 is stuck, so 1
    assert ray(8.0, 8, 8, -6000, down=0.25) == (7, 0)
    assert ray(2.0, 2, 2, -6000, down=0.1) == (1, 0)
    assert ray(16.0, 2, 2, 300, up=0.5) == (5, 0)  # ⌈2 + 0.5·6⌉


def test_ray_serve_goes_to_zero_only_from_one_and_wakes_without_delay() -> None:
    assert ray(0.0, 3, 3, -6000, n_min=0) == (1, 0)
    assert ray(0.0, 1, 1, -6000, n_min=0) == (0, 0)
    assert ray(0.5, 0, 0, 0, n_min=0) == (1, 0)
    assert ray(0.0, 0, 0, 0, n_min=0) == (0, 0)


def test_the_same_source_compiles_and_decides_the_same() -> None:
    numba = pytest.importorskip("numba")
    rng = np.random.default_rng(2)
    compiled = {
        name: numba.njit(getattr(autoscale, name))
        for name in ("hpa_for_total", "hpa_for_usage", "kpa_step", "ray_serve_step", "hpa_stabilised")
    }
    for _ in range(200):
        load, ready, unready = float(rng.uniform(0, 40)), int(rng.integers(0, 9)), int(rng.integers(0, 4))
        current = ready + unready
        cases = {
            "hpa_for_total": (load, 2.0, current, 0.1),
            "hpa_for_usage": (load, ready, unready, 1.0, current, 0.1),
            "kpa_step": (load, load * 2, ready, 0.7, 2.0, 1000.0, 2.0, 60.0, 70.0, float(rng.choice([NEVER_S, 5.0, 30.0])), 3),
            "ray_serve_step": (load, ready, current, 2.0, 1.0, 0.5, 0, 30, 3, 6, 6, int(rng.integers(-7, 5))),
            "hpa_stabilised": (current, ready, np.arange(4) * 15.0, rng.integers(0, 9, 4), 60.0, 20.0, 40.0),
        }  # fmt: skip
        for name, arguments in cases.items():
            assert compiled[name](*arguments) == getattr(autoscale, name)(*arguments), (name, arguments)
    assert math.isfinite(NEVER_S)
