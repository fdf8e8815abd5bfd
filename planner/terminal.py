"""Tables on the terminal: the answer first, then the evidence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner.explain import usd
from planner.kind_record import KindsRecord
from planner.plan_record import Estimate, PlanRecord
from planner.report_words import TOPOLOGY_HEADER, grades_words, plain_notes, profile_notes, topology_cells

WIDE_COLUMNS: Final = 132
"""What ten columns with intervals need."""


def print_plan(plan: PlanRecord, files: Sequence[Path], console: Console) -> None:
    """The answer, the topologies side by side, the waterfall, what limits it, how well it is known, where the files are."""
    console.print(Text(plan.sentence, style="bold" if plan.recommended else "bold red"))
    console.print()
    console.print(_side_by_side(plan, console.width))
    for row in plan.topologies:
        if row.verdict != "meets_slo":
            console.print(Text(f"{row.topology}: {row.why}"))
    if plan.kinds is not None:
        console.print()
        console.print(_kinds(plan.kinds))
    if plan.waterfall is not None:
        console.print()
        console.print(_waterfall(plan))
    console.print()
    if plan.infeasible is not None:
        console.print(Text(f"Binds: {plan.infeasible.binds} ({plan.infeasible.why})."))
        console.print(Text(f"Nearest feasible plan: {plan.infeasible.nearest}."))
    else:
        console.print(Text(f"Limited by: {plan.limited_by}"))
        console.print(Text(f"Runner-up: {plan.runner_up or 'none'}."))
    console.print()
    console.print(Text("How well the numbers are known:"))
    for row in plan.topologies:
        console.print(Text(f"  {row.topology}: {grades_words(row)}"))
    for note in plain_notes(plan):
        console.print(Text(f"  {note}"))
    n_more = len(profile_notes(plan))
    if n_more:
        console.print(
            Text(
                f"  How the profile was made: {n_more} notes in report.md, or 'diffplan calibrate show {plan.ids.profile_name}'."
            )
        )
    if files:
        console.print()
        console.print(Text(f"Files in {files[0].parent}: {', '.join(path.name for path in files)}"), soft_wrap=True)


def _kinds(kinds: KindsRecord) -> Table:
    """A line a kind and topology; pairs of kinds only where a fleet was sized."""
    prices = ", ".join(
        f"{kind.gpu_kind} ${kind.price_usd_per_gpu_hour:.2f}{' (assumed profile)' if kind.is_assumed else ''}"
        for kind in kinds.kinds
    )
    table = Table(title=f"GPU kinds: {prices}", title_justify="left", title_style="", pad_edge=False)
    for name in ("GPU kind", "topology", "GPUs", "$/month", "in time", "p99", "verdict"):
        table.add_column(
            name, justify="left" if name in {"GPU kind", "topology", "verdict"} else "right", overflow="fold"
        )
    for row in kinds.rows:
        chosen = (row.gpu_kind, row.worker_gpu_kind) == (kinds.base_gpu_kind, kinds.worker_gpu_kind)
        apart = f" + {row.worker_gpu_kind}" if row.worker_gpu_kind != row.gpu_kind else ""
        if apart and row.n_gpus is None:
            continue
        least = f"over {usd(row.bound_usd_per_month)}" if row.bound_usd_per_month is not None else "–"
        cost = usd(row.cost_usd_per_month) if row.cost_usd_per_month is not None else least
        attained, p99 = row.slo_attainment_ratio.mean, row.latency_p99_s.mean
        table.add_row(
            Text(f"{row.gpu_kind}{apart}"), row.topology, "–" if row.n_gpus is None else str(row.n_gpus), cost,
            "–" if attained is None else f"{attained:.2%}", "–" if p99 is None else f"{p99:.2f} s", row.verdict.replace("_", " "),
            style="bold" if chosen else "",
        )  # fmt: skip
    return table


def _side_by_side(plan: PlanRecord, width: int) -> Table:
    """A line a topology; a column a topology where the terminal is too narrow for ten columns."""
    table = Table(title=_title(plan), title_justify="left", title_style="", pad_edge=False)
    # an interval goes under its mean, so that the columns fit
    rows = [
        [Text(cell.replace(" (", "\n(").replace(" + ", "\n+ ")) for cell in topology_cells(row)]
        for row in plan.topologies
    ]
    styles = ["bold" if row.topology == plan.recommended else "" for row in plan.topologies]
    if width >= WIDE_COLUMNS:
        for name in TOPOLOGY_HEADER:
            table.add_column(name, justify="left" if name in {"topology", "verdict"} else "right", overflow="fold")
        for row, style in zip(rows, styles, strict=True):
            table.add_row(*row, style=style)
        return table
    table.add_column("")
    for row, style in zip(rows, styles, strict=True):
        table.add_column(row[0], justify="right", overflow="fold", style=style)
    for place, name in enumerate(TOPOLOGY_HEADER[1:], start=1):
        table.add_row(name, *(row[place] for row in rows))
    return table


def print_comparison(plans: Sequence[tuple[str, PlanRecord]], console: Console) -> None:
    """One column a plan."""
    table = Table(pad_edge=False)
    table.add_column("")
    for name, _ in plans:
        table.add_column(Text(name), overflow="fold")
    for label, values in comparison_rows([plan for _, plan in plans]):
        table.add_row(label, *(Text(value) for value in values))
    console.print(table)


def comparison_rows(plans: Sequence[PlanRecord]) -> list[tuple[str, list[str]]]:
    """Label and one text a plan."""
    chosen = [plan.row(plan.recommended) if plan.recommended else None for plan in plans]

    def figures(name: str, words: str, scale: float = 1.0) -> list[str]:
        texts = []
        for row in chosen:
            estimate: Estimate | None = getattr(row, name) if row is not None else None
            mean = estimate.mean if estimate is not None else None
            texts.append("–" if mean is None else words.format(scale * mean))
        return texts

    return [
        ("scenario", [plan.ids.scenario_name for plan in plans]),
        ("verdict", [plan.verdict for plan in plans]),
        ("promise", [f"{100 * plan.slo_attainment_ratio:g} % within {plan.slo_latency_s:g} s" for plan in plans]),
        ("traffic", [f"{plan.traffic.mean_per_s:.3g} requests/s" for plan in plans]),
        ("topology", [plan.recommended or "–" for plan in plans]),
        ("GPUs", [str(row.n_gpus) if row else "–" for row in chosen]),
        ("$/month", [usd(row.cost_usd_per_month) if row else "–" for row in chosen]),
        ("$/1000 images", figures("cost_usd_per_1000_images", "${:,.2f}")),
        ("p50", figures("latency_p50_s", "{:.2f} s")),
        ("p99", figures("latency_p99_s", "{:.2f} s")),
        ("in time", figures("slo_attainment_ratio", "{:.2f} %", 100)),
        ("binds", [plan.infeasible.binds if plan.infeasible else "–" for plan in plans]),
        ("profile", [f"{plan.ids.profile_name} {plan.ids.profile_id}" for plan in plans]),
        ("price", [f"${plan.ids.price_usd_per_gpu_hour:.2f} ({plan.ids.price_table_id})" for plan in plans]),
    ]


def _title(plan: PlanRecord) -> str:
    return (
        f"{100 * plan.slo_attainment_ratio:g} % of the requests within {plan.slo_latency_s:g} s; means of {plan.n_replications} "
        f"repetitions with {100 * plan.confidence:g} % intervals"
    )


def _waterfall(plan: PlanRecord) -> Table:
    table = Table(title="Where the saving comes from", title_justify="left", title_style="", pad_edge=False)
    for name in ("step", "what", "GPUs", "$/month", "saving/month"):
        table.add_column(name, justify="left" if name in {"step", "what"} else "right")
    if plan.waterfall is not None:
        for step in plan.waterfall.steps:
            gpus = "–" if step.n_gpus is None else str(step.n_gpus)
            table.add_row(
                step.topology, Text(step.what), gpus, usd(step.cost_usd_per_month), usd(step.saving_usd_per_month)
            )
        table.add_section()
        table.add_row("sum", "", "", "", usd(plan.waterfall.saving_usd_per_month))
    return table
