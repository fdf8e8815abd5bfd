"""What a cluster as exported does, in numbers. Apart from the simulation that finds them, which takes long to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.allocation import Allocation

Balancing = Literal["random", "least_outstanding"]


@dataclass(frozen=True, slots=True)
class Front:
    """What stands before the pods."""

    balancing: Balancing
    n_balancers: int = 1
    """Each sees only what went through itself, and gets an equal part of the requests by lot."""


@dataclass(frozen=True, slots=True)
class PodsFigures:
    """A fleet of pods over all repetitions; latencies are means over them."""

    n_gpus: int
    mean_gpus: float
    """Allocated on average; ``n_gpus`` unless the pods are scaled."""
    n_pods: int
    """The most there can be."""
    slo_attainment_ratio: float
    low: float
    """Lower end of its interval, at the scenario's confidence."""
    high: float
    latency_p50_s: float
    latency_p95_s: float
    latency_p99_s: float


@dataclass(frozen=True, slots=True)
class Proposal:
    """A larger fleet that keeps the promise as it would be exported."""

    allocation: Allocation
    figures: PodsFigures


@dataclass(frozen=True, slots=True)
class PodsCheck:
    """The exported cluster against its plan."""

    front: Front
    exported: PodsFigures
    by_lot: PodsFigures | None
    """The same pods behind a Service alone; None where that was not simulated."""
    promised_ratio: float
    slo_latency_s: float
    n_repetitions: int
    n_requests: int
    """Of one repetition, as simulated."""
    scaled_between: tuple[int, int] | None
    """Fewest and most pods that the autoscaler keeps; None for a fixed number."""
    is_whole: bool
    """Whether the plan's whole traffic was simulated, not its busiest stretch."""
    proposal: Proposal | None
    """Only for a fleet that breaks the promise; None also if nothing within reach keeps it."""
    grown_from: float | None = None
    """GPUs of the plan, if what is exported is its proposal."""

    @property
    def is_kept(self) -> bool:
        """By the rule of plans: the whole interval is at or over the promise."""
        return self.exported.low >= self.promised_ratio
