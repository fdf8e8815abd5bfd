"""CUSUM charts of log-likelihood ratios: the sequential test behind ``diffplan watch``.

For a window, ``L`` is the log of how much likelier it is under a stated shift than in plan. Page's chart sums it, never below zero:
``S = max(0, S + L)``, and signals at ``S >= h``. If the windows are independent and the in-plan law is right, the mean number of
windows to a false signal is at least ``exp(h)`` (Lorden 1971), so ``h`` is near ``log(windows wanted)``; the mean delay after the shift is near
``h`` over the mean of ``L`` under it, and no other test with this false-alarm rate is faster in the worst case (Moustakides 1986).

Windows of real services are not independent and counts vary more than the law says. Every ``L`` is therefore divided by a dispersion
that the plan's own windows show (quasi-likelihood); with it the bound is an approximation that ``benchmarks/watch.py`` checks.

No single window decides: its ``L`` counts as at most a third of ``h`` either way, which can only make false signals rarer.

Hysteresis: once signalled, a chart stays on until the opposite test, ``T = max(0, T - L)``, reaches the same ``h``: as much evidence
that the shift has gone as it took to believe in it. At the full shift it clears wrongly as rarely as it signals wrongly in plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from planner.watch.windows import Tally
from planner.workload import Bools, Floats

Law = Literal["poisson", "binomial", "normal"]
WINDOWS_MIN: Final = 3
"""Windows that it takes at least to signal, and to clear."""


@dataclass(frozen=True, slots=True, eq=False)
class Chart:
    """One test: a measure, in plan and shifted. ``mean`` may differ by window (a daily rhythm)."""

    measure: str
    direction: Literal["up", "down"]
    law: Law
    mean: Floats
    """Of one trial, in plan; one value for all windows or one each."""
    shifted: Floats
    sd: float = 0.0
    """Of one trial; ``normal`` only."""
    dispersion: float = 1.0
    """Variance of a window over what the law gives, from the plan's own windows; 1 or more."""

    def evidence(self, tally: Tally) -> Floats:
        """``L`` of every window; 0 where there was no trial."""
        n, total = tally.n, tally.total
        mean, shifted = self.mean, self.shifted
        if self.law == "poisson":
            plain = total * np.log(shifted / mean) - n * (shifted - mean)
        elif self.law == "binomial":
            plain = total * np.log(shifted / mean) + (n - total) * np.log((1 - shifted) / (1 - mean))
        else:
            plain = (shifted - mean) / self.sd**2 * (total - n * (mean + shifted) / 2)
        found: Floats = np.where(n > 0, plain / self.dispersion, 0.0)
        return found

    def gain_per_window(self, n: float) -> float:
        """Mean of ``L`` under the shift, for windows of ``n`` trials: ``h`` over it is the delay in windows to be expected."""
        mean, shifted = float(np.mean(self.mean)), float(np.mean(self.shifted))
        if self.law == "poisson":
            plain = shifted * np.log(shifted / mean) - (shifted - mean)
        elif self.law == "binomial":
            plain = shifted * np.log(shifted / mean) + (1 - shifted) * np.log((1 - shifted) / (1 - mean))
        else:
            plain = (shifted - mean) ** 2 / (2 * self.sd**2)
        return float(n * plain / self.dispersion)


@dataclass(frozen=True, slots=True, eq=False)
class Course:
    """How a chart went."""

    score: Floats
    """``S`` after each window while off; while on, ``T``."""
    is_on: Bools
    n_signals: int
    since: int | None
    """Window at which the present signal began; None if off."""
    changed_at: int | None
    """Where the shift most likely began: the window after ``S`` was last 0. None if off."""


def run_chart(evidence: Floats, h: float) -> Course:
    """Sums evidence through all windows, with hysteresis."""
    score = np.empty(len(evidence))
    on = np.zeros(len(evidence), dtype=np.bool_)
    is_on, held, n_signals, zero_at = False, 0.0, 0, 0
    since: int | None = None
    changed_at: int | None = None
    for place, gain in enumerate(np.clip(evidence, -h / WINDOWS_MIN, h / WINDOWS_MIN).tolist()):
        held = max(0.0, held - gain if is_on else held + gain)
        if not is_on and held == 0.0:
            zero_at = place + 1
        if held >= h:
            is_on, held = not is_on, 0.0
            if is_on:
                n_signals, since, changed_at = n_signals + 1, place, zero_at
            else:
                since, changed_at, zero_at = None, None, place + 1
        score[place], on[place] = held, is_on
    return Course(score, on, n_signals, since, changed_at)
