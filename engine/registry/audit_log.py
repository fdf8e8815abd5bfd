"""The log beside a catalogue file: one JSON line a change, each with the hash of the line before, so that tampering shows.

The catalogue states the head (number of lines, bytes, sha256 of the last), so that a log that was cut off shows too. Whoever may
write both files can forge both, consistently: keep a head elsewhere (``audit_check.check_log``) to find that as well.

A line's own fields: ``n``, ``previous_sha256`` (of the line before, without its newline; 64 zeros in the first), ``content_sha256`` (of
entries and names after the change), ``restart`` (its entries are the whole catalogue), ``voids`` (the line before, which a crash
left without effect).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engine.catalogue import Catalogue, LogHead, entry_to_plain
from engine.registry.audit_check import (
    LINE_BYTES_MAX,
    MOVE_AWAY,
    NO_LINE,
    REPAIR,
    Walk,
    content_sha256,
    digest_of,
    log_path,
    whole,
)
from traces.problems import InputError, one_problem

EMPTY: Final = LogHead(0, 0, NO_LINE)


@dataclass(frozen=True, slots=True)
class NewLines:
    """Lines ready to be appended, and where the log stands afterwards."""

    path: Path
    data: bytes
    head: LogHead


def next_lines(path: Path, before: Catalogue, after: Catalogue, who: str, what: str, now_unix_s: float) -> NewLines:
    """The lines for a change of a catalogue file, whose lock is held. The first of a file that had no log is the file as found.

    Raises:
        InputError: file and log do not fit: one was edited, cut off or put back.
        OSError: the log cannot be read.
    """
    log = log_path(path)
    stamp = {"at_unix_s": round(now_unix_s, 3), "who": who}
    if before.log is None:
        if log.exists() and log.stat().st_size:
            raise one_problem(
                str(path), "does not say how far its log reaches, though there is one", "the catalogue that diffplan wrote",
                REPAIR,
            )  # fmt: skip
        draft = _Draft(log)
        if before.entries:
            draft.add({**stamp, "what": "as found", "restart": True, **whole(before)}, before)
    else:
        last, tail = _last_line(log, before.log)
        if last.get("content_sha256") != content_sha256(before):
            raise one_problem(
                str(path), "was changed without a line in its log", "changes by `diffplan addons` only", REPAIR
            )
        draft = _Draft(log, before.log)
        if tail:
            if tail.count(b"\n") > 1 or (tail.count(b"\n") == 1 and not tail.endswith(b"\n")):
                raise one_problem(
                    str(path), f"is older than its log, which goes on after line {before.log.n_lines}",
                    "the latest catalogue", REPAIR,
                )  # fmt: skip
            draft.take_over(tail)
            n = draft.head.n_lines
            draft.add(
                {**stamp, "what": f"line {n} did not take effect", "voids": n, "entries": {}, "current": {}}, before
            )
    draft.add({**stamp, "what": what, **_difference(before, after)}, after)
    return draft.lines()


def fresh_lines(path: Path, found: Catalogue, who: str, what: str, now_unix_s: float) -> NewLines:
    """A line from which the log starts anew with the catalogue as found, behind the lines that are there.

    Raises:
        InputError: the lines that are there do not chain.
        OSError: the log cannot be read.
    """
    log = log_path(path)
    walk = Walk(log)
    if log.exists():
        with log.open("rb") as file:
            for _ in walk.lines(file):
                pass
            if walk.unread is not None:
                raise InputError(walk.unread)
    draft = _Draft(log, LogHead(walk.n, walk.n_bytes, walk.previous))
    draft.add(
        {"at_unix_s": round(now_unix_s, 3), "who": who, "what": what, "restart": True, **whole(found)}, found
    )  # fmt: skip
    return draft.lines()


def append(lines: NewLines) -> None:
    """Appends lines and waits until they are on the disk. Raises :class:`OSError`."""
    with lines.path.open("ab") as file:
        file.write(lines.data)
        file.flush()
        os.fsync(file.fileno())


def _difference(before: Catalogue, after: Catalogue) -> dict[str, Any]:
    changed = sorted(
        key for key in {*before.entries, *after.entries} if before.entries.get(key) != after.entries.get(key)
    )
    return {
        "entries": {
            key: entry_to_plain(after.entries[key]) if key in after.entries else None for key in changed
        },
        "current": {
            name: after.current.get(name)
            for name in sorted({*before.current, *after.current})
            if before.current.get(name) != after.current.get(name)
        },
    }  # fmt: skip


def _last_line(log: Path, head: LogHead) -> tuple[dict[str, Any], bytes]:
    """The line that the head names, decoded, and what follows it. Raises :class:`InputError` if it is not there."""
    wrong = one_problem(
        str(log), f"does not end its line {head.n_lines} as the catalogue says", f"the sha256 {head.sha256}",
        "`diffplan addons audit` names the first bad line.",
    )  # fmt: skip
    try:
        file = log.open("rb")
    except FileNotFoundError:
        raise one_problem(str(log), "is missing", f"{head.n_lines} lines, as the catalogue says", MOVE_AWAY) from None
    with file:
        start = max(0, head.n_bytes - LINE_BYTES_MAX)
        file.seek(start)
        data = file.read(head.n_bytes - start)
        tail = file.read(LINE_BYTES_MAX)
    line = data[data.rfind(b"\n", 0, -1) + 1 :]
    if len(data) < head.n_bytes - start or not line.endswith(b"\n") or digest_of(line[:-1]) != head.sha256:
        raise wrong
    try:
        plain = json.loads(line)
    except ValueError:
        raise wrong from None
    return (plain if isinstance(plain, dict) else {}), tail


@dataclass(slots=True)
class _Draft:
    """Lines that are being put together behind a head."""

    path: Path
    head: LogHead = EMPTY
    data: bytes = b""

    def take_over(self, tail: bytes) -> None:
        """Counts what a crash left as a line; ends it if it was torn."""
        if not tail.endswith(b"\n"):
            self.data += b"\n"
            tail += b"\n"
        self.head = LogHead(self.head.n_lines + 1, self.head.n_bytes + len(tail), digest_of(tail[:-1]))

    def add(self, fields: Mapping[str, Any], after: Catalogue) -> None:
        line = {
            **fields,
            "n": self.head.n_lines + 1,
            "previous_sha256": self.head.sha256,
            "content_sha256": content_sha256(after),
        }
        # ASCII: no look-alike, bidirectional mark or separator of lines stands in a log that people read.
        data = json.dumps(line, sort_keys=True, ensure_ascii=True).encode("ascii")
        self.data += data + b"\n"
        self.head = LogHead(self.head.n_lines + 1, self.head.n_bytes + len(data) + 1, digest_of(data))

    def lines(self) -> NewLines:
        return NewLines(self.path, self.data, self.head)
