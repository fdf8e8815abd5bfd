"""One column of a table, cell by cell: turns raw cells into values of the declared kind, and says which ones cannot be.

All readers and importers end here, so that a wrong cell reads the same whatever file it came from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from traces.problems import Problem
from traces.records import Column

BoolArray = npt.NDArray[np.bool_]

_SHOWN_PER_COLUMN: Final = 20


@dataclass(slots=True)
class Findings:
    """Collects the problems of one table; of each column only the first ones are kept, the rest are counted."""

    where: str
    row_word: str = "row"
    problems: list[Problem] = field(default_factory=list)
    _per_column: dict[str, int] = field(default_factory=dict)

    def cell(self, row: int, column: str, what: str, allowed: str = "", repair: str = "") -> None:
        """Notes a problem of the cell in data row ``row`` (0-based; shown 1-based, without header)."""
        seen = self._per_column.get(column, 0)
        self._per_column[column] = seen + 1
        if seen < _SHOWN_PER_COLUMN:
            place = f"{self.where} {self.row_word} {row + 1} column {column}"
            self.problems.append(Problem(place, what, allowed, repair))

    def table(self, what: str, allowed: str = "", repair: str = "") -> None:
        """Notes a problem of the table as a whole."""
        self.problems.append(Problem(self.where, what, allowed, repair))

    def all_problems(self) -> list[Problem]:
        """Every problem noted; a column with too many ends in a sentence that counts the others."""
        more = [
            Problem(f"{self.where} column {name}", f"{count - _SHOWN_PER_COLUMN} more cells are wrong")
            for name, count in self._per_column.items()
            if count > _SHOWN_PER_COLUMN
        ]
        return [*self.problems, *more]


def allowed_values(column: Column) -> str:
    """What a cell of the column may hold, in words: ``a whole number, 1..1000``."""
    noun = {
        "str": "text" if column.default == "" else "text that is not empty",
        "int": "a whole number",
        "float": "a finite number",
        "list[str]": 'a list of names such as ["a", "b"]',
        "list[float]": "a list of finite numbers such as [1, 0.5]",
    }[column.kind]
    low, high = column.minimum, column.maximum
    if low is not None and high is not None:
        return f"{noun}, {low:g}..{high:g}"
    if low is not None:
        return f"{noun}, at least {low:g}"
    return noun


def missing_cells(cells: pd.Series[Any], column: Column) -> BoolArray:
    """Marks the cells that hold nothing: None, pandas' NA, and NaN where the column may be null or holds text.

    A NaN in a column of numbers that must have a value is not "nothing" but a wrong value, and is reported as one.
    """
    values = cells.to_numpy(dtype=object) if cells.dtype == object else None
    if values is not None:
        if pd.api.types.infer_dtype(values, skipna=False) == "string":  # the usual case, decided in C
            return np.zeros(len(values), dtype=np.bool_)
        if not pd.isna(cells).any():  # likewise; what it does not call missing never is
            return np.zeros(len(values), dtype=np.bool_)
        nan_is_missing = column.is_nullable or column.kind == "str"
        return np.fromiter(
            (v is None or v is pd.NA or (nan_is_missing and isinstance(v, float) and math.isnan(v)) for v in values),
            dtype=np.bool_,
            count=len(values),
        )
    if isinstance(cells.dtype, np.dtype) and not column.is_nullable and cells.dtype.kind == "f":
        return np.zeros(len(cells), dtype=np.bool_)
    is_missing: BoolArray = cells.isna().to_numpy(dtype=np.bool_)
    return is_missing


def parse_numbers(cells: pd.Series[Any], column: Column, is_missing: BoolArray, findings: Findings) -> npt.NDArray[Any]:
    """int64 or float64 values; missing cells become the default (NaN if the column is nullable)."""
    if isinstance(cells.dtype, np.dtype) and cells.dtype.kind in "iuf":
        numbers = cells.to_numpy(dtype=np.float64)
    else:
        numbers = np.fromiter((_as_float(v) for v in cells), dtype=np.float64, count=len(cells))
    is_wrong = ~np.isfinite(numbers)
    if column.kind == "int":
        is_wrong |= np.trunc(np.where(is_wrong, 0.0, numbers)) != np.where(is_wrong, 0.0, numbers)
    with np.errstate(invalid="ignore"):
        if column.minimum is not None:
            is_wrong |= numbers < column.minimum
        if column.maximum is not None:
            is_wrong |= numbers > column.maximum
    is_wrong &= ~is_missing
    for row in np.flatnonzero(is_wrong).tolist():
        findings.cell(row, column.name, f"got {_shown(cells.iloc[row])}", allowed_values(column))
    fill = math.nan if column.default is None else float(column.default)
    filled: npt.NDArray[np.float64] = np.where(is_missing | is_wrong, fill, numbers)
    if column.kind == "int" and not column.is_nullable:
        return np.nan_to_num(filled).astype(np.int64)
    return filled


def parse_texts(cells: pd.Series[Any], column: Column, is_missing: BoolArray, findings: Findings) -> npt.NDArray[Any]:
    """Python strings in an object array. Whole numbers are taken as the text that writes them; other types are refused."""
    is_empty_fine = column.default == ""
    if cells.dtype == object and not is_missing.any():
        texts = cells.to_numpy()
        if pd.api.types.infer_dtype(texts, skipna=False) == "string" and (is_empty_fine or not (texts == "").any()):
            return texts
    out = np.empty(len(cells), dtype=object)
    for row, (value, gone) in enumerate(zip(cells, is_missing, strict=True)):
        if gone:
            out[row] = column.default
        elif isinstance(value, str) and (value or is_empty_fine):
            out[row] = str(value)
        elif isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_)):
            out[row] = str(int(value))
        else:
            findings.cell(row, column.name, f"got {_shown(value)}", allowed_values(column))
            out[row] = ""
    return out


def parse_lists(cells: pd.Series[Any], column: Column, is_missing: BoolArray, findings: Findings) -> npt.NDArray[Any]:
    """Tuples in an object array, from lists, tuples, arrays, or text that holds a JSON list."""
    out = np.empty(len(cells), dtype=object)
    known: dict[Any, tuple[Any, ...] | None] = {}  # the same few lists repeat over many rows
    same: dict[int, tuple[Any, ...]] = {}  # by identity: tuples that a reader made once for many rows
    exact = (
        str if column.kind == "list[str]" else float
    )  # 1 == 1.0 == True: only lists of one exact type share an entry
    for row, (value, gone) in enumerate(zip(cells, is_missing, strict=True)):
        items: tuple[Any, ...] | None
        if gone:
            items = ()
        elif id(value) in same:
            items = same[id(value)]
        elif isinstance(value, str):
            if value not in known:
                known[value] = _checked_items(_json_list(value), column)
            items = known[value]
        elif isinstance(value, (list, tuple)) and all(type(item) is exact for item in value):
            key = tuple(value)
            if key not in known:
                known[key] = _checked_items(key, column)
            items = known[key]
        elif isinstance(value, (list, tuple, np.ndarray)):
            items = _checked_items(value, column)
        else:
            items = None
        if items is None:
            findings.cell(row, column.name, f"got {_shown(value)}", allowed_values(column))
            items = ()
        elif type(value) is tuple and not gone:  # the column keeps it alive, so nothing else gets its identity
            same[id(value)] = items
        out[row] = items
    return out


def default_cells(column: Column, n: int) -> npt.NDArray[Any]:
    """``n`` cells of the column's default, as :func:`parse_column` would give them for missing cells."""
    if column.kind == "int" and not column.is_nullable:
        return np.full(n, int(column.default or 0), dtype=np.int64)
    if column.kind in ("int", "float"):
        return np.full(n, math.nan if column.default is None else float(column.default))
    out = np.empty(n, dtype=object)
    out.fill(column.default if column.kind == "str" else ())
    return out


