"""``calibrate ingest``: reads what came back from an air-gapped host. Nothing in it is believed before it is checked.

Only three member names exist; sizes, ratios and digests are checked before anything is parsed; of the Parquet file only the known
columns are read, after its own statement of its size; nothing is unpacked to a path that the archive names. The digests find
damage, not malice: who can write the file can write its manifest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from calibrate.bundle import FORMAT, MANIFEST
from calibrate.measurement import (
    METADATA_KEY,
    PARQUET_FILE,
    ROWS_MAX,
    Failure,
    Measurements,
    Session,
    holds_run,
    parse_table,
    write_measurements,
)
from calibrate.rig import MODELS
from traces.problems import InputError, Problem, one_problem

MEMBERS: Final[Mapping[str, int]] = {PARQUET_FILE: 128 * 2**20, "run.log": 2 * 2**20, MANIFEST: 2**16}
"""Names that may be in it, and the most bytes that each may unpack to."""
ARCHIVE_BYTES_MAX: Final = 128 * 2**20
COLUMNS_MAX: Final = 64
UNCOMPRESSED_BYTES_MAX: Final = 2**30
METADATA_BYTES_MAX: Final = 16 * 2**20
TEXT_CHARACTERS_MAX: Final = 2000
COUNT_MAX: Final = 2**50
SECONDS_MAX: Final = 86_400.0
WORD: Final = re.compile(r"[A-Za-z0-9._:+-]{0,200}")
"""Quantities, stacks, modes, links, variants, sessions: they end up in files and on terminals."""


@dataclass(frozen=True, slots=True)
class Ingested:
    """What was taken in."""

    path: Path
    measurements: Measurements


def ingest(archive: Path, out: Path) -> Ingested:
    """Checks a result and writes its measurements anew below ``out``.

    Raises:
        InputError: it is not a result, is damaged, or says what measurements cannot say; nothing is written then.
    """
    if holds_run(out):
        raise one_problem(f"--out {out}", "holds a run already", "a new folder", "Name another one.")
    files = read_members(archive)
    _check_manifest(archive, files)
    where = f"{archive} {PARQUET_FILE}"
    measurements = parse_table(_table(files[PARQUET_FILE], where), where)
    _check_sessions(measurements, where)
    _check_rows(measurements, where)
    measurements = Measurements(measurements.rows, tuple(_printable(session) for session in measurements.sessions))
    path = out / PARQUET_FILE
    write_measurements(measurements, path)
    return Ingested(path, measurements)


def read_members(archive: Path) -> dict[str, bytes]:
    """The members by name, every one within its bounds.

    Raises:
        InputError: it is no zip file, too large, encrypted, or has other members than a result.
    """
    try:
        n_bytes = archive.stat().st_size
    except OSError as error:
        raise one_problem(str(archive), f"cannot be read: {error.strerror}", "the result.zip of a kit") from None
    if n_bytes > ARCHIVE_BYTES_MAX:
        raise one_problem(str(archive), f"has {n_bytes} bytes", f"at most {ARCHIVE_BYTES_MAX}")
    problems, files = [], {}
    try:
        with zipfile.ZipFile(archive) as opened:
            infos = opened.infolist()
            names = [info.filename for info in infos]
            for name in sorted(set(names)):
                if name not in MEMBERS:
                    problems.append(
                        Problem(f"{archive} member {name[:100]!r}", "is unknown", f"only {sorted(MEMBERS)}")
                    )
                elif names.count(name) > 1:
                    problems.append(Problem(f"{archive} member {name}", "is there twice", "each once"))
            problems += [
                Problem(f"{archive} member {name}", "is missing", "a whole result", "Pack it again: calibrate pack.")
                for name in (PARQUET_FILE, MANIFEST)
                if name not in names
            ]
            if problems:
                raise InputError(problems)
            for info in infos:
                files[info.filename] = _member(opened, info, archive)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, RuntimeError) as error:
        raise one_problem(
            str(archive), f"is no sound zip file: {str(error)[:200]}", "the result.zip of a kit"
        ) from None
    return files


def _member(opened: zipfile.ZipFile, info: zipfile.ZipInfo, archive: Path) -> bytes:
    limit = MEMBERS[info.filename]
    where = f"{archive} member {info.filename}"
    if info.flag_bits & 0x1:
        raise one_problem(where, "is encrypted", "a plain member")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise one_problem(where, f"is compressed by method {info.compress_type}", "stored or deflated")
    with opened.open(info) as stream:
        data = stream.read(limit + 1)  # what the header says is not believed
    if len(data) > limit:
        raise one_problem(where, f"unpacks to more than {limit} bytes", f"at most {limit}")
    return data


def _check_manifest(archive: Path, files: Mapping[str, bytes]) -> None:
    where = f"{archive} {MANIFEST}"
    try:
        manifest = json.loads(files[MANIFEST])
        stated = dict(manifest["sha256"])
        kind, version = manifest["kind"], manifest["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise one_problem(where, "cannot be decoded", "the manifest of a result") from None
    if kind != "result" or version != FORMAT:
        raise one_problem(
            where, f"is of a {str(kind)[:40]!r}, format {str(version)[:10]}", f"a 'result', format {FORMAT}"
        )
    found = {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != MANIFEST}
    problems = [
        Problem(f"{archive} member {name}", "is not what its manifest says", "the sha256 stated there",
                "Copy the file again: it was damaged on its way.")
        for name in sorted(found)
        if stated.get(name) != found[name]
    ]  # fmt: skip
    if problems:
        raise InputError(problems)


def _table(data: bytes, where: str) -> pa.Table:
    """The known columns, once the file's own account of its size is within bounds."""
    try:
        opened = pq.ParquetFile(io.BytesIO(data))
        about = opened.metadata
        uncompressed = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
        for what, value, limit in (
            ("rows", about.num_rows, ROWS_MAX), ("columns", about.num_columns, COLUMNS_MAX),
            ("uncompressed bytes", uncompressed, UNCOMPRESSED_BYTES_MAX),
            ("bytes of metadata", len((about.metadata or {}).get(METADATA_KEY, b"")), METADATA_BYTES_MAX),
        ):  # fmt: skip
            if value > limit:
                raise one_problem(where, f"has {value} {what}", f"at most {limit}")
        return opened.read()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise one_problem(where, f"is no sound Parquet file: {str(error)[:200]}", "measurements.parquet") from None


