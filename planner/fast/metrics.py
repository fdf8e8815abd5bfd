"""Statistics of a compiled run, straight from its arrays: the same figures as ``planner.statistics.summarise`` of the same run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from planner.fast import arrays as a
from planner.fast.arrays import Floats, Ints
from planner.fast.loop import DONE, EXPIRED, NO_POOL, QUEUE_FULL
from planner.fast.run import FastRun
from planner.statistics import Metrics, _latency, _ratio, is_saturated
from planner.workload import Bools


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """What statistics need of each request; NaN where it did not happen."""

    arrival_s: Floats
    start_s: Floats
    end_s: Floats
    queue_wait_s: Floats
    latency_s: Floats
    """NaN unless done."""
    is_done: Bools
    denoise_s: Floats
    denoise_alone_s: Floats
    """This and the last are 0 where the request was not done."""
    not_ready_s: Floats
    """From take-up until models and LoRAs are there."""


def columns_of(run: FastRun) -> Columns:
    """Derives the columns once for all statistics of a run."""
    n = run.n_requests
    outcome = run.outcome
    arrival_s = run.prepared.flat.arrival_s[:n]
    start_s, end_s = outcome.times_s[:, a.START_S], outcome.times_s[:, a.END_S]
    is_done = outcome.states[:, a.ENDING] == DONE
    replica = outcome.states[:, a.REPLICA]
    alone_s = np.zeros(n)
    for table, service in enumerate(run.prepared.services):
        if len(run.prepared.services) == 1:
            rows = is_done
        else:
            tables = np.array(run.table_of_pool, dtype=np.int64)[run.pool_of]
            rows = is_done & (tables[replica] == table)
        alone_s[rows] = service.denoise_alone_s[:n][rows]
    denoise_s = alone_s
    if len(outcome.controlnets):
        is_coupled = ~np.isnan(outcome.controlnets[:, a.DENOISE_S])
        denoise_s = np.where(is_coupled, outcome.controlnets[:, a.DENOISE_S], alone_s)
        alone_s = np.where(is_coupled, outcome.controlnets[:, a.DENOISE_ALONE_S], alone_s)
    not_ready_s = outcome.times_s[:, a.SWITCH_S] + outcome.times_s[:, a.CONTROLNET_LOAD_S]
    if len(outcome.loras):
        not_ready_s = not_ready_s + outcome.loras[:, a.LORA_FETCH_S]
    return Columns(
        arrival_s, start_s, end_s, start_s - arrival_s, np.where(is_done, end_s - arrival_s, np.nan), is_done, denoise_s,
        alone_s, not_ready_s,
    )  # fmt: skip


def summarise_fast(
    run: FastRun, slo_latency_s: float, *, warmup_s: float = 0.0, columns: Columns | None = None
) -> Metrics:
    """Metrics of the requests that arrived from ``warmup_s`` on; raises ValueError if nothing is left of the window."""
    column = columns_of(run) if columns is None else columns
    outcome = run.outcome
    stop_s = run.offered_until_s
    if not stop_s > warmup_s:
        raise ValueError(f"the window is {warmup_s:g}..{stop_s:g} s; its end must be greater than its start")
    window_s = stop_s - warmup_s
    in_window = (column.arrival_s >= warmup_s) & (column.arrival_s <= stop_s)
    ending = outcome.states[:, a.ENDING]
    is_done = column.is_done & in_window
    ended_here = column.is_done & (column.end_s >= warmup_s) & (column.end_s < stop_s)
    n_controlnets, n_loras = _uses(run, a.CONTROLNETS), _uses(run, a.LORAS)
    has_add_ons = (n_controlnets + n_loras) > 0
    is_taken = in_window & column.is_done
    wait_s = column.queue_wait_s[is_taken]
    n_offered = int(in_window.sum())
    n_good = int((is_done & (column.latency_s <= slo_latency_s)).sum())
    n_switches = int(outcome.states[is_taken, a.IS_SWITCH].sum())
    n_lora_loads = int(outcome.loras[is_taken, a.LORA_MISSES].sum()) if len(outcome.loras) else 0
    n_controlnet_loads = (
        int(outcome.controlnets[is_taken, a.CONTROLNET_MISSES].sum()) if len(outcome.controlnets) else 0
    )
    alone_s = float(column.denoise_alone_s[is_done].sum())
    busy, loading = pool_ratios(run, column, warmup_s, stop_s)
    done = column.is_done
    return Metrics(
        window_s=window_s,
        n_offered=n_offered,
        n_done=int(is_done.sum()),
        n_rejected=int((((ending == NO_POOL) | (ending == QUEUE_FULL)) & in_window).sum()),
        n_expired=int(((ending == EXPIRED) & in_window).sum()),
        n_failed=0,
        offered_per_s=n_offered / window_s,
        served_per_s=int(ended_here.sum()) / window_s,
        goodput_per_s=n_good / window_s,
        slo_attainment_ratio=n_good / n_offered if n_offered else 1.0,
        **_latency("", column.latency_s, is_done),
        **_latency("plain_", column.latency_s, is_done & ~has_add_ons),
        **_latency("add_on_", column.latency_s, is_done & has_add_ons),
        queue_wait_mean_s=float(wait_s.mean()) if len(wait_s) else math.nan,
        queue_wait_p95_s=float(np.quantile(wait_s, 0.95)) if len(wait_s) else math.nan,
        denoise_stretch_ratio=float(column.denoise_s[is_done].sum()) / alone_s if alone_s > 0 else 1.0,
        n_switches=n_switches,
        switch_ratio=_ratio(n_switches, int(is_taken.sum()), 0.0),
        n_lora_loads=n_lora_loads,
        lora_warm_hit_ratio=1.0 - _ratio(n_lora_loads, int(n_loras[is_taken].sum()), 0.0),
        n_controlnet_loads=n_controlnet_loads,
        controlnet_warm_hit_ratio=1.0 - _ratio(n_controlnet_loads, int(n_controlnets[is_taken].sum()), 0.0),
        busy_ratio=busy,
        loading_ratio=loading,
        is_saturated=is_saturated(
            column.arrival_s[done], column.queue_wait_s[done], (column.end_s - column.start_s)[done]
        ),
    )


def pool_ratios(
    run: FastRun, column: Columns, start_s: float, stop_s: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Busy and loading time of each pool in ``start_s..stop_s``, over its workers' allocated time."""
    busy, loading = {}, {}
    replica = run.outcome.states[:, a.REPLICA]
    rows = np.flatnonzero(replica >= 0)
    pool_of = run.pool_of[replica[rows]]
    begun = column.start_s[rows]
    ready = begun + column.not_ready_s[rows]
    loading_s, busy_s = _overlap(begun, ready, start_s, stop_s), _overlap(ready, column.end_s[rows], start_s, stop_s)
    base = run.allocation.pools_of("base")
    busy_of_pool = np.bincount(pool_of, weights=busy_s, minlength=len(base))
    loading_of_pool = np.bincount(pool_of, weights=loading_s, minlength=len(base))
    for p, pool in enumerate(base):
        allocated_s = pool.n_replicas * (stop_s - start_s)
        busy[pool.name], loading[pool.name] = busy_of_pool[p] / allocated_s, loading_of_pool[p] / allocated_s
    others = run.allocation.pools_of("controlnet")
    counts = [pool.n_replicas for pool in others]
    owner = np.repeat(np.arange(len(others)), counts)
    spans = run.outcome.spans[: run.outcome.counts[a.N_SPANS]]
    is_load = spans[:, 1] > 0
    work_s = _merged_work(spans[~is_load], start_s, stop_s, len(owner))
    load_s = np.bincount(
        spans[is_load, 0].astype(np.int64),
        weights=_overlap(spans[is_load, 2], spans[is_load, 3], start_s, stop_s),
        minlength=len(owner),
    )
    for p, pool in enumerate(others):
        allocated_s = pool.n_replicas * (stop_s - start_s)
        busy[pool.name] = float(work_s[owner == p].sum()) / allocated_s
        loading[pool.name] = float(load_s[owner == p].sum()) / allocated_s
    return {name: float(value) for name, value in busy.items()}, {name: float(value) for name, value in loading.items()}


