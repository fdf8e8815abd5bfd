"""What a latency distribution earns a month: completion, churn, price and penalties, from the user's own curves.

A plan keeps three quantiles of latency. Between them latency is taken as straight; below the median as the median and above p99
as p99, for every fleet alike, so that nothing is credited that the plan does not record.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.money.assumptions import Value
from planner.plan_record import TopologyRow


@dataclass(frozen=True, slots=True)
class ValueLines:
    """USD a month; penalties and churn are negative."""

    completion_usd: float
    churn_usd: float
    price_usd: float
    penalty_usd: float

    @property
    def total_usd(self) -> float:
        """The sum of the lines."""
        return self.completion_usd + self.churn_usd + self.price_usd + self.penalty_usd


def is_valued(value: Value) -> bool:
    """Whether anything is switched on."""
    return value.completion.is_on or value.churn.is_on or value.price.is_on or value.penalty_usd_per_late_image > 0


def value_lines(row: TopologyRow, value: Value, hours_per_month: float) -> ValueLines | None:
    """What a topology's latency earns; None if the row has no latencies."""
    p50_s, p95_s, p99_s = row.latency_p50_s.mean, row.latency_p95_s.mean, row.latency_p99_s.mean
    in_time_per_s, attained = row.in_slo_images_per_s.mean, row.slo_attainment_ratio.mean
    if p50_s is None or p95_s is None or p99_s is None or in_time_per_s is None or not attained:
        return None
    seconds = 3600.0 * hours_per_month
    offered = in_time_per_s / attained * seconds  # images are taken to be late as often as requests
    completion_usd = churn_usd = price_usd = 0.0
    if value.completion.is_on:
        levels = np.linspace(0.0, 1.0, 2001)
        latency_s = np.interp(levels, [0.5, 0.95, 0.99], [p50_s, p95_s, p99_s])
        share = float(np.interp(latency_s, value.completion.latency_s, value.completion.completion_ratio).mean())
        completion_usd = offered * share * (value.completion.value_usd_per_image or 0.0)
    if value.churn.is_on:
        left = float(np.interp(p95_s, value.churn.latency_s, value.churn.churn_ratio_per_month))
        churn_usd = -left * value.churn.n_customers * value.churn.value_usd_per_customer
    if value.price.is_on:
        price_usd = offered * float(np.interp(p95_s, value.price.latency_s, value.price.price_usd_per_image))
    late = offered - in_time_per_s * seconds
    return ValueLines(completion_usd, churn_usd, price_usd, -late * value.penalty_usd_per_late_image)
