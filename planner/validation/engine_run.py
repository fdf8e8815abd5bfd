"""A replay of the engine as ``diffplan engine replay`` left it: what was asked, what ran, what happened. Hostile until checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.allocation import Allocation, read_allocation
from planner.simulator import Held, SimulationResult, StartState
from planner.statistics import is_saturated
from traces.problems import InputError, Problem, one_problem
from traces.reader import read_table, read_trace
from traces.records import REQUEST_RECORD_COLUMNS, REQUEST_STATUSES, WORKER_INTERVAL_COLUMNS
from traces.trace import Trace

START_BYTES_MAX: Final = 16 * 2**20
REQUESTS_MIN: Final = 20
"""Fewer say nothing about a quantile."""
SAME: Final = (
    "request_id", "arrival_s", "n_steps", "width_px", "height_px", "n_images", "guidance_scale", "priority",
)  # fmt: skip
"""Columns in which two replays of one workload agree; ids of add-ons may differ, so that caches start alike."""
Name = Annotated[str, Field(max_length=256)]


class _Worker(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    base_model_ids: list[Name] = []
    controlnet_ids: list[Name] = []


class _StartFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    schema_version: Annotated[int, Field(ge=1, le=1)]
    workers: dict[Name, _Worker] = {}
    lora_ids: list[Name] = []
    lora_bytes: dict[Name, Annotated[int, Field(ge=0, le=2**40)]] = {}
    model: Name = ""
    n_loaders: Annotated[int, Field(ge=1, le=64)] = 1
    has_store: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class EngineRun:
    """One replay."""

    name: str
    """Of its folder."""
    trace: Trace
    """As it was offered."""
    log: SimulationResult
    """Its records, in the form of a simulation's."""
    allocation: Allocation
    start: StartState
    lora_bytes: Mapping[str, int]
    model: str
    n_loaders: int

    @property
    def workload_key(self) -> str:
        """The same for replays of one workload."""
        frame = self.trace.requests
        digest = hashlib.sha256()
        for name in SAME:
            digest.update("\x1f".join(map(str, frame[name].tolist())).encode() + b"\x1e")
        for name in ("controlnet_ids", "lora_ids"):
            digest.update("\x1f".join(str(len(ids)) for ids in frame[name]).encode() + b"\x1e")
        return digest.hexdigest()

    @property
    def topology(self) -> str:
        """Of its base pools; several are joined by ``+``."""
        return "+".join(dict.fromkeys(pool.topology for pool in self.allocation.pools_of("base")))


def read_engine_run(folder: Path) -> EngineRun:
    """Reads a replay's folder.

    Raises:
        InputError: a file is missing, damaged or too large, the tables do not fit one another, or too few requests ended.
    """
    if not folder.is_dir():
        raise one_problem(str(folder), "is no folder", "the --out folder of 'diffplan engine replay'", "Check the path")
    wanted = ("trace.parquet", "requests.parquet", "workers.parquet", "allocation.json", "start.json")
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise InputError(
            [Problem(str(folder), f"has no {name}", "what 'diffplan engine replay' writes", "Replay again") for name in missing]
        )  # fmt: skip
    _check_whole(folder)
    trace = read_trace(folder / "trace.parquet")
    requests = read_table(folder / "requests.parquet", REQUEST_RECORD_COLUMNS)
    workers = read_table(folder / "workers.parquet", WORKER_INTERVAL_COLUMNS)
    allocation = read_allocation(folder / "allocation.json")
    start = _read_start(folder / "start.json")
    requests = _in_order(folder, trace, requests)
    _check_times(folder, requests)
    return EngineRun(
        name=folder.resolve().name,
        trace=trace,
        log=_as_result(trace, requests, workers),
        allocation=allocation,
        start=StartState(
            {name: Held(tuple(w.base_model_ids), tuple(w.controlnet_ids)) for name, w in sorted(start.workers.items())},
            tuple(start.lora_ids),
        ),
        lora_bytes=start.lora_bytes,
        model=start.model,
        n_loaders=start.n_loaders,
    )


