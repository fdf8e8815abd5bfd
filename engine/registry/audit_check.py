"""Reads the log beside a catalogue file: whether its lines chain, reach as far as the catalogue says, and say what it holds.

What the lines are: ``engine.registry.audit_log``, which writes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

from engine.catalogue import Catalogue, LogHead, catalogue_to_plain, entry_to_plain
from traces.problems import InputError, Problem, one_problem

NO_LINE: Final = "0" * 64
LINE_BYTES_MAX: Final = 64 * 2**20
"""A line may hold a whole catalogue (16 MiB in its own file), each character escaped at worst."""
UNIX_S_MAX: Final = 10**11
REPAIR: Final = (
    "Find out who did it; `diffplan addons audit --accept REASON` takes the catalogue as it is into the log."
)
MOVE_AWAY: Final = (
    "Find out who did it, and keep the log as evidence: move it away, then `diffplan addons audit --accept REASON`."
)
CRASHED: Final = (
    "A crash, an older catalogue put back, or another hand. The next change marks one such line as void; otherwise: "
    + REPAIR[0].lower()
    + REPAIR[1:]
)


@dataclass(frozen=True, slots=True)
class AuditReport:
    """A log that fits its catalogue."""

    head: LogHead
    first_unix_s: float
    last_unix_s: float
    void_lines: tuple[int, ...]
    """Lines that a crash left without effect; a later line says so."""
    restarts: tuple[tuple[int, str], ...]
    """Lines from which the log starts anew with the whole catalogue as found, and what they say."""


def log_path(path: Path) -> Path:
    """Where the log of a catalogue file is."""
    return path.with_name(f"{path.name}.log.jsonl")


def content_sha256(catalogue: Catalogue) -> str:
    """Of entries and current names, in one spelling."""
    plain = catalogue_to_plain(catalogue)
    text = json.dumps([plain["entries"], plain["current"]], sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def check_log(path: Path, catalogue: Catalogue, *, expected_head: str = "") -> AuditReport:
    """Reads every line of a catalogue file's log and replays it.

    Args:
        path: the catalogue file.
        catalogue: what it holds.
        expected_head: sha256 of a line as an earlier audit gave it; it must still be there.

    Raises:
        InputError: with the first bad line: it does not carry the hash of the line before, is cut off, is not in the
            catalogue, or what all lines together say is not what the catalogue holds.
    """
    log = log_path(path)
    head = catalogue.log
    if head is None:
        what = "does not say how far its log reaches" if log.exists() else "has no log"
        raise one_problem(str(path), what, "a catalogue that `diffplan addons` wrote", REPAIR)
    walk = Walk(log, head.n_lines)
    is_expected_found = not expected_head
    try:
        with log.open("rb") as file:
            for digest in walk.lines(file):
                is_expected_found = is_expected_found or digest == expected_head
                if walk.n == head.n_lines and digest != head.sha256:
                    raise one_problem(
                        f"{log} line {walk.n}",
                        f"has the sha256 {digest}",
                        f"{head.sha256}, as the catalogue says",
                        MOVE_AWAY,
                    )
                if walk.n == head.n_lines + 1:
                    raise one_problem(
                        f"{log} line {walk.n}", f"comes after line {head.n_lines}, the last that the catalogue knows",
                        "no further line", CRASHED,
                    )  # fmt: skip
    except OSError as error:
        raise one_problem(
            str(log), f"cannot be read: {error.strerror}", "the log of the catalogue", MOVE_AWAY
        ) from None
    if walk.n < head.n_lines:
        raise one_problem(
            f"{log} line {walk.n + 1}", "is missing: the log was cut off",
            f"{head.n_lines} lines, as the catalogue says", MOVE_AWAY,
        )  # fmt: skip
    if walk.unread is not None:
        raise InputError(walk.unread)
    if not is_expected_found:
        raise one_problem(
            str(log), f"has no line with the sha256 {expected_head[:80]}", "the head that was kept elsewhere",
            "Log and catalogue were rewritten since. " + MOVE_AWAY,
        )  # fmt: skip
    problems = list(walk.differences(catalogue, path))
    if problems:
        raise InputError(problems)
    return AuditReport(head, walk.first_unix_s, walk.last_unix_s, tuple(walk.void_lines), tuple(walk.restarts))


def whole(catalogue: Catalogue) -> dict[str, Any]:
    """Entries and names as a line states them."""
    return {
        "entries": {key: entry_to_plain(entry) for key, entry in sorted(catalogue.entries.items())},
        "current": dict(sorted(catalogue.current.items())),
    }


def digest_of(line: bytes) -> str:
    """Of a line without its newline."""
    return hashlib.sha256(line).hexdigest()


@dataclass(slots=True)
class Walk:
    """What the lines of a log say, read one by one."""

    path: Path
    n_known: int = 0
    """How many lines the catalogue knows; what comes after them may be a crash's."""
    n: int = 0
    n_bytes: int = 0
    previous: str = NO_LINE
    entries: dict[str, Any] = field(default_factory=dict)
    current: dict[str, Any] = field(default_factory=dict)
    content: str = ""
    unread: Problem | None = None
    """The last line, if it is no line of a log: allowed only where the next one voids it."""
    void_lines: list[int] = field(default_factory=list)
    restarts: list[tuple[int, str]] = field(default_factory=list)
    first_unix_s: float = 0.0
    last_unix_s: float = 0.0
    _undo: tuple[dict[str, Any], dict[str, Any], str] = field(default_factory=lambda: ({}, {}, ""))

    def lines(self, file: BinaryIO) -> Iterator[str]:
        """Takes in line after line and gives the sha256 of each; raises :class:`InputError` at the first bad one."""
        while data := file.readline(LINE_BYTES_MAX + 1):
            where = f"{self.path} line {self.n + 1}"
            if len(data) > LINE_BYTES_MAX:
                raise one_problem(where, "is too long", f"at most {LINE_BYTES_MAX} bytes", MOVE_AWAY)
            if not data.endswith(b"\n"):
                repair = CRASHED if self.n >= self.n_known else MOVE_AWAY
                raise one_problem(where, "is cut off", "a line that ends with a newline", repair)
            line = _decoded(data)
            if isinstance(line, str):
                if self.unread is not None:
                    raise InputError(self.unread)
                self.unread = Problem(where, line, "a line of the log", MOVE_AWAY)
            else:
                self._take(line, where)
            self.n += 1
            self.n_bytes += len(data)
            self.previous = digest_of(data[:-1])
            yield self.previous

    def _take(self, line: Mapping[str, Any], where: str) -> None:
        if self.unread is not None and "voids" not in line:
            raise InputError(self.unread)
        if line["n"] != self.n + 1:
            raise one_problem(
                where, f"says that it is line {str(line['n'])[:20]}: a line was taken out or put in before it",
                f"{self.n + 1}", MOVE_AWAY,
            )  # fmt: skip
        if line["previous_sha256"] != self.previous:
            raise one_problem(
                f"{self.path} line {self.n}" if self.n else where,
                f"has the sha256 {self.previous}" if self.n else "says that there was a line before",
                f"{str(line['previous_sha256'])[:64]}, as line {self.n + 1} says: one of the two was changed" if self.n else NO_LINE,
                MOVE_AWAY,
            )  # fmt: skip
        if "voids" in line:
            if line["voids"] != self.n or self.n == 0:
                raise one_problem(where, "voids another line than the one before", f"{self.n}", MOVE_AWAY)
            if self.unread is None:
                self._take_back()
            self.unread = None
            self.void_lines.append(self.n)
        if line.get("restart") is True:
            self.entries, self.current = {}, {}
            self.restarts.append((self.n + 1, str(line["what"])))
        self._undo = (
            {key: self.entries.get(key) for key in line["entries"]},
            {key: self.current.get(key) for key in line["current"]},
            self.content,
        )
        _merge(self.entries, line["entries"])
        _merge(self.current, line["current"])
        self.content = str(line["content_sha256"])
        if self.n == 0:
            self.first_unix_s = float(line["at_unix_s"])
        self.last_unix_s = float(line["at_unix_s"])

    def _take_back(self) -> None:
        entries, current, self.content = self._undo
        _merge(self.entries, entries)
        _merge(self.current, current)

    def differences(self, catalogue: Catalogue, path: Path) -> Iterator[Problem]:
        """What the catalogue holds and the log does not say."""
        plain = whole(catalogue)
        for key in sorted({*plain["entries"], *self.entries}):
            kept, said = plain["entries"].get(key), self.entries.get(key)
            if _plain(kept) != _plain(said):
                what = "is not in the log" if said is None else "is gone" if kept is None else "is not as in the log"
                fields = sorted(name for name in kept if said.get(name) != _plain(kept[name])) if kept and said else []
                yield Problem(
                    f"{path} entry {key[:80]!r}", what + (f": {', '.join(fields)}" if fields else ""),
                    "the entry of its last line in the log", REPAIR,
                )  # fmt: skip
        for name in sorted({*plain["current"], *self.current}):
            kept, said = plain["current"].get(name), self.current.get(name)
            if kept != said:
                yield Problem(
                    f"{path} current", f"says that {name[:80]!r} means {kept!r}", f"{said!r}, as in the log", REPAIR
                )
        if self.content != content_sha256(catalogue):
            yield Problem(
                f"{self.path} line {self.n}",
                f"says content_sha256 {self.content[:64]}",
                content_sha256(catalogue),
                REPAIR,
            )


def _decoded(data: bytes) -> dict[str, Any] | str:
    """A line of a log, or why it is none."""
    try:
        line = json.loads(data)
    except (ValueError, RecursionError):
        return "is not JSON"
    wanted = {
        "n": int, "previous_sha256": str, "content_sha256": str, "at_unix_s": int | float, "who": str, "what": str,
        "entries": dict, "current": dict,
    }  # fmt: skip
    if not isinstance(line, dict):
        return "is no JSON object"
    wrong = [name for name, kind in wanted.items() if not isinstance(line.get(name), kind)]
    if wrong:
        return f"lacks {', '.join(wrong)}, or has another type there"
    if not 0 <= line["at_unix_s"] <= UNIX_S_MAX:
        return "has a time that is none"
    return line


def _merge(table: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if value is None:
            table.pop(key, None)
        else:
            table[key] = value


def _plain(value: Any) -> Any:
    """As JSON gives it back: lists for tuples."""
    return json.loads(json.dumps(value))
