"""From charts to one verdict with its evidence.

Causes are told apart in a fixed order. More or other traffic also slows shared ControlNet workers and fills queues, and a slower engine
also fills queues; neither works the other way round. So *traffic changed* goes before *engine drifted*, and that before *capacity
short*; what else signalled is in ``also``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from planner.watch.baseline import CAUSES
from planner.watch.charts import WINDOWS_MIN, Chart, Course, run_chart
from planner.watch.windows import Tally, WindowTable

Verdict = Literal["in_plan", "traffic_changed", "engine_drifted", "capacity_short"]
ORDER: Final[tuple[Verdict, ...]] = ("traffic_changed", "engine_drifted", "capacity_short")
RECENT_S: Final = 1800.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One chart at the end of the live windows."""

    measure: str
    direction: str
    is_on: bool
    planned: float
    """Mean of one trial, in plan; for stages the deviation 0."""
    seen: float | None
    """The same since the shift began, or over the last half hour; None without a trial."""
    looked_for: float
    """The shift that the chart is made for."""
    changed_at_s: float | None
    signalled_at_s: float | None
    n_signals: int
    threshold: float
    """Evidence that a change of state needs."""
    score_ratio: float
    """Evidence over it."""
    delay_s: float | None
    """Mean time in which the shift would be found at this traffic; None if there are no trials."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The state at the end of the live windows."""

    verdict: Verdict
    also: tuple[Verdict, ...]
    findings: tuple[Finding, ...]
    n_windows: int
    begin_s: float
    end_s: float

    @property
    def signals(self) -> tuple[Finding, ...]:
        """Charts that are on."""
        return tuple(finding for finding in self.findings if finding.is_on)

    def rate_ratio(self) -> float | None:
        """Live traffic over planned since it changed; None if its charts are off."""
        rates = [finding for finding in self.signals if finding.measure == "traffic_rate"]
        return rates[0].seen / rates[0].planned if rates and rates[0].seen is not None else None


def judge(charts: Sequence[Chart], live: WindowTable, thresholds: Sequence[float]) -> Judgement:
    """Runs every chart over the live windows, each with its own threshold."""
    findings = []
    for chart, h in zip(charts, thresholds, strict=True):
        tally = live.tallies[chart.measure]
        findings.append(_finding(chart, tally, live, run_chart(chart.evidence(tally), h), h))
    on = {finding.measure for finding in findings if finding.is_on}
    causes = [cause for cause in ORDER if on & set(CAUSES[cause])]
    return Judgement(
        causes[0] if causes else "in_plan", tuple(causes[1:]), tuple(findings), len(live), float(live.start_s[0]),
        float(live.start_s[-1]) + live.window_s,
    )  # fmt: skip


def _finding(chart: Chart, tally: Tally, live: WindowTable, course: Course, h: float) -> Finding:
    recent = max(0, len(live) - max(1, round(RECENT_S / live.window_s)))
    begin = course.changed_at if course.changed_at is not None else recent
    n, total = float(tally.n[begin:].sum()), float(tally.total[begin:].sum())
    weight = tally.n[begin:] if n > 0 else np.ones(len(live) - begin)
    planned, shifted = (
        float(np.average(np.broadcast_to(v, (len(live),))[begin:], weights=weight)) for v in (chart.mean, chart.shifted)
    )
    gain = chart.gain_per_window(float(tally.n.mean()))
    return Finding(
        chart.measure, chart.direction, bool(course.is_on[-1]), planned, total / n if n > 0 else None, shifted - planned,
        None if course.changed_at is None else float(live.start_s[min(course.changed_at, len(live) - 1)]),
        None if course.since is None else float(live.start_s[course.since]) + live.window_s,
        course.n_signals, h, float(course.score[-1]) / h, max(h / gain, WINDOWS_MIN) * live.window_s if gain > 0 else None,
    )  # fmt: skip
