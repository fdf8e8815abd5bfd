"""State of the workers: which models each holds on its device and in host memory, and how full that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from engine.allocation import ANY, GIB, Allocation, Pool
from engine.policies import lru
from planner.consistency import BrokenRunError
from planner.service import ServiceTable, Sizes
from planner.simulator.result import ProfileFacts
from planner.workload import Workload
from traces.problems import InputError, Problem

if TYPE_CHECKING:
    from planner.simulator.coupling import Client


FactsByPool = ProfileFacts | Mapping[str, ProfileFacts]
"""The same facts for every pool, or one's own by pool name where GPU kinds differ."""


class Cache:
    """One tier of one worker: resident keys by recency, within a capacity in bytes."""

    __slots__ = ("capacity_bytes", "following", "n_bytes", "n_pins", "preceding", "used_bytes")

    def __init__(self, n_bytes: Sequence[int], capacity_bytes: int) -> None:
        self.n_bytes = n_bytes
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.following, self.preceding = lru.empty_ring(len(n_bytes))
        self.n_pins = [0] * len(n_bytes)

    def touch(self, key: int) -> bool:
        """Marks a key as used; False if it is not resident."""
        return lru.touch(key, self.following, self.preceding)

    def insert(self, key: int) -> bool:
        """Makes a key resident, evicting the least recently used; False if it cannot be held."""
        self.used_bytes = lru.insert(
            key, self.following, self.preceding, self.n_bytes, self.used_bytes, self.capacity_bytes, self.n_pins
        )
        return self.following[key] != key

    def holds(self, key: int) -> bool:
        """Whether a key is resident."""
        return self.following[key] != key


class BaseReplica:
    """One base worker. Device keys are checkpoint codes, then ControlNet codes shifted by the number of checkpoints."""

    __slots__ = ("device", "host_checkpoints", "host_controlnets", "host_loras", "index", "pool", "worker_id")

    def __init__(self, index: int, pool: int, worker_id: str, device: Cache, hosts: tuple[Cache, Cache, Cache]) -> None:
        self.index = index
        self.pool = pool
        self.worker_id = worker_id
        self.device = device
        self.host_checkpoints, self.host_controlnets, self.host_loras = hosts


class ControlNetWorker:
    """One ControlNet worker: what it holds, and who uses it."""

    has_waits: ClassVar[bool] = True
    """A forward waits for the one that it finds running."""
    __slots__ = (
        "alone_load",
        "attached_load",
        "clients",
        "device",
        "host",
        "index",
        "is_full",
        "loader_free_s",
        "n_attached",
        "pool",
        "ready_s",
        "span_start_s",
        "work_s",
        "worker_id",
    )

    def __init__(self, index: int, pool: Pool, worker_id: str, device: Cache, host: Cache) -> None:
        self.index = index
        self.pool = pool
        self.worker_id = worker_id
        self.device = device
        self.host = host
        self.ready_s = [0.0] * len(device.n_bytes)
        """When each ControlNet's last load is complete."""
        self.loader_free_s = 0.0
        self.attached_load = 0.0
        """Load by all requests attached, in seconds per second, if each went at its own pace: what placement balances."""
        self.n_attached = 0
        self.clients: dict[Client, float] = {}
        """Requests denoising now, in order of joining, with their demand in seconds per step."""
        self.alone_load = 0.0
        """Load by those, if each went at its own pace; above 1 they slow one another down."""
        self.is_full = False
        self.span_start_s = 0.0
        self.work_s = 0.0


