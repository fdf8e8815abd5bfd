"""More or less of the same traffic, and pieces of it: superposed time-shifted copies, windows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd

from traces.problems import one_problem
from traces.streams import stream
from traces.trace import Trace

ShiftLaw = Literal["same_hours", "independent", "amplify"]
SHIFT_LAWS: Final[tuple[ShiftLaw, ...]] = get_args(ShiftLaw)

DAY_S: Final = 86_400.0
JITTER_S: Final = 900.0
"""Half-width of the jitter of ``same_hours``: well inside an hour, well above a user's burst of minutes."""
AMPLIFY_SPAN_S: Final = 3_600.0
MAX_FACTOR: Final = 100_000.0
MAX_REQUESTS: Final = 20_000_000

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def scale_traffic(trace: Trace, factor: float, shift_law: ShiftLaw = "same_hours", seed: int = 0) -> Trace:
    """``factor`` times the traffic: the trace and time-shifted copies of it laid over each other, same window.

    Every copy asks for the same add-ons, so popularity is kept; a fractional factor thins the last copy to the exact
    count. Copy 0 is not shifted. The law decides how bursty the sum is:

    - ``same_hours``: whole days, drawn uniformly, plus a jitter of ±15 minutes a copy: the daily rhythm stays, single
      users average out. What a shift moves past the end comes back on the first day that has the same hour. A trace
      shorter than two days has no whole day to shift by: its copies get the jitter alone, at most a quarter of the window.
    - ``independent``: uniform over the window; bursts and rhythm both average out.
    - ``amplify``: uniform within an hour (within the window if that is shorter): bursts of users grow with the factor.

    Shifts wrap around the window. Copy k of request ``r`` is called ``r#k``; where there is a column ``instance_id``,
    copies get instances of their own (``i#k``), so that the requests per instance and their locality stay.

    Raises:
        InputError: the factor is not above 0 and sensible, the law is unknown, or the result would be too large.
    """
    _check_scaling(factor, shift_law, len(trace))
    if factor == 1:
        return trace
    copies = _copies(trace, factor, shift_law, seed)
    return Trace(_requests(trace, copies), trace.provenance.with_note(copies.note), trace.duration_s)


def scaled_busiest_window(
    trace: Trace, factor: float, length_s: float, shift_law: ShiftLaw = "same_hours", seed: int = 0
) -> Trace:
    """The busiest window of scaled traffic, without building the requests outside it.

    The same as ``window(scaled, *busiest_window(scaled, length_s))`` of ``scaled = scale_traffic(…)``, but of a large
    factor only the arrivals are made for all requests.

    Raises:
        InputError: as :func:`scale_traffic` and :func:`busiest_window`.
    """
    _check_scaling(factor, shift_law, len(trace))
    if factor == 1:
        return window(trace, *busiest_window(trace, length_s))
    copies = _copies(trace, factor, shift_law, seed)
    start_s, end_s = _busiest(copies.arrival_s, trace.duration_s, length_s)
    part = _bounds(copies.arrival_s, start_s, end_s, trace.duration_s)
    requests = _requests(
        trace, replace(copies, source=copies.source[part], copy=copies.copy[part], arrival_s=copies.arrival_s[part])
    )
    requests["arrival_s"] = requests["arrival_s"] - start_s
    provenance = trace.provenance.with_note(copies.note).with_note(_window_note(start_s, end_s, trace.duration_s))
    return Trace(requests, provenance, end_s - start_s)


@dataclass(frozen=True, slots=True, eq=False)
class ScaledRows:
    """Scaled and cut traffic as rows of the trace, in order of arrival."""

    source: IntArray
    """Row of the trace. [n]"""
    copy: IntArray
    """Number of the copy, 0 for the trace itself. [n]"""
    arrival_s: FloatArray
    """From the start of the cut. [n]"""
    duration_s: float


