"""The workers that are up: what each may hold and holds, who may use whom, and which batch runs where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.allocation import ANY, Pool
from engine.policies.routing import affinity, control_load, least_loaded
from engine.serving.job import Job
from engine.serving.ports import BaseReplicaInfo, ControlNetWorkerInfo
from engine.serving.waiting import Group, Ticket


@dataclass(slots=True, eq=False)
class Batch:
    """Jobs that a base replica runs together."""

    info: BaseReplicaInfo
    tickets: dict[str, Ticket]
    """Those that have not ended yet, by request id."""
    request_ids: frozenset[str]
    """All of them."""
    start_s: float
    forward_batch: int
    controlnet_workers: tuple[Mapping[str, str], ...]
    """ControlNet id to worker, for each rank of the replica."""
    loads: Mapping[str, float]
    """ControlNet worker to the load this batch puts on it."""
    lora_ids: tuple[str, ...]
    """Pinned until it ends."""
    was_resident: bool
    """Whether its checkpoint was believed to be on the device."""
    had_company: bool = False
    """Another batch has used one of its ControlNet workers at the same time."""
    awaited_loras: set[str] = field(default_factory=set)
    """LoRAs that were not there when it started, and of which the replica has not been told yet."""
    lost_loras: set[str] = field(default_factory=set)
    """LoRAs whose fetch failed, for a reason that need not last, while it waited for them."""

    @property
    def worker_id(self) -> str:
        """The replica that runs it."""
        return self.info.worker_id


@dataclass(slots=True, eq=False)
class Base:
    """One base replica."""

    info: BaseReplicaInfo
    resident: dict[str, None]
    """Checkpoints believed to be on its device: what it said, and what it ran since."""
    warm_controlnets: dict[str, None] = field(default_factory=dict)
    """ControlNets that ran in its process since it came up."""
    is_draining: bool = False
    batch: Batch | None = None

    @property
    def is_open(self) -> bool:
        """Whether it takes a batch now."""
        return self.batch is None and not self.is_draining

    @property
    def n_ranks(self) -> int:
        """Its processes; each of a pair runs half of a guided batch."""
        return 2 if self.info.topology == "decoupled_cfg2" else 1

    @property
    def is_decoupled(self) -> bool:
        """Whether its ControlNets run on ControlNet workers."""
        return self.info.topology.startswith("decoupled")


@dataclass(slots=True, eq=False)
class ControlNetWorker:
    """One ControlNet worker."""

    info: ControlNetWorkerInfo
    resident: dict[str, None]
    is_draining: bool = False


class Roster:
    """All workers, in the order in which they came up; that order decides ties."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self.bases: dict[str, Base] = {}
        self.controlnets: dict[str, ControlNetWorker] = {}
        self._pairs: set[tuple[str, str]] = set()
        self._loads: dict[str, float] = {}
        self._n_batches: dict[str, int] = {}
        """Batches that use a ControlNet worker; also of one that is gone, until they end."""
        self._pools: dict[str, Pool] = {}
        self._is_declared = False
        self.set_pools(pools)

    # who is there

    def set_pools(self, pools: Sequence[Pool]) -> None:
        """The pools of the allocation: what may be served, whether or not a worker is up.

        Replicas of other pools get nothing more. Without any, the workers that come up say what there is.
        """
        self._pools = {pool.name: pool for pool in pools}
        self._is_declared = bool(pools)
        for base in self.bases.values():
            self._learn_base(base.info)
        for worker in self.controlnets.values():
            self._learn_controlnet(worker.info)

    def base_up(self, info: BaseReplicaInfo) -> bool:
        """Adds a replica, or notes what an idle one holds by now; True if the pools have changed by it."""
        known = self.bases.get(info.worker_id)
        if known is not None:
            known.info, known.is_draining = info, False
            known.resident = dict.fromkeys(info.resident_base_model_ids)
        else:
            self.bases[info.worker_id] = Base(info, dict.fromkeys(info.resident_base_model_ids))
        return self._learn_base(info)

    def base_down(self, worker_id: str) -> Batch | None:
        """Removes a replica and its attachments; gives what it ran."""
        base = self.bases.pop(worker_id, None)
        self._pairs = {pair for pair in self._pairs if pair[0] != worker_id}
        return None if base is None else base.batch

    def controlnet_up(self, info: ControlNetWorkerInfo) -> bool:
        """Adds a ControlNet worker; True if the pools have changed by it."""
        self.controlnets[info.worker_id] = ControlNetWorker(info, dict.fromkeys(info.resident_controlnet_ids))
        return self._learn_controlnet(info)

    def controlnet_down(self, worker_id: str) -> None:
        """Removes a ControlNet worker and its attachments."""
        self.controlnets.pop(worker_id, None)
        self._pairs = {pair for pair in self._pairs if pair[1] != worker_id}

    def attach(self, base_worker_id: str, controlnet_worker_id: str) -> None:
        """The base may use the ControlNet worker."""
        self._pairs.add((base_worker_id, controlnet_worker_id))

    def detach(self, base_worker_id: str, controlnet_worker_id: str) -> None:
        """It may no longer, from its next batch on."""
        self._pairs.discard((base_worker_id, controlnet_worker_id))

    def is_used(self, worker_id: str) -> bool:
        """Whether a batch runs on, or uses, this worker."""
        base = self.bases.get(worker_id)
        return (base is not None and base.batch is not None) or self._n_batches.get(worker_id, 0) > 0

    # what can be served where

    def group_of(self, job: Job) -> Group:
        """The base pools that can serve a job once their workers are up; () if none can."""
        return tuple(pool.name for pool in self._pools.values() if pool.role == "base" and self._can_serve(pool, job))

    @property
    def base_pools(self) -> list[str]:
        """All of them, whether or not a worker is up."""
        return [pool.name for pool in self._pools.values() if pool.role == "base"]

    def open_bases(self, group: Group) -> list[Base]:
        """Replicas of these pools that take a batch now."""
        return [base for base in self.bases.values() if base.is_open and base.info.pool in group]

    def n_replicas(self, group: Group) -> int:
        """Replicas of these pools that are up and stay."""
        return sum(base.info.pool in group and not base.is_draining for base in self.bases.values())

    def can_start(self, base: Base, ticket: Ticket) -> bool:
        """Whether an open replica could run a ticket now: it may hold the checkpoint and reaches every ControlNet."""
        info = base.info
        if not _hosts(info.base_model_ids, ticket.job.base_model_id):
            return False
        if not base.is_decoupled:
            return all(_hosts(info.controlnet_ids, name) for name in ticket.controlnet_ids)
        return all(self._candidates(info.worker_id, name) for name in ticket.controlnet_ids)

    def affinity_of(self, base: Base, ticket: Ticket) -> int:
        """How much of what a ticket needs a replica, or the workers it reaches, hold already."""
        if base.is_decoupled:
            n_warm = sum(
                any(name in self.controlnets[worker].resident for worker in self._candidates(base.info.worker_id, name))
                for name in ticket.controlnet_ids
            )
        else:
            n_warm = sum(name in base.warm_controlnets for name in ticket.controlnet_ids)
        return affinity(ticket.job.base_model_id in base.resident, n_warm)

    # batches

    def begin(self, base: Base, tickets: Sequence[Ticket], now_s: float) -> Batch:
        """Chooses the ControlNet workers and makes the replica busy. :meth:`can_start` must hold."""
        head = tickets[0]
        forward_batch = sum(ticket.job.forward_batch for ticket in tickets)
        chosen: list[dict[str, str]] = [{}]
        loads: dict[str, float] = {}
        if base.is_decoupled:
            # Each rank of a pair runs half of a guided batch, and its half may go to a worker of its own.
            if base.n_ranks == 2 and head.job.uses_cfg:
                chosen.append({})
            for use in head.job.controls:
                load = control_load(head.job.n_steps, use.start, use.end, forward_batch) if use.scale != 0.0 else 0.0
                for of_rank in chosen:
                    self._choose(base, use.controlnet_id, load / len(chosen), of_rank, loads)
        else:
            base.warm_controlnets.update(dict.fromkeys(head.controlnet_ids))
        company = [
            other.batch for other in self.bases.values() if other.batch and loads.keys() & other.batch.loads.keys()
        ]
        for other in company:
            other.had_company = True
        for worker_id, load in loads.items():
            self._loads[worker_id] = self._loads.get(worker_id, 0.0) + load
            self._n_batches[worker_id] = self._n_batches.get(worker_id, 0) + 1
        base.batch = Batch(
            info=base.info,
            tickets={ticket.job.request_id: ticket for ticket in tickets},
            request_ids=frozenset(ticket.job.request_id for ticket in tickets),
            start_s=now_s,
            forward_batch=forward_batch,
            controlnet_workers=tuple(chosen) if len(chosen) == base.n_ranks else (chosen[0],) * base.n_ranks,
            loads=loads,
            lora_ids=head.lora_ids,
            was_resident=head.job.base_model_id in base.resident,
            had_company=bool(company),
        )
        base.resident[head.job.base_model_id] = None
        return base.batch

    def end(self, batch: Batch) -> None:
        """Makes the replica, if it is still there, and the ControlNet workers free of a batch."""
        base = self.bases.get(batch.worker_id)
        if base is not None and base.batch is batch:
            base.batch = None
        for worker_id, load in batch.loads.items():
            self._n_batches[worker_id] -= 1
            self._loads[worker_id] -= load
            if self._n_batches[worker_id] == 0:  # rounding must not decide ties between unused workers
                del self._n_batches[worker_id]
                del self._loads[worker_id]

    def switched(self, worker_id: str, base_model_id: str) -> None:
        """A replica had to load a checkpoint: what else was believed resident may have made room for it."""
        base = self.bases.get(worker_id)
        if base is not None:
            base.resident = {base_model_id: None}

    def _choose(
        self, base: Base, controlnet_id: str, load: float, chosen: dict[str, str], loads: dict[str, float]
    ) -> None:
        """Who computes a ControlNet for one rank; ``chosen`` and ``loads`` are those of the batch so far."""
        worker_id = chosen.get(controlnet_id)
        if worker_id is None:
            names = self._candidates(base.info.worker_id, controlnet_id)
            carried = [self._loads.get(name, 0.0) + loads.get(name, 0.0) for name in names]
            resident = [controlnet_id in self.controlnets[name].resident for name in names]
            worker_id = chosen[controlnet_id] = names[least_loaded(carried, resident)]
            self.controlnets[worker_id].resident[controlnet_id] = None
        loads[worker_id] = loads.get(worker_id, 0.0) + load

    def _candidates(self, base_worker_id: str, controlnet_id: str) -> list[str]:
        return [
            name
            for name, worker in self.controlnets.items()
            if not worker.is_draining
            and _hosts(worker.info.controlnet_ids, controlnet_id)
            and (base_worker_id, name) in self._pairs
        ]

    def _can_serve(self, pool: Pool, job: Job) -> bool:
        if not _hosts(pool.base_model_ids, job.base_model_id):
            return False
        if not pool.topology.startswith("decoupled"):
            return all(_hosts(pool.controlnet_ids, use.controlnet_id) for use in job.controls)
        remote = [other for other in self._pools.values() if other.role == "controlnet"]
        return all(any(_hosts(other.controlnet_ids, use.controlnet_id) for other in remote) for use in job.controls)

    def _learn_base(self, info: BaseReplicaInfo) -> bool:
        if self._is_declared or info.pool in self._pools:
            return False
        self._pools[info.pool] = Pool(
            info.pool, "base", 1, info.gpu_kind, info.n_gpus, info.topology, info.base_model_ids, info.controlnet_ids
        )
        return True

    def _learn_controlnet(self, info: ControlNetWorkerInfo) -> bool:
        if self._is_declared or info.pool in self._pools:
            return False
        self._pools[info.pool] = Pool(info.pool, "controlnet", 1, info.gpu_kind, controlnet_ids=info.controlnet_ids)
        return True


def _hosts(ids: Sequence[str], name: str) -> bool:
    return ANY in ids or name in ids
