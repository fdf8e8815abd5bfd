"""Raw measurements: one row per timed repetition, with the session (hardware, software, failures) they were taken in.

Rows live in Parquet; the sessions travel in the file's metadata, so one file says where its numbers come from. While a
session runs, rows are appended to a JSON-lines file, so that a run that is cut short loses nothing. Torch-free.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from traces.problems import InputError, Problem, one_problem

SCHEMA_VERSION: Final = 1
METADATA_KEY: Final = b"diffplan.measurements"
ROWS_FILE: Final = "measurements.jsonl"
SESSION_FILE: Final = "session.json"
PARQUET_FILE: Final = "measurements.parquet"
PREVIOUS_FILE: Final = "previous.parquet"
"""What a run that is being resumed had measured before."""
ROWS_MAX: Final = 5_000_000


@dataclass(frozen=True, slots=True)
class Features:
    """What was timed: the size of the work. Fields that do not apply are 0 (or empty)."""

    forward_batch: int = 0
    """Samples in one UNet forward pass: 2 x n_images under classifier-free guidance."""
    n_images: int = 0
    width_px: int = 0
    height_px: int = 0
    n_steps: int = 0
    n_controlnets: int = 0
    n_loras: int = 0
    n_bytes: int = 0
    link: str = ""
    variant: str = ""
    """Anything else that sets two measurements of one quantity apart: ``fused``, ``file``, ``without_triton``."""

    @property
    def megapixels(self) -> float:
        """width x height / 2**20 of one image."""
        return self.width_px * self.height_px / 2**20


@dataclass(frozen=True, slots=True)
class Measurement:
    """One timed repetition."""

    session: str
    quantity: str
    """Named like the law it feeds (``engine.unet_step``); ``e2e.TOPOLOGY`` for whole images."""
    stack: str
    topology: str
    mode: str
    """``eager``, ``graph`` or ``compiled``; empty where it does not apply."""
    features: Features
    repetition: int
    """Counts up per quantity, mode and features within the session."""
    order: int
    """Position in the session: rows with ascending order were measured one after the other."""
    value_s: float
    is_held_out: bool = False
    """Measured to check laws: never used in fitting one."""
    flags: str = ""
    """What was noticed while it was measured, joined by ``+``: ``throttled``, ``power_limited``, ``noisy``. Nothing is deleted for it."""

    @property
    def cell(self) -> tuple[str, str, Features]:
        """What repetitions have in common: quantity, mode and features."""
        return self.quantity, self.mode, self.features


@dataclass(frozen=True, slots=True)
class Failure:
    """A part that could not be measured, and why; kept with the data so that a gap explains itself."""

    part: str
    error: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Session:
    """One run of ``calibrate run`` on one machine."""

    session: str
    model: str
    gpu_kind: str
    started: str
    """UTC, ISO 8601, whole seconds."""
    seed: int
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)
    """Measured memory facts by the profile's names, and their raw counterparts."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Part to the seconds it took."""
    failures: tuple[Failure, ...] = ()
    tasks: Mapping[str, int] = field(default_factory=dict)
    """Task of the design to how often it was done: what a resumed session need not do again."""


@dataclass(frozen=True, slots=True)
class Measurements:
    """Rows of one or more sessions."""

    rows: tuple[Measurement, ...]
    sessions: tuple[Session, ...]

    def merged(self, other: Measurements) -> Measurements:
        """Both together; raises :class:`InputError` if they share a session."""
        shared = sorted({s.session for s in self.sessions} & {s.session for s in other.sessions})
        if shared:
            raise one_problem(
                "measurements", f"session {shared[0]!r} is given twice", "each session once", "Name each file once."
            )
        return Measurements(self.rows + other.rows, self.sessions + other.sessions)


_FEATURE_FIELDS = [f.name for f in dataclasses.fields(Features)]
_SCHEMA = pa.schema(
    [("session", pa.string()), ("quantity", pa.string()), ("stack", pa.string()), ("topology", pa.string()),
     ("mode", pa.string())]
    + [(name, pa.string() if name in ("link", "variant") else pa.int64()) for name in _FEATURE_FIELDS]
    + [("repetition", pa.int64()), ("order", pa.int64()), ("value_s", pa.float64()), ("is_held_out", pa.bool_()),
       ("flags", pa.string())]
)  # fmt: skip
_PLAIN = ("session", "quantity", "stack", "topology", "mode", "repetition", "order", "value_s")
_LATER: Final[Mapping[str, Any]] = {"is_held_out": False, "flags": ""}
"""Columns that files of older versions lack, and what holds for these."""


