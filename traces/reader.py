"""Reads a trace from Parquet, CSV or JSON lines; what is wrong with the file comes back as one error with all problems."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from traces.cells import Findings
from traces.files import DEFAULT_LIMITS, ReadLimits, checked_file, read_text
from traces.frame import checked_frame, checked_table
from traces.problems import InputError, one_problem
from traces.records import Column
from traces.trace import Provenance, Trace

METADATA_KEY: Final = b"diffplan"
SAMPLE_PREFIX: Final = "sample:"
SUFFIXES: Final = (".parquet", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz")


def read_trace(path: Path | str, limits: ReadLimits = DEFAULT_LIMITS) -> Trace:
    """Reads ``.parquet``, ``.csv[.gz]`` or ``.jsonl[.gz]``, or a shipped sample by ``sample:NAME``.

    A Parquet file written by :func:`traces.writer.write_trace` brings its provenance and window along. For other files
    the window ends with the last arrival. In CSV an empty cell is "not given" and list cells hold JSON.

    Raises:
        InputError: the file is missing, too large, damaged, or any cell is wrong; all problems together.
    """
    if str(path).startswith(SAMPLE_PREFIX):
        from traces.samples import load_sample

        return load_sample(str(path).removeprefix(SAMPLE_PREFIX))
    path = Path(path)
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise one_problem(str(path), f"got a file name ending in {path.suffix!r}", f"one of {', '.join(SUFFIXES)}")
    if name.endswith(".parquet"):
        frame, metadata = read_parquet(path, limits)
        stored = _stored_provenance(path, metadata)
        provenance, duration_s = stored if stored else (Provenance(source=path.name), None)
        return checked_frame(frame, path.name, provenance, duration_s)
    text = read_text(path, limits)
    if ".csv" in name:
        frame = frame_of_csv(text, path.name, limits)
        return checked_frame(frame, path.name, Provenance(source=path.name))
    frame = _frame_of_json_lines(text, path.name, limits)
    return checked_frame(frame, path.name, Provenance(source=path.name), row_word="line")


def read_table(path: Path | str, columns: Sequence[Column], limits: ReadLimits = DEFAULT_LIMITS) -> pd.DataFrame:
    """Reads a Parquet table with declared columns (request records, worker intervals), checked; rows in file order.

    Raises:
        InputError: the file is missing, too large, damaged, or any cell is wrong; all problems together.
    """
    path = Path(path)
    frame, _ = read_parquet(path, limits)
    return checked_table(frame, columns, path.name).frame


def read_parquet(path: Path, limits: ReadLimits = DEFAULT_LIMITS) -> tuple[pd.DataFrame, dict[bytes, bytes]]:
    """The table as it is, nulls apart from NaN, and the file's own metadata."""
    checked_file(path, limits)
    try:
        with pq.ParquetFile(path) as file:
            rows = file.metadata.num_rows
            groups = range(file.metadata.num_row_groups)
            size = sum(file.metadata.row_group(group).total_byte_size for group in groups)
            if rows > limits.rows:
                raise one_problem(str(path), f"has {rows} rows", f"at most {limits.rows} rows", "Split the file")
            if size > limits.decompressed_bytes:
                allowed = f"at most {limits.decompressed_bytes} bytes"
                raise one_problem(str(path), f"has {size} bytes once decompressed", allowed, "Split the file")
            table = file.read()
        names = table.column_names
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise one_problem(str(path), f"has these columns more than once: {', '.join(twice)}", "each column once")
        columns = {name: _series_of_arrow(table.column(name)) for name in names}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise one_problem(str(path), f"is not a readable Parquet file: {message}", repair="Write it again") from error
    return pd.DataFrame(columns, columns=names), dict(table.schema.metadata or {})


def _series_of_arrow(column: pa.ChunkedArray) -> pd.Series[Any]:
    kind = column.type
    if (pa.types.is_integer(kind) or pa.types.is_floating(kind)) and column.null_count == 0:
        return pd.Series(column.to_numpy())
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _is_plain(kind.value_type):
        return pd.Series(_tuples(column), dtype=object)
    return pd.Series(column.to_pylist(), dtype=object)


