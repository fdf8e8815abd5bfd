"""Checks that every run must pass: conservation, causality, no replica in two places at once. Called by ``simulate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from planner.workload import Bools, Workload
from traces.records import REQUEST_STATUSES

if TYPE_CHECKING:  # the simulator calls this module
    from planner.simulator.result import SimulationResult

STAGES: Final = ("switch_s", "controlnet_load_s", "lora_wait_s", "text_s", "denoise_s", "decode_s")
SLACK: Final = 1e-9
"""Relative to the horizon: a time is a sum of at most a dozen doubles, each rounded by 1.1e-16 of the horizon."""


class BrokenRunError(AssertionError):
    """A run violated a law that holds for every run: a fault of the simulator (or of an engine's log), not of the input."""


def check_run(result: SimulationResult, workload: Workload, *, may_batch: bool = False) -> None:
    """Raises :class:`BrokenRunError` with every violated law and the first request or worker that shows it.

    Laws: each request of the workload (up to the run's cut) is recorded once, in order, with a known status · a done request
    has arrival ≤ start ≤ end, latency = end − arrival, and its stages fill start to end · one that is not done has no
    latency · on a base worker no request starts before the one before ended (``may_batch``: those that start together end
    together) · no worker works more than its span, or while it is down.
    """
    frame = result.requests
    violations: list[str] = []
    slack_s = SLACK * max(1.0, result.horizon_s)
    column = {
        name: frame[name].to_numpy(np.float64) for name in ("arrival_s", "start_s", "end_s", "latency_s", *STAGES)
    }
    status = frame["status"].to_numpy(dtype=object)
    ids = frame["request_id"].to_numpy(dtype=object)

    def law(sentence: str, broken: Bools, names: np.ndarray[tuple[int, ...], np.dtype[np.object_]] = ids) -> None:
        if broken.any():
            violations.append(f"{sentence}: {int(broken.sum())} times, first {names[int(np.argmax(broken))]!r}")

    if ids.tolist() != list(workload.request_ids[: len(ids)]):
        violations.append("the recorded requests are not the workload's, each once and in order")
    law("has a status that is not known", ~np.isin(status.astype(str), REQUEST_STATUSES))
    is_done = status == "done"
    law("is done without start", is_done & np.isnan(column["start_s"]))
    law("starts before it arrives", column["start_s"] < column["arrival_s"] - slack_s)
    law("ends before it arrives", ~(column["end_s"] >= column["arrival_s"] - slack_s))
    law("ends before it starts", column["end_s"] < column["start_s"] - slack_s)
    law("has a latency without being done", ~is_done & ~np.isnan(column["latency_s"]))
    sojourn_s = column["end_s"] - column["arrival_s"]
    law("has a latency other than end − arrival", is_done & ~(np.abs(column["latency_s"] - sojourn_s) <= slack_s))
    filled_s = column["start_s"] + np.sum([column[name] for name in STAGES], axis=0)
    law("has stages that do not fill start to end", is_done & ~(np.abs(filled_s - column["end_s"]) <= slack_s))
    law("has a stage of negative length", np.min([column[name] for name in STAGES], axis=0) < -slack_s)
    violations += _worker_violations(result.workers, slack_s)
    order = np.lexsort((column["start_s"], frame["worker_id"].to_numpy(dtype=object).astype(str)))
    order = order[is_done[order]]
    worker = frame["worker_id"].to_numpy(dtype=object)[order]
    overlaps = (worker[1:] == worker[:-1]) & (column["start_s"][order][1:] < column["end_s"][order][:-1] - slack_s)
    if may_batch:
        start_s, end_s = column["start_s"][order], column["end_s"][order]
        overlaps &= ~((start_s[1:] == start_s[:-1]) & (end_s[1:] == end_s[:-1]))
    law("starts on a worker that is still busy", overlaps, ids[order][1:])
    if violations:
        raise BrokenRunError("; ".join(violations))


def _worker_violations(workers: pd.DataFrame, slack_s: float) -> list[str]:
    begin, end = workers["start_s"].to_numpy(np.float64), workers["end_s"].to_numpy(np.float64)
    busy_s = workers["busy_s"].to_numpy(np.float64)
    names = workers["worker_id"].to_numpy(dtype=object)
    found = []
    for sentence, broken in (
        ("a span ends before it begins", end < begin - slack_s),
        # a span's work is a sum over its requests, so its rounding grows with its length: 1e-6 of it is far below any figure shown
        ("a worker does more work than its span holds", busy_s > (end - begin) * (1 + 1e-6) + slack_s),
        ("spans of a worker overlap", np.append(False, (names[1:] == names[:-1]) & (begin[1:] < end[:-1] - slack_s))),
    ):
        if broken.any():
            found.append(f"{sentence}: {int(broken.sum())} times, first {names[int(np.argmax(broken))]!r}")
    return found
