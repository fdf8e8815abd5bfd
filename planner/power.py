"""How much traffic, and for how long, a test on live requests needs before it can tell two fleets apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from scipy import stats

from planner.workload import Floats

SIGNIFICANCE: Final = 0.05
POWER: Final = 0.8
SHARES: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
DURATION_MAX_H: Final = 14 * 24.0
BATCHES_MIN: Final = 10


@dataclass(frozen=True, slots=True)
class Group:
    """What one fleet's requests look like."""

    mean: float
    variance: float
    design_effect: float


@dataclass(frozen=True, slots=True)
class TestSize:
    """The smallest test."""

    __test__ = False  # not for pytest

    share_ratio: float
    duration_h: float
    n_new: int
    n_old: int


def group_of(values: Floats) -> Group:
    """Mean, variance and design effect of figures in order of arrival (n of at least 20).

    The design effect is the variance of batch means against what independent requests would give (batches of about the square
    root of n, never less than 1): two requests that waited in one queue say less than two.
    """
    n = len(values)
    variance = float(values.var(ddof=1)) if n > 1 else 0.0
    size = max(1, math.isqrt(n))
    n_batches = n // size
    if n_batches < BATCHES_MIN or variance == 0.0:
        return Group(float(values.mean()), variance, 1.0)
    means = values[: n_batches * size].reshape(n_batches, size).mean(axis=1)
    return Group(float(values.mean()), variance, max(1.0, float(means.var(ddof=1)) * size / variance))


def detectable(
    old: Group,
    new: Group,
    difference: float,
    arrivals_per_h: float,
    *,
    is_one_sided: bool,
    shares: Sequence[float] = SHARES,
) -> TestSize | None:
    """The smallest share, and then the shortest time, with which a difference is found; None if 14 days of any share do not do.

    Two-sample z-test of means with unequal groups: ``(z_α + z_β)² · (d_new·σ²_new/n_new + d_old·σ²_old/n_old) ≤ difference²``,
    α of 5 % (one- or two-sided), power 80 %, d the design effects (Cohen 1988, ch. 2; Kish 1965 for d).
    """
    if difference == 0.0 or arrivals_per_h <= 0.0:
        return None
    alpha = SIGNIFICANCE if is_one_sided else SIGNIFICANCE / 2
    z = float(stats.norm.isf(alpha) + stats.norm.ppf(POWER))
    for share in shares:
        spread = new.design_effect * new.variance / share + old.design_effect * old.variance / (1 - share)
        n = max(
            z**2 * spread / difference**2, 100 / share
        )  # the normal law needs some tens of requests in the smaller group
        hours = n / arrivals_per_h
        if hours <= DURATION_MAX_H:
            n_new = math.ceil(n * share)
            return TestSize(share, hours, n_new, math.ceil(n) - n_new)
    return None
