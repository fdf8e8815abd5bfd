"""Where time and money of a run went: every second of latency and of GPU time belongs to one stage, add-on, checkpoint, tenant.

Shares are whole nanoseconds and whole micro-dollars, divided by cumulative rounding, so that every division sums to its total
exactly. Reads request records of the simulator or of an engine; nothing here simulates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from planner.workload import Floats, Ints, Workload

NS_PER_S: Final = 1_000_000_000
STAGES: Final = (
    "queue", "checkpoint_switch", "controlnet_load", "lora_wait", "text", "denoise_plain", "denoise_controlnet",
    "denoise_lora", "denoise_sharing", "decode",
)  # fmt: skip
"""Parts of a request's latency, in order. ``denoise_*``: what the checkpoint alone takes, what ControlNets add, what LoRAs that
are not fused add to every step, and waiting for ControlNet workers that others use."""
STAGE_WORDS: Final[Mapping[str, str]] = {
    "queue": "waiting for a replica",
    "checkpoint_switch": "switching checkpoints",
    "controlnet_load": "loading ControlNets",
    "lora_wait": "fetching and patching LoRAs",
    "text": "text encoding",
    "denoise_plain": "denoising, the checkpoint alone",
    "denoise_controlnet": "denoising, added by ControlNets",
    "denoise_lora": "denoising, added by unfused LoRAs",
    "denoise_sharing": "waiting for shared ControlNet workers",
    "decode": "decoding and overhead",
    "controlnet_workers": "computing on ControlNet workers",
    "idle": "idle, starting or lost attempts",
}
_QUEUE, _SWITCH, _LOAD, _LORA, _TEXT, _PLAIN, _CONTROLNET, _UNFUSED, _SHARING, _DECODE = range(len(STAGES))


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """What a profile says about each request (length n): how its denoising divides, and what ControlNet workers do for it."""

    plain_s: Floats
    controlnet_s: Floats
    lora_s: Floats
    remote_work_s: Floats
    """Seconds of ControlNet workers; 0 in process."""
    lora_weight: Floats
    """Per LoRA code: how a request's LoRA time divides among its LoRAs (their bytes)."""
    counts_windows: bool
    """Whether a ControlNet computes inside its window only (our engine) or at every step (stock Diffusers)."""


@dataclass(frozen=True, slots=True, eq=False)
class Attribution:
    """The division of one run. Integer matrices: request × stage, in nanoseconds."""

    workload: Workload
    latency_ns: Ints
    """[n, stages]: of requests that were done, how their latency divides; a row of any other request is 0."""
    gpu_ns: Ints
    """[n, stages]: seconds of base replicas; waiting takes none. Replicas that serve several at once are divided evenly."""
    worker_ns: Ints
    """[n]: seconds of ControlNet workers."""
    controlnet_latency_ns: Ints
    """One entry a use of a ControlNet, in order of requests: its part of the loads and of ``denoise_controlnet``."""
    controlnet_gpu_ns: Ints
    """Likewise of GPU time, workers included."""
    lora_latency_ns: Ints
    lora_gpu_ns: Ints
    allocated_ns: int
    """GPU time that the fleet had, busy or not."""

    @property
    def idle_ns(self) -> int:
        """Allocated and given to no request: idle, starting, down, or attempts that were lost. Exactly what is left."""
        return self.allocated_ns - int(self.gpu_ns.sum()) - int(self.worker_ns.sum())


def apportion(total: int, weights: Sequence[float] | Floats) -> Ints:
    """Divides a whole number in proportion to weights (0 or more, finite); the parts are whole and sum to it exactly.

    Raises:
        ValueError: a weight is negative or not finite, or all are 0 while the total is not.
    """
    values = np.asarray(weights, dtype=np.float64)
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("weights must be finite and 0 or more")
    if not len(values) or not values.any():
        if total:
            raise ValueError(f"nothing to divide {total} among: no weight is above 0")
        return np.zeros(len(values), dtype=np.int64)
    return _apportion_groups(np.array([total], dtype=np.int64), np.zeros(len(values), dtype=np.int64), values)


