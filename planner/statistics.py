"""Statistics of a run, all derived from its request and worker records; nothing here knows how they came about.

The same functions therefore read a simulation's records and the engine's. Requests count by arrival: a window
``[warmup_s, until_s)`` holds the requests that arrived in it, whenever they ended.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from scipy import special

from planner.workload import Bools, Floats

if TYPE_CHECKING:  # the simulator calls this module
    from planner.simulator.result import SimulationResult

LATENCY_LEVELS: Final = (0.50, 0.90, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Metrics:
    """What one run delivered. Latency figures are of requests that were done; NaN where there is none."""

    window_s: float
    n_offered: int
    n_done: int
    n_rejected: int
    n_expired: int
    n_failed: int
    offered_per_s: float
    served_per_s: float
    """Requests that ended as done inside the window, whenever they arrived, per second: the throughput."""
    goodput_per_s: float
    """Requests of the window that were done within the SLO, per second."""
    slo_attainment_ratio: float
    """Share of the offered requests that were done within the SLO; 1 if none was offered."""
    latency_mean_s: float
    latency_p50_s: float
    latency_p90_s: float
    latency_p95_s: float
    latency_p99_s: float
    plain_latency_mean_s: float
    """Requests without add-ons, which must not pay for those with."""
    plain_latency_p50_s: float
    plain_latency_p90_s: float
    plain_latency_p95_s: float
    plain_latency_p99_s: float
    add_on_latency_mean_s: float
    """Requests with at least one ControlNet or LoRA."""
    add_on_latency_p50_s: float
    add_on_latency_p90_s: float
    add_on_latency_p95_s: float
    add_on_latency_p99_s: float
    queue_wait_mean_s: float
    queue_wait_p95_s: float
    denoise_stretch_ratio: float
    """Denoising time over what it would have been had nobody shared the ControlNet workers; 1 without sharing."""
    n_switches: int
    switch_ratio: float
    """Share of the requests taken up whose checkpoint was not resident."""
    n_lora_loads: int
    lora_warm_hit_ratio: float
    """Share of LoRA uses found in the host tier; 1 without LoRAs."""
    n_controlnet_loads: int
    controlnet_warm_hit_ratio: float
    """Share of ControlNet uses found on the device; 1 without ControlNets."""
    busy_ratio: Mapping[str, float]
    """Pool to busy time over allocated time in the window: for ControlNet workers the work done, not the time attached."""
    loading_ratio: Mapping[str, float]
    """Pool to time spent loading models over allocated time in the window."""
    is_saturated: bool

    def to_plain(self) -> dict[str, Any]:
        """JSON-ready: field to value, NaN as None."""
        plain: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Mapping):
                value = {key: _or_none(number) for key, number in value.items()}
            plain[item.name] = _or_none(value)
        return plain

    def numbers(self) -> dict[str, float]:
        """Every figure by name, a pool's as ``busy_ratio.POOL``: what :func:`intervals` averages."""
        numbers: dict[str, float] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Mapping):
                numbers |= {f"{item.name}.{key}": float(number) for key, number in value.items()}
            else:
                numbers[item.name] = float(value)
        return numbers


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over replications with its confidence interval; the bounds are NaN for fewer than two values."""

    mean: float
    low: float
    high: float
    n: int
    level: float

    def to_plain(self) -> dict[str, Any]:
        """JSON-ready, NaN as None."""
        return {key: _or_none(value) for key, value in dataclasses.asdict(self).items()}


def summarise(
    result: SimulationResult, slo_latency_s: float, *, warmup_s: float = 0.0, until_s: float | None = None
) -> Metrics:
    """Metrics of the requests that arrived in ``[warmup_s, until_s)``; ``until_s`` None means all that was offered.

    Raises:
        ValueError: the window is empty or reversed.
    """
    frame = result.requests
    arrival_s = frame["arrival_s"].to_numpy(np.float64)
    stop_s = result.offered_until_s if until_s is None else float(until_s)
    if not stop_s > warmup_s:
        raise ValueError(f"the window is {warmup_s:g}..{stop_s:g} s; its end must be greater than its start")
    in_window = (arrival_s >= warmup_s) & ((arrival_s < stop_s) if until_s is not None else (arrival_s <= stop_s))
    window_s = stop_s - warmup_s
    status = frame["status"].to_numpy(dtype=object)
    is_done = (status == "done") & in_window
    end_s = frame["end_s"].to_numpy(np.float64)
    ended_here = (status == "done") & (end_s >= warmup_s) & (end_s < stop_s)
    latency_s = frame["latency_s"].to_numpy(np.float64)
    n_controlnets = frame["n_controlnets"].to_numpy(np.int64)
    n_loras = frame["n_loras"].to_numpy(np.int64)
    has_add_ons = (n_controlnets + n_loras) > 0
    is_taken = in_window & ~np.isnan(frame["start_s"].to_numpy(np.float64))
    wait_s = frame["queue_wait_s"].to_numpy(np.float64)[is_taken]
    n_offered = int(in_window.sum())
    n_good = int((is_done & (latency_s <= slo_latency_s)).sum())
    n_switches = int(frame["is_switch"].to_numpy(np.int64)[is_taken].sum())
    n_lora_loads = int(frame["n_lora_misses"].to_numpy(np.int64)[is_taken].sum())
    n_controlnet_loads = int(frame["n_controlnet_misses"].to_numpy(np.int64)[is_taken].sum())
    alone_s = float(frame["denoise_alone_s"].to_numpy(np.float64)[is_done].sum())
    busy, loading = _pool_ratios(result.workers, warmup_s, stop_s)
    return Metrics(
        window_s=window_s,
        n_offered=n_offered,
        n_done=int(is_done.sum()),
        n_rejected=int(((status == "rejected") & in_window).sum()),
        n_expired=int(((status == "expired") & in_window).sum()),
        n_failed=int(((status == "failed") & in_window).sum()),
        offered_per_s=n_offered / window_s,
        served_per_s=int(ended_here.sum()) / window_s,
        goodput_per_s=n_good / window_s,
        slo_attainment_ratio=n_good / n_offered if n_offered else 1.0,
        **_latency("", latency_s, is_done),
        **_latency("plain_", latency_s, is_done & ~has_add_ons),
        **_latency("add_on_", latency_s, is_done & has_add_ons),
        queue_wait_mean_s=float(wait_s.mean()) if len(wait_s) else math.nan,
        queue_wait_p95_s=float(np.quantile(wait_s, 0.95)) if len(wait_s) else math.nan,
        denoise_stretch_ratio=float(frame["denoise_s"].to_numpy(np.float64)[is_done].sum()) / alone_s
        if alone_s > 0
        else 1.0,
        n_switches=n_switches,
        switch_ratio=_ratio(n_switches, int(is_taken.sum()), 0.0),
        n_lora_loads=n_lora_loads,
        lora_warm_hit_ratio=1.0 - _ratio(n_lora_loads, int(n_loras[is_taken].sum()), 0.0),
        n_controlnet_loads=n_controlnet_loads,
        controlnet_warm_hit_ratio=1.0 - _ratio(n_controlnet_loads, int(n_controlnets[is_taken].sum()), 0.0),
        busy_ratio=busy,
        loading_ratio=loading,
        is_saturated=result.saturated,
    )


def warmup_cut_s(requests: pd.DataFrame, *, batch: int = 5) -> float:
    """Arrival time from which latencies no longer remember the empty start, by MSER-5 (White 1997).

    Latencies of done requests, in order of arrival, are averaged in batches of 5; the cut d minimises
    ``var(batches[d:]) / (len - d)`` over the first half. Loading spans count as warm-up because latencies contain them.
    It finds the start-up transient of one run; it does not repair a trace whose load drifts.
    """
    done = requests["status"].to_numpy(dtype=object) == "done"
    latency_s = requests["latency_s"].to_numpy(np.float64)[done]
    arrival_s = requests["arrival_s"].to_numpy(np.float64)[done]
    n = len(latency_s) // batch
    if n < 4:
        return 0.0
    means = latency_s[: n * batch].reshape(n, batch).mean(axis=1)
    means = means - means.mean()  # keeps the difference of sums below accurate
    left = np.arange(n, 0, -1, dtype=np.float64)
    tail = np.cumsum(means[::-1])[::-1]
    tail_squares = np.cumsum((means**2)[::-1])[::-1]
    score = (tail_squares / left - (tail / left) ** 2) / left
    cut = int(np.argmin(score[: n // 2]))
    return float(arrival_s[cut * batch]) if cut else 0.0


def is_saturated(arrival_s: Floats, queue_wait_s: Floats, service_s: Floats) -> bool:
    """Whether queue waits grew over the whole run, so that no steady state exists. Arrays in order of arrival, no NaN.

    The first fifth is left out; the rest, in 10 batches of equal count, is regressed on arrival time. Saturated if the
    growth is significant (one-sided t with 8 degrees of freedom at 99.9 %: 4.50), the wait grew by more than 5 mean
    services over the window, and by more than 1 % of elapsed time (an overload of 1 % adds 0.01 s of wait each second). A
    service whose queue is limited never saturates in this sense: it rejects.
    """
    first = len(arrival_s) // 5
    times, waits = arrival_s[first:], queue_wait_s[first:]
    n_batches = 10
    if len(times) < 20 * n_batches:
        return False
    size = len(times) // n_batches
    x = times[: size * n_batches].reshape(n_batches, size).mean(axis=1)
    y = waits[: size * n_batches].reshape(n_batches, size).mean(axis=1)
    if x[-1] <= x[0]:
        return False
    # least squares by hand: scipy.stats takes longer to load than most plans to make
    variance, covariance, _, of_waits = np.cov(x, y, bias=True).flat
    slope = float(covariance / variance)
    if not (slope > 0.01 and slope * float(x[-1] - x[0]) > 5 * float(service_s.mean())):
        return False
    unexplained = max(0.0, float(of_waits) - slope * float(covariance))
    error = math.sqrt(unexplained / float(variance) / (n_batches - 2))
    return error == 0.0 or slope / error > 4.50


def t_interval(values: Sequence[float] | Floats, level: float = 0.95) -> Interval:
    """Student's t-interval for the mean of independent replications, values that are NaN left out.

    Raises:
        ValueError: no value is left, or the level is not inside (0, 1).
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is {level}, needs a number between 0 and 1, for example 0.95")
    kept = np.asarray(values, dtype=np.float64)
    kept = kept[~np.isnan(kept)]
    if not len(kept):
        raise ValueError("an interval needs at least one value that is not NaN")
    mean = float(kept.mean())
    if len(kept) < 2:
        return Interval(mean, math.nan, math.nan, len(kept), level)
    half = float(special.stdtrit(len(kept) - 1, 0.5 + level / 2)) * float(kept.std(ddof=1)) / math.sqrt(len(kept))
    return Interval(mean, mean - half, mean + half, len(kept), level)


