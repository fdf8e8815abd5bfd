"""JSON lines that survive the death of the process that writes them: one write a line, files rotated by size.

A killed process leaves at most one torn line, the last of its last file; the next process begins a file of its own. Against the
loss of power, files are also synced to the disk now and then, on a thread, so that a slow disk does not hold up the caller.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

LINE_BYTES_MAX: Final = 2**20


@dataclass(frozen=True, slots=True)
class LineFileSettings:
    """Sizes and syncing."""

    file_bytes_max: int = 64 * 2**20
    """A file that has grown to this is closed and the next one begun."""
    n_files_max: int | None = None
    """Older files are removed. None: all are kept."""
    sync_s: float = 5.0
    """Least time between two syncs to disk."""


class LineFiles:
    """``NAME-000001.jsonl``, ``NAME-000002.jsonl``, … in one folder, appended to by one process at a time."""

    def __init__(
        self, folder: Path, name: str, clock: Callable[[], float], settings: LineFileSettings | None = None
    ) -> None:
        self._folder = folder
        self._name = name
        self._clock = clock
        self._settings = settings if settings is not None else LineFileSettings()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="line-files")
        existing = line_files(folder, name)
        self._number = _number_of(existing[-1]) if existing else 0
        self._descriptor = -1
        self._n_bytes = 0
        self._synced_s = clock()
        self.n_lost = 0
        """Lines that could not be written (disk full, folder gone); said on stderr once."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one object. A disk that fails must not stop the service: the line is counted as lost."""
        data = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        try:
            if self._descriptor < 0 or self._n_bytes + len(data) > self._settings.file_bytes_max:
                self._next_file()
            written = os.write(self._descriptor, data)
            if written < len(data):
                self._close_file()  # what is torn stays the last line of its file
                raise OSError(f"{written} of {len(data)} bytes written")
        except OSError as error:
            self.n_lost += 1
            if self.n_lost == 1:
                sys.stderr.write(f"{self._folder}: record lines cannot be written and are lost: {error}\n")
            return
        self._n_bytes += len(data)
        now_s = self._clock()
        if now_s - self._synced_s >= self._settings.sync_s:
            self._synced_s = now_s
            self._thread.submit(os.fsync, self._descriptor)

    def close(self) -> None:
        """Syncs and closes; may be called twice, and writing again begins a new file."""
        self._close_file()
        self._thread.shutdown(wait=True)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="line-files")

    def _next_file(self) -> None:
        self._close_file()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._number += 1
        path = self._folder / f"{self._name}-{self._number:06d}.jsonl"
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._n_bytes = 0
        limit = self._settings.n_files_max
        if limit is not None:
            for old in line_files(self._folder, self._name)[:-limit]:
                old.unlink(missing_ok=True)

    def _close_file(self) -> None:
        if self._descriptor >= 0:
            self._thread.submit(_sync_and_close, self._descriptor)  # behind syncs that are under way
            self._descriptor = -1


def _sync_and_close(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def line_files(folder: Path, name: str) -> list[Path]:
    """The files of a log, oldest first."""
    return sorted(
        (path for path in folder.glob(f"{name}-*.jsonl") if path.stem[len(name) + 1 :].isdigit()), key=_number_of
    )


def _number_of(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


@dataclass(slots=True)
class ReadReport:
    """What was found while reading."""

    n_torn: int = 0
    """Lines that were not whole: at most one a file if nothing but a kill happened."""


def read_lines(folder: Path, name: str, report: ReadReport) -> Iterator[dict[str, Any]]:
    """Every whole line of a log, oldest first. Torn ones are counted in ``report``."""
    for path in line_files(folder, name):
        with path.open("rb") as file:
            while line := file.readline(LINE_BYTES_MAX):
                try:
                    value = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    value = None
                if isinstance(value, dict):
                    yield value
                else:
                    report.n_torn += 1
