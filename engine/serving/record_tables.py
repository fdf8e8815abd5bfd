"""Makes Parquet tables of a record log: the same tables, columns and order as a simulation writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd

from engine.serving.line_file import ReadReport, read_lines
from engine.serving.record_log import NAME
from traces.records import REQUEST_RECORD_COLUMNS, WORKER_INTERVAL_COLUMNS, column_names
from traces.writer import write_table

JOIN_S: Final = 1e-6
"""Spans of one worker and state that are no further apart than this are one row."""
EXTRA_COLUMNS: Final = ("variant", "n_attempts", "lora_patch_step", "code", "overhead_s")
"""Columns that only an engine's log has, behind the declared ones."""


@dataclass(frozen=True, slots=True)
class RecordTables:
    """A log as two tables."""

    requests: pd.DataFrame
    workers: pd.DataFrame
    n_torn_lines: int
    """Lines lost to a kill."""


def read_record_log(folder: Path, order: Sequence[str] | None = None) -> RecordTables:
    """Reads every line of a log.

    Args:
        order: request ids in the order wanted; rows that are not in it are left out. None: by arrival, then id.
    """
    report = ReadReport()
    requests: dict[str, dict[str, Any]] = {}
    spans: list[dict[str, Any]] = []
    for row in read_lines(folder, NAME, report):
        if row.pop("table", "") == "workers":
            spans.append(row)
        else:
            requests[row["request_id"]] = row
    if order is None:
        rows = sorted(requests.values(), key=lambda row: (row["arrival_s"], row["request_id"]))
    else:
        rows = [requests[name] for name in order if name in requests]
    frame = pd.DataFrame(rows, columns=[*column_names(REQUEST_RECORD_COLUMNS), *EXTRA_COLUMNS])
    return RecordTables(frame, _workers(spans), report.n_torn)


def write_record_tables(
    tables: RecordTables, folder: Path, metadata: Mapping[str, Any] | None = None
) -> tuple[Path, Path]:
    """Writes ``requests.parquet`` and ``workers.parquet``, each beside and renamed; returns their paths.

    Raises:
        InputError: the folder cannot be written to.
    """
    facts = {"written_by": "engine", "n_torn_lines": tables.n_torn_lines, **(metadata or {})}
    folder.mkdir(parents=True, exist_ok=True)
    requests = write_table(tables.requests, REQUEST_RECORD_COLUMNS, folder / "requests.parquet", facts)
    workers = write_table(tables.workers, WORKER_INTERVAL_COLUMNS, folder / "workers.parquet", facts)
    return requests, workers


def _workers(spans: list[dict[str, Any]]) -> pd.DataFrame:
    """Spans by worker and time, adjacent ones joined; a worker that never worked has one idle row over the whole log."""
    first_s = min((span["start_s"] for span in spans), default=0.0)
    last_s = max((span["end_s"] for span in spans), default=0.0)
    by_worker: dict[str, list[dict[str, Any]]] = {}
    for span in spans:
        by_worker.setdefault(span["worker_id"], []).append(span)
    rows: list[dict[str, Any]] = []
    for worker_id in sorted(by_worker):
        own = sorted(by_worker[worker_id], key=lambda span: (span["start_s"], span["end_s"]))
        at_work = [span for span in own if span["state"] != "idle"]
        if not at_work:
            rows.append({**own[0], "start_s": min(first_s, 0.0), "end_s": last_s})
            continue
        joined: list[dict[str, Any]] = []
        for span in at_work:
            before = joined[-1] if joined else None
            if before and span["state"] == "down" and span["start_s"] < before["end_s"]:
                # that a worker is gone is noted a moment before its batch is given up
                span = {**span, "start_s": before["end_s"], "end_s": max(span["end_s"], before["end_s"])}
            if before and before["state"] == span["state"] and 0.0 <= span["start_s"] - before["end_s"] <= JOIN_S:
                before["end_s"] = span["end_s"]
                before["busy_s"] += span["busy_s"]
            else:
                joined.append(dict(span))
        rows.extend(joined)
    return pd.DataFrame(rows, columns=column_names(WORKER_INTERVAL_COLUMNS))