def _apportion_groups(totals: Ints, group: Ints, weights: Floats) -> Ints:
    """Divides ``totals[g]`` among the entries of group g, which stand together in order. A group without weight gets equal parts."""
    if not len(group):
        return np.zeros(0, dtype=np.int64)
    sums = np.bincount(group, weights=weights, minlength=len(totals))
    values = np.where(sums[group] > 0, weights, 1.0)
    new = np.ones(len(group), dtype=np.bool_)
    new[1:] = group[1:] != group[:-1]
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(group)) - 1
    running = np.cumsum(values)
    before = np.repeat(np.where(first > 0, running[first - 1], 0.0), last - first + 1)
    inside = running - before
    whole = np.repeat(inside[last], last - first + 1)  # the last entry's share is exactly 1
    upto = np.rint(inside / whole * totals[group]).astype(np.int64)
    parts: Ints = upto.copy()
    parts[1:] -= np.where(new[1:], 0, upto[:-1])
    return parts


def _apportion_rows(totals: Ints, weights: Floats) -> Ints:
    """Divides ``totals[i]`` among the columns of ``weights[i]``; a row without weight goes to its first column."""
    weights = weights.copy()
    weights[weights.sum(axis=1) == 0.0, 0] = 1.0
    running = np.cumsum(weights, axis=1)
    upto = np.rint(running / running[:, -1:] * totals[:, None]).astype(np.int64)
    parts: Ints = np.diff(upto, axis=1, prepend=0)
    return parts


def attribute(workload: Workload, requests: pd.DataFrame, weights: Weights, allocated_s: float) -> Attribution:
    """Divides a run.

    Args:
        requests: request records, row i of the workload's request i; columns ``traces.records.REQUEST_RECORD_COLUMNS``.
        allocated_s: GPU seconds of the fleet over the run.

    Raises:
        ValueError: records and workload are not of one length.
    """
    n = len(workload)
    if len(requests) != n:
        raise ValueError(f"got {len(requests)} records for {n} requests")

    def column(name: str) -> Floats:
        values: Floats = np.nan_to_num(requests[name].to_numpy(dtype=np.float64, na_value=np.nan))
        return values

    is_done = (requests["status"] == "done").to_numpy(dtype=np.bool_)
    shape_s = np.stack([weights.plain_s, weights.controlnet_s, weights.lora_s], axis=1)
    total_s = shape_s.sum(axis=1, keepdims=True)
    shares = np.divide(shape_s, total_s, out=np.tile([1.0, 0.0, 0.0], (n, 1)), where=total_s > 0)
    denoise_s = column("denoise_s")
    alone_s = requests["denoise_alone_s"].to_numpy(dtype=np.float64, na_value=np.nan)
    # an engine's log cannot say how long the steps would have taken alone: then the profile says it
    alone_s = np.minimum(np.where(np.isnan(alone_s), total_s[:, 0], alone_s), denoise_s)
    stage_s = np.zeros((n, len(STAGES)))
    for place, name in (
        (_QUEUE, "queue_wait_s"), (_SWITCH, "switch_s"), (_LOAD, "controlnet_load_s"), (_LORA, "lora_wait_s"),
        (_TEXT, "text_s"), (_DECODE, "decode_s"),
    ):  # fmt: skip
        stage_s[:, place] = np.maximum(column(name), 0.0)
    stage_s[:, [_PLAIN, _CONTROLNET, _UNFUSED]] = alone_s[:, None] * shares
    stage_s[:, _SHARING] = denoise_s - alone_s
    latency_ns = _apportion_rows(_to_ns(np.where(is_done, column("latency_s"), 0.0)), stage_s)
    occupied_s = np.where(is_done, _shared_occupation(requests, is_done), 0.0)
    gpu_s = stage_s.copy()
    gpu_s[:, _QUEUE] = 0.0
    empty = gpu_s.sum(axis=1) == 0.0
    gpu_s[empty, _PLAIN] = 1.0  # never the queue, which takes no GPU
    gpu_ns = _apportion_rows(_to_ns(occupied_s), gpu_s)
    worker_ns = _to_ns(np.where(is_done, weights.remote_work_s, 0.0))
    c_rows, c_weights = _controlnet_uses(workload, weights.counts_windows)
    l_rows, l_weights = _lora_uses(workload, weights.lora_weight)
    of_controlnets, of_loras = [_LOAD, _CONTROLNET], [_LORA, _UNFUSED]
    return Attribution(
        workload, latency_ns, gpu_ns, worker_ns,
        _apportion_groups(latency_ns[:, of_controlnets].sum(axis=1), c_rows, c_weights),
        _apportion_groups(gpu_ns[:, of_controlnets].sum(axis=1) + worker_ns, c_rows, c_weights),
        _apportion_groups(latency_ns[:, of_loras].sum(axis=1), l_rows, l_weights),
        _apportion_groups(gpu_ns[:, of_loras].sum(axis=1), l_rows, l_weights),
        int(_to_ns(np.array([allocated_s]))[0]),
    )  # fmt: skip


