"""Live traffic cut into windows: of every measure a number of trials and their total, whether records or counters gave them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd

from planner.observe.summary import Summary
from planner.workload import Bools, Floats
from traces.problems import one_problem

STAGES: Final = ("text", "denoise", "decode")
"""Stages that compute. Loads and waits depend on caches and on other requests."""
QUANTILES: Final = {"latency_p50": 0.5, "latency_p95": 0.95, "latency_p99": 0.99}
MIX: Final = {
    "controlnets_per_request": "n_controlnets", "loras_per_request": "n_loras", "images_per_request": "n_images",
    "steps_per_request": "n_steps",
}  # fmt: skip
CELL: Final = ("n_images", "n_steps", "n_controlnets", "n_loras")
"""Requests that agree in these take the same time on one topology."""
CELL_ROWS_MIN: Final = 5
DEVIATION_MAX: Final = 0.5
"""A single request counts as at most this far from its planned time, so that a few stragglers are no drift."""


@dataclass(frozen=True, slots=True, eq=False)
class Tally:
    """One measure over windows."""

    n: Floats
    """Trials: requests, uses, or seconds for the traffic's rate."""
    total: Floats


@dataclass(frozen=True, slots=True, eq=False)
class WindowTable:
    """Windows in the order of time; those that could not be seen whole are left out."""

    start_s: Floats
    window_s: float
    tallies: Mapping[str, Tally]

    def __len__(self) -> int:
        return len(self.start_s)


@dataclass(frozen=True, slots=True, eq=False)
class Norms:
    """What a request of the plan takes: the yardstick for stages and latency."""

    slo_latency_s: float
    quantile_s: Mapping[str, float]
    """``latency_p95`` … to the upper end of the plan's interval for it."""
    cell_stage_s: pd.DataFrame
    """Mean of every stage by cell (``CELL``), of cells with enough requests."""
    stage_mean_s: Mapping[str, float]
    """Over all requests: for counters, which know no cells."""


def norms_of(
    requests: pd.DataFrame, slo_latency_s: float, quantile_s: Mapping[str, float], run_ratio: Mapping[str, float]
) -> Norms:
    """From the plan's simulated run; ``run_ratio`` is each stage's time in it over the fitted laws'."""
    done = requests[requests["status"] == "done"]
    columns = [f"{stage}_s" for stage in STAGES]
    grouped = done.groupby(list(CELL), sort=True)[columns]
    means = grouped.mean()[grouped.size() >= CELL_ROWS_MIN]
    stage_mean_s = {stage: float(done[f"{stage}_s"].mean()) / run_ratio.get(stage, 1.0) for stage in STAGES}
    return Norms(slo_latency_s, quantile_s, means / [run_ratio.get(stage, 1.0) for stage in STAGES], stage_mean_s)


