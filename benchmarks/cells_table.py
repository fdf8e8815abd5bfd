"""Images per GPU-minute of our engine, tuned and stock Diffusers, by ControlNets and LoRAs, as a table and as JSON.

    PYTHONPATH=. python benchmarks/cells_table.py run1 run4-0 run4-1 --out benchmarks/results/image_cells.json

Reads what ``diffplan calibrate run`` kept. Two stacks are compared within one session only, whose repetitions were interleaved on one
GPU: for each cell and peer, the session with the most repetitions of the one that has fewer. LoRAs are attached and taken off
again for every image: ours from pinned memory, stock and tuned Diffusers from their file, fused. Median, smallest and largest are
over all repetitions of that session.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from calibrate.measurement import Measurement, read_measurements

STACKS: Final = {"e2e.colocated": "ours", "e2e.diffusers_tuned": "tuned", "e2e.diffusers": "stock"}
PEERS: Final = ("tuned", "stock")
COLD: Final = frozenset({("20261123T225458Z-sdxl-cuda1-427", "ours"), ("20261123T225458Z-sdxl-cuda1-427", "tuned")})
"""Measured before the rigs ran LoRAs ahead of the clock: the first image with LoRAs of the process includes imports.

Those images are set apart and shown, not used."""
STEPS, SIDE_PX = 50, 1024
Cell = tuple[int, int]
Seconds = dict[tuple[str, Cell, str], list[float]]
"""By session, cell and stack."""


@dataclass(frozen=True, slots=True)
class Compared:
    """Ours and one peer in one cell and session."""

    session: str
    ours_s: tuple[float, ...]
    peer_s: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """How many images ours makes while the peer makes one; below 1 the peer is faster."""
        return statistics.median(self.peer_s) / statistics.median(self.ours_s)

    @property
    def ratio_range(self) -> tuple[float, float]:
        """The same from the extremes: the peer's fastest with our slowest, and the other way round."""
        return min(self.peer_s) / max(self.ours_s), max(self.peer_s) / min(self.ours_s)


def seconds_of(rows: Sequence[Measurement]) -> tuple[Seconds, list[Measurement]]:
    """Seconds of every repetition, and the rows that were set apart."""
    found: Seconds = {}
    apart: list[Measurement] = []
    cold = set(COLD)
    for row in sorted(rows, key=lambda row: (row.session, row.order)):
        f = row.features
        is_cell = row.quantity in STACKS and (f.forward_batch, f.n_images, f.n_steps) == (2, 1, STEPS) and not f.link
        if not is_cell or (f.width_px, f.height_px) != (SIDE_PX, SIDE_PX):
            continue
        stack = STACKS[row.quantity]
        if f.n_loras and stack != "ours" and f.variant != "fused":
            continue
        if f.n_loras and (row.session, stack) in cold:
            cold.remove((row.session, stack))
            apart.append(row)
            continue
        found.setdefault((row.session, (f.n_controlnets, f.n_loras), stack), []).append(row.value_s)
    return found, apart


def compare(found: Seconds, cell: Cell, peer: str) -> Compared | None:
    """The two in the session that has most of both; None if none has."""
    both = [
        Compared(session, tuple(found[session, cell, "ours"]), tuple(values))
        for (session, at, stack), values in sorted(found.items())
        if at == cell and stack == peer and (session, cell, "ours") in found
    ]
    return max(both, key=lambda c: (min(len(c.ours_s), len(c.peer_s)), len(c.ours_s), c.session), default=None)


def alone(found: Seconds, cell: Cell) -> Compared | None:
    """Ours where no peer was measured beside it."""
    own = [(len(values), session) for (session, at, stack), values in found.items() if (at, stack) == (cell, "ours")]
    if not own:
        return None
    _, session = max(own)
    return Compared(session, tuple(found[session, cell, "ours"]), ())


