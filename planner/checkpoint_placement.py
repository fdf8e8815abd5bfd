"""Where a checkpoint should run: on every base replica, or in a pool of its own, with in-process ControlNets or with workers.

So a fleet may mix topologies by checkpoint. Sized as add-on placements are (``planner.addon_placement``): on the same requests, the
recommended fleet again in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from engine.allocation import ANY, Allocation, Link, Pool, Topology
from planner.addon_placement import START_LOAD, TOPOLOGIES, Trial, fewest, trial_of
from planner.answers import answers_about
from planner.candidates import BASE_POOL, Counts, Shape, controlnet_loads
from planner.decision_record import CheckpointFleetRow, CheckpointRow, CheckpointsRecord
from planner.explain import gpus_words, usd
from planner.scenario import Scenario
from planner.simulator import mechanisms_in_use
from planner.traffic import build_traffic
from planner.workload import Bools

CHECKPOINTS_MAX: Final = 3
"""Checkpoints that are tried apart, most used first."""
USE_RATIO_MIN: Final = 0.05
OWN: Final = "base-own"
"""The base pool that serves one checkpoint only."""
WORKERS: Final = "controlnets"


@dataclass(frozen=True, slots=True)
class Split:
    """Pools without their replica counts: one base pool for all, or another for one checkpoint beside it."""

    name: str | None
    """The checkpoint with a pool of its own; None: the recommended fleet."""
    own: Topology
    """How that pool runs ControlNets."""
    shape: Shape
    """The recommended fleet's."""
    others: tuple[str, ...]
    """What the pool for all starts with beside it, ``*`` last if it may also hold the rest."""

    @property
    def worker_pools(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """ControlNet pools and what they host: the recommended ones, or one for all if only the own pool uses workers."""
        if self.shape.controlnet_pools or self.name is None or self.own != "decoupled":
            return self.shape.controlnet_pools
        return ((WORKERS, (ANY,)),)

    def allocation(self, counts: Counts) -> Allocation:
        """The allocation with these replicas: the pool for all, the checkpoint's own, then workers."""
        shape = self.shape
        if self.name is None:
            return shape.allocation(counts)
        everyone = Pool(
            BASE_POOL, "base", counts[0], shape.gpu_kind, 1, shape.topology, self.others, shape.in_process_ids
        )
        in_process = () if self.own == "decoupled" else shape.in_process_ids or (ANY,)
        own = Pool(OWN, "base", counts[1], shape.gpu_kind, 1, self.own, (self.name,), in_process)
        workers = tuple(
            Pool(pool, "controlnet", n, shape.gpu_kind, 1, "decoupled", base_model_ids=(), controlnet_ids=hosted)
            for (pool, hosted), n in zip(self.worker_pools, counts[2:], strict=True)
        )
        links = tuple(
            Link(base.name, worker.name, shape.link)
            for base in (everyone, own)
            if base.topology == "decoupled"
            for worker in workers
        )
        return Allocation((everyone, own, *workers), links, shape.policies)


def splits_of(name: str, shape: Shape, names: Sequence[str], has_controlnets: bool) -> list[Split]:
    """The recommended fleet, then a pool of its own for one checkpoint, of the same topology and of the other.

    Args:
        names: all checkpoints of the traffic.
    """
    held = tuple(one for one in shape.base_model_ids if one not in (name, ANY))
    # only if the pool for all can start with every other checkpoint, none of them needs '*', which would let it serve this one, too
    others = held if len(held) == len(names) - 1 else (*held, ANY)
    splits = [Split(None, shape.topology, shape, ()), Split(name, shape.topology, shape, others)]
    if has_controlnets:
        splits.append(Split(name, "decoupled" if shape.topology == "colocated" else "colocated", shape, others))
    return splits


def busiest_checkpoints(scenario: Scenario, folder: Path, shape: Shape | None, n_gpus: int) -> list[str]:
    """The checkpoints worth a pool of their own; none if there is one checkpoint or one GPU, or mechanisms are switched on."""
    if shape is None or shape.topology not in TOPOLOGIES or n_gpus < 2:
        return []
    if mechanisms_in_use(shape.allocation((1,) * (1 + len(shape.controlnet_pools))), scenario.world.world(0)):
        return []  # only the compiled tier is fast enough for so many fleets
    workload = build_traffic(scenario, folder).workload
    if len(workload.checkpoint_names) < 2:
        return []
    uses = np.bincount(workload.checkpoint, minlength=len(workload.checkpoint_names))
    often = sorted(zip((-uses).tolist(), workload.checkpoint_names, strict=True))
    return [name for n, name in often if -n >= USE_RATIO_MIN * len(workload)][:CHECKPOINTS_MAX]


def place_checkpoint(
    scenario: Scenario, folder: Path, shape: Shape, name: str, price_usd_per_gpu_hour: float, store: Path | None = None
) -> CheckpointRow:
    """The recommended fleet and those with a pool of its own for one checkpoint, each with the fewest GPUs that keep the promise."""
    with answers_about(store, scenario, folder, None) as known:
        return _placed(trial_of(scenario, folder, known), shape, name, price_usd_per_gpu_hour)


def _placed(trial: Trial, shape: Shape, name: str, price_usd_per_gpu_hour: float) -> CheckpointRow:
    workload = trial.workload
    code = workload.checkpoint_names.index(name) if name in workload.checkpoint_names else -1
    mine = workload.checkpoint == code
    loads = controlnet_loads(workload, trial.services["decoupled"])
    monthly_usd = price_usd_per_gpu_hour * trial.scenario.prices.hours_per_month
    rows: list[CheckpointFleetRow] = []
    for split in splits_of(name, shape, workload.checkpoint_names, bool((workload.n_controlnets[mine] > 0).any())):
        counts = fewest(trial, split.allocation, start_counts(trial, split, mine, loads))
        found = None if counts is None else trial.run(split.allocation(counts), mine, f"checkpoint {name}")
        n_gpus = None if counts is None else sum(counts)
        here = rows[0].n_gpus if rows else n_gpus
        rows.append(
            CheckpointFleetRow(
                has_own_pool=split.name is not None,
                topology=split.own,
                pools={pool.name: pool.n_replicas for pool in split.allocation(counts).pools} if counts else {},
                n_gpus=n_gpus,
                cost_usd_per_month=None if n_gpus is None else n_gpus * monthly_usd,
                difference_usd_per_month=None if n_gpus is None or here is None else (n_gpus - here) * monthly_usd,
                slo_attainment_ratio=found[0].slo_attainment_ratio if found else None,
                latency_p50_s=found[0].latency_p50_s if found else None,
                latency_p99_s=found[0].latency_p99_s if found else None,
                with_it_p50_s=found[1] if found else None,
            )
        )
    best = best_of(rows)
    return CheckpointRow(
        checkpoint_id=name, use_ratio=float(mine.mean()), best=best, why=_why(rows, best), fleets=tuple(rows)
    )


def start_counts(trial: Trial, split: Split, mine: Bools, loads: Mapping[str, float]) -> Counts:
    """Each pool at ``START_LOAD`` of the work that goes there."""
    seconds = trial.workload.duration_s * START_LOAD
    everyone, own = trial.services[split.shape.topology], trial.services[split.own]

    def base(service_s: float) -> int:
        return max(1, math.ceil(service_s / seconds))

    if split.name is None:
        counts = [base(float(everyone.alone_s.sum()))]
    else:
        counts = [base(float(everyone.alone_s[~mine].sum())), base(float(own.alone_s[mine].sum()))]
    work_s = trial.services["decoupled"].controlnet_work_s
    remote = np.zeros(len(mine), dtype=np.bool_)
    remote |= ~mine & (split.shape.topology == "decoupled")
    remote |= mine & ((split.own if split.name is not None else split.shape.topology) == "decoupled")
    share = float(work_s[remote].sum()) / max(1e-9, float(work_s.sum()))
    named = {one for _, hosted in split.worker_pools for one in hosted}
    for _, hosted in split.worker_pools:
        rest = sum(load for one, load in loads.items() if one not in named) if ANY in hosted else 0.0
        load = sum(loads.get(one, 0.0) for one in hosted) + rest
        counts.append(max(1, math.ceil(share * load / START_LOAD)))
    return tuple(counts)


def best_of(rows: Sequence[CheckpointFleetRow]) -> int | None:
    """The fewest GPUs; of equals the first, which is the recommended fleet. None if no size was found for any."""
    able = [place for place, row in enumerate(rows) if row.n_gpus is not None]
    return min(able, key=lambda place: (rows[place].n_gpus or 0, place), default=None)


def _why(rows: Sequence[CheckpointFleetRow], best: int | None) -> str:
    here, parts = rows[0], []
    if best is None or here.n_gpus is None:
        return "On these requests no size of the recommended fleet was found."
    for row in rows[1:]:
        what = "a pool of its own" + (f", {row.topology}," if row.topology != here.topology else "")
        if row.n_gpus is None:
            parts.append(f"with {what} no size was found that keeps the promise")
            continue
        gap = row.n_gpus - here.n_gpus
        money = usd(abs(row.difference_usd_per_month or 0.0))
        cost = f"{gpus_words(abs(gap))} {'more' if gap > 0 else 'less'} ({money} a month)" if gap else "as many GPUs"
        parts.append(f"with {what} the fleet takes {cost}")
    text = "; ".join(parts)
    end = " That is worth a plan of its own: these sizes are one run each, not repeated." if best else ""
    return f"{text[:1].upper()}{text[1:]}, against {gpus_words(here.n_gpus)} as recommended.{end}"


def checkpoints_record(rows: Sequence[CheckpointRow], simulated_on: str) -> CheckpointsRecord | None:
    """None if nothing was tried."""
    if not rows:
        return None
    apart = [row for row in rows if row.best]
    sentence = (
        "No checkpoint gains from base replicas of its own."
        if not apart
        else f"Base replicas of its own would save GPUs for {', '.join(row.checkpoint_id for row in apart)}, one at a time."
    )
    return CheckpointsRecord(sentence=sentence, rows=tuple(rows), simulated_on=simulated_on)
