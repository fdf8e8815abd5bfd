"""Imports any CSV of requests by a map from our column names to its own."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any, Final, Literal, get_args
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np
import numpy.typing as npt
import pandas as pd

from traces.cells import Findings
from traces.files import DEFAULT_LIMITS, ReadLimits, read_text
from traces.frame import checked_frame
from traces.problems import InputError, Problem, one_problem
from traces.reader import frame_of_csv
from traces.records import REQUEST_COLUMNS
from traces.trace import Provenance, Trace

TimeFormat = Literal["auto", "seconds", "epoch_s", "epoch_ms", "iso"]
TIME_FORMATS: Final[tuple[TimeFormat, ...]] = get_args(TimeFormat)

_LONGEST_TRACE_S: Final = 10 * 366 * 86_400.0  # seconds beyond this are an epoch, not a place in a trace


@dataclass(frozen=True, slots=True)
class ColumnOptions:
    """How to read the cells of a foreign CSV."""

    time_format: TimeFormat = "auto"
    """``seconds`` after the trace's start, ``epoch_s`` or ``epoch_ms`` since 1970, ``iso`` timestamps; ``auto`` takes
    ``seconds`` if every cell is a number and ``iso`` otherwise, and refuses numbers that can only be an epoch."""
    timezone: str = "UTC"
    """IANA zone of timestamps that name none. A time that a clock change makes ambiguous is the earlier one."""
    list_separator: str | None = None
    """Separates the items of list cells; JSON lists are understood either way."""


def import_columns(
    path: Path | str,
    mapping: Mapping[str, str],
    options: ColumnOptions | None = None,
    limits: ReadLimits = DEFAULT_LIMITS,
) -> Trace:
    """Reads a CSV (``.csv`` or ``.csv.gz``) whose columns have other names.

    Args:
        path: the file.
        mapping: our column to its column, ``{"arrival_s": "TIMESTAMP", "n_steps": "steps"}``. Columns that already have
            our name need no entry. All others are kept behind ours.
        options: times and lists.
        limits: how much of a file is accepted.

    Without a ``request_id``, rows are called ``row-1`` and so on; that and all other defaults are stated and counted.
    Timestamps and epochs become seconds after the earliest one.

    Raises:
        InputError: an entry of the map names a column that does not exist on either side, or any cell is wrong.
    """
    options = options or ColumnOptions()
    path = Path(path)
    zone = _zone(options)
    raw = frame_of_csv(read_text(path, limits), path.name, limits)
    _check_mapping(raw, mapping, path.name)
    frame = raw.drop(columns=[source for source in mapping.values() if source not in mapping])
    for target, source in mapping.items():
        frame[target] = raw[source]
    notes = [f"columns mapped: {', '.join(f'{ours}={theirs}' for ours, theirs in sorted(mapping.items()))}"]
    defaults = {}
    if "request_id" not in frame.columns:
        frame["request_id"] = [f"row-{row + 1}" for row in range(len(frame))]
        defaults["request_id=row-N"] = len(frame)
    if "arrival_s" in frame.columns:
        frame["arrival_s"], note = _seconds(frame["arrival_s"], options, zone, path.name)
        notes.append(note)
    for column in REQUEST_COLUMNS:
        if column.kind.startswith("list") and column.name in frame.columns and options.list_separator:
            is_text = column.kind == "list[str]"
            frame[column.name] = _split(frame[column.name], options.list_separator, is_text)
    return checked_frame(frame, path.name, Provenance(source=path.name, defaults=defaults, notes=tuple(notes)))


def parse_mapping(entries: list[str]) -> dict[str, str]:
    """``["arrival_s=TIMESTAMP", …]`` as a mapping.

    Raises:
        InputError: an entry is not OURS=THEIRS, or ours is there twice.
    """
    mapping: dict[str, str] = {}
    problems = []
    for entry in entries:
        ours, mark, theirs = entry.partition("=")
        if not (mark and ours.strip() and theirs.strip()):
            problems.append(Problem("--map", f"got {entry!r}", "OURS=THEIRS such as arrival_s=TIMESTAMP"))
        elif ours.strip() in mapping:
            problems.append(Problem("--map", f"{ours.strip()} is mapped twice", "one source for each column"))
        else:
            mapping[ours.strip()] = theirs.strip()
    if problems:
        raise InputError(problems)
    return mapping


def _zone(options: ColumnOptions) -> tzinfo:
    if options.time_format not in TIME_FORMATS:
        raise one_problem("time format", f"got {options.time_format!r}", f"one of {', '.join(TIME_FORMATS)}")
    if options.timezone == "UTC":
        return UTC
    try:
        return ZoneInfo(options.timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise one_problem("time zone", f"got {options.timezone!r}", "an IANA name such as Europe/Berlin") from error


def _check_mapping(raw: pd.DataFrame, mapping: Mapping[str, str], where: str) -> None:
    known = [column.name for column in REQUEST_COLUMNS]
    problems = []
    for ours, theirs in mapping.items():
        if ours not in known:
            close = difflib.get_close_matches(ours, known, n=1)
            repair = f"Did you mean {close[0]}?" if close else ""
            problems.append(
                Problem("--map", f"{ours!r} is not one of our columns", f"one of {', '.join(known)}", repair)
            )
        if theirs not in raw.columns:
            allowed = f"one of its columns: {', '.join(map(str, raw.columns))}"
            problems.append(Problem(where, f"has no column {theirs!r}", allowed))
        elif ours in raw.columns and ours != theirs:
            what = f"has a column {ours} of its own beside {theirs!r}, which is mapped to it"
            problems.append(Problem(where, what, "one source for each column", "Rename one of them"))
    if "arrival_s" not in mapping and "arrival_s" not in raw.columns:
        names = [str(name) for name in raw.columns]
        other = next((mark for mark in (";", "\t", "|") if len(names) == 1 and mark in names[0]), "")
        what = f"no column holds the arrivals (it has: {', '.join(names)})"
        repair = f"Separate its columns by commas, not by {other!r}" if other else "Add --map arrival_s=COLUMN"
        problems.append(Problem("--map", what, "a source for arrival_s", repair))
    if problems:
        raise InputError(problems)


def _seconds(cells: pd.Series[Any], options: ColumnOptions, zone: tzinfo, where: str) -> tuple[pd.Series[Any], str]:
    """Seconds after the trace's start, with None where the cell is empty, and what was done in words."""
    numbers: pd.Series[float] = pd.to_numeric(cells, errors="coerce").astype(np.float64)
    form = options.time_format
    if form == "auto":
        # by the majority, so that one bad cell is named as the bad one, not all the good ones
        form = "seconds" if 2 * int(numbers.notna().sum()) >= int(cells.notna().sum()) else "iso"
    if form == "iso":
        instants = _instants(cells, zone, where)
        return _from_earliest(
            cells, instants
        ), f"arrivals from ISO timestamps (zone {options.timezone} where none is named)"
    wrong = np.flatnonzero(((numbers.isna() | np.isinf(numbers)) & cells.notna()).to_numpy())
    if len(wrong):
        findings = Findings(where)
        for row in wrong.tolist():
            findings.cell(row, "arrival_s", f"got {cells.iloc[row]!r}", f"a finite number ({form})")
        raise InputError(findings.all_problems())
    if form == "seconds":
        largest = float(numbers.max()) if len(numbers) else 0.0
        if options.time_format == "auto" and largest > _LONGEST_TRACE_S:
            what = f"got {largest:g}, which is more than ten years after the trace's start"
            repair = "Say --time epoch_s or --time epoch_ms if it counts from 1970, --time seconds if it is meant"
            raise one_problem(f"{where} column arrival_s", what, "seconds after the trace's start", repair)
        return cells, "arrivals in seconds after the trace's start"
    scale = 1.0 if form == "epoch_s" else 1e-3
    instants = np.asarray(numbers, dtype=np.float64)
    return _from_earliest(cells, instants, scale), f"arrivals from {form}"


