"""Writes traces and logs as Parquet: the same content gives the same bytes, and a reader never sees half a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from traces.files import written_beside
from traces.frame import checked_table
from traces.problems import one_problem
from traces.reader import METADATA_KEY
from traces.records import REQUEST_COLUMNS, Column
from traces.trace import Trace

_ARROW_TYPES: Final = {
    "str": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "list[str]": pa.list_(pa.string()),
    "list[float]": pa.list_(pa.float64()),
}


def write_trace(trace: Trace, path: Path | str) -> Path:
    """Writes a trace as Parquet, with provenance and window in the file's metadata. Returns the path written.

    Raises:
        InputError: the name does not end in ``.parquet``, the file cannot be written, or a kept column holds a mix of
            types that Parquet has no type for.
    """
    path = Path(path)
    if path.suffix != ".parquet":
        raise one_problem(str(path), f"got a file name ending in {path.suffix!r}", "a name ending in .parquet")
    plain = {"table": "trace", "duration_s": trace.duration_s, "provenance": plain_provenance(trace)}
    _write(trace.requests, REQUEST_COLUMNS, path, plain)
    return path


def write_table(
    frame: pd.DataFrame, columns: Sequence[Column], path: Path | str, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Writes a table with declared columns (request records, worker intervals) as Parquet. Returns the path written.

    Declared columns that are absent get their default; undeclared ones are kept behind them. ``metadata`` is any
    JSON-able mapping and ends in the file's metadata.

    Raises:
        InputError: a cell is not of its declared kind or range, or the file cannot be written.
    """
    path = Path(path)
    checked = checked_table(frame, columns, path.name).frame
    _write(checked, columns, path, {"table": "log", **(metadata or {})})
    return path


def plain_provenance(trace: Trace) -> dict[str, Any]:
    """The trace's provenance as plain JSON-able values."""
    plain = asdict(trace.provenance)
    plain["notes"] = list(trace.provenance.notes)
    return plain


def _write(frame: pd.DataFrame, columns: Sequence[Column], path: Path, metadata: Mapping[str, Any]) -> None:
    arrays: dict[str, pa.Array] = {}
    kinds = {column.name: column for column in columns}
    for name in frame.columns:
        if name in kinds:
            arrays[name] = _declared_array(frame[name], kinds[name])
        else:
            arrays[name] = _kept_array(frame[name], str(name), path)
    table = pa.table(arrays)
    text = json.dumps(metadata, ensure_ascii=False, sort_keys=True, allow_nan=False)
    table = table.replace_schema_metadata({METADATA_KEY: text.encode()})
    with written_beside(path) as beside:
        pq.write_table(table, beside, compression="zstd", compression_level=9, version="2.6", row_group_size=1_000_000)


def _declared_array(cells: pd.Series[Any], column: Column) -> pa.Array:
    kind = _ARROW_TYPES[column.kind]
    if column.is_nullable:
        numbers = cells.to_numpy(dtype=np.float64)
        return pa.array(numbers, mask=np.isnan(numbers)).cast(kind)
    return pa.array(cells.to_numpy(), type=kind)


def _kept_array(cells: pd.Series[Any], name: str, path: Path) -> pa.Array:
    try:
        return pa.Array.from_pandas(cells)
    except pa.ArrowException as error:
        message = str(error).splitlines()[0]
        raise one_problem(
            f"{path} column {name}", f"cannot be written: {message}", "one type of value in a column"
        ) from error
