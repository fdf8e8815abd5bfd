"""Ranking and selection: where further repetitions help most, and how probable it is that the choice is right.

The cost of an allocation is known, whether it keeps the promise is estimated: the best allocation is the cheapest whose mean
attainment reaches the target. Wrong is either choosing one that does not, or passing over a cheaper one that does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import special

from planner.workload import Floats


def ocba_repetitions(
    means: Sequence[float], variances: Sequence[float], n_so_far: Sequence[int], n_more: int
) -> list[int]:
    """Optimal computing budget allocation for the smallest mean (Chen, Lin, Yücesan, Chick 2000).

    Shares of the total: N_i ∝ (σ_i / δ_i)², with δ_i the distance to the smallest mean, and N_best = σ_best √Σ (N_i / σ_i)².

    Returns:
        Further repetitions of each alternative, ``n_more`` in all; what rounding leaves over goes to the best.

    Raises:
        ValueError: fewer than two alternatives, a variance that is not positive, or two smallest means.
    """
    mean, variance = np.asarray(means, dtype=np.float64), np.asarray(variances, dtype=np.float64)
    best = int(np.argmin(mean))
    gap = np.delete(mean - mean[best], best)
    if len(mean) < 2 or (variance <= 0).any() or (gap <= 0).any():
        raise ValueError("needs two alternatives or more with positive variances, and one smallest mean")
    others = np.delete(variance, best)
    shares = np.insert(others / gap**2, best, 0.0)
    shares[best] = math.sqrt(variance[best] * float((np.delete(shares, best) ** 2 / others).sum()))
    return _top_up(shares, n_so_far, n_more, best)


def feasibility_repetitions(
    margins: Sequence[float], deviations: Sequence[float], n_so_far: Sequence[int], n_more: int
) -> list[int]:
    """Shares for telling on which side of a threshold each mean lies: N_i ∝ (σ_i / margin_i)² (Szechtman, Yücesan 2008).

    An alternative without spread needs none; one on the threshold itself, which no number would settle, counts as half a
    standard deviation away.

    Returns:
        Further repetitions of each, ``n_more`` in all; all 0 if none has any spread.
    """
    deviation = np.asarray(deviations, dtype=np.float64)
    margin = np.maximum(np.abs(np.asarray(margins, dtype=np.float64)), 0.5 * deviation)
    shares = np.where(deviation > 0, (deviation / np.where(margin > 0, margin, 1.0)) ** 2, 0.0)
    if not shares.any():
        return [0] * len(shares)
    return _top_up(shares, n_so_far, n_more, int(np.argmax(shares)))


def _top_up(shares: Floats, n_so_far: Sequence[int], n_more: int, rest_to: int) -> list[int]:
    """Brings the totals as near to ``shares`` as adding allows: who already has too much gets none."""
    have = np.asarray(n_so_far, dtype=np.float64)
    is_open = shares > 0
    wanted = np.zeros(len(shares))
    while is_open.any():
        total = float(have[is_open].sum()) + n_more
        wanted = np.where(is_open, total * shares / shares[is_open].sum(), have)
        over = is_open & (wanted < have)
        if not over.any():
            break
        is_open &= ~over
    extra = [math.floor(value + 1e-9) for value in np.maximum(wanted - have, 0.0)]
    extra[rest_to] += n_more - sum(extra)
    return extra


def probability_at_least(values: Sequence[float], target: float) -> float:
    """Posterior probability that the mean of independent values is at least the target (Student's t, flat prior).

    Raises:
        ValueError: there are fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"got {len(values)} values, needs two or more")
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    if deviation == 0.0:
        return 1.0 if mean >= target else 0.0
    return float(special.stdtr(len(values) - 1, (mean - target) / (deviation / math.sqrt(len(values)))))


def correct_selection_probability(chosen: float, cheaper: Sequence[float]) -> float:
    """Lower bound (Bonferroni) on the probability that the chosen one meets the target and no cheaper one does.

    Args:
        chosen: probability that the chosen one meets it.
        cheaper: the same of each cheaper one. It holds however the estimates depend on one another: they share arrivals.
    """
    return max(0.0, 1.0 - (1.0 - chosen) - math.fsum(cheaper))
