"""GPU time that is paid for, read from the worker records: workers that were off, or reclaimed, cost nothing then."""

from __future__ import annotations

import numpy as np
import pandas as pd

from engine.allocation import Pool

SECONDS_PER_HOUR = 3600.0


def places(pool: Pool) -> int:
    """Replicas that a pool may ever have at once."""
    return pool.n_replicas if pool.autoscale is None else pool.autoscale.max_replicas


def gpu_hours(workers: pd.DataFrame, begin_s: float, end_s: float) -> dict[str, float]:
    """Pool to its allocated GPU hours in a window, busy or not. A ``down`` span with 0 GPUs is not allocated.

    Raises:
        ValueError: the window is reversed.
    """
    _check(begin_s, end_s)
    first, last = workers["start_s"].to_numpy(np.float64), workers["end_s"].to_numpy(np.float64)
    n_gpus = workers["n_gpus"].to_numpy(np.int64)
    pool = workers["pool"].to_numpy(dtype=object)
    name = workers["worker_id"].to_numpy(dtype=object)
    is_unpaid = (workers["state"].to_numpy(dtype=object) == "down") & (n_gpus == 0)
    overlap_s = np.clip(np.minimum(last, end_s) - np.maximum(first, begin_s), 0.0, None)
    hours: dict[str, float] = dict.fromkeys(map(str, pool.tolist()), 0.0)
    order = pd.Series(np.arange(len(workers))).groupby(name, sort=False).indices
    for rows in order.values():
        away_s = float(overlap_s[rows][is_unpaid[rows]].sum())
        hours[str(pool[rows[0]])] += int(n_gpus[rows].max()) * (end_s - begin_s - away_s) / SECONDS_PER_HOUR
    return hours


def held_ratio(workers: pd.DataFrame, begin_s: float, end_s: float) -> tuple[float, ...]:
    """Share of a window in which at least 1, 2, … GPUs are allocated, up to the most that there ever are; its sum is their mean.

    Raises:
        ValueError: the window is reversed or empty.
    """
    _check(begin_s, end_s)
    if end_s == begin_s:
        raise ValueError(f"the window at {begin_s:g} s is empty; its end must come after its start")
    first = np.clip(workers["start_s"].to_numpy(np.float64), begin_s, end_s)
    last = np.clip(workers["end_s"].to_numpy(np.float64), begin_s, end_s)
    is_unpaid = (workers["state"].to_numpy(dtype=object) == "down") & (workers["n_gpus"].to_numpy(np.int64) == 0)
    of_worker = workers.groupby("worker_id", sort=False)["n_gpus"].transform("max").to_numpy(np.int64)
    n_all = int(workers.groupby("worker_id", sort=False)["n_gpus"].max().sum())
    away = of_worker[is_unpaid]
    times_s = np.concatenate([[begin_s], first[is_unpaid], last[is_unpaid], [end_s]])
    changes = np.concatenate([[n_all], -away, away, [0]])
    order = np.argsort(times_s, kind="stable")
    held = np.cumsum(changes[order])[:-1]
    seconds = np.bincount(held, weights=np.diff(times_s[order]), minlength=n_all + 1)
    at_least = np.cumsum(seconds[::-1])[::-1][1:] / (end_s - begin_s)
    return tuple(float(share) for share in at_least if share > 0.0)


def _check(begin_s: float, end_s: float) -> None:
    if end_s < begin_s:
        raise ValueError(f"the window is {begin_s:g}..{end_s:g} s; its end must not come before its start")
