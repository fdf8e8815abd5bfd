"""Cost and waterfall: the sums are right, and decoupling is credited with nothing that is not its own."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cost import cost_of
from planner.waterfall import build_waterfall, holds_more


def test_cost_per_image_counts_idle_gpus() -> None:
    # 10 GPUs at 2 USD for 730 h are 14,600 USD; one image in 10 s, 0.1/s, is 262,800 images a month
    cost = cost_of(10, 0.1, 2.0, 730.0)
    assert cost.cost_usd_per_month == 14_600
    assert cost.gpu_hours_per_month == 7_300
    assert cost.cost_usd_per_image == pytest.approx(14_600 / 262_800, rel=1e-12)


def test_no_image_in_time_costs_infinitely_much() -> None:
    assert cost_of(1, 0.0, 2.0, 730.0).cost_usd_per_image == math.inf


def test_a_cost_of_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="price_usd_per_gpu_hour is nan"):
        cost_of(1, 1.0, math.nan, 730.0)


def test_the_waterfall_goes_through_every_row_and_its_steps_sum_to_the_saving() -> None:
    costs = {
        "diffusers": (60, 600.0),
        "diffusers_tuned": (40, 400.0),
        "colocated": (30, 300.0),
        "decoupled": (28, 280.0),
    }
    built = build_waterfall(costs, {}, "decoupled")
    assert [step.topology for step in built.steps] == ["diffusers", "diffusers_tuned", "colocated", "recommendation"]
    assert [step.saving_usd_per_month for step in built.steps] == [None, 200.0, 100.0, 20.0]
    assert built.saving_usd_per_month == 320.0


def test_a_step_that_costs_money_is_shown_as_it_is() -> None:
    built = build_waterfall(
        {"diffusers": (4, 40.0), "diffusers_tuned": (5, 50.0), "colocated": (3, 30.0)}, {}, "colocated"
    )
    assert built.steps[1].saving_usd_per_month == -10.0
    assert built.steps[-1].saving_usd_per_month == 0.0


def test_a_row_that_misses_the_slo_has_no_price_and_is_skipped_in_the_comparison() -> None:
    built = build_waterfall(
        {"diffusers_tuned": (5, 50.0), "decoupled": (3, 30.0)}, {"diffusers": "too slow"}, "decoupled"
    )
    first, second, third, last = built.steps
    assert (first.cost_usd_per_month, first.note) == (None, "too slow")
    assert second.saving_usd_per_month is None
    assert third.cost_usd_per_month is None
    assert last.saving_usd_per_month == 20.0
    assert built.baseline == "diffusers_tuned"


PRICED = st.dictionaries(st.sampled_from(["diffusers", "diffusers_tuned", "colocated"]), st.integers(1, 10**6))


@settings(deadline=None)
@given(PRICED, st.integers(1, 10**6))
def test_the_steps_always_sum_to_the_saving(gpus: dict[str, int], recommended: int) -> None:
    costs = {name: (n, float(n)) for name, n in {**gpus, "decoupled": recommended}.items()}
    built = build_waterfall(costs, {}, "decoupled")
    # whole dollars under 2**53: the sum is exact
    assert sum(step.saving_usd_per_month or 0.0 for step in built.steps) == built.saving_usd_per_month


@settings(deadline=None)
@given(PRICED, st.integers(1, 10**6))
def test_decoupling_is_credited_with_no_more_than_it_adds_to_the_same_engine_or_the_step_says_so(
    gpus: dict[str, int], recommended: int
) -> None:
    costs = {name: (n, float(n)) for name, n in {**gpus, "decoupled": recommended}.items()}
    last = build_waterfall(costs, {}, "decoupled").steps[-1]
    if "colocated" in gpus:
        assert last.saving_usd_per_month == gpus["colocated"] - recommended
        assert not holds_more(last.note)
    elif gpus:
        assert holds_more(last.note)
        assert "colocated" in last.note
    else:
        assert last.saving_usd_per_month is None