def _merged_work(spans: Floats, start_s: float, stop_s: float, n_workers: int) -> Floats:
    """Work of each worker in the window. A span's work is spread evenly over it; spans that touch are one, as in the records."""
    spans = spans[spans[:, 3] > spans[:, 2]]
    spans = spans[np.lexsort((spans[:, 3], spans[:, 2], spans[:, 0]))]
    if not len(spans):
        return np.zeros(n_workers)
    worker: Ints = spans[:, 0].astype(np.int64)
    new = np.ones(len(spans), dtype=np.bool_)
    new[1:] = (worker[1:] != worker[:-1]) | (spans[1:, 2] > spans[:-1, 3])
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(spans)) - 1
    begin, end = spans[first, 2], spans[last, 3]
    work_s = np.add.reduceat(spans[:, 4], first) * _overlap(begin, end, start_s, stop_s) / (end - begin)
    return np.bincount(worker[first], weights=work_s, minlength=n_workers).astype(np.float64)


def _overlap(begin: Floats, end: Floats, start_s: float, stop_s: float) -> Floats:
    seconds: Floats = np.maximum(np.minimum(end, stop_s) - np.maximum(begin, start_s), 0.0)
    return seconds


def _uses(run: FastRun, kind: int) -> Ints:
    start = run.prepared.flat.add_on_start
    if not len(start):
        return np.zeros(run.n_requests, dtype=np.int64)
    return np.diff(start[: run.n_requests + 1, kind]).astype(np.int64)
