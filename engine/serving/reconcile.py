"""From an allocation to the workers it wants, and from one allocation to the next: decisions only, no processes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from engine.allocation import Allocation, Topology
from engine.workers.setup import Role
from traces.problems import InputError, Problem

LOADER_POOL: Final = "loaders"
CPU: Final = "cpu"


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One replica that is wanted."""

    worker_id: str
    pool: str
    role: Role
    topology: Topology = "colocated"
    n_ranks: int = 1
    """Processes, each with a device of its own."""
    gpu_kind: str = ""
    base_model_ids: tuple[str, ...] = ()
    controlnet_ids: tuple[str, ...] = ()

    @property
    def identity(self) -> tuple[object, ...]:
        """What cannot change while the replica runs; the ids it may hold can."""
        return (self.worker_id, self.pool, self.role, self.topology, self.n_ranks, self.gpu_kind)


Pairing = tuple[str, str]
"""Base worker, ControlNet worker."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Everything an allocation asks for."""

    workers: Mapping[str, WorkerSpec]
    pairings: frozenset[Pairing]


@dataclass(frozen=True, slots=True)
class Difference:
    """What turns one set of workers into another; each in the order in which it is best done."""

    start: tuple[WorkerSpec, ...]
    stop: tuple[str, ...]
    update: tuple[WorkerSpec, ...]
    """Goes on in the same processes with other ids that it may hold."""
    keep: tuple[str, ...]
    attach: tuple[Pairing, ...]
    """Among workers that stay; those of new ones follow when they are ready."""
    detach: tuple[Pairing, ...]


def wanted_by(allocation: Allocation, n_loaders: int) -> Wanted:
    """The workers and pairs of an allocation.

    Every replica of a decoupled base pool is paired with every replica of the ControlNet pools that links name for it; of all
    ControlNet pools, if no link names the base pool.
    """
    workers: dict[str, WorkerSpec] = {}
    members: dict[str, list[str]] = {}
    for pool in allocation.pools:
        is_pair = pool.role == "base" and pool.topology == "decoupled_cfg2"
        members[pool.name] = [f"{pool.name}-{index}" for index in range(pool.n_replicas)]
        for worker_id in members[pool.name]:
            workers[worker_id] = WorkerSpec(
                worker_id=worker_id,
                pool=pool.name,
                role=pool.role,
                topology=pool.topology,
                n_ranks=2 if is_pair else 1,
                gpu_kind=pool.gpu_kind,
                base_model_ids=pool.base_model_ids if pool.role == "base" else (),
                controlnet_ids=pool.controlnet_ids if _hosts(pool.role, pool.topology) else (),
            )
    for index in range(n_loaders):
        worker_id = f"{LOADER_POOL}-{index}"
        workers[worker_id] = WorkerSpec(worker_id, LOADER_POOL, "loader")
    pairings: set[Pairing] = set()
    for base in allocation.pools_of("base"):
        if not base.topology.startswith("decoupled"):
            continue
        linked = [link.controlnet_pool for link in allocation.links if link.base_pool == base.name]
        for pool in allocation.pools_of("controlnet"):
            if not linked or pool.name in linked:
                pairings.update((one, other) for one in members[base.name] for other in members[pool.name])
    return Wanted(workers, frozenset(pairings))


def difference(now: Wanted, then: Wanted) -> Difference:
    """What is to be done; workers in neither ``start``, ``stop`` nor ``update`` are not touched."""
    stays = {
        name
        for name, spec in then.workers.items()
        if name in now.workers and now.workers[name].identity == spec.identity
    }
    update = tuple(then.workers[name] for name in sorted(stays) if now.workers[name] != then.workers[name])
    kept_pairs = {pair for pair in now.pairings | then.pairings if set(pair) <= stays}
    return Difference(
        start=tuple(spec for name, spec in then.workers.items() if name not in stays),
        stop=tuple(name for name in now.workers if name not in stays),
        update=update,
        keep=tuple(sorted(stays)),
        attach=tuple(sorted((then.pairings - now.pairings) & kept_pairs)),
        detach=tuple(sorted((now.pairings - then.pairings) & kept_pairs)),
    )


def check_runnable(allocation: Allocation) -> list[Problem]:
    """What this engine cannot start although the simulator can simulate it."""
    problems = []
    for pool in allocation.pools:
        place = f"allocation pool {pool.name!r}"
        if pool.name == LOADER_POOL:
            problems.append(Problem(place, "is the name of the engine's own loaders", "another name", "Rename it."))
        if "/" in pool.name or "\0" in pool.name or pool.name.startswith("."):
            problems.append(
                Problem(place, "has a name that cannot be part of a file name", "no /, no leading dot", "Rename it.")
            )
        if pool.role == "base" and pool.topology in {"diffusers", "diffusers_tuned"}:
            problems.append(
                Problem(
                    place,
                    f"topology is {pool.topology}, a baseline",
                    "colocated, decoupled or decoupled_cfg2",
                    "Set it.",
                )
            )
        if pool.role == "base" and pool.topology in {"colocated", "decoupled"} and pool.n_gpus_per_replica != 1:
            problems.append(
                Problem(place, f"n_gpus_per_replica is {pool.n_gpus_per_replica}", f"1 for {pool.topology}", "Set it.")
            )
    return problems


class Devices:
    """Gives devices to replicas in order; one that is named twice can be given twice."""

    def __init__(self, devices: Sequence[str]) -> None:
        self._slots = tuple(devices)
        self._taken: dict[str, tuple[int, ...]] = {}

    @property
    def is_unlimited(self) -> bool:
        """Whether everything runs on the CPU."""
        return all(device == CPU for device in self._slots)

    def check(self, specs: Collection[WorkerSpec]) -> None:
        """Raises :class:`InputError` unless all of these fit together."""
        n_wanted = sum(spec.n_ranks for spec in specs if spec.role != "loader")
        if not self._slots:
            raise InputError(Problem("--devices", "names no device", "at least one", "Name cpu or cuda:0,cuda:1."))
        if not self.is_unlimited and n_wanted > len(self._slots):
            raise InputError(
                Problem(
                    "--devices",
                    f"names {len(self._slots)} devices, the allocation needs {n_wanted}",
                    f"{n_wanted} devices",
                    "Name a device twice if workers may share it, or use a smaller allocation.",
                )
            )

    def can_take(self, n_ranks: int) -> bool:
        """Whether so many devices are free."""
        return self.is_unlimited or len(self._free()) >= n_ranks

    def take(self, spec: WorkerSpec) -> tuple[str, ...]:
        """The devices of a replica; :meth:`can_take` must hold. Loaders run on the CPU."""
        if spec.role == "loader" or self.is_unlimited:
            return (CPU,) * spec.n_ranks
        slots = tuple(self._free()[: spec.n_ranks])
        self._taken[spec.worker_id] = slots
        return tuple(self._slots[slot] for slot in slots)

    def give_back(self, worker_id: str) -> None:
        """A replica is gone."""
        self._taken.pop(worker_id, None)

    def _free(self) -> list[int]:
        taken = {slot for slots in self._taken.values() for slot in slots}
        return [slot for slot in range(len(self._slots)) if slot not in taken]


def _hosts(role: str, topology: str) -> bool:
    """Whether a worker runs ControlNets in its own process."""
    return role == "controlnet" or not topology.startswith("decoupled")
