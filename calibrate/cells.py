"""Measurements by cell (same quantity, mode and features): medians, and the same medians of resampled repetitions."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from calibrate.measurement import Features, Measurements

Cell = tuple[str, str, Features]


@dataclass(frozen=True)
class Cells:
    """All repetitions of a set of sessions, by cell and session."""

    values: Mapping[Cell, Mapping[str, np.ndarray]]
    sessions: tuple[str, ...]

    @classmethod
    def of(cls, measurements: Measurements, *, held_out: bool = False) -> Cells:
        """Groups the rows that laws are fitted to, or only those that were held out; their order does not matter."""
        grouped: dict[Cell, dict[str, list[float]]] = {}
        for row in measurements.rows:
            if row.is_held_out != held_out:
                continue
            grouped.setdefault(row.cell, {}).setdefault(row.session, []).append(row.value_s)
        values = {
            cell: {session: np.sort(np.asarray(found)) for session, found in sorted(by_session.items())}
            for cell, by_session in sorted(grouped.items(), key=lambda item: cell_name(item[0]))
        }
        return cls(values, tuple(sorted(session.session for session in measurements.sessions)))

    def pooled(self, cell: Cell) -> np.ndarray:
        """Every repetition of a cell."""
        return np.concatenate(list(self.values[cell].values()))

    def medians(self) -> dict[Cell, float]:
        """Median of all repetitions, by cell."""
        return {cell: float(np.median(self.pooled(cell))) for cell in self.values}

    def resampled_medians(self, seed: int, draw: int) -> dict[Cell, float]:
        """Medians of one bootstrap draw: sessions are resampled first, the same for all cells, then their repetitions.

        Resampling sessions together is what makes the draw joint: if one machine was slower, every law of a draw that
        leaves the other machine out is slower.
        """
        rng = np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(b"sessions"), draw]))
        chosen = [self.sessions[i] for i in rng.integers(0, len(self.sessions), len(self.sessions))]
        medians = {}
        for cell, by_session in self.values.items():
            used = [session for session in chosen if session in by_session] or list(by_session)
            own = np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(cell_name(cell).encode()), draw]))
            parts = [own.choice(by_session[session], by_session[session].size) for session in used]
            medians[cell] = float(np.median(np.concatenate(parts)))
        return medians

    def matching(self, quantity: str, accept: Callable[[Features], bool] = lambda _: True) -> list[Cell]:
        """Cells of a quantity whose features are accepted."""
        return [cell for cell in self.values if cell[0] == quantity and accept(cell[2])]


def cell_name(cell: Cell) -> str:
    """Stable text of a cell, for seeding and sorting."""
    quantity, mode, f = cell
    return (
        f"{quantity}|{mode}|{f.forward_batch:04d}|{f.n_images:04d}|{f.width_px}x{f.height_px}|{f.n_steps:04d}|"
        f"{f.n_controlnets}|{f.n_loras}|{f.n_bytes:014d}|{f.link}|{f.variant}"
    )
