"""``roi.json`` and ``roi.md``: every figure with where it comes from; the same plan and assumptions give the same bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from planner.explain import usd
from planner.money.assumptions import stated
from planner.money.roi import Roi
from planner.money.tables import (
    Table,
    assumption_table,
    buying_table,
    cost_table,
    load_range_table,
    return_table,
    share_tables,
    swing_table,
)
from planner.plan_record import PhaseRow
from planner.report_playbook import playbook
from planner.report_words import markdown_cell, seconds_words, share_words, words_of_test
from planner.sentences import decision

SCHEMA_VERSION: Final = 1


def to_plain(roi: Roi, roadmap: Sequence[PhaseRow]) -> dict[str, Any]:
    """Everything, JSON-ready."""
    said = decision(roi)
    return {
        "schema_version": SCHEMA_VERSION,
        "decision": {"en": said.english, "ja": said.japanese},
        "plan": roi.plan.ids.model_dump(mode="json"),
        "price_usd_per_gpu_hour": roi.price_usd_per_gpu_hour,
        "model_traffic": asdict(roi.models) if roi.models is not None else None,
        "waterfall": [
            {**asdict(row), "cost_usd_per_month": row.cost.total_usd, "value_usd_per_month": row.value.total_usd if row.value else None}
            for row in roi.waterfall
        ],
        "returns": asdict(roi.returns) if roi.returns is not None else None,
        "gpu_time_ranges": {name: asdict(found) for name, found in roi.load_ranges},
        "buying": {words: asdict(found) for words, found in roi.bought},
        "attribution": asdict(roi.shares) if roi.shares is not None else None,
        "roadmap": [phase.model_dump(mode="json") for phase in roadmap],
        "assumptions": stated(roi.assumptions),
        "notes": list(roi.notes),
    }  # fmt: skip


def to_json(roi: Roi, roadmap: Sequence[PhaseRow]) -> str:
    """``roi.json``."""
    return json.dumps(to_plain(roi, roadmap), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def markdown(roi: Roi, roadmap: Sequence[PhaseRow]) -> str:
    """``roi.md``."""
    said = decision(roi)
    lines = [f"# Return on {markdown_cell(roi.plan.ids.scenario_name)}", "", f"**{markdown_cell(said.english)}**", "", f"**{markdown_cell(said.japanese)}**", ""]  # fmt: skip
    lines += [*_waterfall(roi), *_returns(roi), *_buying(roi), *_attribution(roi)]
    lines += [*_roadmap(roadmap), *_playbook(roi, roadmap), *_assumptions(roi)]
    return "\n".join(lines).rstrip("\n") + "\n"


def markdown_table(table: Table) -> list[str]:
    """The lines of a table, and an empty one after it."""
    made = [f"| {' | '.join(table.header)} |", f"|{' --- |' * len(table.header)}"]
    return [*made, *(f"| {' | '.join(markdown_cell(cell) for cell in row)} |" for row in table.rows), ""]


def _waterfall(roi: Roi) -> list[str]:
    said = "Each row against the one before it: what kernels earn is not credited to decoupling."
    return ["## Where the saving comes from", "", said, "", *markdown_table(cost_table(roi))]


def _returns(roi: Roi) -> list[str]:
    facts, swings = return_table(roi), swing_table(roi)
    if facts is None or swings is None:
        return []
    return [
        "## The change as an investment", "", *markdown_table(facts),
        "What moves it, one input at a time:", "", *markdown_table(swings),
    ]  # fmt: skip


def _buying(roi: Roi) -> list[str]:
    table = buying_table(roi)
    return [] if table is None else ["## Buying instead of renting", "", *markdown_table(table)]


def _attribution(roi: Roi) -> list[str]:
    if roi.shares is None:
        return []
    lines = ["## Who the cost is for", "", f"A month of the recommendation, {roi.shares.total_cents / 100:,.2f} USD, divided by GPU time; each table sums to it.", ""]  # fmt: skip
    for table in share_tables(roi):
        lines += markdown_table(table)
    return lines


def _roadmap(roadmap: Sequence[PhaseRow]) -> list[str]:
    if not roadmap:
        return []
    rows = tuple(
        (
            str(phase.number), phase.name, "yes" if phase.is_worthwhile else "no", str(phase.n_gpus_today), str(phase.n_gpus_new),
            usd(phase.cost_usd_per_month), seconds_words(phase.latency_p50_s), seconds_words(phase.latency_p95_s), share_words(phase.slo_attainment_ratio),
        )
        for phase in roadmap
    )  # fmt: skip
    header = ("phase", "name", "worthwhile", "GPUs as today", "new GPUs", "GPUs a month", "p50", "p95", "in time")
    lines = ["## Roadmap", "", *markdown_table(Table(header, rows))]
    for phase in roadmap:
        lines += [f"### {phase.number}. {phase.name.capitalize()}", "", markdown_cell(phase.what), ""]
        if phase.is_worthwhile:
            lines += [f"- watch: {markdown_cell('; '.join(phase.watch))}", f"- go on when: {markdown_cell(phase.gate)}", f"- roll back when: {markdown_cell(phase.roll_back)}"]  # fmt: skip
            lines += [f"- test: {markdown_cell(words_of_test(phase))}", ""] if phase.topology else [""]
    return lines


def _playbook(roi: Roi, roadmap: Sequence[PhaseRow]) -> list[str]:
    """What docs/playbook.md asks, with this plan's answers."""
    lines = ["## Playbook, filled in", ""]
    for number, chapter in enumerate(playbook(roi.plan, roi, roadmap), start=1):
        lines += [f"### {number}. {chapter.title}", "", *(f"- {markdown_cell(line)}" for line in chapter.lines), ""]
    return lines


def _assumptions(roi: Roi) -> list[str]:
    lines = ["## Assumptions", "", *markdown_table(assumption_table(roi)), *markdown_table(load_range_table(roi))]
    return [*lines, *(f"- {markdown_cell(note)}" for note in roi.notes), ""]