def build_base_replicas(
    allocation: Allocation,
    workload: Workload,
    sizes: Sizes,
    facts: FactsByPool,
    n_requests: int,
    *,
    is_new_machine: bool = False,
) -> list[BaseReplica]:
    """The base workers, pool by pool, in order.

    A pool that names its checkpoints starts with them, as far as they fit, on host and device; one that takes any starts empty.

    Args:
        is_new_machine: one that starts while the run goes on: its host tiers hold what it loads onto the device, and no more.
    """
    policies = allocation.policies
    checkpoint_bytes = sizes.of_checkpoints(workload.checkpoint_names).tolist()
    controlnet_bytes = sizes.of_controlnets(workload.controlnet_names).tolist()
    lora_bytes = sizes.of_loras(workload.lora_names).tolist()
    model_bytes = checkpoint_bytes + controlnet_bytes
    checkpoint_codes = {name: code for code, name in enumerate(workload.checkpoint_names)}
    controlnet_codes = {name: code for code, name in enumerate(workload.controlnet_names)}
    replicas: list[BaseReplica] = []
    for pool_index, pool in enumerate(allocation.pools_of("base")):
        capacity_bytes = device_bytes_for_models(workload, facts_of(facts, pool), n_requests)
        checkpoints = [checkpoint_codes[name] for name in pool.base_model_ids if name in checkpoint_codes]
        is_remote = pool.topology == "decoupled"
        named = () if is_remote else pool.controlnet_ids
        controlnets = [controlnet_codes[name] for name in named if name in controlnet_codes]
        for number in range(pool.n_replicas):
            device = Cache(model_bytes, capacity_bytes)
            hosts = (
                Cache(checkpoint_bytes, _host_bytes(policies.checkpoint_host_cache_gib)),
                Cache(controlnet_bytes, _host_bytes(policies.controlnet_host_cache_gib)),
                Cache(lora_bytes, _host_bytes(policies.lora_cache_gib)),
            )
            n = len(checkpoint_bytes)
            _preload(device, [*checkpoints, *(n + code for code in controlnets)])
            _preload(hosts[0], [code for code in checkpoints if device.holds(code) or not is_new_machine])
            _preload(hosts[1], [code for code in controlnets if device.holds(n + code) or not is_new_machine])
            replicas.append(BaseReplica(len(replicas), pool_index, f"{pool.name}-{number}", device, hosts))
    return replicas


def build_controlnet_workers(
    allocation: Allocation,
    workload: Workload,
    sizes: Sizes,
    facts: FactsByPool,
    n_requests: int,
    *,
    is_new_machine: bool = False,
) -> list[ControlNetWorker]:
    """The ControlNet workers, pool by pool; what a pool names is resident from the start, as far as it fits.

    Args:
        is_new_machine: as for :func:`build_base_replicas`.
    """
    n_bytes = sizes.of_controlnets(workload.controlnet_names).tolist()
    codes = {name: code for code, name in enumerate(workload.controlnet_names)}
    workers: list[ControlNetWorker] = []
    for pool in allocation.pools_of("controlnet"):
        capacity_bytes = device_bytes_for_models(workload, facts_of(facts, pool), n_requests)
        named = [codes[name] for name in pool.controlnet_ids if name in codes]
        for number in range(pool.n_replicas):
            device = Cache(n_bytes, capacity_bytes)
            host = Cache(n_bytes, _host_bytes(allocation.policies.controlnet_host_cache_gib))
            _preload(device, named)
            _preload(host, [code for code in named if device.holds(code) or not is_new_machine])
            workers.append(ControlNetWorker(len(workers), pool, f"{pool.name}-{number}", device, host))
    return workers


def facts_of(facts: FactsByPool, pool: Pool) -> ProfileFacts:
    """A pool's facts: those of its GPU kind, with its worker's part of the memory."""
    own = facts if isinstance(facts, ProfileFacts) else facts[pool.name]
    if pool.workers_per_gpu == 1:
        return own
    return ProfileFacts(own.device_memory_gib / pool.workers_per_gpu, own.activation_gib_per_sample)


def device_bytes_for_models(workload: Workload, facts: ProfileFacts, n_requests: int) -> int:
    """Device memory left for weights, beside the activations of the largest forward batch of the first n requests."""
    largest = int(workload.forward_batch[:n_requests].max(initial=0))
    return int((facts.device_memory_gib - facts.activation_gib_per_sample * largest) * GIB)


