"""Investment arithmetic against closed forms, and what must hold for any input."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.money.assumptions import Horizon
from planner.money.returns import (
    BREAK_EVEN_FROM,
    Change,
    Side,
    break_even_traffic,
    buy,
    monte_carlo,
    neutral,
    npv_usd,
    payback_months,
    slack_ratio,
    tornado,
)

FLAT = Horizon(n_months=24, discount_ratio_per_year=0.0)


def change(
    today: float = 10, new: float = 6, once_usd: float = 8_000, horizon: Horizon = FLAT, services: int = 1
) -> Change:
    """GPUs at 1000 USD a month, a service at 500."""
    old = Side(today, 1, 1000.0, 500.0, 20.0, 0.0)
    return Change(old, Side(new, services, 1000.0, 500.0 * services, 20.0, 0.0), once_usd, 0.0, horizon)


def test_without_discount_the_value_is_the_savings_less_the_investment() -> None:
    assert npv_usd(change(), neutral()) == 24 * 4_000 - 8_000


def test_discounted_value_is_the_annuity_formula() -> None:
    horizon = Horizon(n_months=36, discount_ratio_per_year=0.1)
    monthly = 1.1 ** (1 / 12) - 1
    annuity = (1 - (1 + monthly) ** -36) / monthly
    # both are sums of 36 doubles around 1e5: 1e-12 relative is thousands of roundings
    assert npv_usd(change(horizon=horizon), neutral()) == pytest.approx(4_000 * annuity - 8_000, rel=1e-12)


def test_a_saving_pays_the_investment_back_when_it_has_summed_to_it() -> None:
    assert payback_months(change(), neutral()) == 2.0
    assert payback_months(change(once_usd=10_000), neutral()) == 2.5


def test_an_investment_that_is_never_earned_has_no_payback() -> None:
    assert payback_months(change(new=10), neutral()) is None
    assert payback_months(change(new=12), neutral()) is None


def test_a_second_service_costs_its_operation_every_month() -> None:
    assert npv_usd(change(services=1), neutral()) - npv_usd(change(services=2), neutral()) == 24 * 500


def test_break_even_traffic_is_where_the_value_is_zero() -> None:
    found = change(once_usd=48_000)
    even = break_even_traffic(found)
    assert even is not None
    # 24 months of 4 GPUs' difference at 1000 USD pay 48,000 USD at half the traffic: 5 against 3 GPUs.
    # The grid's neighbours are 2.3 % apart and the value between them is straight: exact up to rounding
    assert even == pytest.approx(0.5, rel=1e-9)


def test_break_even_is_the_end_of_the_search_where_it_always_pays_and_none_where_it_never_does() -> None:
    assert break_even_traffic(change(once_usd=0.0, new=12)) is None
    pays_always = Change(Side(10, 2, 1000, 0, 0, 0), Side(5, 1, 1000, 0, 0, 0), 0.0, 0.0, FLAT)
    assert break_even_traffic(pays_always) == BREAK_EVEN_FROM


def test_one_gpu_that_is_mostly_idle_does_not_grow_with_a_little_more_work() -> None:
    # 0.35 GPUs busy in the busiest hour may double before 70 % of the GPU is full
    assert slack_ratio(1, 1, 0.35) == 2.0
    assert slack_ratio(1, 1, 0.9) == 1.0
    assert slack_ratio(5, 1, 0.35) == 1.0


@settings(deadline=None)
@given(st.floats(1, 200), st.floats(1, 200), st.floats(0, 1e6), st.floats(0.3, 1.0), st.floats(1.0, 3.0))
def test_the_tornado_is_sorted_and_its_ends_are_values_of_the_same_change(
    today: float, new: float, once_usd: float, low: float, high: float
) -> None:
    found = change(today, new, once_usd)
    swings = tornado(found, {"traffic": (low, high), "migration": (low, high), "gpu_price": (low, high)})
    widths = [swing.width_usd for swing in swings]
    assert widths == sorted(widths, reverse=True)
    for swing in swings:
        assert swing.npv_at_low_usd == npv_usd(found, {**neutral(), swing.factor: low})


def test_the_ends_of_the_tornado_are_reckoned_by_hand() -> None:
    swings = {swing.factor: swing for swing in tornado(change(), {"traffic": (0.5, 1.5), "migration": (0.5, 2.0)})}
    # half the traffic: 5 against 3 GPUs at 1000 USD for 24 months, half as much again: 15 against 9
    assert (swings["traffic"].npv_at_low_usd, swings["traffic"].npv_at_high_usd) == (40_000, 136_000)
    assert (swings["migration"].npv_at_low_usd, swings["migration"].npv_at_high_usd) == (92_000, 80_000)
    assert swings["traffic"].width_usd == 96_000


def test_the_quantiles_of_the_draws_are_those_of_the_triangle() -> None:
    """The value is straight in the price of a GPU: 96,000 USD times it, less 8,000."""
    spread = monte_carlo(change(), {"gpu_price": (0.8, 1.3)}, 40_000, 3)
    low, high = 0.8, 1.3
    # a triangle with its peak at 1 holds (x − low)² / ((high − low)(1 − low)) below x < 1, likewise from above
    at_05 = low + np.sqrt(0.05 * (high - low) * (1 - low))
    at_95 = high - np.sqrt(0.05 * (high - low) * (high - 1))
    # standard error of a quantile: √(p(1−p)/n) / density = 0.0011 / 1.41 and 0.0011 / 1.15 of 96,000 USD: four of them
    assert spread.npv_p05_usd == pytest.approx(96_000 * at_05 - 8_000, abs=310)
    assert spread.npv_p95_usd == pytest.approx(96_000 * at_95 - 8_000, abs=380)
    assert spread.probability_npv_positive == 1.0


def test_draws_repeat_to_the_bit_and_lie_between_the_extremes() -> None:
    found, ranges = change(), {"traffic": (0.5, 1.5), "gpu_price": (0.8, 1.2)}
    first = monte_carlo(found, ranges, 500, 7)
    assert first == monte_carlo(found, ranges, 500, 7)
    assert first != monte_carlo(found, ranges, 500, 8)
    lowest = npv_usd(found, {**neutral(), "traffic": 0.5, "gpu_price": 0.8})
    highest = npv_usd(found, {**neutral(), "traffic": 1.5, "gpu_price": 1.2})
    assert lowest <= first.npv_p05_usd <= first.npv_p50_usd <= first.npv_p95_usd <= highest


def test_another_unsure_input_does_not_move_the_draws_of_the_first() -> None:
    found = change(once_usd=0.0)  # migration then multiplies nothing
    alone = monte_carlo(found, {"traffic": (0.5, 1.5)}, 500, 7)
    both = monte_carlo(found, {"traffic": (0.5, 1.5), "migration": (0.5, 2.0)}, 500, 7)
    assert (alone.npv_p05_usd, alone.npv_p95_usd) == (both.npv_p05_usd, both.npv_p95_usd)


def test_a_fixed_input_gives_one_value() -> None:
    spread = monte_carlo(change(), {"traffic": (1.0, 1.0)}, 100, 1)
    assert spread.npv_p05_usd == spread.npv_p95_usd == 24 * 4_000 - 8_000


def test_bought_gpus_are_paid_back_by_the_rent_less_hosting() -> None:
    bought = buy(2, 30_000, 300, 48, 0.0, 3.5, 730, 0.0)
    rent = 2 * 3.5 * 730
    assert bought.payback_months == pytest.approx(60_000 / (rent - 600), rel=1e-12)
    assert bought.npv_usd == pytest.approx(48 * (rent - 600) - 60_000, rel=1e-12)
    # renting costs as much as owning at (30000/48 + 300) / 3.5 hours a month
    assert bought.break_even_hours_per_month == pytest.approx((30_000 / 48 + 300) / 3.5, rel=1e-12)


def test_rent_below_hosting_never_pays_a_purchase_back() -> None:
    bought = buy(1, 30_000, 300, 48, 0.1, 1.0, 100, 0.1)
    assert bought.payback_months is None
    assert bought.npv_usd < 0
    assert math.isfinite(bought.npv_usd)


def test_an_array_of_factors_gives_the_values_of_each() -> None:
    traffic = np.array([0.5, 1.0, 2.0])
    many = npv_usd(change(), {**neutral(), "traffic": traffic})
    each = [npv_usd(change(), {**neutral(), "traffic": float(value)}) for value in traffic]
    assert np.asarray(many).tolist() == each