def windows_of_records(
    requests: pd.DataFrame, norms: Norms, *, window_s: float, begin_s: float, until_s: float
) -> WindowTable:
    """Cuts request records into whole windows from ``begin_s``, by arrival.

    Args:
        until_s: the engine was seen up to here. Windows within the promised latency of it are left out: requests that arrived
            in them may still be running, and have no record yet.
    """
    n_windows = int((until_s - norms.slo_latency_s - begin_s) // window_s)
    if n_windows < 1:
        raise one_problem(
            "the live records", f"reach to {until_s:.0f} s after the start, and the first {begin_s:.0f} s are left out",
            f"at least {begin_s + window_s + norms.slo_latency_s:.0f} s",
            "Wait until the engine has served longer",
        )  # fmt: skip
    place = np.floor((requests["arrival_s"].to_numpy(dtype=np.float64) - begin_s) / window_s).astype(np.int64)
    inside = (place >= 0) & (place < n_windows)
    frame, place = requests[inside], place[inside]
    is_done = (frame["status"] == "done").to_numpy()

    def sums(weights: Floats) -> Floats:
        return np.bincount(place, weights=weights, minlength=n_windows).astype(np.float64)

    def tally(values: Floats, counted: Bools | None = None) -> Tally:
        weight = np.ones(len(frame)) if counted is None else counted.astype(np.float64)
        return Tally(sums(weight), sums(values * weight))

    latency_s = frame["latency_s"].to_numpy(dtype=np.float64)
    in_time = is_done & (np.nan_to_num(latency_s, nan=np.inf) <= norms.slo_latency_s)
    uses = frame["n_loras"].to_numpy(dtype=np.float64) * is_done
    misses = frame["n_lora_misses"].to_numpy(dtype=np.float64) * is_done
    tallies = {"traffic_rate": Tally(np.full(n_windows, window_s), sums(np.ones(len(frame))))}
    tallies |= {name: tally(frame[column].to_numpy(dtype=np.float64)) for name, column in MIX.items()}
    tallies["lora_misses"] = Tally(sums(uses), sums(misses))
    for stage in STAGES:
        deviation = _deviation(frame, norms, stage)
        known = is_done & np.isfinite(deviation)
        tallies[f"stage_{stage}"] = tally(np.clip(np.nan_to_num(deviation), -DEVIATION_MAX, DEVIATION_MAX), known)
    tallies["late"] = tally((~in_time).astype(np.float64))
    for name, bound_s in norms.quantile_s.items():
        tallies[name] = tally((np.nan_to_num(latency_s) > bound_s).astype(np.float64), is_done)
    return WindowTable(begin_s + window_s * np.arange(n_windows, dtype=np.float64), window_s, tallies)


def _deviation(frame: pd.DataFrame, norms: Norms, stage: str) -> Floats:
    """Time of a stage over the plan's mean for such requests, less 1; NaN for requests of a kind that the plan has too few of."""
    keys = pd.MultiIndex.from_frame(frame[list(CELL)])
    place = norms.cell_stage_s.index.get_indexer(keys)
    means = np.append(norms.cell_stage_s[f"{stage}_s"].to_numpy(dtype=np.float64), np.nan)
    expected = means[place]  # -1, not found, is the NaN at the end
    deviation: Floats = frame[f"{stage}_s"].to_numpy(dtype=np.float64) / np.where(expected > 0, expected, np.nan) - 1.0
    return deviation


def windows_of_summary(summary: Summary, norms: Norms) -> WindowTable:
    """From counters: stages are means over whatever was asked for, and shares above a latency are linear within a bucket."""
    rows = [row for row in summary.windows if row.is_covered]
    if not rows:
        raise one_problem(
            summary.source, "has no window without missing scrapes", "at least one", "Look at the server's targets"
        )
    bounds = np.array((0.0, *summary.bounds_s))
    counts = np.array([(0.0, *row.latency_le) for row in rows])

    def column(name: str) -> Floats:
        return np.array([getattr(row, name) for row in rows], dtype=np.float64)

    done, offered = column("n_done"), np.maximum(column("n_offered"), 0.0)

    def within(bound_s: float) -> Floats:
        return np.array([np.interp(bound_s, bounds, each, right=n) for each, n in zip(counts, done, strict=True)])

    uses = {kind: np.array([row.n_uses.get(kind, 0.0) for row in rows]) for kind in ("controlnet", "lora")}
    answered = column("n_answered")
    tallies = {
        "traffic_rate": Tally(np.full(len(rows), summary.window_s), offered),
        "controlnets_per_request": Tally(answered, uses["controlnet"]),
        "loras_per_request": Tally(answered, uses["lora"]),
        "images_per_request": Tally(done, column("n_images")),
        "lora_misses": Tally(column("n_lora_hits") + column("n_lora_misses"), column("n_lora_misses")),
        "late": Tally(answered, np.maximum(answered - within(norms.slo_latency_s), 0.0)),
    }
    for stage in STAGES:
        n, total_s = (
            np.array([getattr(row, what).get(stage, 0.0) for row in rows]) for what in ("stage_n", "stage_sum_s")
        )
        mean_s = norms.stage_mean_s[stage]
        tallies[f"stage_{stage}"] = Tally(n, total_s / mean_s - n if mean_s > 0 else np.zeros(len(rows)))
    for name, bound_s in norms.quantile_s.items():
        if summary.bounds_s and bound_s <= summary.bounds_s[-1]:
            tallies[name] = Tally(done, np.maximum(done - within(bound_s), 0.0))
    return WindowTable(column("start_s"), summary.window_s, tallies)
