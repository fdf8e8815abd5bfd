"""A run as a Chrome trace: workers as threads, stages of requests as slices. Opens in Perfetto (ui.perfetto.dev) and chrome://tracing."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final, cast

import numpy as np
import pandas as pd

from planner.simulator import SimulationResult
from traces.files import written_beside
from traces.problems import one_problem

REQUESTS_MAX: Final = 500_000
"""About as many as a browser still opens (six slices a request)."""
SUFFIXES: Final = (".json", ".json.gz")
US_PER_S: Final = 1e6
QUEUE_PID: Final = 1
STAGES: Final = (
    ("switch_s", "checkpoint switch"), ("controlnet_load_s", "ControlNet load"), ("lora_wait_s", "LoRA"), ("text_s", "text"),
    ("denoise_s", "denoise"), ("decode_s", "decode"),
)  # fmt: skip
"""In the order in which a request goes through them; LoRAs that are patched while denoising runs are drawn before it."""


def write_chrome_trace(result: SimulationResult, path: Path) -> Path:
    """Writes the run's Chrome trace (JSON, gzipped if the name ends in ``.gz``). The same run gives the same bytes.

    A process is a pool, a thread a worker: base replicas show the stages of each request, ControlNet workers their busy and
    loading spans. The queue's length and the requests in service are counters.

    Raises:
        InputError: the name has another ending, the run has too many requests, or the file cannot be written.
    """
    if not path.name.endswith(SUFFIXES):
        raise one_problem("--chrome-trace", f"got {path.name!r}", f"a name ending in {' or '.join(SUFFIXES)}")
    if len(result.requests) > REQUESTS_MAX:
        raise one_problem(
            "--chrome-trace", f"the run has {len(result.requests)} requests", f"at most {REQUESTS_MAX}",
            "Cut the scenario with traffic.window or traffic.busiest",
        )  # fmt: skip
    with written_beside(path) as beside, beside.open("wb") as raw:
        if path.name.endswith(".gz"):
            with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
                _write(result, cast(IO[bytes], packed))
        else:
            _write(result, raw)
    return path


def _write(result: SimulationResult, stream: IO[bytes]) -> None:
    stream.write(b'{"displayTimeUnit": "ms", "traceEvents": [\n')
    for position, event in enumerate(events(result)):
        text = json.dumps(event, ensure_ascii=False, allow_nan=False)
        stream.write((",\n" if position else "").encode() + text.encode())
    stream.write(b"\n]}\n")


def events(result: SimulationResult) -> Iterator[dict[str, Any]]:
    """The events of the trace, metadata first."""
    workers = result.workers
    names = workers.drop_duplicates("worker_id")
    pools = list(dict.fromkeys(names["pool"].tolist()))
    pid_of = {pool: QUEUE_PID + 1 + i for i, pool in enumerate(pools)}
    yield _name("process_name", QUEUE_PID, 0, "queue")
    for pool, pid in pid_of.items():
        yield _name("process_name", pid, 0, f"pool {pool}")
    place: dict[str, tuple[int, int]] = {}
    for tid, row in enumerate(names.itertuples(index=False), start=1):
        worker, pool = str(row.worker_id), str(row.pool)
        place[worker] = (pid_of[pool], tid)
        yield _name("thread_name", pid_of[pool], tid, worker)
    yield from _requests(result.requests, place)
    yield from _spans(workers, place)
    yield from _counters(result.requests)


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def _requests(requests: pd.DataFrame, place: dict[str, tuple[int, int]]) -> Iterator[dict[str, Any]]:
    for row in requests.to_dict("records"):
        if row["status"] != "done":
            about = {"request": row["request_id"], "reason": row["reason"]}
            yield {"ph": "i", "s": "p", "name": row["status"], "cat": "request", "ts": _us(row["end_s"]), "pid": QUEUE_PID, "tid": 0, "args": about}  # fmt: skip
            continue
        pid, tid = place[row["worker_id"]]
        about = {
            "request": row["request_id"], "checkpoint": row["base_model_id"], "tenant": row["tenant_id"], "n_steps": row["n_steps"],
            "n_images": row["n_images"], "n_controlnets": row["n_controlnets"], "n_loras": row["n_loras"],
            "queue_wait_s": row["queue_wait_s"], "latency_s": row["latency_s"],
        }  # fmt: skip
        start_s, end_s = float(row["start_s"]), float(row["end_s"])
        yield _slice(row["request_id"], "request", start_s, end_s, pid, tid, about)
        at_s = start_s
        for column, name in STAGES:
            seconds = float(row[column])
            if seconds > 0:
                # never past its request: viewers nest slices by their times
                yield _slice(name, "stage", at_s, min(at_s + seconds, end_s), pid, tid, {})
                at_s += seconds


def _spans(workers: pd.DataFrame, place: dict[str, tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """ControlNet workers, loaders, and what befell base workers beside requests."""
    rows = workers[(workers["role"] != "base") | (workers["state"] == "down")]
    for row in rows[rows["state"] != "idle"].to_dict("records"):
        pid, tid = place[row["worker_id"]]
        yield _slice(row["state"], row["role"], row["start_s"], row["end_s"], pid, tid, {"busy_s": row["busy_s"]})


def _counters(requests: pd.DataFrame) -> Iterator[dict[str, Any]]:
    start_s = requests["start_s"].to_numpy(dtype=np.float64, na_value=np.nan)
    end_s, arrival_s = requests["end_s"].to_numpy(dtype=np.float64), requests["arrival_s"].to_numpy(dtype=np.float64)
    taken = ~np.isnan(start_s)
    left_queue_s = np.where(taken, start_s, end_s)
    for name, begin, end in (
        ("waiting", arrival_s, left_queue_s),
        ("in service", start_s[taken], end_s[taken]),
    ):
        times = np.concatenate([begin, end])
        change = np.concatenate([np.ones(len(begin)), -np.ones(len(end))])
        moments, group = np.unique(times, return_inverse=True)
        values = np.cumsum(np.bincount(group, weights=change, minlength=len(moments)))
        for moment, value in zip(moments.tolist(), values.tolist(), strict=True):
            yield {"ph": "C", "name": name, "ts": _us(moment), "pid": QUEUE_PID, "tid": 0, "args": {"requests": int(value)}}  # fmt: skip


def _slice(name: str, category: str, start_s: float, end_s: float, pid: int, tid: int, about: dict[str, Any]) -> dict[str, Any]:  # fmt: skip
    begin = _us(start_s)
    return {"ph": "X", "name": name, "cat": category, "ts": begin, "dur": round(_us(end_s) - begin, 3), "pid": pid, "tid": tid, "args": about}  # fmt: skip


def _us(seconds: float) -> float:
    return round(float(seconds) * US_PER_S, 3)