def _to_ns(seconds: Floats) -> Ints:
    return np.asarray(np.rint(seconds * NS_PER_S), dtype=np.int64)


def _shared_occupation(requests: pd.DataFrame, is_done: npt.NDArray[np.bool_]) -> Floats:
    """Seconds of its replica that each request had: all of its service alone, an equal part of what several had together."""
    start_s = requests["start_s"].to_numpy(dtype=np.float64, na_value=np.nan)
    end_s = requests["end_s"].to_numpy(dtype=np.float64)
    seconds: Floats = np.where(is_done, end_s - start_s, 0.0)
    rows = np.flatnonzero(is_done)
    worker = pd.factorize(requests["worker_id"].to_numpy(dtype=object)[rows])[0]
    order = rows[np.lexsort((start_s[rows], worker))]
    key = np.sort(worker)
    same = key[1:] == key[:-1]
    overlaps = same & (start_s[order[1:]] < end_s[order[:-1]] - 1e-9 * np.abs(end_s[order[:-1]]))
    for code in np.unique(key[1:][overlaps]).tolist():
        members = order[key == code]
        edges = np.unique(np.concatenate([start_s[members], end_s[members]]))
        first = np.searchsorted(edges, start_s[members])
        last = np.searchsorted(edges, end_s[members])
        change = np.zeros(len(edges) + 1)
        np.add.at(change, first, 1.0)
        np.add.at(change, last, -1.0)
        n_inside = np.cumsum(change)[: len(edges) - 1]
        per_head = np.divide(np.diff(edges), n_inside, out=np.zeros(len(edges) - 1), where=n_inside > 0)
        upto = np.concatenate([[0.0], np.cumsum(per_head)])
        seconds[members] = upto[last] - upto[first]
    return seconds


def _controlnet_uses(workload: Workload, counts_windows: bool) -> tuple[Ints, Floats]:
    rows = np.repeat(np.arange(len(workload), dtype=np.int64), workload.n_controlnets)
    steps = [float(last - first) for windows in workload.control_steps for first, last in windows]
    return rows, np.array(steps, dtype=np.float64) if counts_windows else np.ones(len(rows), dtype=np.float64)


def _lora_uses(workload: Workload, weight: Floats) -> tuple[Ints, Floats]:
    rows = np.repeat(np.arange(len(workload), dtype=np.int64), workload.n_loras)
    codes = np.array([code for codes in workload.loras for code in codes], dtype=np.int64)
    return rows, weight[codes]


# -- tables: one row a stage, an add-on, a checkpoint, a tenant ------------------------------------------------------------


def by_stage(found: Attribution, cost_micro_usd: int) -> pd.DataFrame:
    """Stage, ControlNet workers, idle: ``latency_ns``, ``gpu_ns``, ``cost_micro_usd``; each column sums to its total."""
    names = [*STAGES, "controlnet_workers", "idle"]
    latency = np.append(found.latency_ns.sum(axis=0), [0, 0])
    gpu = np.append(found.gpu_ns.sum(axis=0), [int(found.worker_ns.sum()), found.idle_ns])
    return _with_cost({"stage": names, "latency_ns": latency, "gpu_ns": gpu}, cost_micro_usd)


