"""Which bounds a run has to keep, and when they are kept."""

from __future__ import annotations

import pytest

from planner.validation.bounds import Check, band_of, busy_checks, latency_checks, load_of
from planner.validation.gaps import Gap
from tests.simulation_builders import run_queue


def gap(ratio: float) -> Gap:
    return Gap(1.0, 1.0 + ratio, ratio, ratio - 0.01, ratio + 0.01)


GAPS = {"p50": gap(0.04), "p95": gap(-0.049), "p99": gap(0.07), "mean": gap(0.0)}


@pytest.mark.parametrize(
    ("load", "band"),
    [(0.1, "light"), (0.54, "light"), (0.7, "70 %"), (0.79, "70 %"), (0.9, "90 %"), (1.0, "past saturation")],
)
def test_a_load_belongs_to_a_band(load: float, band: str) -> None:
    assert band_of(load) == band


def test_the_load_is_offered_work_over_what_the_replicas_can_do() -> None:
    result = run_queue([0.0, 1.0, 2.0, 10.0], [1.0, 2.0, 1.0, 4.0], 2)
    assert load_of(result, 2) == pytest.approx(8.0 / 10.0 / 2)  # 8 s of work in 10 s on 2 replicas


def test_at_seventy_per_cent_every_quantile_has_its_bound() -> None:
    checks = {check.name: check for check in latency_checks("70 %", GAPS, None)}
    assert {name: check.holds for name, check in checks.items()} == {
        "latency p50": False,
        "latency p95": True,
        "latency p99": True,
    }


def test_at_ninety_per_cent_bounds_are_wider_and_the_99th_has_none() -> None:
    checks = latency_checks("90 %", GAPS, None)
    assert [(check.name, check.bound) for check in checks] == [("latency p50", 0.10), ("latency p95", 0.12)]
    assert all(check.holds for check in checks)


def test_past_saturation_no_latency_is_bounded() -> None:
    assert latency_checks("past saturation", GAPS, None) == ()
    assert busy_checks("past saturation", {"base": 1.0}, {"base": 0.5}, None) == ()


def test_a_floor_above_the_bound_is_what_is_allowed_and_one_below_changes_nothing() -> None:
    wide = {name: gap(-0.05) for name in GAPS}
    narrow = {name: gap(0.01) for name in GAPS}
    p50 = latency_checks("70 %", GAPS, wide)[0]
    assert (p50.allowed, p50.holds) == (0.05, True)
    p50 = latency_checks("70 %", GAPS, narrow)[0]
    assert (p50.allowed, p50.holds) == (0.03, False)


def test_busy_ratios_may_differ_by_two_points() -> None:
    inside, outside = busy_checks("light", {"a": 0.50, "b": 0.50}, {"a": 0.519, "b": 0.521}, None)
    assert (inside.holds, outside.holds) == (True, False)


def test_a_quantile_without_a_ratio_is_out() -> None:
    assert not Check("latency p50", float("inf"), 0.03, None).holds
