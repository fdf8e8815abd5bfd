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
    if end_s < begin_s:
        raise ValueError(f"the window is {begin_s:g}..{end_s:g} s; its end must not come before its start")
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
