"""Writes docs/records.md from the column declarations in traces/records.py: ``python docs/make_records_page.py``."""

from __future__ import annotations

from pathlib import Path

from traces.records import REQUEST_COLUMNS, REQUEST_RECORD_COLUMNS, WORKER_INTERVAL_COLUMNS, Column

PAGE = Path(__file__).parent / "records.md"
TABLES = (
    ("Request", "What was asked: one row an image job. Read from Parquet, CSV or JSON lines; lists are JSON lists in CSV.",
     REQUEST_COLUMNS),
    ("RequestRecord", "What became of each request, written by the simulator (`requests.parquet`); the engine's log has the same columns.",
     REQUEST_RECORD_COLUMNS),
    ("WorkerInterval", "What each worker did (`workers.parquet`): spans in which its state did not change.",
     WORKER_INTERVAL_COLUMNS),
)  # fmt: skip


def table(columns: tuple[Column, ...]) -> str:
    """A Markdown table of the columns."""
    lines = ["| column | type | unit | allowed | if missing | meaning |", "| --- | --- | --- | --- | --- | --- |"]
    for column in columns:
        low = "" if column.minimum is None else f"{column.minimum:g}"
        high = "" if column.maximum is None else f"{column.maximum:g}"
        allowed = f"{low}..{high}" if low or high else ""
        if column.is_required:
            missing = "**error**"
        elif column.is_nullable:
            missing = "null"
        else:
            missing = "`[]`" if column.default == () else f"`{column.default}`" if column.default != "" else "empty"
        lines.append(
            f"| `{column.name}` | {column.kind} | {column.unit} | {allowed} | {missing} | {column.description} |"
        )
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    parts = ["# Recorded tables\n\nEvery statistic of diffplan is computed from these three tables. This page is generated: "
             "`python docs/make_records_page.py`."]  # fmt: skip
    parts += [f"## {name}\n\n{text}\n\n{table(columns)}" for name, text, columns in TABLES]
    parts.append("Columns that are not listed are kept as they are. A value that is given but not allowed is an error that "
                 "names the row, the column, the value and what is allowed; defaults are counted and travel with the trace.")  # fmt: skip
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
