"""What a service does not decide: clients that try again, machines that fail or are reclaimed, the store's bandwidth.

Everything is off by default. What the service does decide (autoscaling, order, batching, caches) is in the allocation.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from traces.problems import Problem


@dataclass(frozen=True, slots=True)
class Retries:
    """Clients whose request was rejected ask again after a wait. It stays one request, with its first arrival and deadline."""

    n_max: int = 3
    """Further attempts, 1..100."""
    backoff_s: float = 1.0
    """Wait before the first of them, above 0."""
    backoff_factor: float = 2.0
    """Each wait over the one before, 1 or more."""
    backoff_max_s: float = 60.0
    """No wait is longer."""
    jitter_ratio: float = 0.5
    """0..1: a wait is drawn evenly from this share below its length up to it, by request and attempt."""

    def wait_s(self, attempt: int, uniform: float) -> float:
        """Seconds before attempt 1, 2, …; ``uniform`` in [0, 1)."""
        longest_s = min(self.backoff_s * self.backoff_factor ** (attempt - 1), self.backoff_max_s)
        return longest_s * (1.0 - self.jitter_ratio * uniform)


@dataclass(frozen=True, slots=True)
class Failures:
    """Workers that fail while they are up, and are repaired. Both times are exponential, each worker with a stream of its own."""

    mtbf_s: float
    """Mean time between the end of a repair (or of a start) and the next failure, above 0."""
    mttr_s: float
    """Mean time from a failure until the machine is back, 0 or more; the worker then starts as a new one does."""
    start_s: float = 60.0
    """Start of the process after a repair; a pool with an autoscaler has its own ``start_s``."""
    pools: tuple[str, ...] = ()
    """Names of the pools that fail; empty: all."""


@dataclass(frozen=True, slots=True)
class Reclaims:
    """Spot capacity that the provider takes back, with notice, and gives again. Not paid for while it is gone."""

    mean_s: float
    """Mean time a worker keeps its GPUs, exponential, above 0."""
    notice_s: float = 120.0
    """From the notice, when the worker stops taking requests, to its end; what still runs then is tried again elsewhere."""
    return_s: float = 600.0
    """Mean time until a replacement is given, exponential, 0 or more."""
    start_s: float = 60.0
    """Start of the replacement; a pool with an autoscaler has its own ``start_s``."""
    pools: tuple[str, ...] = ()
    """Names of the pools on spot capacity; empty: all."""


@dataclass(frozen=True, slots=True)
class LoraStore:
    """The remote store of LoRAs: its bandwidth is shared by all fetches at once, max–min fair.

    A fetch alone takes what the profile's law says; others slow it down only where the sum of their rates exceeds the bandwidth.
    """

    bandwidth_gib_per_s: float
    """Above 0."""


@dataclass(frozen=True, slots=True)
class World:
    """Everything outside the service's control."""

    retries: Retries | None = None
    failures: Failures | None = None
    reclaims: Reclaims | None = None
    lora_store: LoraStore | None = None
    seed: int = 0
    """Seeds failures, reclaims and jitter."""

    def stream(self, purpose: str, name: str) -> np.random.Generator:
        """Random numbers for one purpose and one worker, independent of all others and of Python's hash seed."""
        key = [self.seed, zlib.crc32(purpose.encode()), zlib.crc32(name.encode()), len(name)]
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


STILL = World()
"""Nothing fails, nobody tries again, the store has room for everybody."""


def world_problems(world: World, pool_names: tuple[str, ...]) -> list[Problem]:
    """Every value that is out of range, and every pool named that does not exist."""
    problems = []

    def need(holds: bool, where: str, value: object, allowed: str) -> None:
        if not holds:
            problems.append(Problem(f"world {where}", f"got {value!r}", allowed, "Set it, or leave the table out"))

    retries, failures, reclaims = world.retries, world.failures, world.reclaims
    if retries is not None:
        need(1 <= retries.n_max <= 100, "retries.n_max", retries.n_max, "1..100")
        need(retries.backoff_s > 0, "retries.backoff_s", retries.backoff_s, "seconds above 0")
        need(retries.backoff_factor >= 1, "retries.backoff_factor", retries.backoff_factor, "1 or more")
        need(
            retries.backoff_max_s >= retries.backoff_s, "retries.backoff_max_s", retries.backoff_max_s,
            f"backoff_s ({retries.backoff_s:g}) or more",
        )  # fmt: skip
        need(0 <= retries.jitter_ratio <= 1, "retries.jitter_ratio", retries.jitter_ratio, "0..1")
    if failures is not None:
        need(failures.mtbf_s > 0, "failures.mtbf_s", failures.mtbf_s, "seconds above 0")
        need(failures.mttr_s >= 0, "failures.mttr_s", failures.mttr_s, "seconds, 0 or more")
        need(failures.start_s >= 0, "failures.start_s", failures.start_s, "seconds, 0 or more")
    if reclaims is not None:
        need(reclaims.mean_s > 0, "reclaims.mean_s", reclaims.mean_s, "seconds above 0")
        for name in ("notice_s", "return_s", "start_s"):
            value = getattr(reclaims, name)
            need(value >= 0, f"reclaims.{name}", value, "seconds, 0 or more")
    for table, item in (("failures", failures), ("reclaims", reclaims)):
        for name in item.pools if item is not None else ():
            need(name in pool_names, f"{table}.pools", name, f"one of {', '.join(pool_names)}")
    if world.lora_store is not None:
        bandwidth = world.lora_store.bandwidth_gib_per_s
        need(bandwidth > 0, "lora_store.bandwidth_gib_per_s", bandwidth, "GiB/s above 0")
    return problems
