"""What a plan decides beside the fleet, in a report: a fixed size or scaling by itself, and where each add-on should live."""

from __future__ import annotations

from typing import Final

from planner.decision_record import AddOnsRecord, AutoscalingRecord
from planner.explain import usd
from planner.plan_record import TopologyRow
from planner.report_blocks import Block, Grid, Heading, Paragraph
from planner.report_words import seconds_words, share_words

SCALING_HEADER: Final = (
    "base pool", "replicas", "mean GPUs", "GPU hours a month", "$/month", "in time", "p99", "keeps the promise",
)  # fmt: skip
ADD_ON_HEADER: Final = (
    "add-on", "kind", "of the requests", "GPU hours a month", "$/month", "adds", "placement", "why",
)  # fmt: skip


def autoscaling_blocks(found: AutoscalingRecord | None, fixed: TopologyRow) -> list[Block]:
    """The fixed fleet, which is ``fixed``, against the settings that were simulated; nothing for a plan that does not say."""
    if found is None:
        return []
    blocks: list[Block] = [Heading("Fixed size, or scaling by itself"), Paragraph(found.why)]
    if not found.tried:
        return blocks
    rows = [
        (
            "fixed", "–", str(fixed.n_gpus), f"{found.fixed_gpu_hours_per_month:,.0f}", usd(found.fixed_cost_usd_per_month),
            share_words(fixed.slo_attainment_ratio), seconds_words(fixed.latency_p99_s), "yes",
        )
    ]  # fmt: skip
    rows += [
        (
            f"{row.kind}, target {row.target:g} a replica", f"{row.min_replicas} … {row.max_replicas}",
            "–" if row.mean_gpus.mean is None else f"{row.mean_gpus.mean:.1f}",
            "–" if row.gpu_hours_per_month is None else f"{row.gpu_hours_per_month:,.0f}", usd(row.cost_usd_per_month),
            share_words(row.slo_attainment_ratio), seconds_words(row.latency_p99_s), "yes" if row.keeps_promise else "no",
        )
        for row in found.tried
    ]  # fmt: skip
    chosen = 0 if found.verdict == "fixed" else None
    if found.verdict == "autoscale" and found.chosen in found.tried:
        chosen = 1 + found.tried.index(found.chosen)
    blocks.append(Grid(SCALING_HEADER, tuple(rows), chosen))
    blocks.append(Paragraph(f"Assumed: a new replica is up {found.start_s:g} s after the decision.", "muted"))
    return blocks


def add_on_blocks(found: AddOnsRecord | None) -> list[Block]:
    """The add-ons that cost most, with where each should live; nothing for a plan that does not say."""
    if found is None or not found.rows:
        return []
    rows = tuple(
        (
            row.add_on_id, row.kind, f"{row.use_ratio:.1%}", f"{row.gpu_hours_per_month:,.1f}", usd(row.cost_usd_per_month),
            f"{row.latency_added_s:.2f} s", row.placement, row.why,
        )
        for row in found.rows
    )  # fmt: skip
    others = (
        f"{found.n_others} more add-ons cost {usd(found.others_cost_usd_per_month)} a month together. Loaded anew for more than half of "
        f"their uses: {found.n_controlnets_on_demand} ControlNets, {found.n_loras_on_demand} LoRAs."
    )
    return [
        Heading("Where each add-on should live"), Grid(ADD_ON_HEADER, rows), Paragraph(others),
        *([Paragraph(f"Alternatives were simulated on {found.simulated_on}.", "muted")] if found.simulated_on else []),
    ]  # fmt: skip