def check_memory(allocation: Allocation, workload: Workload, sizes: Sizes, facts: FactsByPool, n_requests: int) -> None:
    """Raises :class:`InputError` if some request's checkpoint with its in-process ControlNets fits no device at once."""
    checkpoint_bytes = sizes.of_checkpoints(workload.checkpoint_names)
    controlnet_bytes = sizes.of_controlnets(workload.controlnet_names)
    together: dict[tuple[int, tuple[int, ...]], int] = {}
    for key in zip(workload.checkpoint[:n_requests].tolist(), workload.controlnets[:n_requests], strict=True):
        if key not in together:
            together[key] = int(checkpoint_bytes[key[0]]) + sum(int(controlnet_bytes[c]) for c in sorted(set(key[1])))
    in_process = max(together.values(), default=0)
    apart = int(np.max(checkpoint_bytes, initial=0))
    largest_controlnet = int(np.max(controlnet_bytes, initial=0))
    largest_lora = int(np.max(sizes.of_loras(workload.lora_names), initial=0))
    largest = int(workload.forward_batch[:n_requests].max(initial=0))
    problems = []
    for pool in allocation.pools:
        own = facts_of(facts, pool)
        capacity_bytes = device_bytes_for_models(workload, own, n_requests)
        if pool.role == "controlnet":
            needed, what = largest_controlnet, "the largest ControlNet"
        elif pool.topology == "decoupled":
            needed, what = apart, "the largest checkpoint"
        else:
            needed, what = in_process, "a checkpoint with the ControlNets of one request"
        if pool.role == "base" and largest_lora > max(needed, capacity_bytes):
            needed, what = largest_lora, "the largest LoRA"
        if needed > capacity_bytes:
            problems.append(
                Problem(
                    f"allocation pool {pool.name!r}",
                    f"{what} takes {needed / GIB:.1f} GiB of device memory",
                    f"at most {capacity_bytes / GIB:.1f} GiB ({own.device_memory_gib:g} GiB less activations of {largest} samples)",
                    "Use GPUs with more memory, smaller batches, or ControlNet workers.",
                )
            )
    if problems:
        raise InputError(problems)


def check_residency(replicas: Sequence[BaseReplica], workers: Sequence[ControlNetWorker]) -> None:
    """Raises :class:`planner.consistency.BrokenRunError` if some memory holds more than it has (our fault)."""
    memories: list[tuple[str, tuple[Cache, ...]]] = [
        (r.worker_id, (r.device, r.host_checkpoints, r.host_controlnets, r.host_loras)) for r in replicas
    ]
    memories += [(worker.worker_id, (worker.device, worker.host)) for worker in workers]
    for name, caches in memories:
        for cache in caches:
            if not 0 <= cache.used_bytes <= max(cache.capacity_bytes, 0):
                raise BrokenRunError(f"{name} holds {cache.used_bytes} of {cache.capacity_bytes} bytes")


def check_services(allocation: Allocation, services: Mapping[str, ServiceTable], n: int) -> None:
    """Raises :class:`InputError` if a base pool lacks its table, or has one of another topology or length."""
    problems = []
    for pool in allocation.pools:
        table = services.get(pool.name)
        place = f"allocation pool {pool.name!r}"
        if table is None and pool.role == "controlnet":
            continue  # its forwards then take what the base pool's table says
        if table is None:
            problems.append(Problem(place, "has no service table", f"one of {sorted(services)}", "Build one for it."))
        elif len(table) != n:
            problems.append(Problem(place, f"its service table has {len(table)} rows", f"{n}, one a request"))
        elif table.topology != pool.topology:
            problems.append(Problem(place, f"its service table is for {table.topology!r}", repr(pool.topology)))
    if problems:
        raise InputError(problems)


def hosts(ids: Sequence[str], name: str) -> bool:
    """Whether a list of ids of a pool covers a model."""
    return ANY in ids or name in ids


def _host_bytes(size_gib: float) -> int:
    return int(size_gib * GIB)


def _preload(cache: Cache, keys: Sequence[int]) -> None:
    """Fills a cache, first keys first, without evicting any."""
    kept = []
    room_bytes = cache.capacity_bytes
    for key in dict.fromkeys(keys):
        if cache.n_bytes[key] <= room_bytes:
            room_bytes -= cache.n_bytes[key]
            kept.append(key)
    for key in reversed(kept):  # the first becomes the most recent
        cache.insert(key)