def intervals(metrics: Iterable[Metrics], level: float = 0.95) -> dict[str, Interval]:
    """For every figure of :meth:`Metrics.numbers` that at least one run has: its mean and interval over the runs."""
    rows = [item.numbers() for item in metrics]
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name, math.nan) for row in rows] for name in names}
    return {
        name: t_interval(values, level) for name, values in columns.items() if not all(math.isnan(v) for v in values)
    }


def littles_law_gap(result: SimulationResult) -> float:
    """|L − λW| / L over the whole run: L by sweeping arrivals and ends, λW from the recorded waits and stages.

    Exactly 0 but for rounding when the records are consistent, because the run starts and ends empty.
    """
    frame = result.requests
    if not len(frame):
        return 0.0
    arrival_s, end_s = frame["arrival_s"].to_numpy(np.float64), frame["end_s"].to_numpy(np.float64)
    times = np.concatenate([arrival_s, end_s])
    change = np.concatenate([np.ones(len(frame)), -np.ones(len(frame))])
    order = np.argsort(times, kind="stable")
    inside = np.cumsum(change[order])[:-1]
    in_system_s = float((inside * np.diff(times[order])).sum())
    stages = ("queue_wait_s", "switch_s", "controlnet_load_s", "lora_wait_s", "text_s", "denoise_s", "decode_s")
    is_done = frame["status"].to_numpy(dtype=object) == "done"
    sojourn_s = np.where(
        is_done, np.sum([frame[name].to_numpy(np.float64) for name in stages], axis=0), end_s - arrival_s
    )
    return abs(in_system_s - float(sojourn_s.sum())) / in_system_s if in_system_s > 0 else 0.0


