"""Changes of the catalogue: pure functions from one catalogue to the next, and the one way to write a file that others read.

A change is made under a lock, on the file as it is then, checked whole, written beside and renamed: readers see the old or the new
catalogue, two writers both take effect, and a rollback is one rename. Every change is a line in a log beside the file, chained by
hash (``engine.registry.audit_log``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Final

from engine.catalogue import (
    Catalogue,
    CatalogueEntry,
    catalogue_from_plain,
    catalogue_to_plain,
    check_catalogue,
    read_catalogue,
)
from engine.json_records import FILE_BYTES_MAX
from engine.registry.audit_check import log_path
from engine.registry.audit_log import append, fresh_lines, next_lines
from traces.problems import InputError, one_problem

LOCK_TIMEOUT_S: Final = 10.0
Change = Callable[[Catalogue], Catalogue]


def add(entry: CatalogueEntry) -> Change:
    """A new version. Adding the very same entry again changes nothing."""

    def change(catalogue: Catalogue) -> Catalogue:
        if catalogue.entries.get(entry.id) == entry:
            return catalogue
        if entry.id in catalogue.entries:
            known = catalogue.entries[entry.id]
            raise one_problem(
                entry.title, f"has the id of {known.title}, {entry.id}", "a file that is not in the catalogue yet",
                "Promote, or retire and name anew, what is there.",
            )  # fmt: skip
        return _with(catalogue, entry)

    return change


def promote(name: str, version: str) -> Change:
    """Puts a version into production and makes it what the plain name means. Also the way back: promote an earlier one."""

    def change(catalogue: Catalogue) -> Catalogue:
        entry = _find(catalogue, name, version)
        if entry.stage == "retired":
            raise one_problem(entry.title, "is retired", "a version in trial or production", "Choose another version.")
        return _with(catalogue, dataclasses.replace(entry, stage="production"), {name: version})

    return change


def rollback(name: str, version: str) -> Change:
    """Makes the plain name mean another version that is in production already; nothing else changes."""

    def change(catalogue: Catalogue) -> Catalogue:
        entry = _find(catalogue, name, version)
        if entry.stage != "production":
            raise one_problem(entry.title, f"is in {entry.stage}", "a version in production", "Promote it instead.")
        return _with(catalogue, entry, {name: version})

    return change


def retire(name: str, version: str) -> Change:
    """Takes a version out of use for good; its entry stays. Refused for the version that the plain name means while others are left."""

    def change(catalogue: Catalogue) -> Catalogue:
        entry = _find(catalogue, name, version)
        others = [
            item.version
            for item in catalogue.versions(name)
            if item.stage == "production" and item.version != entry.version
        ]
        is_current = catalogue.current.get(name) == version
        if is_current and others:
            raise one_problem(
                entry.title, "is what the plain name means", "a version that is not current",
                f"Roll back to one of {sorted(others)} first.",
            )  # fmt: skip
        after = _with(catalogue, dataclasses.replace(entry, stage="retired"))
        current = {key: value for key, value in after.current.items() if not (is_current and key == name)}
        return Catalogue(after.entries, MappingProxyType(current))

    return change


def update_catalogue(
    path: Path,
    change: Change,
    *,
    who: str,
    what: str,
    now_unix_s: float | None = None,
    lock_timeout_s: float = LOCK_TIMEOUT_S,
) -> Catalogue:
    """Applies a change to a catalogue file, atomically; a file that is missing counts as empty.

    Args:
        path: the catalogue.
        change: from the catalogue as it is under the lock to the next.
        who: for the log.
        what: for the log, such as ``promote style@2``.
        now_unix_s: for the log; None: the clock.
        lock_timeout_s: longest wait for another writer.

    Returns:
        The catalogue as it was written.

    Raises:
        InputError: the file cannot be read or written, the change is refused, its result breaks a rule, or another writer
            holds the lock too long. The file is as it was.
    """
    with locked(path, lock_timeout_s):
        before = read_catalogue(path) if path.exists() else Catalogue()
        after = change(before)
        problems = list(check_catalogue(after, str(path)))
        if problems:
            raise InputError(problems)
        if after != before or not path.exists():
            try:
                # The log first: a crash between the two leaves a line too many, never a change without a line.
                lines = next_lines(path, before, after, who, what, time.time() if now_unix_s is None else now_unix_s)
                after = dataclasses.replace(after, log=lines.head)
                text = file_text(after, path)
                append(lines)
                _write(path, text)
            except OSError as error:
                raise one_problem(
                    str(path), f"cannot be written: {error.strerror}", "a writable folder", "Check it."
                ) from None
            return after
    return dataclasses.replace(after, log=before.log)


def accept(path: Path, reason: str, *, who: str, now_unix_s: float | None = None) -> Catalogue:
    """Takes a catalogue file as it is into its log, in full, where the two do not fit: it was edited by hand, or put back.

    Raises:
        InputError: the file cannot be read or written, or the log's own lines do not chain: then the log must be moved away
            (and kept) first.
    """
    with locked(path):
        found = read_catalogue(path)
        try:
            lines = fresh_lines(
                path, found, who, f"accept: {reason}", time.time() if now_unix_s is None else now_unix_s
            )
            after = dataclasses.replace(found, log=lines.head)
            text = file_text(after, path)
            append(lines)
            _write(path, text)
        except OSError as error:
            raise one_problem(
                str(path), f"cannot be written: {error.strerror}", "a writable folder", "Check it."
            ) from None
    return after


@contextmanager
def reading(path: Path, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
    """Keeps writers off while file and log are compared; without a right to the lock, as for a read-only copy, nothing is held."""
    beside = path.with_name(f"{path.name}.lock")
    if os.access(beside, os.W_OK) or (not beside.exists() and os.access(path.parent, os.W_OK)):
        with locked(path, timeout_s):
            yield
    else:
        yield


def file_text(catalogue: Catalogue, path: Path) -> str:
    """What stands in the file; checked to be readable. Raises :class:`InputError`, also where it is too long."""
    text = json.dumps(catalogue_to_plain(catalogue), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    n_bytes = len(text.encode("utf-8"))
    if n_bytes > FILE_BYTES_MAX:
        raise one_problem(
            str(path), f"would have {n_bytes} bytes", f"at most {FILE_BYTES_MAX}", "Keep a second catalogue."
        )
    catalogue_from_plain(json.loads(text), str(path))  # what was written can be read
    return text


def history(path: Path) -> list[dict[str, object]]:
    """The log of a catalogue file, oldest first; [] if there is none. A line that a crash cut off is left out."""
    try:
        lines = log_path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    entries = []
    for line in lines:
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def _with(catalogue: Catalogue, entry: CatalogueEntry, current: dict[str, str] | None = None) -> Catalogue:
    return Catalogue(
        MappingProxyType({**catalogue.entries, entry.id: entry}),
        MappingProxyType({**catalogue.current, **(current or {})}),
    )


def _find(catalogue: Catalogue, name: str, version: str) -> CatalogueEntry:
    for entry in catalogue.versions(name):
        if entry.version == version:
            return entry
    known = sorted(entry.version for entry in catalogue.versions(name))
    allowed = f"one of {known}" if known else "a name of the catalogue"
    raise one_problem(f"{name}@{version}", "is not in the catalogue", allowed, "Correct it.")


@contextmanager
def locked(path: Path, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
    """Holds the lock of a catalogue file. Raises :class:`InputError` if another process holds it too long."""
    beside = path.with_name(f"{path.name}.lock")  # never renamed or removed: all writers lock the same file
    try:
        descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise one_problem(
            str(beside), f"cannot be opened: {error.strerror}", "a writable folder", "Check it."
        ) from None
    try:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise one_problem(
                        str(path), f"is being changed by another process for {timeout_s:g} s", "one writer at a time",
                        "Try again.",
                    ) from None  # fmt: skip
                time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)  # and with it the lock, also if the process dies


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