def _check_whole(folder: Path) -> None:
    """A replay that was broken off offered less than its trace says; without a summary nobody knows."""
    path = folder / "summary.json"
    if not path.is_file():
        return
    if path.stat().st_size > START_BYTES_MAX:
        raise one_problem(str(path), f"has {path.stat().st_size} bytes", f"at most {START_BYTES_MAX}")
    try:
        summary = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise one_problem(str(path), "is not JSON", "what the engine writes", "Replay again") from None
    if isinstance(summary, dict) and summary.get("is_interrupted"):
        raise one_problem(str(folder), "is a replay that was broken off", "a whole one", "Replay again")


def _read_start(path: Path) -> _StartFile:
    size = path.stat().st_size
    if size > START_BYTES_MAX:
        raise one_problem(str(path), f"has {size} bytes", f"at most {START_BYTES_MAX}")
    try:
        return _StartFile.model_validate(json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ValidationError):
            raise InputError([
                Problem(f"{path} {'.'.join(map(str, item['loc']))}", item["msg"], "what the engine writes", "Replay again")
                for item in error.errors(include_url=False, include_input=False)
            ]) from None  # fmt: skip
        raise one_problem(str(path), "is not JSON", "what the engine writes", "Replay again") from None


def _in_order(folder: Path, trace: Trace, requests: pd.DataFrame) -> pd.DataFrame:
    """The records in the order of the trace, which must have all of them."""
    unknown = set(requests["request_id"]) - set(trace.requests["request_id"])
    statuses = sorted(set(requests["status"]) - set(REQUEST_STATUSES))
    problems = []
    if unknown:
        problems.append(
            Problem(
                f"{folder}/requests.parquet", f"has {len(unknown)} requests that trace.parquet has not, such as {min(unknown)!r}",
                "the requests of one replay", "Keep the files of a replay together",
            )
        )  # fmt: skip
    if requests["request_id"].duplicated().any():
        problems.append(Problem(f"{folder}/requests.parquet", "has a request twice", "each request once"))
    if statuses:
        problems.append(
            Problem(f"{folder}/requests.parquet status", f"got {statuses[0]!r}", ", ".join(REQUEST_STATUSES))
        )
    n_done = int((requests["status"] == "done").sum())
    if n_done < REQUESTS_MIN:
        problems.append(
            Problem(f"{folder}/requests.parquet", f"has {n_done} requests that were done", f"at least {REQUESTS_MIN}", "Replay more")
        )  # fmt: skip
    if problems:
        raise InputError(problems)
    place = {name: k for k, name in enumerate(trace.requests["request_id"])}
    order = np.argsort([place[name] for name in requests["request_id"]], kind="stable")
    return requests.iloc[order].reset_index(drop=True)


def _check_times(folder: Path, requests: pd.DataFrame) -> None:
    done = requests[requests["status"] == "done"]
    for name in ("start_s", "latency_s", "queue_wait_s"):
        if done[name].isna().any():
            raise one_problem(f"{folder}/requests.parquet {name}", "is null for a request that was done", "a number")
    backwards = requests["end_s"] < requests["arrival_s"]
    if backwards.any():
        row = requests[backwards].iloc[0]
        raise one_problem(
            f"{folder}/requests.parquet request {str(row['request_id'])[:80]!r}",
            f"ends at {row['end_s']:g} s, before it arrived at {row['arrival_s']:g} s", "an end after the arrival",
        )  # fmt: skip


def _as_result(trace: Trace, requests: pd.DataFrame, workers: pd.DataFrame) -> SimulationResult:
    """The log as a simulation's; saturation by the same rule."""
    done = requests[requests["status"] == "done"]
    service_s = (done["end_s"] - done["start_s"]).to_numpy(np.float64)
    saturated = is_saturated(
        done["arrival_s"].to_numpy(np.float64), done["queue_wait_s"].to_numpy(np.float64), service_s
    )
    offered_until_s = max(trace.duration_s, float(trace.requests["arrival_s"].iloc[-1]))
    horizon_s = max(offered_until_s, float(requests["end_s"].max()))
    # loaders occupy no GPU and have no spans in an engine's log
    return SimulationResult(requests, workers, saturated, 0, offered_until_s, horizon_s)
