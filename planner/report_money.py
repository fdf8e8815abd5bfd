"""The money of a report: full cost, the change as an investment, what moves it, who the cost is for, and what is assumed."""

from __future__ import annotations

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
from planner.plan_record import PlanRecord
from planner.report_blocks import Block, Bullets, Grid, Heading, Paragraph, Section
from planner.report_charts import tornado_bars


def money(plan: PlanRecord, roi: Roi | None) -> Section | None:
    """The section; None for a plan that recommends nothing, and what to type where the return was not worked out."""
    if plan.recommended is None:
        return None
    if roi is None:
        said = "The return was not worked out with this report. This does it:"
        return Section("Money", (Paragraph(said), Paragraph("diffplan roi PLAN", "command")))
    chosen = next(index for index, row in enumerate(roi.waterfall) if row.is_recommended)
    blocks: list[Block] = [
        Heading("Full cost, USD a month"),
        _grid(cost_table(roi), chosen),
        Paragraph("Each row against the one before it. Operation: every pool that is scaled by itself is a service that somebody runs.", "muted"),
    ]  # fmt: skip
    facts, swings = return_table(roi), swing_table(roi)
    if facts is not None and swings is not None:
        blocks += [Heading("The change as an investment"), _grid(facts), Heading("What moves it, one input at a time")]
        bars = tornado_bars(roi)
        blocks.append(bars if bars is not None else _grid(swings))
    bought = buying_table(roi)
    if bought is not None:
        blocks += [Heading("Buying instead of renting"), _grid(bought)]
    if roi.shares is not None:
        blocks += [
            Heading("Who the cost is for"),
            Paragraph(f"A month of the recommendation, {roi.shares.total_cents / 100:,.2f} USD, divided by GPU time; each table sums to it."),
            *(_grid(table) for table in share_tables(roi)),
        ]  # fmt: skip
    blocks += [
        Heading("Assumptions"),
        Bullets(roi.notes),
        _grid(assumption_table(roi, is_short=True)),
        _grid(load_range_table(roi)),
        Paragraph(
            "Fields that are switched off are left out; diffplan roi writes them all. Your own figures: diffplan roi PLAN --assumptions FILE (docs/money.md lists every field).",
            "muted",
        ),
    ]
    return Section("Money", tuple(blocks))


def _grid(table: Table, chosen: int | None = None) -> Grid:
    return Grid(table.header, table.rows, chosen)
