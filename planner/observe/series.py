"""Increases of counters between scrapes: restarts start a counter from zero, and where scrapes are missing nothing is known.

Prometheus' own ``increase()`` extrapolates to the window's ends; sums over windows would then not be what was counted. Here an
increase lies at the scrape that showed it, so windows add up to the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from planner.observe.prometheus_http import Series
from planner.workload import Bools, Floats, Ints
from traces.problems import one_problem

GAP_INTERVALS: Final = 3.0
"""Scrapes further apart than this many usual intervals are a gap: a window that one touches is left out."""
TARGET_LABELS: Final = ("job", "instance")


@dataclass(frozen=True, slots=True, eq=False)
class Scrapes:
    """When each target was seen."""

    interval_s: float
    """Median time between two scrapes of a target."""
    by_target: Mapping[tuple[str, ...], Floats]

    def covered(self, edges_s: Floats) -> Bools:
        """Which windows ``edges_s[i]..edges_s[i+1]`` no target has a gap in."""
        whole = np.ones(len(edges_s) - 1, dtype=np.bool_)
        for at_s in self.by_target.values():
            # an instance that comes or goes for good is no gap; one that comes back is
            wide = np.flatnonzero(np.diff(at_s) > GAP_INTERVALS * self.interval_s)
            for place in wide.tolist():
                whole &= (edges_s[1:] <= at_s[place]) | (edges_s[:-1] >= at_s[place + 1])
        first_s = min((float(at_s[0]) for at_s in self.by_target.values()), default=np.inf)
        last_s = max((float(at_s[-1]) for at_s in self.by_target.values()), default=-np.inf)
        reach_s = GAP_INTERVALS * self.interval_s
        covered: Bools = whole & (edges_s[:-1] >= first_s - reach_s) & (edges_s[1:] <= last_s + reach_s)
        return covered


def target_of(series: Series) -> tuple[str, ...]:
    """The scraped process that a series belongs to."""
    return tuple(series.labels.get(name, "") for name in TARGET_LABELS)


def scrapes_of(series: Iterable[Series]) -> Scrapes:
    """From a metric that every scrape of a target has. Raises ValueError if a target was seen less than twice."""
    by_target: dict[tuple[str, ...], Floats] = {}
    for each in series:
        held = by_target.get(target_of(each))
        by_target[target_of(each)] = each.at_s if held is None else np.union1d(held, each.at_s)
    steps = [np.diff(at_s) for at_s in by_target.values()]
    every = np.concatenate(steps) if steps else np.empty(0)
    if not len(every):
        raise ValueError("no target was seen twice")
    return Scrapes(float(np.median(every)), by_target)


@dataclass(frozen=True, slots=True, eq=False)
class Increases:
    """How much a counter rose in each window."""

    n: Floats
    n_resets: int


def increases(series: Series, edges_s: Floats, scrapes: Scrapes) -> Increases:
    """Increase of a counter in each window; the scrapes before the first edge give the value to start from.

    A value below the one before is a restart: the counter began at zero. A series whose target was seen before it first appeared
    also began at zero; of one that was there at the target's first scrape the first value is unknown history.

    Raises:
        InputError: a negative value.
    """
    name = series.labels.get("__name__", "a counter")
    if np.any(series.value < 0):
        raise one_problem(
            f"Prometheus series {name}",
            f"has the value {series.value.min():g}",
            "a counter, 0 or more",
            "Check the exporter",
        )
    before = np.concatenate([[np.nan], series.value[:-1]])
    rise = series.value - before
    is_reset = rise < 0
    rise = np.where(is_reset, series.value, rise)
    seen_s = scrapes.by_target.get(target_of(series))
    was_seen_before = seen_s is not None and seen_s[0] < series.at_s[0] - 0.5 * scrapes.interval_s
    rise[0] = series.value[0] if was_seen_before else 0.0
    window = np.searchsorted(edges_s, series.at_s, side="left") - 1
    inside = (window >= 0) & (window < len(edges_s) - 1)
    n: Floats = np.bincount(window[inside], weights=rise[inside], minlength=len(edges_s) - 1).astype(np.float64)
    return Increases(n, int(is_reset[inside].sum()))


def total(found: Sequence[Increases], n_windows: int) -> Floats:
    """Sum over series."""
    result: Floats = np.zeros(n_windows)
    for each in found:
        result = result + each.n
    return result


def gauge_at(series: Series, edges_s: Floats, stale_s: float) -> Floats:
    """Last value at or before each edge; 0 where there is none within ``stale_s``."""
    place: Ints = np.searchsorted(series.at_s, edges_s, side="right") - 1
    known = (place >= 0) & (edges_s - series.at_s[np.maximum(place, 0)] <= stale_s)
    value: Floats = np.where(known, series.value[np.maximum(place, 0)], 0.0)
    return value


def gauge_mean(series: Series, edges_s: Floats) -> tuple[Floats, Floats]:
    """Sum and number of samples in each window."""
    window = np.searchsorted(edges_s, series.at_s, side="left") - 1
    inside = (window >= 0) & (window < len(edges_s) - 1)
    size = len(edges_s) - 1
    return (
        np.bincount(window[inside], weights=series.value[inside], minlength=size).astype(np.float64),
        np.bincount(window[inside], minlength=size).astype(np.float64),
    )