def by_add_on(found: Attribution, cost_micro_usd: int) -> pd.DataFrame:
    """ControlNets, LoRAs, then what is left: the images themselves, waiting, idle. Most GPU time first within a kind."""
    workload = found.workload
    rows: list[dict[str, Any]] = []
    for kind, names, uses, latency_ns, gpu_ns in (
        ("controlnet", workload.controlnet_names, workload.controlnets, found.controlnet_latency_ns, found.controlnet_gpu_ns),
        ("lora", workload.lora_names, workload.loras, found.lora_latency_ns, found.lora_gpu_ns),
    ):  # fmt: skip
        codes = np.array([code for item in uses for code in item], dtype=np.int64)
        n_requests = np.bincount(
            np.array([code for item in uses for code in dict.fromkeys(item)], dtype=np.int64), minlength=len(names)
        )
        columns = (
            n_requests, np.bincount(codes, minlength=len(names)), _sum_by(codes, latency_ns, len(names)),
            _sum_by(codes, gpu_ns, len(names)),
        )  # fmt: skip
        mine = [
            {"kind": kind, "id": name, "n_requests": int(r), "n_uses": int(u), "latency_ns": int(ns), "gpu_ns": int(g)}
            for name, r, u, ns, g in zip(names, *columns, strict=True)
        ]
        rows += sorted(mine, key=lambda row: (-row["gpu_ns"], -row["latency_ns"], row["id"]))
    waiting = int(found.latency_ns[:, [_QUEUE, _SHARING]].sum())
    sharing_gpu = int(found.gpu_ns[:, _SHARING].sum())
    plain = [_SWITCH, _TEXT, _PLAIN, _DECODE]
    n = len(workload)
    rest = ((("images"), int(found.latency_ns[:, plain].sum()), int(found.gpu_ns[:, plain].sum())),
            ("waiting", waiting, sharing_gpu), ("idle", 0, found.idle_ns))  # fmt: skip
    rows += [
        {"kind": kind, "id": "", "n_requests": n, "n_uses": n, "latency_ns": latency, "gpu_ns": gpu}
        for kind, latency, gpu in rest
    ]
    # time of requests that name no add-on cannot carry add-on time; a profile may still say so by rounding: keep the sum exact
    left_latency = int(found.latency_ns.sum()) - sum(row["latency_ns"] for row in rows)
    left_gpu = found.allocated_ns - sum(row["gpu_ns"] for row in rows)
    rows[-3]["latency_ns"] += left_latency
    rows[-3]["gpu_ns"] += left_gpu
    frame = pd.DataFrame(rows)
    return _with_cost({name: frame[name].to_numpy() for name in frame.columns}, cost_micro_usd)


def by_checkpoint(found: Attribution, cost_micro_usd: int) -> pd.DataFrame:
    """All time of the requests for each checkpoint, and idle; most GPU time first."""
    switches = found.latency_ns[:, _SWITCH]
    return _by_code(
        found, "checkpoint", found.workload.checkpoint, found.workload.checkpoint_names, cost_micro_usd, switches
    )


def by_tenant(found: Attribution, cost_micro_usd: int) -> pd.DataFrame:
    """All time of each tenant's requests, and idle; most GPU time first."""
    return _by_code(found, "tenant", found.workload.tenant, found.workload.tenant_names, cost_micro_usd, None)


def _by_code(
    found: Attribution, kind: str, codes: Ints, names: Sequence[str], cost_micro_usd: int, switch_ns: Ints | None
) -> pd.DataFrame:
    n = len(names)
    latency = _sum_by(codes, found.latency_ns.sum(axis=1), n)
    gpu = _sum_by(codes, found.gpu_ns.sum(axis=1) + found.worker_ns, n)
    uses = np.bincount(codes, minlength=n).astype(np.int64)
    order = sorted(range(n), key=lambda code: (-int(gpu[code]), names[code]))
    columns: dict[str, Any] = {
        kind: [*(names[code] for code in order), "(idle)"],
        "n_requests": np.append(uses[order], 0),
        "latency_ns": np.append(latency[order], 0),
        "gpu_ns": np.append(gpu[order], found.idle_ns),
    }
    if switch_ns is not None:
        columns["switch_ns"] = np.append(_sum_by(codes, switch_ns, n)[order], 0)
    return _with_cost(columns, cost_micro_usd)


def _sum_by(codes: Ints, values: Ints, n: int) -> Ints:
    """Integer sums by code: ``np.bincount`` with weights would go through floats."""
    sums = np.zeros(n, dtype=np.int64)
    np.add.at(sums, codes, values)
    return sums


def _with_cost(columns: Mapping[str, Any], cost_micro_usd: int) -> pd.DataFrame:
    gpu = np.asarray(columns["gpu_ns"], dtype=np.float64)
    cost = apportion(cost_micro_usd, np.maximum(gpu, 0.0)) if gpu.any() else np.zeros(len(gpu), dtype=np.int64)
    return pd.DataFrame({**columns, "cost_micro_usd": cost})
