"""The report of a plan as Markdown and as one self-contained HTML page; every number in it is one of ``plan.json``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jinja2

from planner.explain import gpus_words, pools_words, usd
from planner.plan_record import DoubtRow, Estimate, PlanRecord, TopologyRow
from planner.statistics import LATENCY_LEVELS

TEMPLATES: Final = Path(__file__).parent / "templates"
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


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of the cost chart, in the chart's own units."""

    label: str
    words: str
    width: float
    y: int
    is_recommended: bool


def cost_bars(plan: PlanRecord) -> tuple[Bar, ...]:
    """Monthly cost of every topology that has one, as bars at most 420 wide."""
    priced = [row for row in plan.topologies if row.cost_usd_per_month is not None]
    most = max((row.cost_usd_per_month or 0.0 for row in priced), default=1.0) or 1.0
    return tuple(
        Bar(
            row.topology, f"{usd(row.cost_usd_per_month)} · {gpus_words(row.n_gpus)}" + ("" if row.verdict == "meets_slo" else " · misses"),
            round(420 * (row.cost_usd_per_month or 0.0) / most, 1), 10 + 34 * index, row.topology == plan.recommended,
        )
        for index, row in enumerate(priced)
    )  # fmt: skip


def doubt_rows(plan: PlanRecord) -> list[tuple[str, DoubtRow]]:
    """The recommendation and every cheaper allocation that came near, named by their pools."""
    if plan.selection is None:
        return []
    rows = [plan.selection.chosen, *plan.selection.cheaper]
    return [(f"{row.topology} ({', '.join(f'{n} {name}' for name, n in row.pools.items())})", row) for row in rows]


def markdown(plan: PlanRecord) -> str:
    """``report.md``."""
    return _environment(autoescape=False).get_template("report.md.j2").render(**_context(plan))


def html(plan: PlanRecord) -> str:
    """``report.html``: no script, no request to anywhere; every text is escaped."""
    return _environment(autoescape=True).get_template("report.html.j2").render(**_context(plan))


def _environment(*, autoescape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=autoescape,  # noqa: S701  off for Markdown only, whose cells are escaped by their own filter
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"usd": usd, "cell": _cell}
    return environment


def _cell(text: object) -> str:
    """A text that cannot break out of a Markdown table or start markup of its own."""
    plain = " ".join(str(text).split())
    return plain.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "ˋ")


def _context(plan: PlanRecord) -> dict[str, Any]:
    bars = cost_bars(plan)
    return {
        "plan": plan,
        "header": TOPOLOGY_HEADER,
        "rows": [topology_cells(row) for row in plan.topologies],
        "grades": [(row.topology, grades_words(row)) for row in plan.topologies],
        "plain": [
            (row.topology, seconds_words(row.plain_latency_p50_s), seconds_words(row.plain_latency_p99_s))
            for row in plan.topologies
            if row.plain_latency_p50_s.mean is not None
        ],
        "doubts": doubt_rows(plan),
        "roadmap": [
            (
                phase,
                seconds_words(phase.latency_p50_s),
                seconds_words(phase.latency_p95_s),
                share_words(phase.slo_attainment_ratio),
            )
            for phase in plan.roadmap
        ],
        "bars": bars,
        "chart_height": 20 + 34 * len(bars),
    }
