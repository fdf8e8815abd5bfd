"""What happened to the workers, with how long it took: kept in memory for metrics, appended to ``events.jsonl`` for the record."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

KEPT_MAX: Final = 10_000
FILE_BYTES_MAX: Final = 64 * 2**20
"""Then the file is renamed to ``events.1.jsonl`` (replacing that) and begun anew."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened."""

    at_s: float
    """Engine clock, when it was over."""
    kind: str
    """``start``, ``ready``, ``attach``, ``detach``, ``drain``, ``stop``, ``down``, ``kill``, ``restart``, ``admit``, ``pair_lost``,
    ``busy``, ``apply``."""
    worker_id: str = ""
    pool: str = ""
    duration_s: float | None = None
    detail: str = ""
    """Why, with whom, or by which transport."""
    peer: str = ""


class EventLog:
    """Remembers, counts and writes events; tells listeners."""

    def __init__(self, clock: Callable[[], float], folder: Path) -> None:
        self._clock = clock
        self._path = folder / "events.jsonl"
        self._file: TextIO | None = None
        self.recent: deque[Event] = deque(maxlen=KEPT_MAX)
        self.counts: Counter[str] = Counter()
        self.listeners: list[Callable[[Event], None]] = []

    def add(
        self,
        kind: str,
        worker_id: str = "",
        pool: str = "",
        *,
        duration_s: float | None = None,
        detail: str = "",
        peer: str = "",
    ) -> None:
        """Something has happened."""
        event = Event(self._clock(), kind, worker_id, pool, duration_s, detail[:2000], peer)
        self.recent.append(event)
        self.counts[kind] += 1
        self._write(event)
        for listener in self.listeners:
            listener(event)

    def close(self) -> None:
        """Closes the file; a later event opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, event: Event) -> None:
        line = json.dumps(dataclasses.asdict(event), ensure_ascii=False, sort_keys=True)
        try:
            if self._file is None:
                self._file = self._path.open("a", encoding="utf-8")
            self._file.write(line + "\n")
            self._file.flush()
            if self._file.tell() > FILE_BYTES_MAX:
                self.close()
                self._path.replace(self._path.with_name("events.1.jsonl"))
        except OSError as error:
            # A full disk must not stop the service; the event is still in memory and in the metrics.
            sys.stderr.write(f"{self._path}: cannot be written: {error.strerror}: {line}\n")
            self._file = None
