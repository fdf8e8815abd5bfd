"""A run over time, from its two record tables: the queue, how busy each pool is, replicas against demand, and one request's life.

Reads records of the simulator or of an engine alike; nothing here simulates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

Floats = npt.NDArray[np.float64]
SLOTS_MAX: Final = 2000
STAGES: Final = (
    ("queue", "queue_wait_s"), ("switch", "switch_s"), ("controlnet_load", "controlnet_load_s"), ("lora", "lora_wait_s"),
    ("text", "text_s"), ("denoise", "denoise_alone_s"), ("sharing", ""), ("decode", "decode_s"),
)  # fmt: skip
"""Stage and column, in the order in which a request goes through them. ``sharing`` is what denoising took longer than alone."""


@dataclass(frozen=True, slots=True, eq=False)
class PoolSeries:
    """One pool, one figure a slot."""

    pool: str
    role: str
    busy_ratio: Floats
    """Work done over time allocated, 0..1; of a shared ControlNet worker its forwards."""
    loading_ratio: Floats
    replicas: Floats
    """Mean number of replicas that are allocated and not down."""


@dataclass(frozen=True, slots=True, eq=False)
class RunSeries:
    """A window of a run in slots of equal length. Arrays have one figure a slot."""

    begin_s: float
    slot_s: float
    middle_s: Floats
    arrivals_per_s: Floats
    waiting_mean: Floats
    waiting_max: Floats
    """Largest number of waiting requests at any moment of the slot."""
    late_ratio: Floats
    """Of the requests that arrive in the slot: in time is a done one within the promise; NaN where none arrives."""
    demand_replicas: Floats
    """Seconds of base replicas that the slot's arrivals ask for, over its length: fewer replicas than this fall behind."""
    pools: tuple[PoolSeries, ...]


def run_series(
    requests: pd.DataFrame, workers: pd.DataFrame, promise_s: float, *, n_slots: int = 120, begin_s: float = 0.0, end_s: float | None = None
) -> RunSeries:  # fmt: skip
    """Cuts a window of a run into slots.

    Args:
        requests: columns ``traces.records.REQUEST_RECORD_COLUMNS``.
        workers: columns ``traces.records.WORKER_INTERVAL_COLUMNS``. A worker that the records name counts as allocated for the
            whole window, except while it is down.
        promise_s: latency up to which a request is in time.
        end_s: None: the last event.

    Raises:
        ValueError: the window is empty or reversed, or ``n_slots`` is not 1..2000.
    """
    last_s = float(max(requests["end_s"].max(), requests["arrival_s"].max())) if len(requests) else 0.0
    end_s = last_s if end_s is None else end_s
    if not end_s > begin_s or not 1 <= n_slots <= SLOTS_MAX:
        raise ValueError(
            f"got the window {begin_s:g}..{end_s:g} s in {n_slots} slots, needs a window and 1..{SLOTS_MAX} slots"
        )
    edges = np.linspace(begin_s, end_s, n_slots + 1)
    slot_s = (end_s - begin_s) / n_slots
    arrival_s = requests["arrival_s"].to_numpy(np.float64)
    start_s = requests["start_s"].to_numpy(np.float64, na_value=np.nan)
    done_s = requests["end_s"].to_numpy(np.float64)
    left_queue_s = np.where(np.isnan(start_s), done_s, start_s)  # a rejected request leaves when it is rejected
    slot = np.searchsorted(edges, arrival_s, side="right") - 1
    inside = (slot >= 0) & (slot < n_slots) & (arrival_s < end_s)
    n_arrivals = np.bincount(slot[inside], minlength=n_slots).astype(np.float64)
    is_done = (requests["status"] == "done").to_numpy(np.bool_)
    latency_s = requests["latency_s"].to_numpy(np.float64, na_value=np.nan)
    late = ~(is_done & (np.nan_to_num(latency_s, nan=np.inf) <= promise_s))
    service_s = np.where(is_done, np.nan_to_num(done_s - start_s), 0.0)
    with np.errstate(invalid="ignore"):
        late_ratio = np.bincount(slot[inside], weights=late[inside].astype(np.float64), minlength=n_slots) / np.where(
            n_arrivals, n_arrivals, np.nan
        )
    return RunSeries(
        begin_s, slot_s, (edges[:-1] + edges[1:]) / 2, n_arrivals / slot_s,
        _overlap_s(arrival_s, left_queue_s, np.ones(len(arrival_s)), edges) / slot_s, _most(arrival_s, left_queue_s, edges), late_ratio,
        np.bincount(slot[inside], weights=service_s[inside], minlength=n_slots) / slot_s,
        tuple(_pool(workers[workers["pool"] == pool], str(pool), edges) for pool in dict.fromkeys(workers["pool"].tolist())),
    )  # fmt: skip


def _overlap_s(first_s: Floats, last_s: Floats, weight: Floats, edges: Floats) -> Floats:
    """Seconds of weighted spans inside each slot: differences of the integral at the edges."""

    def until(edge: float) -> float:
        return float((weight * np.clip(np.minimum(last_s, edge) - first_s, 0.0, None)).sum())

    return np.diff(np.array([until(float(edge)) for edge in edges]))