def _pool_ratios(workers: pd.DataFrame, start_s: float, stop_s: float) -> tuple[dict[str, float], dict[str, float]]:
    """Busy and loading time of each pool in the window, over its workers' allocated time."""
    begin, end = workers["start_s"].to_numpy(np.float64), workers["end_s"].to_numpy(np.float64)
    overlap_s = np.clip(np.minimum(end, stop_s) - np.maximum(begin, start_s), 0.0, None)
    length_s = end - begin
    share = np.divide(overlap_s, length_s, out=np.zeros_like(overlap_s), where=length_s > 0)
    busy_s = workers["busy_s"].to_numpy(np.float64) * share  # work is spread evenly over its span
    is_loading = workers["state"].to_numpy(dtype=object) == "loading"
    is_loader = workers["role"].to_numpy(dtype=object) == "loader"  # works beside its worker, on the same GPU
    # a worker that is down with no GPU is not allocated
    is_away = (workers["state"].to_numpy(dtype=object) == "down") & (workers["n_gpus"].to_numpy(np.int64) == 0)
    pool = workers["pool"].to_numpy(dtype=object)
    busy: dict[str, float] = {}
    loading: dict[str, float] = {}
    for name in dict.fromkeys(pool.tolist()):
        rows = pool == name
        allocated_s = workers["worker_id"][rows & ~is_loader].nunique() * (stop_s - start_s)
        if is_away.any():
            allocated_s -= float(overlap_s[rows & is_away].sum())
            if allocated_s <= 0.0:  # nobody of this pool was there
                busy[str(name)] = loading[str(name)] = 0.0
                continue
        busy[str(name)] = float(busy_s[rows].sum()) / allocated_s
        loading[str(name)] = float(overlap_s[rows & is_loading].sum()) / allocated_s
    return busy, loading


def _latency(prefix: str, latency_s: Floats, rows: Bools) -> dict[str, Any]:
    chosen = latency_s[rows]
    names = [f"{prefix}latency_p{round(level * 100)}_s" for level in LATENCY_LEVELS]
    if not len(chosen):
        return {f"{prefix}latency_mean_s": math.nan, **dict.fromkeys(names, math.nan)}
    values = np.quantile(chosen, LATENCY_LEVELS)
    return {
        f"{prefix}latency_mean_s": float(chosen.mean()),
        **{name: float(value) for name, value in zip(names, values, strict=True)},
    }


def _ratio(part: int, whole: int, empty: float) -> float:
    return part / whole if whole else empty


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
