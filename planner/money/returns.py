"""Changing as an investment: net present value, payback, break-even traffic, and how each unsure input moves them.

GPUs grow and shrink in proportion to traffic and to the GPU time of a request, without rounding to whole GPUs, and never below
one a service; a fleet that already has only one a service grows once its busiest hour fills ``FULL_RATIO`` of it. Factors are
drawn independently of each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from planner.money.assumptions import Horizon
from planner.traffic import stream_seed

Floats = npt.NDArray[np.float64]
FACTORS: Final = (
    "traffic", "gpu_price", "operation", "migration", "gpu_time_today", "gpu_time_new",
)  # fmt: skip
BREAK_EVEN_FROM: Final = 0.001
BREAK_EVEN_TO: Final = 100.0
FULL_RATIO: Final = 0.7


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two fleets, USD a month at the factors 1."""

    n_gpus: float
    n_services: int
    usd_per_gpu: float
    operation_usd: float
    fixed_usd: float
    """Storage."""
    by_traffic_usd: float
    """Egress less the value earned: grows with traffic."""
    slack_ratio: float = 1.0
    """Work may grow by this factor before a GPU is added."""


@dataclass(frozen=True, slots=True)
class Change:
    """From today's fleet to the recommended one."""

    today: Side
    new: Side
    migration_usd: float
    double_running_months: float
    horizon: Horizon


def monthly_usd(side: Side, factor: Mapping[str, float | Floats], gpu_time: str) -> float | Floats:
    """Cost of a month at these factors, before growth."""
    gpus = np.maximum(side.n_services, side.n_gpus / side.slack_ratio * factor["traffic"] * factor[gpu_time])
    return (
        gpus * side.usd_per_gpu * factor["gpu_price"]
        + side.operation_usd * factor["operation"]
        + side.fixed_usd
        + side.by_traffic_usd * factor["traffic"]
    )


def investment_usd(change: Change, factor: Mapping[str, float | Floats]) -> float | Floats:
    """What is spent before the first month: effort, and the new fleet beside the old one."""
    new = change.new
    gpus = np.maximum(new.n_services, new.n_gpus / new.slack_ratio * factor["traffic"] * factor["gpu_time_new"])
    beside = gpus * new.usd_per_gpu * factor["gpu_price"] * change.double_running_months
    return change.migration_usd * factor["migration"] + beside


def savings_usd(change: Change, factor: Mapping[str, float | Floats]) -> list[float | Floats]:
    """Saving of each month, 1..n_months."""
    horizon, found = change.horizon, []
    for month in range(horizon.n_months):
        grown = dict(factor)
        grown["traffic"] = factor["traffic"] * (1 + horizon.traffic_growth_ratio_per_month) ** month
        grown["gpu_price"] = factor["gpu_price"] * (1 + horizon.price_change_ratio_per_month) ** month
        found.append(
            monthly_usd(change.today, grown, "gpu_time_today") - monthly_usd(change.new, grown, "gpu_time_new")
        )
    return found


def npv_usd(change: Change, factor: Mapping[str, float | Floats]) -> float | Floats:
    """Discounted savings less the investment; each month's saving counts at its end."""
    rate = 1 + change.horizon.discount_ratio_per_year
    total = -investment_usd(change, factor)
    for month, saving in enumerate(savings_usd(change, factor), start=1):
        total = total + saving / rate ** (month / 12)
    return total


def payback_months(change: Change, factor: Mapping[str, float]) -> float | None:
    """Months until the undiscounted savings have paid the investment; None if they do not within the horizon."""
    left = float(investment_usd(change, factor))
    if left <= 0:
        return 0.0
    for month, saving in enumerate(savings_usd(change, factor)):
        if saving > 0 and saving >= left:
            return month + left / float(saving)
        left -= float(saving)
    return None


def slack_ratio(n_gpus: float, n_services: int, peak_hour_load_gpus: float | None) -> float:
    """How far the work of a fleet may grow before it needs another GPU; 1 for a fleet that is larger than it must be at least."""
    if n_gpus > n_services or not peak_hour_load_gpus:
        return 1.0
    return max(1.0, FULL_RATIO * n_gpus / peak_hour_load_gpus)


def neutral() -> dict[str, float]:
    """Every factor 1."""
    return dict.fromkeys(FACTORS, 1.0)