def scaled_rows(
    trace: Trace,
    factor: float,
    shift_law: ShiftLaw = "same_hours",
    seed: int = 0,
    *,
    window_s: tuple[float, float] | None = None,
    busiest_s: float | None = None,
) -> ScaledRows:
    """Which requests :func:`scale_traffic`, then :func:`window` or :func:`busiest_window`, give, without building them.

    Args:
        window_s: start and end of the window that is kept.
        busiest_s: instead, the length of the busiest one.

    Raises:
        InputError: as those functions.
    """
    _check_scaling(factor, shift_law, len(trace))
    if factor == 1:
        rows = np.arange(len(trace), dtype=np.int64)
        copies = _Copies(rows, np.zeros_like(rows), trace.requests["arrival_s"].to_numpy(dtype=np.float64), "")
    else:
        copies = _copies(trace, factor, shift_law, seed)
    start_s, end_s = 0.0, trace.duration_s
    if window_s is not None:
        start_s, end_s = window_s
        if not 0 <= start_s < end_s <= trace.duration_s:
            allowed = f"0 ≤ start < end ≤ {trace.duration_s:g} s, the trace's length"
            raise one_problem("window", f"got {start_s:g}..{end_s:g} s", allowed)
    elif busiest_s is not None:
        start_s, end_s = _busiest(copies.arrival_s, trace.duration_s, busiest_s)
    part = _bounds(copies.arrival_s, start_s, end_s, trace.duration_s)
    return ScaledRows(copies.source[part], copies.copy[part], copies.arrival_s[part] - start_s, end_s - start_s)


def window(trace: Trace, start_s: float, end_s: float) -> Trace:
    """The requests with ``start_s`` ≤ arrival < ``end_s`` (the window's own end included), as a trace that starts at 0.

    Raises:
        InputError: the window is not inside the trace or holds no request.
    """
    if not 0 <= start_s < end_s <= trace.duration_s:
        allowed = f"0 ≤ start < end ≤ {trace.duration_s:g} s, the trace's length"
        raise one_problem("window", f"got {start_s:g}..{end_s:g} s", allowed)
    arrival = trace.requests["arrival_s"].to_numpy(dtype=np.float64)
    part = _bounds(arrival, start_s, end_s, trace.duration_s)
    if part.start == part.stop:
        raise one_problem(
            "window", f"got {start_s:g}..{end_s:g} s, which holds no request", repair="Choose another window"
        )
    requests = trace.requests.iloc[part].reset_index(drop=True)
    requests["arrival_s"] = requests["arrival_s"] - start_s
    provenance = trace.provenance.with_note(_window_note(start_s, end_s, trace.duration_s))
    return Trace(requests, provenance, end_s - start_s)


def busiest_window(trace: Trace, length_s: float) -> tuple[float, float]:
    """Start and end of the window of this length with the most requests; the earliest one if several tie.

    Windows that begin at an arrival are enough to look at: any other can be moved right to its first arrival without
    losing one. A length of at least the whole trace gives the whole trace.

    Raises:
        InputError: the length is not above 0.
    """
    return _busiest(trace.requests["arrival_s"].to_numpy(dtype=np.float64), trace.duration_s, length_s)


def _busiest(arrival: FloatArray, duration_s: float, length_s: float) -> tuple[float, float]:
    if not (math.isfinite(length_s) and length_s > 0):
        raise one_problem("window length", f"got {length_s:g} s", "a number of seconds above 0")
    if length_s >= duration_s:
        return 0.0, duration_s
    starts = np.minimum(arrival, duration_s - length_s)
    begins = np.searchsorted(arrival, starts, side="left")
    ends = np.searchsorted(arrival, starts + length_s, side="left")
    start_s = float(starts[int(np.argmax(ends - begins))])
    return start_s, min(start_s + length_s, duration_s)


def _bounds(arrival: FloatArray, start_s: float, end_s: float, duration_s: float) -> slice:
    first = int(np.searchsorted(arrival, start_s, side="left"))
    last = int(np.searchsorted(arrival, end_s, side="right" if end_s == duration_s else "left"))
    return slice(first, last)


def _window_note(start_s: float, end_s: float, duration_s: float) -> str:
    return f"window {start_s:g}..{end_s:g} s of {duration_s:g} s"


@dataclass(frozen=True, slots=True, eq=False)
class _Copies:
    """Scaled traffic before its requests are built, in order of arrival."""

    source: IntArray
    """Row of the trace. [n]"""
    copy: IntArray
    arrival_s: FloatArray
    note: str


def _check_scaling(factor: float, shift_law: str, n: int) -> None:
    if not (math.isfinite(factor) and 0 < factor <= MAX_FACTOR):
        raise one_problem("traffic factor", f"got {factor:g}", f"a number above 0, at most {MAX_FACTOR:g}")
    if shift_law not in SHIFT_LAWS:
        raise one_problem("shift law", f"got {shift_law!r}", f"one of {', '.join(SHIFT_LAWS)}")
    n_wanted = round(n * factor)
    if not 0 < n_wanted <= MAX_REQUESTS:
        what = f"got {factor:g}, which makes {n_wanted} requests of {n}"
        raise one_problem("traffic factor", what, f"one that makes 1..{MAX_REQUESTS} requests")


