"""From a frame of anything to a trace: checks every cell, fills the stated defaults and counts them, sorts by arrival."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from traces.cells import Findings, default_cells, missing_cells, parse_column
from traces.problems import InputError, one_problem
from traces.records import REQUEST_COLUMNS, Column
from traces.trace import Provenance, Trace

# List columns that go with a list of ids, and the value each id gets where the source has none.
COMPANIONS: Final[tuple[tuple[str, str, float], ...]] = (
    ("controlnet_ids", "controlnet_scales", 1.0),
    ("controlnet_ids", "control_start", 0.0),
    ("controlnet_ids", "control_end", 1.0),
    ("lora_ids", "lora_scales", 1.0),
)


@dataclass(frozen=True, slots=True)
class CheckedTable:
    """A frame whose declared columns hold values of their declared kind."""

    frame: pd.DataFrame
    defaults: dict[str, int]
    """``column=value`` to the number of cells that were filled with it."""


def checked_frame(
    frame: pd.DataFrame,
    where: str,
    provenance: Provenance,
    duration_s: float | None = None,
    row_word: str = "row",
) -> Trace:
    """Makes a trace of a frame, or says everything that is wrong with it.

    Args:
        frame: one row a request, columns by the names of ``REQUEST_COLUMNS`` plus any others, which are kept behind them.
            List columns hold sequences or JSON text. Whole numbers are taken as text where text is needed.
        where: what to call the source in problems; rows count from 1.
        provenance: gets the defaults that had to be filled.
        duration_s: length of the observed window; the last arrival if None.
        row_word: how the source calls a row ("row", "line").

    Raises:
        InputError: all problems of all cells together. No request at all is also one.
    """
    findings = Findings(where, row_word)
    if len(frame) == 0:
        findings.table("has no requests", "at least one row")
    if frame.columns.has_duplicates:
        twice = sorted({str(name) for name in frame.columns[frame.columns.duplicated()]})
        raise one_problem(where, f"has these columns more than once: {', '.join(twice)}", "each column once")
    table = _checked(frame, REQUEST_COLUMNS, findings)
    requests, defaults = table.frame, dict(table.defaults)
    if not findings.problems:
        _check_unique(requests["request_id"], findings)
    for ids, companion, value in COMPANIONS:
        _fill_companion(requests, ids, companion, value, defaults, findings)
    if not findings.problems:
        _check_control_spans(requests, findings)
    last_s = float(requests["arrival_s"].max()) if len(requests) else 0.0
    if duration_s is not None and not (math.isfinite(duration_s) and duration_s >= last_s):
        findings.table(f"has a window of {duration_s:g} s", f"at least the last arrival, {last_s:g} s")
    if findings.problems:
        raise InputError(findings.all_problems())
    order = np.argsort(requests["arrival_s"].to_numpy(), kind="stable")
    if not np.array_equal(order, np.arange(len(order))):
        requests = requests.iloc[order]
    merged = dict(provenance.defaults)
    for key, count in defaults.items():
        merged[key] = merged.get(key, 0) + count
    filled = replace(provenance, defaults=merged, notes=(*provenance.notes, *_likely_typos(frame, defaults)))
    return Trace(requests.reset_index(drop=True), filled, last_s if duration_s is None else float(duration_s))


def checked_table(frame: pd.DataFrame, columns: Sequence[Column], where: str) -> CheckedTable:
    """The same cell checks for any declared table (request records, worker intervals); rows stay in their order.

    Raises:
        InputError: all problems of all cells together.
    """
    findings = Findings(where)
    if frame.columns.has_duplicates:
        twice = sorted({str(name) for name in frame.columns[frame.columns.duplicated()]})
        raise one_problem(where, f"has these columns more than once: {', '.join(twice)}", "each column once")
    table = _checked(frame, columns, findings)
    if findings.problems:
        raise InputError(findings.all_problems())
    return table


def _checked(frame: pd.DataFrame, columns: Sequence[Column], findings: Findings) -> CheckedTable:
    n = len(frame)
    out: dict[str, pd.Series[Any]] = {}
    defaults: dict[str, int] = {}
    for column in columns:
        if column.name not in frame.columns:
            if column.is_required:
                findings.table(
                    f"has no column {column.name} (it has: {_listed(frame.columns)})",
                    f"a column {column.name} ({column.description.rstrip('.')}{', ' + column.unit if column.unit else ''})",
                    "Rename the column that holds it or import the file with 'diffplan trace import csv --map'",
                )
            values, n_filled = default_cells(column, n), n
        else:
            cells = frame[column.name]
            is_missing = missing_cells(cells, column)
            if isinstance(cells.dtype, pd.StringDtype):
                cells = cells.astype(object)
            if column.is_required:
                for row in np.flatnonzero(is_missing).tolist():
                    findings.cell(row, column.name, "is empty", "a value in every row")
            values = parse_column(cells, column, is_missing, findings)
            n_filled = int(is_missing.sum())
        out[column.name] = pd.Series(values, dtype=values.dtype)
        is_companion = any(column.name == companion for _, companion, _ in COMPANIONS)
        if n_filled and not column.is_required and not column.is_nullable and not is_companion:
            defaults[f"{column.name}={_default_shown(column.default)}"] = n_filled
    declared = {column.name for column in columns}
    for name in frame.columns:
        if name not in declared:
            out[str(name)] = _kept(frame[name])
    return CheckedTable(pd.DataFrame(out), defaults)


def _kept(cells: pd.Series[Any]) -> pd.Series[Any]:
    """An unknown column as it is; text of any storage becomes plain Python strings, so that all text compares alike."""
    cells = cells.reset_index(drop=True)
    if cells.dtype == object and pd.api.types.infer_dtype(cells, skipna=False) == "string":
        return cells
    if cells.dtype == object or isinstance(cells.dtype, pd.StringDtype):
        values = np.empty(len(cells), dtype=object)
        for row, value in enumerate(cells):
            if isinstance(value, (list, np.ndarray)):
                values[row] = tuple(value.tolist() if isinstance(value, np.ndarray) else value)
            else:
                values[row] = None if value is pd.NA or (isinstance(value, float) and math.isnan(value)) else value
        return pd.Series(values, dtype=object)
    return cells


def _check_unique(ids: pd.Series[Any], findings: Findings) -> None:
    for row in np.flatnonzero(ids.duplicated().to_numpy()).tolist():
        first = int(np.flatnonzero((ids == ids.iloc[row]).to_numpy())[0])
        findings.cell(
            row,
            "request_id",
            f"got {ids.iloc[row]!r} again, first seen in {findings.row_word} {first + 1}",
            "unique names",
        )
        if len(findings.problems) > 100:  # the search for the first one is linear; enough is enough
            break


def _fill_companion(
    requests: pd.DataFrame, ids: str, companion: str, value: float, defaults: dict[str, int], findings: Findings
) -> None:
    wanted, given = requests[ids].to_numpy(), requests[companion].to_numpy()
    filled: npt.NDArray[Any] = given.copy()
    n_filled = 0
    for row in np.flatnonzero(_lengths(wanted) != _lengths(given)).tolist():
        names, numbers = wanted[row], given[row]
        if not numbers:
            filled[row] = (value,) * len(names)
            n_filled += 1
        else:
            what = f"has {len(numbers)} values for the {len(names)} names in {ids}"
            findings.cell(row, companion, what, f"one for each of {ids}, or none at all for {value:g} each")
            filled[row] = ()
    requests[companion] = pd.Series(filled, dtype=object)
    if n_filled:
        defaults[f"{companion}={value:g}"] = n_filled


def _lengths(lists: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    return np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))


def _check_control_spans(requests: pd.DataFrame, findings: Findings) -> None:
    fine: set[tuple[tuple[float, ...], tuple[float, ...]]] = set()  # the same few spans repeat over many rows
    for row, spans in enumerate(zip(requests["control_start"], requests["control_end"], strict=True)):
        if spans in fine:
            continue
        starts, ends = spans
        if all(start <= end for start, end in zip(starts, ends, strict=True)):
            fine.add(spans)
            continue
        for start, end in zip(starts, ends, strict=True):
            if start > end:
                findings.cell(row, "control_end", f"got {end:g}, before its control_start {start:g}", "start ≤ end")


def _likely_typos(frame: pd.DataFrame, defaults: dict[str, int]) -> list[str]:
    """Unknown columns that read like one which had to be defaulted: most likely the user meant that one."""
    lacking = {key.partition("=")[0] for key in defaults} - {str(name) for name in frame.columns}
    notes = []
    known = {column.name for column in REQUEST_COLUMNS}
    for name in frame.columns:
        close = difflib.get_close_matches(str(name), sorted(lacking), n=1, cutoff=0.8)
        if close and name not in known:
            notes.append(f"column {name!r} is not one of ours and was kept unused; {close[0]} got its default")
    return notes


def _default_shown(default: object) -> str:
    return "[]" if default == () else str(default)


def _listed(names: Sequence[Any] | pd.Index[Any]) -> str:
    return ", ".join(str(name) for name in names) or "none"
