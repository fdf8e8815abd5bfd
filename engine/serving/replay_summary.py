"""What a replay delivered, in one flat JSON object: derived from its request and worker tables and the planned arrivals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pandas as pd

LEVELS: Final = (50, 90, 95, 99)
STAGES: Final = (
    "queue_wait_s",
    "switch_s",
    "controlnet_load_s",
    "lora_wait_s",
    "text_s",
    "denoise_s",
    "decode_s",
    "overhead_s",
)


def summary_of(
    requests: pd.DataFrame,
    workers: pd.DataFrame,
    planned_s: Mapping[str, float],
    deadlines_s: Mapping[str, float],
    window_s: float,
    slo_latency_s: float | None,
) -> dict[str, Any]:
    """Figures of a replay; null where there is nothing to count.

    Args:
        planned_s: request id to when it should have arrived, for all that were due.
        deadlines_s: those that have one.
        window_s: from the first moment to the last due arrival.
        slo_latency_s: a request counts as in time if it was done within this and its own deadline.
    """
    status = requests["status"].to_numpy(dtype=object)
    is_done = status == "done"
    latency_s = requests["latency_s"].to_numpy(dtype=np.float64)
    own_s = np.array([deadlines_s.get(name, np.inf) for name in requests["request_id"]], dtype=np.float64)
    limit_s = np.minimum(own_s, np.inf if slo_latency_s is None else slo_latency_s)
    in_time = is_done & (latency_s <= limit_s)
    n_due = len(planned_s)
    lag_s = requests["arrival_s"].to_numpy(dtype=np.float64) - np.array(
        [planned_s[name] for name in requests["request_id"]], dtype=np.float64
    )
    has_nets = requests["n_controlnets"].to_numpy(dtype=np.int64) > 0
    has_loras = requests["n_loras"].to_numpy(dtype=np.int64) > 0
    classes = {
        "all": np.ones(len(requests), dtype=bool),
        "plain": ~has_nets & ~has_loras,
        "controlnet": has_nets & ~has_loras,
        "lora": ~has_nets & has_loras,
        "controlnet_and_lora": has_nets & has_loras,
    }
    taken = ~np.isnan(requests["start_s"].to_numpy(dtype=np.float64))
    n_loras = int(requests["n_loras"].to_numpy(dtype=np.int64)[taken].sum())
    n_nets = int(requests["n_controlnets"].to_numpy(dtype=np.int64)[taken].sum())
    return {
        "n_due": n_due,
        "n_recorded": len(requests),
        "n_unfinished": n_due - len(requests),
        "n_by_status": _counts(status),
        "n_by_code": _counts(requests["code"].to_numpy(dtype=object)[~is_done]),
        "n_retried": int((requests["n_attempts"].to_numpy(dtype=np.int64) > 1).sum()),
        "window_s": window_s,
        "offered_per_s": n_due / window_s if window_s > 0 else None,
        "served_per_s": int(is_done.sum()) / _span(requests) if is_done.any() and _span(requests) > 0 else None,
        "slo_latency_s": slo_latency_s,
        "slo_attainment_ratio": int(in_time.sum()) / n_due if n_due else None,
        "latency_s": {name: _spread(latency_s[rows & is_done]) for name, rows in classes.items()},
        "queue_wait_s": _spread(requests["queue_wait_s"].to_numpy(dtype=np.float64)[taken]),
        "stage_mean_s": {
            name: _mean(requests[name].to_numpy(dtype=np.float64)[is_done]) for name in STAGES
        },
        "lora_warm_hit_ratio": _hits(requests["n_lora_misses"], taken, n_loras),
        "controlnet_warm_hit_ratio": _hits(requests["n_controlnet_misses"], taken, n_nets),
        "switch_ratio": _mean(requests["is_switch"].to_numpy(dtype=np.float64)[taken & is_done]),
        "busy_ratio": busy_ratios(workers, _span(requests)),
        "arrival_lag_s": _spread(lag_s),
    }  # fmt: skip


def busy_ratios(workers: pd.DataFrame, span_s: float) -> dict[str, float]:
    """Work done over the time from the first arrival to the last end, by worker."""
    if span_s <= 0:
        return {}
    by_worker = workers.groupby("worker_id", sort=True)["busy_s"].sum()
    return {str(name): float(value) / span_s for name, value in by_worker.items()}


def _span(requests: pd.DataFrame) -> float:
    if not len(requests):
        return 0.0
    return float(requests["end_s"].max()) - min(0.0, float(requests["arrival_s"].min()))


def _spread(values: np.ndarray) -> dict[str, float | int | None]:
    values = values[~np.isnan(values)]
    spread: dict[str, float | int | None] = {"n": len(values), "mean": _mean(values)}
    for level in LEVELS:
        spread[f"p{level}"] = float(np.quantile(values, level / 100)) if len(values) else None
    spread["max"] = float(values.max()) if len(values) else None
    return spread


def _mean(values: np.ndarray) -> float | None:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


def _hits(misses: pd.Series[Any], taken: np.ndarray, n_uses: int) -> float | None:
    return 1.0 - int(misses.to_numpy(dtype=np.int64)[taken].sum()) / n_uses if n_uses else None


def _counts(values: Sequence[Any] | np.ndarray) -> dict[str, int]:
    names, counts = np.unique(np.asarray(values, dtype=str), return_counts=True)
    return {str(name): int(count) for name, count in zip(names, counts, strict=True)}
