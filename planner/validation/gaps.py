"""Gaps between two logs of the same requests: quantiles of latency, means of stages, with bootstrap intervals.

``gap = (other − reference) / reference``; the reference is what was measured. Resampled are blocks of neighbouring requests, the same
ones in both logs: what the two share (arrivals, sizes, bursts) cancels, as it does in the gap itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from planner.workload import Bools, Floats

LEVELS: Final = (0.50, 0.95, 0.99)
CONFIDENCE: Final = 0.95
N_RESAMPLES: Final = 1000
N_BLOCKS: Final = 20
"""Blocks that a log is divided into: 10 requests each of 200, several busy periods of a queue below saturation."""
STAGES: Final = (
    "queue_wait_s", "switch_s", "controlnet_load_s", "lora_wait_s", "text_s", "denoise_s", "decode_s",
)  # fmt: skip
"""Of a request that was done they sum to its latency."""
TAIL_LEVEL: Final = 0.90


@dataclass(frozen=True, slots=True)
class Gap:
    """One figure in two logs."""

    measured: float
    other: float
    """Simulated, or of the second replay; of several simulations the mean of their figures."""
    ratio: float | None
    """``other / measured − 1``; None where the measured figure is 0."""
    low: float | None
    high: float | None
    """95 % bootstrap interval of the ratio."""


@dataclass(frozen=True, slots=True)
class StageGap:
    """One stage, as means over the same requests."""

    stage: str
    measured_s: float
    other_s: float
    gap_s: float
    low_s: float
    high_s: float
    share_of_latency: float
    """``gap_s`` over the measured mean latency of these requests."""


@dataclass(frozen=True, slots=True, eq=False)
class Pairing:
    """Requests that were done in the measured log and in every other one, in order of arrival."""

    measured: pd.DataFrame
    others: tuple[pd.DataFrame, ...]

    def __len__(self) -> int:
        return len(self.measured)

    def where(self, rows: Bools) -> Pairing:
        """Those requests only."""
        return Pairing(self.measured[rows], tuple(other[rows] for other in self.others))

    def column(self, name: str) -> tuple[Floats, Floats]:
        """``[n]`` measured and ``[n, others]``."""
        mine = self.measured[name].to_numpy(np.float64)
        theirs = np.stack([other[name].to_numpy(np.float64) for other in self.others], axis=1)
        return mine, theirs


def pair(measured: pd.DataFrame, others: Sequence[pd.DataFrame]) -> Pairing:
    """Joins logs by request id."""
    tables = [measured, *others]
    done = [set(table.loc[table["status"] == "done", "request_id"]) for table in tables]
    shared = set.intersection(*done)
    order = [name for name in measured["request_id"] if name in shared]
    rows = [table.set_index("request_id").loc[order] for table in tables]
    return Pairing(rows[0], tuple(rows[1:]))


def latency_gaps(pairing: Pairing, seed: int) -> dict[str, Gap]:
    """``p50``, ``p95``, ``p99`` and ``mean`` of the latency."""
    mine, theirs = pairing.column("latency_s")
    return _gaps(mine, theirs, _resampled_rows(len(mine), seed))


def wait_gaps(pairing: Pairing, seed: int) -> dict[str, Gap]:
    """Likewise of the wait in the queue."""
    mine, theirs = pairing.column("queue_wait_s")
    return _gaps(mine, theirs, _resampled_rows(len(mine), seed))


def service_gaps(pairing: Pairing, seed: int) -> dict[str, Gap]:
    """Likewise from take-up to the end."""
    latency, wait = pairing.column("latency_s"), pairing.column("queue_wait_s")
    return _gaps(latency[0] - wait[0], latency[1] - wait[1], _resampled_rows(len(pairing), seed))


def stage_gaps(pairing: Pairing, seed: int) -> tuple[StageGap, ...]:
    """Every stage; the gaps sum to that of the mean latency."""
    if not len(pairing):
        return ()
    rows = _resampled_rows(len(pairing), seed)
    latency_s = float(pairing.measured["latency_s"].mean())
    found = []
    for stage in STAGES:
        mine, theirs = pairing.column(stage)
        difference = theirs.mean(axis=1) - mine
        low, high = _interval(difference[rows].mean(axis=1))
        gap_s = float(difference.mean())
        found.append(StageGap(stage, float(mine.mean()), float(theirs.mean()), gap_s, low, high, gap_s / latency_s))
    return tuple(found)


def stage_quantiles(pairing: Pairing) -> dict[str, dict[str, tuple[float, float]]]:
    """Stage to quantile to (measured, other), in seconds."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for stage in STAGES:
        mine, theirs = pairing.column(stage)
        found[stage] = {
            _name(level): (float(np.quantile(mine, level)), float(np.quantile(theirs, level, axis=0).mean()))
            for level in LEVELS
        }
    return found


def tail_of(pairing: Pairing) -> Pairing:
    """The slowest tenth of the requests by measured latency."""
    latency_s = pairing.measured["latency_s"].to_numpy(np.float64)
    return pairing.where(latency_s >= np.quantile(latency_s, TAIL_LEVEL))


def carrier(stages: Sequence[StageGap]) -> str:
    """The stage whose gap is the largest in the direction of their sum; empty if there is none."""
    total_s = sum(stage.gap_s for stage in stages)
    if not stages or total_s == 0.0:
        return ""
    sign = math.copysign(1.0, total_s)
    return max(stages, key=lambda stage: (sign * stage.gap_s, stage.stage)).stage


def _gaps(mine: Floats, theirs: Floats, rows: npt.NDArray[np.int64]) -> dict[str, Gap]:
    found: dict[str, Gap] = {}
    for name, statistic in _statistics().items():
        measured, other = float(statistic(mine, 0)), float(np.mean(statistic(theirs, 0)))
        if measured <= 0.0:
            found[name] = Gap(measured, other, None, None, None)
            continue
        resampled = statistic(mine[rows], 1)  # [resamples]
        others = statistic(theirs[rows], 1).mean(axis=1)  # [resamples, others] -> [resamples]
        kept = resampled > 0.0
        low, high = _interval(others[kept] / resampled[kept] - 1.0)
        found[name] = Gap(measured, other, other / measured - 1.0, low, high)
    return found


def _statistics() -> Mapping[str, _Statistic]:
    return {**{_name(level): _Statistic(level) for level in LEVELS}, "mean": _Statistic(None)}


@dataclass(frozen=True, slots=True)
class _Statistic:
    level: float | None

    def __call__(self, values: Floats, axis: int) -> Floats:
        if self.level is None:
            return np.asarray(values.mean(axis=axis))
        return np.asarray(np.quantile(values, self.level, axis=axis))


def _resampled_rows(n: int, seed: int) -> npt.NDArray[np.int64]:
    """``[resamples, n]``: circular blocks of neighbours (Künsch 1989)."""
    length = max(1, math.ceil(n / N_BLOCKS))
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, n, size=(N_RESAMPLES, math.ceil(n / length)))
    rows = (starts[:, :, None] + np.arange(length)) % n
    return rows.reshape(N_RESAMPLES, -1)[:, :n]


def _interval(values: Floats) -> tuple[float, float]:
    low, high = np.quantile(values, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return float(low), float(high)


def _name(level: float) -> str:
    return f"p{100 * level:g}"