def _copies(trace: Trace, factor: float, shift_law: ShiftLaw, seed: int) -> _Copies:
    source, copy = _chosen(len(trace), round(len(trace) * factor), seed)
    shifts = _shifts(int(copy[-1]) + 1, trace.duration_s, shift_law, seed)
    arrival = trace.requests["arrival_s"].to_numpy(dtype=np.float64)[source]
    wraps_by_days = shift_law == "same_hours" and trace.duration_s >= 2 * DAY_S
    arrival = _shifted(arrival, copy, shifts, trace.duration_s, wraps_by_days)
    order = np.argsort(arrival, kind="stable")
    note = f"traffic ×{factor:g} by superposed time-shifted copies, shift law {shift_law}, seed {seed}"
    if shift_law == "same_hours" and trace.duration_s < 2 * DAY_S:
        note += f"; shorter than two days, so only jitter of ±{_jitter_s(trace.duration_s):g} s and no whole days"
    return _Copies(source[order], copy[order], arrival[order], note)


def _requests(trace: Trace, copies: _Copies) -> pd.DataFrame:
    requests = trace.requests.take(copies.source).reset_index(drop=True)
    requests["arrival_s"] = copies.arrival_s
    for column in ("request_id", "instance_id"):
        if column in requests.columns:
            mark = _unused_mark(trace.requests[column])
            requests[column] = _numbered(requests[column], copies.copy, mark)
    return requests


def _chosen(n: int, n_wanted: int, seed: int) -> tuple[IntArray, IntArray]:
    """Rows of the trace and the number of their copy, copy by copy, rows in order; the last copy is thinned."""
    n_whole, rest = divmod(n_wanted, n)
    rows = [np.tile(np.arange(n, dtype=np.int64), n_whole)]
    copies = [np.repeat(np.arange(n_whole, dtype=np.int64), n)]
    if rest:
        kept = np.sort(stream(seed, "scaling", "thinning").permutation(n)[:rest])
        rows.append(kept.astype(np.int64))
        copies.append(np.full(rest, n_whole, dtype=np.int64))
    return np.concatenate(rows), np.concatenate(copies)


def _jitter_s(duration_s: float) -> float:
    return min(JITTER_S, duration_s / 4)


def _shifts(n_copies: int, duration_s: float, law: ShiftLaw, seed: int) -> tuple[IntArray, FloatArray]:
    """Whole days and seconds by which each copy is late; copy k's shift does not depend on how many there are."""
    uniform = stream(seed, "scaling", "shift", law).random((n_copies, 2))
    days = np.zeros(n_copies, dtype=np.int64)
    if law == "independent":
        seconds = uniform[:, 0] * duration_s
    elif law == "amplify":
        seconds = uniform[:, 0] * min(AMPLIFY_SPAN_S, duration_s)
    else:
        seconds = (2 * uniform[:, 0] - 1) * _jitter_s(duration_s)
        if duration_s >= 2 * DAY_S:
            days = np.floor(uniform[:, 1] * math.ceil(duration_s / DAY_S)).astype(np.int64)
    days[0], seconds[0] = 0, 0.0
    return days, seconds


def _shifted(
    arrival: FloatArray,
    copy: IntArray,
    shifts: tuple[IntArray, FloatArray],
    duration_s: float,
    wraps_by_days: bool,
) -> FloatArray:
    """Arrivals of the copies, wrapped around the window: to its begin, or to another day at the same time of day. [n]"""
    days, seconds = shifts
    if duration_s <= 0:
        return arrival
    moved = arrival + seconds[copy]
    if wraps_by_days:
        day, hour_s = np.divmod(moved, DAY_S)
        # Days of the window that have this time of day: the last day may be cut off before it.
        n_days = np.ceil((duration_s - hour_s) / DAY_S).astype(np.int64)
        moved = np.mod(day.astype(np.int64) + days[copy], n_days) * DAY_S + hour_s
    else:
        moved = np.mod(moved, duration_s)
    return np.where(copy > 0, moved, arrival)


def _unused_mark(names: pd.Series[Any]) -> str:
    """``#``, or as many of them as no name contains, so that no two new names can be the same."""
    mark = "#"
    known = {name for name in names.unique() if isinstance(name, str)}
    while any(mark in name for name in known):
        mark += "#"
    return mark


def _numbered(names: pd.Series[Any], copy: IntArray, mark: str) -> pd.Series[Any]:
    numbered = np.empty(len(names), dtype=object)
    for row, (name, k) in enumerate(zip(names, copy.tolist(), strict=True)):
        numbered[row] = f"{name}{mark}{k}" if k and name is not None else name
    return pd.Series(numbered, dtype=object)
