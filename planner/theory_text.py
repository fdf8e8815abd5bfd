"""The theory table: for a terminal, as plain JSON, and as the Markdown of docs/theory.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from planner.theory import Row

COLUMNS = ("system", "quantity", "exact", "simulated", "interval", "verdict")


def cells(row: Row) -> tuple[str, ...]:
    """A row as texts."""
    found = row.simulated
    return (
        row.system, row.quantity, f"{row.exact:.4f}", f"{found.mean:.4f}", f"{found.low:.4f} … {found.high:.4f}",
        "inside" if row.is_inside else "OUTSIDE",
    )  # fmt: skip


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """One line a figure, then the verdict on all."""
    table = Table(pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in {"system", "quantity", "verdict"} else "right")
    for row in rows:
        table.add_row(*cells(row), style="" if row.is_inside else "bold red")
    console.print(table)
    n_out = sum(not row.is_inside for row in rows)
    console.print(
        "Every exact figure lies inside its interval." if not n_out else f"{n_out} of {len(rows)} lie outside."
    )


def to_plain(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """JSON-ready."""
    return [
        {"system": row.system, "quantity": row.quantity, "exact": row.exact, "simulated": row.simulated.to_plain(), "is_inside": row.is_inside}
        for row in rows
    ]  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(cells(row)) + " |" for row in rows)]) + "\n"