def _check_sessions(measurements: Measurements, where: str) -> None:
    """Types and names of what is said about a session: its metadata is JSON that somebody else wrote."""
    problems: list[Problem] = []
    kinds: dict[str, tuple[type, ...]] = {
        "session": (str,), "model": (str,), "gpu_kind": (str,), "started": (str,), "seed": (int,), "fingerprint": (dict,),
        "facts": (dict,), "parts": (dict,), "tasks": (dict,),
    }  # fmt: skip
    for place, session in enumerate(measurements.sessions):
        at = f"{where} session {place + 1}"
        wrong = [name for name, kind in kinds.items() if not isinstance(getattr(session, name), kind)]
        numbers = {} if wrong else {**session.facts, **session.parts, **session.tasks}
        wrong += [f"facts {str(name)[:40]}" for name, value in numbers.items() if not _is_number(value)]
        wrong += ["failures" for failure in session.failures if not (
            isinstance(failure.part, str) and isinstance(failure.error, str) and _is_number(failure.at_s))]  # fmt: skip
        problems += [Problem(at, f"its {name} is of another type", "what 'calibrate run' writes") for name in wrong]
        if wrong:
            continue
        if session.model not in MODELS:
            problems.append(Problem(at, f"is of model {session.model[:40]!r}", f"one of {list(MODELS)}"))
        problems += [
            Problem(at, f"{text[:40]!r} has characters of no name", "letters, digits and ._:+-")
            for text in (session.session, session.gpu_kind, session.started)
            if not WORD.fullmatch(text)
        ]
    if problems:
        raise InputError(problems)


def _check_rows(measurements: Measurements, where: str) -> None:
    """Words and numbers that measurements can have."""
    words = {word for row in measurements.rows for word in (row.quantity, row.stack, row.topology, row.mode,
             row.features.link, row.features.variant, row.flags)}  # fmt: skip
    problems = [
        Problem(f"{where} column of words", f"{word[:40]!r} has characters of no name", "letters, digits and ._:+-")
        for word in sorted(words)
        if not WORD.fullmatch(word)
    ]
    for index, row in enumerate(measurements.rows, start=1):
        numbers = [*_numbers(row.features), row.order, row.repetition]
        if row.value_s > SECONDS_MAX or not all(0 <= value <= COUNT_MAX for value in numbers):
            problems.append(
                Problem(f"{where} row {index}", f"says {row.value_s:g} s of {numbers}",
                        f"at most {SECONDS_MAX:g} s, counts and bytes 0..{COUNT_MAX}")
            )  # fmt: skip
    if problems:
        raise InputError(problems)


def _printable(session: Session) -> Session:
    """Texts for people without control characters: a terminal would obey them."""
    failures = tuple(Failure(_text(f.part), _text(f.error), f.at_s) for f in session.failures)
    named = {
        name: {_text(key): value for key, value in getattr(session, name).items()}
        for name in ("facts", "parts", "tasks")
    }
    return dataclasses.replace(session, failures=failures, fingerprint=_clean(session.fingerprint), **named)


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, dict):
        return {_text(str(key)): _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return value


def _text(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text[:TEXT_CHARACTERS_MAX])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(features: Any) -> list[int]:
    return [value for name in features.__slots__ if isinstance(value := getattr(features, name), int)]