def _most(first_s: Floats, last_s: Floats, edges: Floats) -> Floats:
    """Largest number of spans that are open at once in each slot; a span of no length counts for nothing."""
    real = last_s > first_s
    times = np.concatenate([first_s[real], last_s[real]])
    change = np.concatenate([np.ones(int(real.sum())), -np.ones(int(real.sum()))])
    order = np.lexsort((change, times))  # who leaves at a moment goes before who comes
    times, level = times[order], np.cumsum(change[order])
    carried = np.concatenate([[0.0], level])[np.searchsorted(times, edges[:-1], side="right")]
    found = carried.astype(np.float64)
    slot = np.searchsorted(edges, times, side="right") - 1
    inside = (slot >= 0) & (slot < len(found))
    np.maximum.at(found, slot[inside], level[inside])
    return found


def _pool(workers: pd.DataFrame, name: str, edges: Floats) -> PoolSeries:
    first, last = workers["start_s"].to_numpy(np.float64), workers["end_s"].to_numpy(np.float64)
    busy_s = workers["busy_s"].to_numpy(np.float64)
    state = workers["state"].to_numpy(dtype=object)
    slot_s = float(edges[1] - edges[0])
    n_workers = workers["worker_id"].nunique()
    density = np.divide(busy_s, last - first, out=np.zeros(len(first)), where=last > first)
    is_loading, is_down = (state == "loading").astype(np.float64), (state == "down").astype(np.float64)
    away = _overlap_s(first, last, is_down, edges) / slot_s
    replicas = np.maximum(n_workers - away, 0.0)
    there_s = np.where(replicas > 0, replicas * slot_s, np.inf)
    return PoolSeries(
        name, str(workers["role"].iloc[0]), np.clip(_overlap_s(first, last, density, edges) / there_s, 0.0, 1.0),
        np.clip(_overlap_s(first, last, is_loading, edges) / there_s, 0.0, 1.0), replicas,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a request's life."""

    name: str
    """One of ``STAGES``, or ``other``: what the latency has beyond them."""
    begin_s: float
    """After arrival."""
    duration_s: float


@dataclass(frozen=True, slots=True)
class Life:
    """One request from arrival to image."""

    request_id: str
    status: str
    reason: str
    worker_id: str
    arrival_s: float
    latency_s: float | None
    about: dict[str, str | int]
    stages: tuple[Stage, ...]
    """Those that took time, one after the other; their durations sum to the latency. LoRAs that are patched while denoising runs are
    drawn before it."""


def life_of(requests: pd.DataFrame, request_id: str) -> Life | None:
    """One request's stages; None if the run has no such request."""
    found = requests[requests["request_id"] == request_id]
    if found.empty:
        return None
    row = found.iloc[0]
    about = {
        name: row[name] if isinstance(row[name], str) else int(row[name])
        for name in ("base_model_id", "tenant_id", "topology", "n_images", "n_steps", "n_controlnets", "n_loras")
    }
    latency_s = None if pd.isna(row["latency_s"]) or row["status"] != "done" else float(row["latency_s"])
    stages: list[Stage] = []
    if latency_s is not None:
        denoise_s = _seconds(row["denoise_s"])
        alone_s = denoise_s if pd.isna(row["denoise_alone_s"]) else min(_seconds(row["denoise_alone_s"]), denoise_s)
        durations = {name: _seconds(row[column]) for name, column in STAGES if column}
        durations |= {"denoise": alone_s, "sharing": denoise_s - alone_s}
        at_s = 0.0
        for name, _ in STAGES:
            if durations[name] > 0:
                stages.append(Stage(name, at_s, durations[name]))
                at_s += durations[name]
        rest_s = latency_s - at_s
        if rest_s > 1e-6:  # an engine's own milliseconds; a simulator's sum is exact but for rounding
            stages.append(Stage("other", at_s, rest_s))
    return Life(
        request_id, str(row["status"]), str(row["reason"]), str(row["worker_id"]), float(row["arrival_s"]), latency_s, about, tuple(stages)
    )  # fmt: skip


def _seconds(value: float) -> float:
    return 0.0 if pd.isna(value) else max(0.0, float(value))


def slowest(requests: pd.DataFrame, n: int) -> list[tuple[str, float]]:
    """Request ids and latencies of done requests, slowest first; equal ones in order of arrival."""
    done = requests[requests["status"] == "done"]
    order = done.sort_values("latency_s", ascending=False, kind="stable").head(n)
    return [(str(name), float(latency)) for name, latency in zip(order["request_id"], order["latency_s"], strict=True)]


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """How a worker spent a run."""

    worker_id: str
    pool: str
    busy_ratio: float
    loading_ratio: float


def worker_loads(workers: pd.DataFrame, duration_s: float) -> dict[str, WorkerLoad]:
    """Worker to its load over the run; a worker without a record is not in it: it did nothing."""
    if duration_s <= 0:
        raise ValueError(f"got a run of {duration_s:g} s, needs one that lasts")
    length = (workers["end_s"] - workers["start_s"]).where(workers["state"] == "loading", 0.0)
    per_worker = workers.assign(loading=length).groupby("worker_id", sort=True)
    busy_s, loading_s = per_worker["busy_s"].sum(), per_worker["loading"].sum()
    pool_of = per_worker["pool"].first()
    return {
        str(worker): WorkerLoad(
            str(worker),
            str(pool_of[worker]),
            min(1.0, float(busy_s[worker]) / duration_s),
            min(1.0, float(loading_s[worker]) / duration_s),
        )
        for worker in pool_of.index
    }
