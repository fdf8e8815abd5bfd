"""The engine's request log as a trace: what was asked for, so that it can be planned for, replayed or simulated again.

RequestRecords count a request's add-ons but do not name them, so the log is needed for this. Prompts are in neither.
"""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from planner.observe.run_folder import LINE_BYTES_MAX, Observed, json_object
from traces.files import checked_file
from traces.frame import checked_frame
from traces.problems import one_problem
from traces.trace import Provenance, Trace

LINES_MAX: Final = 10_000_000
COPIED: Final = (
    "base_model_id", "n_steps", "width_px", "height_px", "n_images", "guidance_scale", "controlnet_ids", "lora_ids", "priority",
    "deadline_s",
)  # fmt: skip


def read_request_log(path: Path, observed: Observed | None = None) -> Trace:
    """Requests of the engine's log (``diffplan engine serve --log FILE``), in the order of their arrival.

    Arrivals are those of the records of the same run where they have the request; others are placed by the log's own clock. Without
    records the first arrival is second 0. Scales and windows of ControlNets are not in the log: their defaults hold and are counted.

    Raises:
        InputError: the file cannot be read, or has no request that the engine understood.
    """
    rows: list[dict[str, Any]] = []
    ended_s: list[float] = []
    n_without_job = n_torn = 0
    with checked_file(path).open("rb") as stream:
        for number in range(LINES_MAX + 1):
            line = stream.readline(LINE_BYTES_MAX)
            if not line:
                break
            if number == LINES_MAX:
                raise one_problem(
                    str(path), f"has more than {LINES_MAX} lines", f"at most {LINES_MAX}", "Split the file"
                )
            value = json_object(line)
            began_s = _began_s(value) if value is not None else None
            if value is None or began_s is None:
                n_torn += 1
            elif not isinstance(value.get("job"), dict):
                n_without_job += 1
            else:
                job = value["job"]
                rows.append(
                    {"request_id": value.get("request_id"), "tenant_id": value.get("tenant_id", "")}
                    | {name: job[name] for name in COPIED if name in job}
                )
                ended_s.append(began_s)
    if not rows:
        raise one_problem(
            str(path), "has no request that an engine understood", "a log of 'diffplan engine serve --log FILE'"
        )
    arrival_s, n_by_clock = _arrivals([row["request_id"] for row in rows], np.array(ended_s), observed)
    frame = pd.DataFrame([{**row, "arrival_s": when} for row, when in zip(rows, arrival_s.tolist(), strict=True)])
    left_out = {"refused before it was a job": n_without_job, "not a whole line": n_torn}
    notes = [f"{n_by_clock} arrivals by the log's clock, {len(rows) - n_by_clock} from the records"]
    provenance = Provenance(
        source=f"request log {path.name}", left_out={k: n for k, n in left_out.items() if n}, notes=tuple(notes)
    )
    ordered = frame.sort_values(["arrival_s", "request_id"], ignore_index=True)
    until_s = max(float(arrival_s.max()), observed.seen_until_s if observed is not None else 0.0)
    return checked_frame(ordered, path.name, provenance, until_s, row_word="request")


def _began_s(value: dict[str, Any]) -> float | None:
    """Wall-clock second of the request's first byte; None if the line does not say."""
    when, took_s = value.get("time"), value.get("latency_s")
    if not isinstance(when, str) or not isinstance(took_s, (int, float)) or not math.isfinite(took_s):
        return None
    try:
        stamp = datetime.datetime.fromisoformat(when)
    except ValueError:
        return None
    return (stamp if stamp.tzinfo else stamp.replace(tzinfo=datetime.UTC)).timestamp() - took_s


def _arrivals(names: list[Any], began_s: np.ndarray, observed: Observed | None) -> tuple[np.ndarray, int]:
    known: dict[str, float] = {}
    if observed is not None:
        known = dict(zip(observed.requests["request_id"], observed.requests["arrival_s"].astype(float), strict=True))
    recorded = np.array([known.get(name, math.nan) if isinstance(name, str) else math.nan for name in names])
    is_known = np.isfinite(recorded)
    origin_s = float(np.median((began_s - recorded)[is_known])) if is_known.any() else float(began_s.min())
    return np.where(is_known, recorded, np.maximum(began_s - origin_s, 0.0)), int((~is_known).sum())
