"""A trace in memory: one row a request, and where it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from traces.records import REQUEST_COLUMNS, Request


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a trace comes from and what was done to it; travels in the Parquet file's metadata."""

    source: str
    """File or generator, in words a reader can follow."""
    licence: str = ""
    defaults: Mapping[str, int] = field(default_factory=dict)
    """``column=value`` to the number of rows that got this default because the source had none."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Reason to the number of source rows that are not in the trace."""
    notes: tuple[str, ...] = ()
    """Assumptions and transformations, oldest first."""
    seed: int | None = None

    def with_note(self, note: str) -> Provenance:
        """A copy with one more note."""
        return replace(self, notes=(*self.notes, note))


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests sorted by ``arrival_s`` (ties in file order), with every column of ``REQUEST_COLUMNS`` and any others kept.

    ``requests`` is a frame with a fresh 0..n-1 index. List columns hold tuples. Treat it as read-only.
    """

    requests: pd.DataFrame
    provenance: Provenance
    duration_s: float
    """Length of the observed window, from 0; at least the last arrival. Rates divide by this."""

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Request]:
        names = [column.name for column in REQUEST_COLUMNS]
        for row in self.requests[names].itertuples(index=False, name=None):
            values: dict[str, Any] = dict(zip(names, row, strict=True))
            if values["deadline_s"] != values["deadline_s"]:  # NaN marks "no deadline" in the frame
                values["deadline_s"] = None
            yield Request(**values)

    @property
    def rate_per_s(self) -> float:
        """Mean arrivals per second over the window."""
        return len(self.requests) / self.duration_s if self.duration_s > 0 else float("nan")
