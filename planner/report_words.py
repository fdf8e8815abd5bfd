"""Words for the figures of a plan, shared by the report, the terminal, the money pages and the dashboard."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from planner.explain import pools_words, usd
from planner.plan_record import DoubtRow, Estimate, PhaseRow, PlanRecord, TopologyRow
from planner.statistics import LATENCY_LEVELS

PROFILE_NOTE: Final = "Profile: "
"""How a plan's notes about its profile begin (``planner.explain.note_lines``)."""
VERDICT_WORDS: Final = {"meets_slo": "meets", "misses_slo": "misses", "infeasible": "infeasible"}
assert {0.5, 0.95, 0.99} <= set(LATENCY_LEVELS)  # noqa: S101  the columns below


def seconds_words(estimate: Estimate) -> str:
    """``5.33 s (5.21–5.45)``."""
    if estimate.mean is None:
        return "–"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:.2f} s"
    return f"{estimate.mean:.2f} s ({max(0.0, estimate.low):.2f}–{estimate.high:.2f})"


def share_words(estimate: Estimate) -> str:
    """``99.63 % (99.14–100.00)``."""
    if estimate.mean is None:
        return "–"
    if estimate.low is None or estimate.high is None:
        return f"{100 * estimate.mean:.2f} %"
    high = f"{100 * estimate.high:.2f}" if estimate.high < 1 else "100"
    low = f"{100 * estimate.low:.2f}" if estimate.low < 1 else "100"
    return f"{100 * estimate.mean:.2f} % ({low}–{high})"


def probability_words(value: float) -> str:
    """``97.3 %``, cut and not rounded: never 0 % or 100 %, which nothing that was drawn can know."""
    if value > 0.999:
        return "more than 99.9 %"
    if value < 0.001:
        return "less than 0.1 %"
    return f"{math.floor(1000 * value + 1e-9) / 10:.1f} %"


def at_least_words(value: float) -> str:
    """A lower bound of a probability: ``97.3 % or more``."""
    if value < 0.001:
        return "not shown"
    said = probability_words(value)
    return said if said.startswith("more") else f"{said} or more"


def money_words(estimate: Estimate) -> str:
    """``$3.92``."""
    return "–" if estimate.mean is None else f"${estimate.mean:,.2f}"


def count_words(value: int | None) -> str:
    """A whole number, or a dash."""
    return "–" if value is None else f"{value:,}"


def grades_words(row: TopologyRow) -> str:
    """``12 measured, 3 assumed (engine.lora_attach, …)``: how well the laws behind a row are known."""
    by_grade: dict[str, list[str]] = {}
    for law, grade in sorted(row.grades.items()):
        by_grade.setdefault(grade, []).append(law)
    parts = []
    for grade in ("measured", "interpolated", "extrapolated", "assumed"):
        laws = by_grade.get(grade, [])
        if laws:
            named = f" ({', '.join(laws)})" if grade in {"extrapolated", "assumed"} else ""
            parts.append(f"{len(laws)} {grade}{named}")
    return ", ".join(parts) or "none"


def by_grade(grades: Mapping[str, str], wanted: Sequence[str]) -> tuple[str, ...]:
    """The laws that are known only so well, by name."""
    return tuple(law for law, grade in sorted(grades.items()) if grade in wanted)


TOPOLOGY_HEADER: Final = (
    "topology",
    "GPUs",
    "replicas",
    "$/month",
    "$/1000 images",
    "p50",
    "p95",
    "p99",
    "in time",
    "verdict",
)


def topology_cells(row: TopologyRow) -> tuple[str, ...]:
    """One row of the side-by-side table, as texts in the order of ``TOPOLOGY_HEADER``."""
    return (
        row.topology,
        count_words(row.n_gpus),
        pools_words(row) if row.pools else "–",
        usd(row.cost_usd_per_month),
        money_words(row.cost_usd_per_1000_images),
        seconds_words(row.latency_p50_s),
        seconds_words(row.latency_p95_s),
        seconds_words(row.latency_p99_s),
        share_words(row.slo_attainment_ratio),
        VERDICT_WORDS[row.verdict],
    )


def doubt_rows(plan: PlanRecord) -> list[tuple[str, DoubtRow]]:
    """The recommendation and every cheaper allocation that came near, named by their pools."""
    if plan.selection is None:
        return []
    rows = [plan.selection.chosen, *plan.selection.cheaper]
    return [(f"{row.topology} ({', '.join(f'{n} {name}' for name, n in row.pools.items())})", row) for row in rows]


def plain_notes(plan: PlanRecord) -> tuple[str, ...]:
    """What the numbers leave out, without what is about the profile alone."""
    return tuple(note for note in plan.notes if not note.startswith(PROFILE_NOTE))


def profile_notes(plan: PlanRecord) -> tuple[str, ...]:
    """How the profile was measured and how well it was met."""
    return tuple(note.removeprefix(PROFILE_NOTE) for note in plan.notes if note.startswith(PROFILE_NOTE))


def markdown_cell(text: object) -> str:
    """A text that cannot break out of a Markdown table or start markup of its own."""
    plain = " ".join(str(text).split())
    return plain.replace("\\", "\\\\").replace("|", "\\|").replace("[", "\\[").replace("<", "&lt;").replace("`", "ˋ")


def words_of_test(phase: PhaseRow) -> str:
    """The smallest test of a phase, in a sentence."""
    test = phase.test
    if test is None:
        return "no test of 14 days or less would show the promised difference"
    promised = (
        f"{test.promised_difference:+.2f} s in the mean latency"
        if test.figure == "mean latency"
        else f"no more than {-test.promised_difference:.1%} fewer requests in time"
    )
    return (
        f"{test.share_ratio:.0%} of the traffic for {test.duration_h:.1f} h ({test.n_requests_new} requests on the new fleet, "
        f"{test.n_requests_old} on the old) shows {promised} with {test.power:.0%} power at {test.significance:.0%} significance (design "
        f"effect {test.design_effect:.0f}); let it run for whole days all the same, so that every hour of the day is in it"
    )  # fmt: skip
