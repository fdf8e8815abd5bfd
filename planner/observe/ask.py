"""``diffplan observe``: decides what a source is, reads it whole, and only then writes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from planner.files import make_folder, write_texts
from planner.observe.prometheus_http import server_of
from planner.observe.request_log import read_request_log
from planner.observe.run_folder import Observed, read_observed
from planner.observe.summary import Stretch, Summary, read_summary_of_server, to_json
from traces.problems import one_problem
from traces.records import REQUEST_RECORD_COLUMNS, WORKER_INTERVAL_COLUMNS
from traces.trace import Trace
from traces.writer import write_table, write_trace

WINDOWS_MAX: Final = 20_000
PROMETHEUS_SAYS: Final = (
    "A Prometheus server has counts and histograms, no single request: no requests.parquet, workers.parquet or trace.parquet was "
    "made of it. Quantiles are known up to the histogram's buckets."
)


@dataclass(frozen=True, slots=True)
class ObserveQuestion:
    """What the command line asks for."""

    source: str
    """A folder, a Parquet file, or the http(s) address of a Prometheus server."""
    log: Path | None = None
    start: str = ""
    minutes: float = 30.0
    window_s: float = 60.0
    end_s: float | None = None
    """Unix seconds of the last window's end; now if None."""
    match: str = ""
    timeout_s: float = 10.0
    token_file: Path | None = None


def is_address(source: str) -> bool:
    """Whether a source is asked over HTTP."""
    return source.startswith(("http://", "https://"))


def observed_summary(question: ObserveQuestion) -> Summary:
    """What a Prometheus server says. Raises :class:`InputError`; see :func:`read_summary_of_server`."""
    server = server_of(question.source, question.timeout_s, question.token_file)
    n_windows = round(question.minutes * 60 / question.window_s)
    if not 1 <= n_windows <= WINDOWS_MAX:
        raise one_problem(
            "--minutes, --window-seconds", f"make {n_windows} windows", f"1..{WINDOWS_MAX}", "Ask for another stretch"
        )
    end_s = question.end_s if question.end_s is not None else time.time()
    return read_summary_of_server(server, Stretch(end_s, n_windows, question.window_s), question.match)


def observe(question: ObserveQuestion, out: Path) -> tuple[dict[str, Any], str]:
    """Reads a source and writes what it gives into ``out``; nothing is written unless everything could be read.

    Returns:
        The same as JSON values and as text: files and counts.
    """
    if is_address(question.source):
        if question.log is not None:
            raise one_problem(
                "--log", "is given with a Prometheus server", "a run folder beside it", "Name the run folder instead"
            )
        summary = observed_summary(question)
        make_folder(out)
        files = write_texts(out, {"summary.json": to_json(summary)})
        return _summary_plain(summary, files), summary_text(summary, files)
    observed = read_observed(Path(question.source), question.start)
    trace = read_request_log(question.log, observed) if question.log is not None else None
    make_folder(out)
    return _write(observed, trace, out)


def _write(observed: Observed, trace: Trace | None, out: Path) -> tuple[dict[str, Any], str]:
    metadata = {"written_by": "observe", "n_torn_lines": observed.n_torn_lines}
    files = [write_table(observed.requests, REQUEST_RECORD_COLUMNS, out / "requests.parquet", metadata)]
    if len(observed.workers):
        files.append(write_table(observed.workers, WORKER_INTERVAL_COLUMNS, out / "workers.parquet", metadata))
    if trace is not None:
        files.append(write_trace(trace, out / "trace.parquet"))
    plain = {
        "source": observed.source,
        "n_requests": len(observed.requests),
        "n_spans": len(observed.workers),
        "n_torn_lines": observed.n_torn_lines,
        "n_trace": None if trace is None else len(trace),
        "seen_until_s": observed.seen_until_s,
        "files": [str(file) for file in files],
    }
    lines = [
        f"{observed.source}: {len(observed.requests)} requests and {len(observed.workers)} spans of workers until "
        f"{observed.seen_until_s:.1f} s after the start; {observed.n_torn_lines} torn lines",
        f"trace: {len(trace)} requests; {'; '.join(trace.provenance.notes)}" if trace is not None else
        "no trace.parquet: records count a request's add-ons but do not name them. The engine's request log does: add --log FILE",
        f"files: {', '.join(str(file) for file in files)}",
    ]  # fmt: skip
    return plain, "\n".join(lines) + "\n"


def _summary_plain(summary: Summary, files: list[Path]) -> dict[str, Any]:
    rows = [row for row in summary.windows if row.is_covered]
    return {
        "source": summary.source,
        "n_windows": len(summary.windows),
        "n_windows_covered": len(rows),
        "n_counter_resets": summary.n_counter_resets,
        "n_offered": sum(row.n_offered for row in rows),
        "n_done": sum(row.n_done for row in rows),
        "latency_p50_s": summary.quantile_s(0.5),
        "latency_p95_s": summary.quantile_s(0.95),
        "files": [str(file) for file in files],
        "note": PROMETHEUS_SAYS,
    }


def summary_text(summary: Summary, files: list[Path]) -> str:
    """For a reader."""
    plain = _summary_plain(summary, files)
    n_missing = plain["n_windows"] - plain["n_windows_covered"]
    p50, p95 = (_seconds(plain[f"latency_p{q}_s"]) for q in (50, 95))
    lines = [
        f"{summary.source}: {summary.n_targets} engine{'s' if summary.n_targets != 1 else ''}, scraped every {summary.scrape_interval_s:g} s; "
        f"{plain['n_windows']} windows of {summary.window_s:g} s",
        f"{plain['n_offered']:.0f} requests offered, {plain['n_done']:.0f} done; half of them within {p50}, 95 % within {p95}",
        *([f"{n_missing} windows are left out of this: scrapes are missing there"] if n_missing else []),
        *(
            [f"{plain['n_counter_resets']} counters started again from zero: an engine was restarted"]
            if plain["n_counter_resets"]
            else []
        ),
        PROMETHEUS_SAYS,
        f"files: {', '.join(plain['files'])}",
    ]
    return "\n".join(lines) + "\n"


def _seconds(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g} s"
