"""Images per GPU-minute of every stack, side by side: the whole images of one or more sessions as a table. Torch-free.

Comparable within a session only: its repetitions were interleaved on one machine. Sessions are therefore shown apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from calibrate.measurement import Measurements

COLUMNS: Final = (
    ("e2e.colocated", ""), ("e2e.diffusers_tuned", ""), ("e2e.diffusers_tuned", "fused"), ("e2e.diffusers", ""),
    ("e2e.diffusers", "fused"),
)  # fmt: skip
OURS: Final = "colocated"


@dataclass(frozen=True, slots=True)
class ImageRate:
    """One kind of image on one stack in one session."""

    session: str
    stack: str
    """Topology; ``+fused`` where LoRAs were fused."""
    n_controlnets: int
    n_loras: int
    size_px: tuple[int, int]
    n_steps: int
    seconds: tuple[float, ...]
    """Every repetition, sorted."""
    is_flagged: bool
    """Whether any of them was flagged."""

    @property
    def median_s(self) -> float:
        """Median of the repetitions."""
        return float(np.median(self.seconds))

    @property
    def images_per_gpu_minute(self) -> float:
        """One after the other on one GPU."""
        return 60.0 / self.median_s


def image_rates(measured: Measurements) -> tuple[ImageRate, ...]:
    """Every kind of image that was measured whole, on one GPU."""
    found: dict[tuple[Any, ...], list[tuple[float, str]]] = {}
    for row in measured.rows:
        f = row.features
        if (row.quantity, f.variant) not in COLUMNS or f.n_images != 1 or f.link:
            continue
        stack = row.quantity.removeprefix("e2e.") + ("+fused" if f.variant else "")
        key = (row.session, f.n_controlnets, f.n_loras, stack, (f.width_px, f.height_px), f.n_steps)
        found.setdefault(key, []).append((row.value_s, row.flags))
    return tuple(
        ImageRate(
            session, stack, nets, loras, size, n_steps, tuple(sorted(value for value, _ in values)),
            any(flags for _, flags in values),
        )
        for (session, nets, loras, stack, size, n_steps), values in sorted(found.items())
    )  # fmt: skip


def plain_rates(rates: tuple[ImageRate, ...]) -> list[dict[str, Any]]:
    """JSON-ready rows; ``slower_than_ours`` is the median over that of our engine in the same session and cell."""
    ours = {(r.session, r.n_controlnets, r.n_loras, r.size_px, r.n_steps): r.median_s for r in rates if r.stack == OURS}
    rows = []
    for r in rates:
        own = ours.get((r.session, r.n_controlnets, r.n_loras, r.size_px, r.n_steps))
        rows.append({
            "session": r.session, "stack": r.stack, "n_controlnets": r.n_controlnets, "n_loras": r.n_loras,
            "width_px": r.size_px[0], "height_px": r.size_px[1], "n_steps": r.n_steps, "n_repetitions": len(r.seconds),
            "median_s": r.median_s, "min_s": r.seconds[0], "max_s": r.seconds[-1],
            "images_per_gpu_minute": r.images_per_gpu_minute, "slower_than_ours": r.median_s / own if own else None,
            "is_flagged": r.is_flagged,
        })  # fmt: skip
    return rows


def print_rates(rates: tuple[ImageRate, ...]) -> None:
    """One line a cell, one column a stack: images per GPU-minute, seconds, and repetitions."""
    console = Console()
    for session in sorted({rate.session for rate in rates}):
        mine = [rate for rate in rates if rate.session == session]
        stacks = [name for name in _names() if any(rate.stack == name for rate in mine)]
        table = Table(box=None, title=f"images per GPU-minute, {session}", title_justify="left")
        for heading in ("add-ons", *stacks):
            table.add_column(heading)
        for nets, loras in sorted({(rate.n_controlnets, rate.n_loras) for rate in mine}):
            cells = {rate.stack: rate for rate in mine if (rate.n_controlnets, rate.n_loras) == (nets, loras)}
            table.add_row(f"{nets}C {loras}L", *(_cell(cells.get(name)) for name in stacks))
        console.print(table)


def _names() -> list[str]:
    return [quantity.removeprefix("e2e.") + ("+fused" if variant else "") for quantity, variant in COLUMNS]


def _cell(rate: ImageRate | None) -> str:
    if rate is None:
        return "–"
    return f"{rate.images_per_gpu_minute:.1f} ({rate.median_s:.2f} s, {rate.seconds[0]:.2f}–{rate.seconds[-1]:.2f}, {len(rate.seconds)}×)"