def table(found: Seconds) -> str:
    """Markdown; ``–`` where a stack was not measured. A cell in which a peer is faster says so."""
    names = sorted({session for session, _, _ in found})
    lines = [
        "| add-ons | ours | tuned | stock | ours ÷ tuned | ours ÷ stock |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for cell in sorted({cell for _, cell, _ in found}):
        by_peer = {peer: compare(found, cell, peer) for peer in PEERS}
        best = by_peer["tuned"] or by_peer["stock"] or alone(found, cell)
        ours = _rate(best.ours_s) if best else "–"
        peers = [_rate(c.peer_s) if (c := by_peer[peer]) else "–" for peer in PEERS]
        ratios = [_ratio(by_peer[peer], peer, names) for peer in PEERS]
        lines.append("| " + " | ".join([f"{cell[0]}C {cell[1]}L", ours, *peers, *ratios]) + " |")
    legend = [f"{letter}: {name}" for letter, name in zip(_letters(names), names, strict=True)]
    return "\n".join([*lines, "", "Sessions: " + ", ".join(legend) + "."])


def plain(found: Seconds, apart: Sequence[Measurement]) -> dict[str, Any]:
    """Every repetition, and the comparisons."""
    cells = []
    for cell in sorted({cell for _, cell, _ in found}):
        compared = {peer: compare(found, cell, peer) for peer in PEERS}
        cells.append({
            "n_controlnets": cell[0], "n_loras": cell[1],
            "seconds": {f"{session} {stack}": values for (session, at, stack), values in sorted(found.items()) if at == cell},
            "compared": {
                f"ours_per_{peer}": {"session": c.session, "ratio": c.ratio, "range": c.ratio_range,
                                     "n_ours": len(c.ours_s), f"n_{peer}": len(c.peer_s)}
                for peer, c in compared.items() if c is not None
            },
        })  # fmt: skip
    set_apart = [
        {"session": row.session, "stack": STACKS[row.quantity], "n_controlnets": row.features.n_controlnets,
         "n_loras": row.features.n_loras, "value_s": row.value_s}
        for row in apart
    ]  # fmt: skip
    return {"width_px": SIDE_PX, "height_px": SIDE_PX, "n_steps": STEPS, "cells": cells, "set_apart": set_apart}


def _rate(values: tuple[float, ...]) -> str:
    seconds = f"{statistics.median(values):.2f} s, {min(values):.2f}–{max(values):.2f}, {len(values)}×"
    return f"{60 / statistics.median(values):.1f} ({seconds})"


def _ratio(compared: Compared | None, peer: str, names: list[str]) -> str:
    if compared is None:
        return "–"
    low, high = compared.ratio_range
    letter = _letters(names)[names.index(compared.session)]
    faster = f" **{peer} is faster**" if compared.ratio < 1 else ""
    return f"{compared.ratio:.2f} ({low:.2f}–{high:.2f}) {letter}{faster}"


def _letters(names: list[str]) -> list[str]:
    return [chr(ord("a") + place) for place in range(len(names))]


def main() -> None:
    """Prints the table, and keeps the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="measurements.parquet files, or folders of runs")
    parser.add_argument("--out", type=Path, help="JSON file for every repetition")
    arguments = parser.parse_args()
    rows = {}
    for path in arguments.runs:
        # a session that is in two files is the same rows twice
        for row in read_measurements(path).rows:
            rows[row.session, row.order, row.repetition, row.quantity] = row
    found, apart = seconds_of(list(rows.values()))
    if not found:
        parser.error("no whole images in there")
    if arguments.out:
        beside = arguments.out.with_name(arguments.out.name + ".part")
        beside.write_text(json.dumps(plain(found, apart), indent=1) + "\n", encoding="utf-8")
        beside.replace(arguments.out)
    print(table(found))
    for row in apart:
        f = row.features
        what = f"{STACKS[row.quantity]} {f.n_controlnets}C {f.n_loras}L"
        print(f"Set apart: {row.value_s:.2f} s, {what}, the first with LoRAs of its process.")


if __name__ == "__main__":
    main()
