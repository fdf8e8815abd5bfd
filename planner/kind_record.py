"""What a plan says about the GPU kinds at hand: a row a kind and topology, and one a pair of kinds for ``decoupled``."""

from __future__ import annotations

from typing import Literal

from engine.allocation import Topology
from planner.record_types import Estimate, Number, Record

KindVerdict = Literal[
    "meets_slo", "misses_slo", "infeasible", "dearer by its bound", "dearer in the search", "dearer in the confirmation"
]


class KindRow(Record):
    """The best fleet found of one kind, or of one pair of kinds, in one topology; or why it was not looked at further."""

    gpu_kind: str
    """Of the base replicas."""
    worker_gpu_kind: str
    """Of the ControlNet workers; the same unless they are apart."""
    topology: Topology
    verdict: KindVerdict
    why: str
    """One sentence: what the verdict rests on."""
    pools: dict[str, int]
    """Replicas of each pool; empty where no fleet was sized."""
    n_gpus: int | None
    cost_usd_per_month: Number
    bound_usd_per_month: Number
    """What the work alone costs at the least; null where no number of GPUs will do."""
    cost_usd_per_1000_images: Estimate
    slo_attainment_ratio: Estimate
    latency_p50_s: Estimate
    latency_p99_s: Estimate
    is_assumed: bool
    """Whether a profile that it rests on was carried over by datasheet: nothing was measured on that kind."""


class KindPrice(Record):
    """One GPU kind at hand."""

    gpu_kind: str
    profile_name: str
    profile_id: str
    is_assumed: bool
    price_usd_per_gpu_hour: float
    purchase: str
    source: str
    gpus_max: int
    device_memory_gib: float


class KindsRecord(Record):
    """The kinds against each other. The rest of the plan is about the recommended one."""

    sentence: str
    base_gpu_kind: str | None
    """Of the recommended fleet's base replicas; null in an infeasible plan."""
    worker_gpu_kind: str | None
    """Likewise of its ControlNet workers."""
    kinds: tuple[KindPrice, ...]
    rows: tuple[KindRow, ...]
    """By kind in the scenario's order, pairs of kinds last."""
    not_looked_at: tuple[str, ...]
    """What a plan with a fleet of one kind has and this one lacks, since it has two: one sentence each."""

    @property
    def is_mixed(self) -> bool:
        """Whether the recommended fleet has two kinds."""
        return self.base_gpu_kind != self.worker_gpu_kind

    def price_of(self, gpu_kind: str) -> float:
        """USD per GPU-hour; raises KeyError for a kind that was not at hand."""
        return {kind.gpu_kind: kind.price_usd_per_gpu_hour for kind in self.kinds}[gpu_kind]
