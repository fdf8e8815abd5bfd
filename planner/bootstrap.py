"""Intervals for percentiles of one run, and what the uncertainty of a plan is made of: days, profile, service noise.

Latencies of neighbouring requests depend on each other, so whole stretches of time are resampled, not single requests (moving
blocks, Künsch 1989; whole days where the trace has them).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from planner.statistics import LATENCY_LEVELS, Interval
from planner.workload import Floats

N_RESAMPLES: Final = 400
BLOCKS_MIN: Final = 20
"""Fewer blocks than this say too little about how blocks differ."""


def percentile_intervals(
    latency_s: Floats,
    *,
    levels: Sequence[float] = LATENCY_LEVELS,
    confidence: float = 0.95,
    block: int | None = None,
    seed: int = 0,
) -> dict[float, Interval]:
    """Level to the percentile and its interval, for latencies in order of arrival (no NaN).

    Percentile bootstrap over circular blocks. Bounds are NaN if there are fewer than 20 blocks. It says how much this
    window's requests could have differed, not how much another day would: that needs repetitions.

    Args:
        block: requests in a block; None: twice the square root of their number, long against a queue's memory in stable runs.

    Raises:
        ValueError: there are no latencies, or a value is out of range.
    """
    n = len(latency_s)
    if not n:
        raise ValueError("percentiles need at least one latency")
    if not 0 < confidence < 1 or not all(0 < level < 1 for level in levels):
        raise ValueError(f"confidence {confidence} and levels {list(levels)} need to lie between 0 and 1")
    length = block if block is not None else max(1, math.ceil(2 * math.sqrt(n)))
    if length < 1:
        raise ValueError(f"block is {length}, needs 1 or more")
    values = np.quantile(latency_s, levels)
    n_blocks = math.ceil(n / length)
    if n_blocks < BLOCKS_MIN:
        return {q: Interval(float(v), math.nan, math.nan, 1, confidence) for q, v in zip(levels, values, strict=True)}
    rng = np.random.default_rng(seed)
    found = np.empty((N_RESAMPLES, len(levels)))
    offsets = np.arange(length)
    for row in range(N_RESAMPLES):
        starts = rng.integers(0, n, size=n_blocks)
        rows = ((starts[:, None] + offsets) % n).ravel()[:n]
        found[row] = np.quantile(latency_s[rows], levels)
    low, high = np.quantile(found, [0.5 - confidence / 2, 0.5 + confidence / 2], axis=0)
    return {
        q: Interval(float(v), float(a), float(b), N_RESAMPLES, confidence)
        for q, v, a, b in zip(levels, values, low, high, strict=True)
    }


@dataclass(frozen=True, slots=True)
class Source:
    """One source of uncertainty, varied while the others stay."""

    name: str
    values: tuple[float, ...]
    missing: str = ""
    """Why it could not be varied; then there are no values."""

    @property
    def standard_deviation(self) -> float:
        """Over its values; NaN if it is missing."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else math.nan


def variance_shares(sources: Sequence[Source]) -> Mapping[str, float]:
    """Share of each source in the sum of their variances; 0 for one that is missing. Interactions are not separated."""
    variances = {source.name: source.standard_deviation**2 for source in sources}
    total = sum(value for value in variances.values() if not math.isnan(value))
    return {name: 0.0 if math.isnan(value) or total == 0 else value / total for name, value in variances.items()}


def paired_difference(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t-interval of the mean of ``second[i] − first[i]``: repetitions that share arrivals, draw and noise.

    Raises:
        ValueError: the two are not of one length.
    """
    from planner.statistics import t_interval

    if len(first) != len(second):
        raise ValueError(f"pairs need as many of each, got {len(first)} and {len(second)}")
    return t_interval(np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64), level)