def parse_column(cells: pd.Series[Any], column: Column, is_missing: BoolArray, findings: Findings) -> npt.NDArray[Any]:
    """Values of the column's kind; every wrong cell is noted in ``findings`` and replaced by a harmless value."""
    if column.kind in ("int", "float"):
        return parse_numbers(cells, column, is_missing, findings)
    if column.kind == "str":
        return parse_texts(cells, column, is_missing, findings)
    return parse_lists(cells, column, is_missing, findings)


def _as_float(value: object) -> float:
    """The number, or NaN where there is none. Python's own float() would also take True and 1_000."""
    if isinstance(value, (bool, np.bool_)) or value is None:
        return math.nan
    if isinstance(value, str) and "_" in value:
        return math.nan
    if isinstance(value, (int, float, str, np.integer, np.floating)):
        try:
            return float(value)
        except ValueError:
            return math.nan
        except OverflowError:
            return math.inf
    return math.nan


def _json_list(text: str) -> Sequence[Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _checked_items(items: Sequence[Any] | npt.NDArray[Any] | None, column: Column) -> tuple[Any, ...] | None:
    if items is None or (isinstance(items, np.ndarray) and items.ndim != 1):
        return None
    if column.kind == "list[str]":
        return tuple(str(item) for item in items) if all(isinstance(i, str) and i for i in items) else None
    if any(isinstance(item, str) for item in items):
        return None
    numbers = tuple(_as_float(item) for item in items)
    low = -math.inf if column.minimum is None else column.minimum
    high = math.inf if column.maximum is None else column.maximum
    return numbers if all(math.isfinite(x) and low <= x <= high for x in numbers) else None


def _shown(value: object) -> str:
    text = repr(value.item()) if isinstance(value, np.generic) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
