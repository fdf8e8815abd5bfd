"""What a simulation has to reach, by load, and whether it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

import numpy as np

from planner.simulator import SimulationResult
from planner.validation.gaps import Gap

Band = Literal["light", "70 %", "90 %", "past saturation"]
BAND_UNTIL: Final[tuple[tuple[float, Band], ...]] = ((0.55, "light"), (0.80, "70 %"), (1.0, "90 %"))
"""Load below which a run belongs to a band: halfway between the loads after which the bands are called, roughly."""
GAP_MAX: Final[Mapping[Band, Mapping[str, float]]] = MappingProxyType({
    "light": {"p50": 0.03, "p95": 0.05, "p99": 0.08},
    "70 %": {"p50": 0.03, "p95": 0.05, "p99": 0.08},
    "90 %": {"p50": 0.10, "p95": 0.12},
    "past saturation": {},
})  # fmt: skip
"""Largest gap of a latency quantile. Past saturation waits grow for as long as the run lasts: only the verdict is compared."""
BUSY_GAP_MAX: Final = 0.02
"""Largest difference of a pool's busy ratio, in shares of the time; not past saturation."""


@dataclass(frozen=True, slots=True)
class Check:
    """One figure against its bound."""

    name: str
    gap: float
    bound: float
    floor: float | None
    """Size of the gap between two replays of the engine; None without a second one."""

    @property
    def allowed(self) -> float:
        """The bound, or the floor where that is larger: nothing agrees better with an engine than the engine itself."""
        return self.bound if self.floor is None else max(self.bound, self.floor)

    @property
    def holds(self) -> bool:
        """Whether the gap is allowed."""
        return abs(self.gap) <= self.allowed


def load_of(log: SimulationResult, n_replicas: int) -> float:
    """Mean service time of what was done × requests offered a second / base replicas; NaN if nothing was done."""
    done = log.requests[log.requests["status"] == "done"]
    service_s = (done["end_s"] - done["start_s"]).to_numpy(np.float64)
    if not len(service_s) or log.offered_until_s <= 0:
        return float("nan")
    return float(service_s.mean()) * len(log.requests) / log.offered_until_s / n_replicas


def is_past_saturation(log: SimulationResult, n_replicas: int) -> bool:
    """Whether more work was offered than the base replicas can do, or the waits kept growing (the simulator's own rule).

    That rule needs 250 requests; the first needs no statistics but the mean service time.
    """
    return log.saturated or load_of(log, n_replicas) >= 1.0


def band_of(load: float) -> Band:
    """The band that a load belongs to."""
    return next((name for until, name in BAND_UNTIL if load < until), "past saturation")


def latency_checks(band: Band, gaps: Mapping[str, Gap], floors: Mapping[str, Gap] | None) -> tuple[Check, ...]:
    """Quantiles of the latency against the band's bounds."""
    found = []
    for name, bound in GAP_MAX[band].items():
        ratio = gaps[name].ratio
        floor = None if floors is None else floors[name].ratio
        found.append(
            Check(f"latency {name}", float("inf") if ratio is None else ratio, bound, None if floor is None else abs(floor))
        )  # fmt: skip
    return tuple(found)


def busy_checks(
    band: Band,
    measured: Mapping[str, float],
    simulated: Mapping[str, float],
    again: Mapping[str, float] | None,
) -> tuple[Check, ...]:
    """Busy ratios of the pools."""
    if band == "past saturation":
        return ()
    found = []
    for pool, ratio in measured.items():
        floor = None if again is None or pool not in again else abs(again[pool] - ratio)
        found.append(Check(f"busy {pool}", simulated.get(pool, 0.0) - ratio, BUSY_GAP_MAX, floor))
    return tuple(found)
