"""Drawings of the validation report as numbers: paths and bars for inline SVG, so that the page needs no script and no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from planner.validation.comparison import Comparison
from planner.validation.gaps import STAGES, Gap
from planner.workload import Floats

WIDTH: Final = 420
HEIGHT: Final = 180
N_POINTS: Final = 101
COLOURS: Final = {"measured": "#000000", "simulated": "#0072b2", "again": "#d55e00"}
"""Okabe–Ito; lines also differ in their dashes."""
DASHES: Final = {"measured": "", "simulated": "6 3", "again": "2 2"}
STAGE_COLOURS: Final = ("#999999", "#cc79a7", "#f0e442", "#d55e00", "#56b4e9", "#0072b2", "#009e73")


@dataclass(frozen=True, slots=True)
class Line:
    """One distribution."""

    label: str
    path: str
    colour: str
    dash: str


@dataclass(frozen=True, slots=True)
class Distribution:
    """Latencies of one replay: share of the requests (upwards) against seconds."""

    lines: tuple[Line, ...]
    seconds_max: float
    words: str


@dataclass(frozen=True, slots=True)
class Piece:
    """One stage of a bar."""

    stage: str
    x: float
    width: float
    colour: str
    words: str


@dataclass(frozen=True, slots=True)
class StageBar:
    """Mean seconds of all stages of one log."""

    label: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """One gap in the overview: a dot with its interval, beside what is allowed. Units of the drawing."""

    label: str
    y: int
    x: float
    low: float
    high: float
    allowed_x: float
    allowed_width: float
    floor_x: float | None
    holds: bool
    words: str


def distribution(comparison: Comparison) -> Distribution:
    """Measured, simulated and, if there is one, the second replay."""
    shares = np.linspace(0.0, 1.0, N_POINTS)
    mine, theirs = comparison.pairing.column("latency_s")
    curves = {
        "measured": np.quantile(mine, shares),
        "simulated": np.quantile(theirs, shares, axis=0).mean(axis=1),
    }
    labels = {"measured": "measured", "simulated": "simulated", "again": "second replay"}
    if comparison.again is not None:
        curves["again"] = np.quantile(comparison.again.column("latency_s")[1][:, 0], shares)
    longest_s = max(float(curve[-1]) for curve in curves.values()) or 1.0
    lines = tuple(
        Line(labels[name], _path(curve / longest_s, shares), COLOURS[name], DASHES[name])
        for name, curve in curves.items()
    )
    words = ", ".join(
        f"{name} {gap.measured:.3f} s measured, {gap.other:.3f} s simulated"
        for name, gap in comparison.latency.items()
        if name != "mean"
    )
    return Distribution(lines, longest_s, f"Latencies of {len(comparison.pairing)} requests: {words}.")


def stage_bars(comparison: Comparison) -> tuple[StageBar, ...]:
    """Mean stages as bars of one scale."""
    measured = {item.stage: item.measured_s for item in comparison.stages}
    simulated = {item.stage: item.other_s for item in comparison.stages}
    logs = {"measured": measured, "simulated": simulated}
    if comparison.stages_floor is not None:
        logs["second replay"] = {item.stage: item.other_s for item in comparison.stages_floor}
    longest_s = max(sum(log.values()) for log in logs.values()) or 1.0
    bars = []
    for label, log in logs.items():
        x = 0.0
        pieces = []
        for stage, colour in zip(STAGES, STAGE_COLOURS, strict=True):
            width = WIDTH * log[stage] / longest_s
            if width >= 0.05:
                pieces.append(Piece(stage, round(x, 2), round(width, 2), colour, f"{stage} {log[stage]:.4f} s"))
            x += width
        bars.append(StageBar(label, tuple(pieces)))
    return tuple(bars)


def overview(comparisons: Sequence[Comparison]) -> tuple[tuple[Mark, ...], float]:
    """A mark for every bounded quantile of every run, and the gap at the edge of the drawing."""
    rows = []
    for comparison in comparisons:
        for check in comparison.checks:
            if check.name.startswith("latency "):
                rows.append((comparison, check, comparison.latency[check.name.removeprefix("latency ")]))
    edge = max([0.1, *(_size(gap, check.allowed) for _, check, gap in rows)]) * 1.05
    marks = []
    for number, (comparison, check, gap) in enumerate(rows):
        ratio = gap.ratio or 0.0
        marks.append(
            Mark(
                label=f"{comparison.run.name} {check.name.removeprefix('latency ')}",
                y=16 + 18 * number,
                x=_x(ratio, edge),
                low=_x(ratio if gap.low is None else gap.low, edge),
                high=_x(ratio if gap.high is None else gap.high, edge),
                allowed_x=_x(-check.allowed, edge),
                allowed_width=round(_x(check.allowed, edge) - _x(-check.allowed, edge), 2),
                floor_x=None if check.floor is None else _x(check.floor, edge),
                holds=check.holds,
                words=f"{ratio:+.1%}, allowed ±{check.allowed:.1%}",
            )
        )
    return tuple(marks), edge


def _size(gap: Gap, allowed: float) -> float:
    ends = [value for value in (gap.ratio, gap.low, gap.high, allowed) if value is not None]
    return max(abs(value) for value in ends)


def _x(ratio: float, edge: float) -> float:
    return round(WIDTH / 2 + WIDTH / 2 * min(max(ratio / edge, -1.0), 1.0), 2)


def _path(x: Floats, y: Floats) -> str:
    points = [f"{WIDTH * a:.1f},{HEIGHT * (1 - b):.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    return "M" + "L".join(points)