def row_to_plain(row: Measurement) -> dict[str, Any]:
    """Flat dictionary of one row, the columns of the Parquet file."""
    return {name: getattr(row, name) for name in (*_PLAIN, *_LATER)} | dataclasses.asdict(row.features)


def row_from_plain(plain: Mapping[str, Any]) -> Measurement:
    """The row of a flat dictionary; raises KeyError or TypeError where a column is missing."""
    return Measurement(
        **{name: plain[name] for name in _PLAIN},
        **{name: plain.get(name, default) for name, default in _LATER.items()},
        features=Features(**{name: plain[name] for name in _FEATURE_FIELDS}),
    )


def session_to_plain(session: Session) -> dict[str, Any]:
    """JSON-ready dictionary of a session."""
    return dataclasses.asdict(session)


def session_from_plain(plain: Mapping[str, Any]) -> Session:
    """The session of a decoded JSON object; raises KeyError or TypeError where it is not one."""
    return Session(**{**plain, "failures": tuple(Failure(**item) for item in plain.get("failures", ()))})


def write_measurements(measurements: Measurements, path: Path) -> None:
    """Writes Parquet beside ``path``, then renames it; the same measurements give the same bytes."""
    plain = [row_to_plain(row) for row in measurements.rows]
    columns = {name: [row[name] for row in plain] for name in _SCHEMA.names}
    sessions = {
        "schema_version": SCHEMA_VERSION,
        "sessions": [session_to_plain(session) for session in measurements.sessions],
    }
    table = pa.table(columns, schema=_SCHEMA).replace_schema_metadata(
        {METADATA_KEY: json.dumps(sessions, sort_keys=True, ensure_ascii=False).encode()}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    pq.write_table(table, beside, compression="zstd")
    beside.replace(path)


def read_measurements(path: Path) -> Measurements:
    """Reads a Parquet file of measurements, or the folder of a run (finished, or cut short).

    Raises:
        InputError: there is no such file, or it holds no measurements; every problem is named.
    """
    if path.is_dir():
        finished = path / PARQUET_FILE
        return read_measurements(finished) if finished.exists() else _read_folder(path)
    try:
        table = pq.read_table(path)
    except OSError as error:
        raise one_problem(
            str(path), f"cannot be read: {error.strerror or 'not a Parquet file'}", "measurements of 'calibrate run'"
        ) from None
    except pa.ArrowInvalid as error:
        raise one_problem(str(path), f"is not Parquet: {error}", "measurements of 'calibrate run'") from None
    return parse_table(table, str(path))


def parse_table(table: pa.Table, where: str) -> Measurements:
    """The measurements in a table that was read from such a file.

    Raises:
        InputError: it holds none, or what it holds cannot be; every problem is named.
    """
    if table.num_rows > ROWS_MAX:
        raise one_problem(where, f"has {table.num_rows} rows", f"at most {ROWS_MAX}")
    missing = [name for name in _SCHEMA.names if name not in table.column_names and name not in _LATER]
    metadata = (table.schema.metadata or {}).get(METADATA_KEY)
    problems = [
        Problem(f"{where} column {name}", "is missing", "a file written by 'calibrate run'") for name in missing
    ]
    for name in set(_SCHEMA.names) & set(table.column_names):
        found, wanted = table.schema.field(name).type, _SCHEMA.field(name).type
        if found != wanted and not (pa.types.is_large_string(found) and pa.types.is_string(wanted)):
            problems.append(Problem(f"{where} column {name}", f"holds {found}", f"{wanted}"))
        elif table.column(name).null_count:
            problems.append(Problem(f"{where} column {name}", f"has {table.column(name).null_count} gaps", "none"))
    problems.sort(key=lambda problem: problem.where)
    if metadata is None:
        problems.append(Problem(f"{where} metadata", "says nothing about the session", "a file of 'calibrate run'"))
    if problems:
        raise InputError(problems)
    try:
        decoded = json.loads(metadata or b"{}")
        sessions = tuple(session_from_plain(item) for item in decoded["sessions"])
        rows = tuple(row_from_plain(row) for row in table.to_pylist())
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise one_problem(f"{where} metadata", f"cannot be decoded: {error}", "a file of 'calibrate run'") from None
    return _checked(Measurements(rows, sessions), where)


def holds_run(folder: Path) -> bool:
    """Whether a folder holds measurements, of a run that is finished or was cut short."""
    return any((folder / name).exists() for name in (PARQUET_FILE, PREVIOUS_FILE, SESSION_FILE))


def _read_folder(folder: Path) -> Measurements:
    previous = folder / PREVIOUS_FILE
    before = read_measurements(previous) if previous.exists() else Measurements((), ())
    if before.sessions and not (folder / SESSION_FILE).exists():
        return before
    rest = _read_log(folder)
    # cut short between the two: what the log holds is in the earlier file already
    return before if {s.session for s in rest.sessions} <= {s.session for s in before.sessions} else before.merged(rest)


def _read_log(folder: Path) -> Measurements:
    try:
        session = session_from_plain(json.loads((folder / SESSION_FILE).read_text(encoding="utf-8")))
        lines = (folder / ROWS_FILE).read_text(encoding="utf-8").splitlines()
        rows = tuple(row_from_plain(json.loads(line)) for line in lines if line.endswith("}"))
    except OSError as error:
        raise one_problem(
            f"{folder}/{Path(error.filename or '').name}", f"cannot be read: {error.strerror}", "the folder of a run"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise one_problem(str(folder), f"holds no measurements: {error}", "the folder of a run") from None
    return _checked(Measurements(rows, (session,)), str(folder))


def _checked(measurements: Measurements, where: str) -> Measurements:
    known = {session.session for session in measurements.sessions}
    problems = [
        Problem(f"{where} row {index} column value_s", f"got {row.value_s!r}", "seconds above 0")
        for index, row in enumerate(measurements.rows, start=1)
        if not 0 < row.value_s < float("inf")
    ]
    problems += [
        Problem(f"{where} session", f"{name!r} is not described in the metadata", f"one of {sorted(known)}")
        for name in sorted({row.session for row in measurements.rows} - known)
    ]
    if problems:
        raise InputError(problems)
    return measurements


def merge(parts: Sequence[Measurements]) -> Measurements:
    """All of them together; raises :class:`InputError` where a session is given twice."""
    total = Measurements((), ())
    for part in parts:
        total = total.merged(part)
    return total


class RowLog:
    """Appends rows of a running session to its folder and numbers them."""

    def __init__(self, folder: Path, session: str, previous: Measurements | None = None) -> None:
        """``previous``: of the sessions that this one goes on with; kept with its own in one file."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._previous = previous
        if previous is not None:
            write_measurements(previous, folder / PREVIOUS_FILE)
            (folder / PARQUET_FILE).unlink(missing_ok=True)
        self.session = session
        self.rows: list[Measurement] = []
        self._repetitions: dict[tuple[str, str, Features], int] = {}
        (folder / ROWS_FILE).write_text("", encoding="utf-8")

    def add(
        self,
        quantity: str,
        values_s: Iterable[float],
        *,
        stack: str,
        topology: str,
        mode: str,
        features: Features,
        is_held_out: bool = False,
        flags: str = "",
    ) -> None:
        """Appends one row per value and flushes them to disk."""
        fresh = []
        for value_s in values_s:
            cell = (quantity, mode, features)
            repetition = self._repetitions.get(cell, 0)
            self._repetitions[cell] = repetition + 1
            fresh.append(
                Measurement(
                    self.session,
                    quantity,
                    stack,
                    topology,
                    mode,
                    features,
                    repetition,
                    len(self.rows),
                    float(value_s),
                    is_held_out,
                    flags,
                )
            )
            self.rows.append(fresh[-1])
        with (self.folder / ROWS_FILE).open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row_to_plain(row), sort_keys=True) + "\n" for row in fresh)

    def write_session(self, session: Session) -> None:
        """Writes what is known about the session so far."""
        beside = self.folder / (SESSION_FILE + ".part")
        beside.write_text(json.dumps(session_to_plain(session), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        beside.replace(self.folder / SESSION_FILE)

    def finish(self, session: Session) -> Path:
        """Writes the Parquet file and removes what it replaces."""
        path = self.folder / PARQUET_FILE
        own = Measurements(tuple(self.rows), (session,))
        write_measurements(own if self._previous is None else self._previous.merged(own), path)
        (self.folder / PREVIOUS_FILE).unlink(missing_ok=True)
        (self.folder / ROWS_FILE).unlink(missing_ok=True)
        (self.folder / SESSION_FILE).unlink(missing_ok=True)
        return path
