"""What else could be chosen, in a report: replicas for one checkpoint, how to buy the GPUs, other settings and GPU kinds."""

from __future__ import annotations

from typing import Final

from planner.decision_record import CheckpointsRecord, PurchaseRow, PurchasingRecord, SettingsRecord
from planner.explain import usd
from planner.kind_record import KindsRecord
from planner.report_blocks import Block, Bullets, Grid, Heading, Paragraph
from planner.report_words import seconds_words, share_words

CHECKPOINTS_HEADER: Final = ("checkpoint", "of the requests", "GPUs as recommended", "of its own", "why")
PURCHASING_HEADER: Final = ("fleet", "on demand", "reserved", "spot", "$/month", "against the plan", "simulated")
SETTINGS_HEADER: Final = (
    "setting", "value", "GPUs", "$/month", "against the scenario", "in time at the same size", "promised share within",
)  # fmt: skip

KINDS_HEADER: Final = (
    "GPU kind", "workers' kind", "topology", "GPUs", "$/month", "work alone costs", "in time", "p99", "verdict", "assumed profile", "why",
)  # fmt: skip


def kind_blocks(found: KindsRecord | None) -> list[Block]:
    """The GPU kinds at hand, each topology on each; nothing for a plan that had one kind."""
    if found is None:
        return []
    rows = tuple(
        (
            row.gpu_kind, "–" if row.worker_gpu_kind == row.gpu_kind else row.worker_gpu_kind, row.topology,
            "–" if row.n_gpus is None else str(row.n_gpus), usd(row.cost_usd_per_month), usd(row.bound_usd_per_month),
            share_words(row.slo_attainment_ratio), seconds_words(row.latency_p99_s), row.verdict, "yes" if row.is_assumed else "no", row.why,
        )
        for row in found.rows
    )  # fmt: skip
    prices = "; ".join(f"{kind.gpu_kind} ${kind.price_usd_per_gpu_hour:.2f} ({kind.source})" for kind in found.kinds)
    return [
        Heading("GPU kinds"), Paragraph(found.sentence), Grid(KINDS_HEADER, rows), Paragraph(f"A GPU-hour, as priced: {prices}.", "muted"),
        *([Bullets(found.not_looked_at)] if found.not_looked_at else []),
    ]  # fmt: skip


def checkpoint_blocks(found: CheckpointsRecord | None) -> list[Block]:
    """The most used checkpoints, with what base replicas of their own would take; nothing for a plan that does not say."""
    if found is None:
        return []

    def sizes(counts: list[int | None]) -> str:
        return ", ".join("not found" if count is None else str(count) for count in counts)

    rows = tuple(
        (
            row.checkpoint_id,
            f"{row.use_ratio:.1%}",
            sizes([fleet.n_gpus for fleet in row.fleets if not fleet.has_own_pool]),
            sizes([fleet.n_gpus for fleet in row.fleets if fleet.has_own_pool]),
            row.why,
        )
        for row in found.rows
    )
    return [
        Heading("Replicas for one checkpoint"), Paragraph(found.sentence), Grid(CHECKPOINTS_HEADER, rows),
        Paragraph(f"Simulated on {found.simulated_on}.", "muted"),
    ]  # fmt: skip


def purchasing_blocks(found: PurchasingRecord | None) -> list[Block]:
    """The recommended fleet by purchase type; nothing for a plan that does not say."""
    if found is None:
        return []
    rows = tuple(_purchase_row(row) for row in found.rows)
    prices = "; ".join(
        f"{one.purchase.replace('_', ' ')} ${one.price_usd_per_gpu_hour:.2f} ({one.source})"
        for one in found.prices
        if one.price_usd_per_gpu_hour is not None
    )
    return [
        Heading("On demand, reserved or spot"), Paragraph(found.sentence), Grid(PURCHASING_HEADER, rows, found.best),
        Paragraph(f"A GPU-hour: {prices}.", "muted"),
    ]  # fmt: skip


def _purchase_row(row: PurchaseRow) -> tuple[str, ...]:
    counts = (str(count) if count else "–" for count in (row.n_on_demand, row.n_reserved, row.n_spot))
    cost, gap = usd(row.cost_usd_per_month), usd(row.difference_usd_per_month)
    return (
        "scaling by itself" if row.is_scaled else "fixed size",
        *counts,
        cost,
        gap,
        "yes" if row.is_simulated else "without interruptions",
    )


def settings_blocks(found: SettingsRecord | None) -> list[Block]:
    """One setting changed at a time; nothing for a plan that does not say or where nothing else can matter."""
    if found is None or len(found.rows) < 2:
        return []
    rows = tuple(
        (
            row.setting or "as planned",
            row.value if row.setting else "–",
            "not found" if row.n_gpus is None else str(row.n_gpus),
            usd(row.cost_usd_per_month),
            usd(row.difference_usd_per_month),
            "–" if row.same_size_attainment_ratio is None else f"{row.same_size_attainment_ratio:.2%}",
            "–" if row.same_size_latency_at_target_s is None else f"{row.same_size_latency_at_target_s:.2f} s",
        )
        for row in found.rows
    )
    return [
        Heading("Other settings, one at a time"), Paragraph(found.sentence), Grid(SETTINGS_HEADER, rows, 0),
        Paragraph(f"Simulated on {found.simulated_on}.", "muted"),
    ]  # fmt: skip