def _instants(cells: pd.Series[Any], zone: tzinfo, where: str) -> npt.NDArray[np.float64]:
    """Seconds since 1970 of ISO timestamps; NaN for an empty cell. [n]"""
    findings = Findings(where)
    instants = np.full(len(cells), math.nan)
    named: set[bool] = set()
    for row, text in enumerate(cells):
        if text is None:
            continue
        try:
            time = datetime.fromisoformat(text.strip())
        except ValueError:
            findings.cell(row, "arrival_s", f"got {text!r}", "a timestamp like 2026-03-01T12:00:00+01:00")
            continue
        named.add(time.tzinfo is not None)
        aware = time if time.tzinfo is not None else time.replace(tzinfo=zone)
        # Exact to the microsecond, which float seconds since 1970 are too (spacing 2.4e-7 s).
        instants[row] = aware.timestamp()
    if len(named) == 2:
        findings.table("has timestamps with and without a time zone in arrival_s", "one or the other in all rows")
    if findings.problems:
        raise InputError(findings.all_problems())
    return instants


def _from_earliest(cells: pd.Series[Any], instants: npt.NDArray[np.float64], scale: float = 1.0) -> pd.Series[Any]:
    if not np.isfinite(instants).any():
        return cells
    seconds = np.round((instants - np.nanmin(instants)) * scale, 6)
    return pd.Series([None if math.isnan(second) else second for second in seconds.tolist()], dtype=object)


def _split(cells: pd.Series[Any], separator: str, is_text: bool) -> pd.Series[Any]:
    """Lists of cells like ``a;b``. Numbers that are none stay text and are refused with the others later."""
    lists: list[Any] = []
    for cell in cells:
        if cell is None or cell.lstrip().startswith("["):
            lists.append(cell)
            continue
        items = [item.strip() for item in cell.split(separator)]
        lists.append(items if is_text else [_number_or_text(item) for item in items])
    return pd.Series(lists, dtype=object)


def _number_or_text(item: str) -> Any:
    try:
        return json.loads(item)
    except ValueError:
        return item