def _is_plain(kind: pa.DataType) -> bool:
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return bool(is_text or pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _tuples(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """Cells of a column of lists; equal ones of a chunk are one object, for the same few lists repeat over many rows."""
    cells = np.empty(len(column), dtype=object)
    row = 0
    for chunk in column.chunks:
        known: dict[tuple[Any, ...], tuple[Any, ...]] = {}  # lists of one type: no 1 and 1.0 that look alike
        values = chunk.values.to_pylist()
        bounds = chunk.offsets.to_pylist()
        is_null = chunk.is_null().to_pylist() if chunk.null_count else None
        for k in range(len(chunk)):
            if is_null is None or not is_null[k]:
                cell = tuple(values[bounds[k] : bounds[k + 1]])
                cells[row] = known.setdefault(cell, cell)
            row += 1
    return cells


def _stored_provenance(path: Path, metadata: dict[bytes, bytes]) -> tuple[Provenance, float] | None:
    stored = metadata.get(METADATA_KEY)
    if stored is None:
        return None
    try:
        plain = json.loads(stored)
        if plain.get("table") != "trace":
            raise ValueError(f"it describes a {plain.get('table', 'table')!r}, not a trace")
        facts = plain["provenance"]
        provenance = Provenance(
            source=str(facts["source"]),
            licence=str(facts["licence"]),
            defaults={str(key): int(count) for key, count in facts["defaults"].items()},
            left_out={str(key): int(count) for key, count in facts["left_out"].items()},
            notes=tuple(str(note) for note in facts["notes"]),
            seed=None if facts["seed"] is None else int(facts["seed"]),
        )
        return provenance, float(plain["duration_s"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise one_problem(
            f"{path} metadata 'diffplan'",
            f"cannot be understood: {error}",
            "the provenance that 'diffplan trace' writes",
            "Write the trace again, or give a Parquet file without that metadata",
        ) from error


def frame_of_csv(text: str, where: str, limits: ReadLimits = DEFAULT_LIMITS) -> pd.DataFrame:
    """Cells of a comma-separated table with a header, as text; an empty cell is None.

    Raises:
        InputError: no header, a name twice, a row with another number of cells, a broken quote, too many rows.
    """
    findings = Findings(where)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[list[str]] = []
    header: list[str] = []
    try:
        header = [name.strip() for name in next(reader, [])]
        for row in reader:
            if not row:  # a blank line
                continue
            if len(rows) >= limits.rows:
                raise one_problem(
                    where, f"has more than {limits.rows} rows", f"at most {limits.rows}", "Split the file"
                )
            if len(row) != len(header):
                what = f"has {len(row)} cells, the header has {len(header)}"
                findings.cell(
                    len(rows), f"{min(len(row), len(header)) + 1}", what, "as many cells as names in the header"
                )
            rows.append(row)
    except csv.Error as error:
        findings.table(f"line {reader.line_num} is not CSV: {error}", repair="Check the quotes of that line")
    if not any(header):
        findings.table("has no header", "the names of the columns in the first line")
    for name in sorted({name for name in header if header.count(name) > 1}):
        findings.table(f"has the column {name!r} more than once", "each column once")
    if findings.problems:
        raise InputError(findings.all_problems())
    columns = {
        name: pd.Series([row[place] or None for row in rows], dtype=object) for place, name in enumerate(header) if name
    }
    return pd.DataFrame(columns)


def _frame_of_json_lines(text: str, where: str, limits: ReadLimits) -> pd.DataFrame:
    findings = Findings(where, "line")
    objects: list[dict[str, Any]] = []
    names: dict[str, None] = {}
    lines = text.split("\n")  # not splitlines: JSON text may hold the other separators
    if len(lines) > limits.rows + 1:
        raise one_problem(where, f"has {len(lines)} lines", f"at most {limits.rows}", "Split the file")
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines):
        try:
            value = json.loads(line, object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            findings.cell(number, "(the whole line)", f"is not JSON: {error}", "one JSON object a line")
            continue
        if not isinstance(value, dict):
            findings.cell(number, "(the whole line)", f"got {line[:60]!r}", "one JSON object a line")
            continue
        objects.append(value)
        names.update(dict.fromkeys(value))
    if findings.problems:
        raise InputError(findings.all_problems())
    columns = {name: pd.Series([each.get(name) for each in objects], dtype=object) for name in names}
    return pd.DataFrame(columns)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key is there twice")
    return value
