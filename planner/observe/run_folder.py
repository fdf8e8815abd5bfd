"""Reads what an engine has recorded, also while it runs: the JSON lines of its run folder, or the Parquet tables made of them.

The lines are the engine's (``engine-run/records/*Z/records-000001.jsonl``): one object a line, ``table`` says which table it is
a row of. The planner may not import the engine's reader, so what is read here is the file format only, within limits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd

from traces.frame import checked_table
from traces.problems import one_problem
from traces.reader import read_table
from traces.records import REQUEST_RECORD_COLUMNS, REQUEST_STATUSES, WORKER_INTERVAL_COLUMNS, Column, column_names

BYTES_MAX: Final = 4 * 2**30
ROWS_MAX: Final = 10_000_000
LINE_BYTES_MAX: Final = 2**20
START_NAME: Final = re.compile(r".*Z")
LINES_NAME: Final = re.compile(r"records-(\d+)\.jsonl")
EXTRA_COLUMNS: Final = ("variant", "n_attempts", "lora_patch_step", "code", "overhead_s")


@dataclass(frozen=True, slots=True, eq=False)
class Observed:
    """What an engine recorded; times in seconds after its start."""

    source: str
    requests: pd.DataFrame
    """RequestRecord, by arrival."""
    workers: pd.DataFrame
    """WorkerInterval; empty where only request records were given."""
    n_torn_lines: int = 0
    """Lines that were not whole: at most the last of each file, unless somebody wrote into them."""

    @property
    def seen_until_s(self) -> float:
        """The last moment that any row knows of."""
        ends = [float(frame["end_s"].max()) for frame in (self.requests, self.workers) if len(frame)]
        return max(ends, default=0.0)


def read_observed(path: Path, start: str = "") -> Observed:
    """Reads an engine's run folder, one start's folder in it, a folder with ``requests.parquet``, or such a file.

    Args:
        start: Which start of the engine, by its folder's name; the latest if empty.

    Raises:
        InputError: there are no records, they are too large, or a cell is wrong.
    """
    if path.is_file():
        return _of_parquet(path, path.with_name("workers.parquet"))
    if (path / "requests.parquet").is_file():
        return _of_parquet(path / "requests.parquet", path / "workers.parquet")
    folder = _start_folder(path, start)
    files = _line_files(folder)
    n_bytes = sum(file.stat().st_size for file in files)
    if n_bytes > BYTES_MAX:
        raise one_problem(
            str(folder), f"holds {n_bytes} bytes of records", f"at most {BYTES_MAX}", "Move old files away"
        )
    requests: dict[str, dict[str, Any]] = {}
    workers: list[dict[str, Any]] = []
    n_torn = 0
    for row in _rows(files):
        if row is None:
            n_torn += 1
        elif row.pop("table", "") == "workers":
            workers.append(row)
        elif isinstance(row.get("request_id"), str):
            requests[row["request_id"]] = row
        else:
            n_torn += 1
        if len(requests) + len(workers) > ROWS_MAX:
            raise one_problem(
                str(folder), f"holds more than {ROWS_MAX} rows", f"at most {ROWS_MAX}", "Move old files away"
            )
    if not requests and not workers:
        raise one_problem(str(folder), "holds no whole record", "an engine that has served", "Send it a request first")
    frame = pd.DataFrame(list(requests.values()), columns=[*column_names(REQUEST_RECORD_COLUMNS), *EXTRA_COLUMNS])
    spans = pd.DataFrame(workers, columns=column_names(WORKER_INTERVAL_COLUMNS))
    return _checked(
        Observed(
            str(folder),
            _table(frame, REQUEST_RECORD_COLUMNS, str(folder)).sort_values(
                ["arrival_s", "request_id"], ignore_index=True
            ),
            _table(spans, WORKER_INTERVAL_COLUMNS, str(folder)).sort_values(
                ["worker_id", "start_s", "end_s"], ignore_index=True
            ),
            n_torn,
        )
    )


def _of_parquet(requests: Path, workers: Path) -> Observed:
    frame = read_table(requests, REQUEST_RECORD_COLUMNS).sort_values(["arrival_s", "request_id"], ignore_index=True)
    empty = pd.DataFrame(columns=column_names(WORKER_INTERVAL_COLUMNS))
    spans = read_table(workers, WORKER_INTERVAL_COLUMNS) if workers.is_file() else empty
    return _checked(Observed(str(requests), frame, spans))


def _start_folder(path: Path, start: str) -> Path:
    if not path.is_dir():
        raise one_problem(
            str(path), "is no folder", "an engine's run folder, or a folder with requests.parquet", "Check the path"
        )
    if _line_files(path):
        return path
    records = path / "records"
    names = (
        sorted(each.name for each in records.iterdir() if START_NAME.fullmatch(each.name)) if records.is_dir() else []
    )
    if not names:
        raise one_problem(
            str(path), "holds neither records/ of an engine nor requests.parquet", "an engine's run folder", "Check the path"
        )  # fmt: skip
    if start and start not in names:
        raise one_problem("--start", f"got {start!r}", f"one of {', '.join(names[-10:])}", "Correct it")
    return records / (start or names[-1])


def _line_files(folder: Path) -> list[Path]:
    found = [(int(match[1]), each) for each in folder.iterdir() if (match := LINES_NAME.fullmatch(each.name))]
    return [each for _, each in sorted(found)]


def _rows(files: list[Path]) -> Iterator[dict[str, Any] | None]:
    """Each line's object, None for a line that is not whole."""
    for file in files:
        with file.open("rb") as stream:
            while line := stream.readline(LINE_BYTES_MAX):
                yield json_object(line)


def json_object(line: bytes) -> dict[str, Any] | None:
    """One line's object; None if the line is torn or holds anything else."""
    try:
        value = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _table(frame: pd.DataFrame, columns: tuple[Column, ...], where: str) -> pd.DataFrame:
    # JSON's null is None; a column without any value has no type that the check could read
    plain: Mapping[str, Any] = {
        name: frame[name].astype(object).where(frame[name].notna(), None) for name in frame.columns
    }
    return checked_table(pd.DataFrame(plain), columns, where).frame


def _checked(observed: Observed) -> Observed:
    """Refuses what the columns' declarations cannot say: unknown statuses, a request that ends before it arrives."""
    frame = observed.requests
    unknown = sorted(set(frame["status"]) - set(REQUEST_STATUSES))
    if unknown:
        raise one_problem(
            f"{observed.source} column status", f"got {unknown[0]!r}", f"one of {', '.join(REQUEST_STATUSES)}"
        )
    backwards = frame["end_s"] < frame["arrival_s"]
    if backwards.any():
        row = frame[backwards].iloc[0]
        raise one_problem(
            f"{observed.source} request {row['request_id']!r}",
            f"ends at {row['end_s']:g} s, before it arrived at {row['arrival_s']:g} s", "an end after the arrival",
        )  # fmt: skip
    return observed