def break_even_traffic(change: Change) -> float | None:
    """Factor on the traffic above which the net present value stays positive; None if there is none in 0.001..100.

    Fleets are scaled in proportion; 0.001 means that it pays at any traffic looked at.
    """
    grid = np.geomspace(BREAK_EVEN_FROM, BREAK_EVEN_TO, 501)
    values = np.asarray(npv_usd(change, {**neutral(), "traffic": grid}), dtype=np.float64)
    if values[-1] <= 0:
        return None
    losing = np.flatnonzero(values <= 0)
    if not len(losing):
        return BREAK_EVEN_FROM
    low, high = int(losing[-1]), int(losing[-1]) + 1
    share = -values[low] / (values[high] - values[low])  # nearly straight between neighbours 2.3 % apart
    return float(grid[low] + share * (grid[high] - grid[low]))


@dataclass(frozen=True, slots=True)
class Swing:
    """What one input does to the net present value."""

    factor: str
    low: float
    high: float
    npv_at_low_usd: float
    npv_at_high_usd: float

    @property
    def width_usd(self) -> float:
        """How far apart the two values are."""
        return abs(self.npv_at_high_usd - self.npv_at_low_usd)


def tornado(change: Change, ranges: Mapping[str, tuple[float, float]]) -> list[Swing]:
    """One input at a time at its ends, the others at 1; the widest swing first."""
    swings = [
        Swing(
            name, low, high,
            float(npv_usd(change, {**neutral(), name: low})), float(npv_usd(change, {**neutral(), name: high})),
        )
        for name, (low, high) in ranges.items()
    ]  # fmt: skip
    return sorted(swings, key=lambda swing: (-swing.width_usd, swing.factor))


@dataclass(frozen=True, slots=True)
class Spread:
    """What the draws give."""

    n_draws: int
    npv_p05_usd: float
    npv_p50_usd: float
    npv_p95_usd: float
    saving_p05_usd_per_month: float
    saving_p50_usd_per_month: float
    saving_p95_usd_per_month: float
    probability_npv_positive: float
    sampled: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def monte_carlo(change: Change, ranges: Mapping[str, tuple[float, float]], n_draws: int, seed: int) -> Spread:
    """All inputs at once, each triangular with its peak at 1; the draws of one do not depend on which others vary."""
    factor: dict[str, float | Floats] = dict(neutral())
    for name, (low, high) in ranges.items():
        if low < high:
            rng = np.random.default_rng(stream_seed(seed, f"money {name}"))
            factor[name] = rng.triangular(low, 1.0, high, n_draws)
    npv = np.broadcast_to(np.asarray(npv_usd(change, factor), dtype=np.float64), (n_draws,))
    saving = np.broadcast_to(np.asarray(savings_usd(change, factor)[0], dtype=np.float64), (n_draws,))
    low5, mid, high95 = (float(value) for value in np.quantile(npv, (0.05, 0.5, 0.95)))
    s5, s50, s95 = (float(value) for value in np.quantile(saving, (0.05, 0.5, 0.95)))
    return Spread(n_draws, low5, mid, high95, s5, s50, s95, float((npv > 0).mean()), dict(ranges))


@dataclass(frozen=True, slots=True)
class Bought:
    """GPUs bought instead of rented, as an investment."""

    n_gpus: int
    invested_usd: float
    rent_avoided_usd_per_month: float
    hosting_usd_per_month: float
    npv_usd: float
    payback_months: float | None
    break_even_hours_per_month: float
    """Rented hours a GPU and month above which buying is cheaper over its life, undiscounted; compare with how long it is needed."""


def buy(
    n_gpus: int, purchase_usd: float, hosting_usd: float, life_months: int, resale_ratio: float,
    price_usd_per_gpu_hour: float, hours_per_month: float, discount_ratio_per_year: float,
) -> Bought:  # fmt: skip
    """Buys ``n_gpus`` that would else be rented ``hours_per_month``; they are sold for ``resale_ratio`` at the end of their life."""
    rent, hosting = n_gpus * price_usd_per_gpu_hour * hours_per_month, n_gpus * hosting_usd
    invested, resale = n_gpus * purchase_usd, n_gpus * purchase_usd * resale_ratio
    rate = 1 + discount_ratio_per_year
    npv = -invested + sum((rent - hosting) / rate ** (m / 12) for m in range(1, life_months + 1))
    npv += resale / rate ** (life_months / 12)
    gain = rent - hosting
    months = invested / gain if gain > 0 and invested / gain <= life_months else None
    per_month = (purchase_usd * (1 - resale_ratio)) / life_months + hosting_usd
    return Bought(n_gpus, invested, rent, hosting, npv, months, per_month / price_usd_per_gpu_hour)
