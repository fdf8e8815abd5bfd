"""Host memory of a pod: the caches that were simulated, and what of them its engine is told to fill."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from engine.allocation import Allocation
from engine.catalogue import AddOnKind, Catalogue
from planner.export.cells import Cell
from planner.export.cluster import Cluster

LINE_GIB_PER_GPU: Final = 1.0
"""Shared memory for the lines between workers; assumed, the residuals of one SDXL forward are a tenth of it."""
GIB: Final = 2**30
ADD_ON_KINDS: Final[tuple[AddOnKind, ...]] = ("base", "controlnet", "lora")


@dataclass(frozen=True, slots=True)
class HostTiers:
    """Host memory that each worker process of a pod may fill with checked models."""

    checkpoint_gib: float
    controlnet_gib: float


def lora_tier_gib(allocation: Allocation) -> float:
    """Shared memory of a pod: the host tier for LoRAs that the plan gives its base replicas, and room for the workers' lines."""
    planned = allocation.policies.lora_cache_gib * sum(pool.n_replicas for pool in allocation.pools_of("base"))
    return planned + LINE_GIB_PER_GPU * allocation.n_gpus


def memory_request_gib(cell: Cell, cluster: Cluster, catalogue: Catalogue | None) -> float:
    """Host memory that a pod asks for: its planned caches, or what its nodes have for its GPUs if that is less."""
    planned = planned_memory_gib(cell.allocation, catalogue)
    if cluster.memory_gib_per_gpu is None:
        return planned
    return min(planned, cluster.memory_gib_per_gpu * cell.n_gpus)


def planned_memory_gib(allocation: Allocation, catalogue: Catalogue | None) -> float:
    """Host memory that the plan lets the replicas fill: per replica and kind of model the planned cache, or less if the
    catalogue states every size and holds less. The processes' own memory is not known to a plan and not in it."""
    return sum(_planned(allocation, catalogue))


def _planned(allocation: Allocation, catalogue: Catalogue | None) -> tuple[float, float]:
    """GiB of LoRAs, and of checkpoints and ControlNets."""
    held = _held_gib(catalogue)
    policies = allocation.policies
    of_loras = of_models = 0.0
    for pool in allocation.pools:
        per_replica = min(policies.controlnet_host_cache_gib, held["controlnet"])
        if pool.role == "base":
            per_replica = per_replica if pool.controlnet_ids else 0.0
            per_replica += min(policies.checkpoint_host_cache_gib, held["base"])
            of_loras += pool.n_replicas * min(policies.lora_cache_gib, held["lora"])
        of_models += pool.n_replicas * per_replica
    return of_loras, of_models


def _held_gib(catalogue: Catalogue | None) -> dict[AddOnKind, float]:
    """By kind all models of a catalogue; infinite where it does not state every size."""
    held: dict[AddOnKind, float] = dict.fromkeys(ADD_ON_KINDS, math.inf)
    for kind in ADD_ON_KINDS if catalogue is not None else ():
        sizes = [entry.bytes for entry in catalogue.entries.values() if entry.kind == kind] if catalogue else []
        if all(size > 0 for size in sizes):
            held[kind] = sum(sizes) / GIB
    return held


def host_tiers(cell: Cell, cluster: Cluster, catalogue: Catalogue | None) -> HostTiers:
    """The tiers that were simulated; where the nodes have less than planned, LoRAs keep theirs and models share what is left."""
    policies = cell.allocation.policies
    asked_gib = memory_request_gib(cell, cluster, catalogue)
    if asked_gib >= planned_memory_gib(cell.allocation, catalogue):
        return HostTiers(policies.checkpoint_host_cache_gib, policies.controlnet_host_cache_gib)
    of_loras_gib, of_models_gib = _planned(cell.allocation, catalogue)
    ratio = max(0.0, asked_gib - of_loras_gib) / of_models_gib if of_models_gib else 0.0
    held = _held_gib(catalogue)
    return HostTiers(
        _shortened(ratio * min(policies.checkpoint_host_cache_gib, held["base"])),
        _shortened(ratio * min(policies.controlnet_host_cache_gib, held["controlnet"])),
    )


def _shortened(gib: float) -> float:
    return math.floor(gib * 1000) / 1000
