"""Whole images of our engine, tuned and stock Diffusers, measured in one run by turns, as a table: seconds, images per GPU-minute, ratios.

    PYTHONPATH=. python benchmarks/cells_table.py calibrate/profiles/h200.measurements.parquet

Reads the rows that ``diffplan calibrate run`` has kept. Sessions are not mixed: the newest one that has the rows is shown. LoRAs are
attached and taken off again for every image: ours from pinned memory, stock and tuned Diffusers from their file, fused.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Final

from calibrate.measurement import read_measurements

STACKS: Final = {"e2e.colocated": "ours", "e2e.diffusers_tuned": "tuned", "e2e.diffusers": "stock"}
Cell = tuple[int, int]


def cells(path: Path) -> tuple[str, dict[Cell, dict[str, list[float]]]]:
    """Session and, by ControlNets and LoRAs, the seconds of every repetition of each stack."""
    rows = [row for row in read_measurements(path).rows if row.quantity in STACKS and row.features.forward_batch == 2]
    if not rows:
        raise SystemExit(f"{path} has no whole images")
    sessions = sorted({row.session for row in rows if row.quantity == "e2e.colocated"})
    found: dict[Cell, dict[str, list[float]]] = {}
    for row in rows:
        f = row.features
        if row.session != sessions[-1] or (f.n_loras and row.quantity != "e2e.colocated" and f.variant != "fused"):
            continue
        found.setdefault((f.n_controlnets, f.n_loras), {}).setdefault(STACKS[row.quantity], []).append(row.value_s)
    return sessions[-1], dict(sorted(found.items()))


def table(found: dict[Cell, dict[str, list[float]]]) -> str:
    """Markdown; ``–`` where a stack was not measured."""
    lines = [
        "| cell | ours, s | tuned, s | stock, s | ours, images per GPU-minute | tuned ÷ ours | stock ÷ ours |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (n_controlnets, n_loras), stacks in found.items():
        shown = [_seconds(stacks.get(name, [])) for name in STACKS.values()]
        ours = statistics.median(stacks["ours"]) if "ours" in stacks else None
        ratios = [
            f"{statistics.median(stacks[name]) / ours:.2f}" if ours and name in stacks else "–"
            for name in ("tuned", "stock")
        ]
        rate = f"{60 / ours:.1f}" if ours else "–"
        lines.append("| " + " | ".join([f"{n_controlnets}C/{n_loras}L", *shown, rate, *ratios]) + " |")
    return "\n".join(lines)


def _seconds(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f}, {len(values)}×)"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measurements", type=Path)
    session, found = cells(parser.parse_args().measurements)
    print(f"{table(found)}\n\nSession {session}.")


if __name__ == "__main__":
    main()
