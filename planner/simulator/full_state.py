"""What a run with mechanisms holds: the fleet, the waiting room, the LoRA tiers, the gauges that autoscalers look at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from engine.allocation import GIB, Allocation, Pool
from engine.policies.routing import affinity, best_replica
from planner.consistency import BrokenRunError
from planner.service import ServiceTable, Sizes
from planner.simulator.allocated import places
from planner.simulator.autoscaler import Autoscaler, Gauge, Sight
from planner.simulator.batches import BatchClock, kinds_of
from planner.simulator.coupling import Client, Coupling
from planner.simulator.fleet import Fleet, Member, State
from planner.simulator.full_placement import FullPlacer
from planner.simulator.full_records import FullRecorder
from planner.simulator.lora_tiers import Fetching, HostTier, Store
from planner.simulator.model import StaticRun
from planner.simulator.placement import Placement
from planner.simulator.replicas import BaseReplica, FactsByPool
from planner.simulator.waiting import Key, WaitingRoom
from planner.simulator.world import World
from planner.workload import Workload


class Job:
    """One or more requests on a base replica, from take-up to their end."""

    __slots__ = (
        "client", "denoised_s", "fetching", "is_over", "lora_wait_s", "placement", "prepared_s", "ready_s", "replica", "requests",
        "stages_s", "start_s",
    )  # fmt: skip

    def __init__(self, requests: list[int], replica: BaseReplica, start_s: float) -> None:
        self.requests = requests
        self.replica = replica
        self.start_s = start_s
        self.ready_s = start_s
        """When its models are there: until then the replica is loading."""
        self.prepared_s = start_s
        self.lora_wait_s = 0.0
        self.stages_s: tuple[float, float, float] | None = None
        self.placement: Placement | None = None
        self.client: Client | None = None
        self.fetching: Fetching | None = None
        self.denoised_s: float | None = None
        self.is_over = False


class FullState(StaticRun):
    """State of one run with mechanisms, and what can be read from it. What happens is added by the classes on top."""

    def __init__(
        self,
        workload: Workload,
        allocation: Allocation,
        services: Mapping[str, ServiceTable],
        sizes: Sizes,
        facts: FactsByPool,
        n_requests: int,
        world: World,
    ) -> None:
        sized = replace(allocation, pools=tuple(replace(pool, n_replicas=places(pool)) for pool in allocation.pools))
        speeds = {pool.name: pool.speed_ratio or 1.0 / pool.workers_per_gpu for pool in allocation.pools}
        tables = {
            pool.name: services[pool.name]
            if speeds[pool.name] == 1.0
            else services[pool.name].slowed(1.0 / speeds[pool.name])
            for pool in allocation.pools
            if pool.name in services
        }
        for pool in allocation.pools_of("controlnet"):
            if pool.name not in tables and speeds[pool.name] != 1.0:
                served = services[next(p.name for p in allocation.pools_of("base") if p.topology == "decoupled")]
                tables[pool.name] = served.slowed(1.0 / speeds[pool.name])
        super().__init__(workload, sized, tables, sizes, facts, n_requests)
        self._allocation = allocation
        self._world = world
        base_pools = sized.pools_of("base")
        controlnet_pools = sized.pools_of("controlnet")
        self.recorder: FullRecorder = FullRecorder(
            workload, base_pools, tables, self.replicas, self.workers, n_requests
        )
        self.placer: FullPlacer = FullPlacer(workload, sized, tables, self.workers, self.recorder.controlnet_load)
        self.coupling = Coupling(self.env, self.recorder.controlnet_span)
        self._rebuild = (workload, sized, sizes, facts, n_requests)
        policies = allocation.policies
        self._policies = policies
        self._batch_max = policies.forward_batch_max
        needs_kinds = self._batch_max is not None or policies.switch_overtake_max > 0 or policies.overtake_max > 0
        self._kinds = kinds_of(workload) if needs_kinds else None
        self._clocks = [
            BatchClock(tables[pool.name], tables[pool.name].batch, workload)  # type: ignore[arg-type]
            if self._batch_max is not None
            else None
            for pool in base_pools
        ]
        self._samples: list[int] = workload.forward_batch.tolist()
        self._n_images: list[int] = workload.n_images.tolist()
        self._alone_s = [tables[pool.name].alone_s.tolist() for pool in base_pools]
        self._request_key: list[int] = workload.request_key.tolist()
        if policies.deadline_s is not None:
            self.deadline_s = [policies.deadline_s if math.isnan(d) else d for d in self.deadline_s]
        self.room = WaitingRoom(workload, policies, self.group_of, self._kinds)
        self._is_decoupled = [pool.topology == "decoupled" for pool in base_pools]
        self._n_attempts: dict[int, int] = {}
        self._n_rejections: dict[int, int] = {}
        self._n_overtaken: dict[int, int] = {}
        self._place_in_line: dict[int, Key] = {}
        self._has_expiry: set[int] = set()
        self._jobs: dict[int, Job] = {}
        """By replica."""
        self._n_open = n_requests
        self._last_taken_s = 0.0
        self._ripening_s = math.inf
        self._build_tiers(workload, sized, sizes)
        self._build_fleet(base_pools, controlnet_pools)

    def _build_tiers(self, workload: Workload, sized: Allocation, sizes: Sizes) -> None:
        policies, store = self._policies, self._world.lora_store
        self._lora_bytes: list[int] = sizes.of_loras(workload.lora_names).tolist()
        self._tiers: list[HostTier] | None = None
        is_default = policies.lora_cache_policy == "lru" and policies.replicas_per_host == 1 and store is None
        if is_default:
            return
        per_host = policies.replicas_per_host
        capacity_bytes = int(policies.lora_cache_gib * GIB) * per_host
        self._tiers = []
        for p in range(len(sized.pools_of("base"))):
            hosts: list[HostTier] = []
            for number, _ in enumerate(r for r in self.replicas if r.pool == p):
                if number // per_host == len(hosts):
                    hosts.append(
                        HostTier(
                            self._lora_bytes, capacity_bytes, policies.lora_cache_policy, policies.lora_cache_ttl_s
                        )
                    )
                self._tiers.append(hosts[number // per_host])
        bandwidth = math.inf if store is None else store.bandwidth_gib_per_s * GIB
        self._store = Store(self.env, bandwidth)

    @property
    def lora_tiers(self) -> list[HostTier] | None:
        """Of each base replica its host's; None where each has a cache of its own."""
        return self._tiers

    def _build_fleet(self, base_pools: Sequence[Pool], controlnet_pools: Sequence[Pool]) -> None:
        pools = [*self._allocation.pools_of("base"), *self._allocation.pools_of("controlnet")]
        n_base = len(base_pools)
        members: list[list[Member]] = [[] for _ in pools]
        for replica in self.replicas:
            members[replica.pool].append(Member(replica.index, replica.pool, replica))
        names = [pool.name for pool in controlnet_pools]
        for worker in self.workers:
            p = n_base + names.index(worker.pool.name)
            members[p].append(Member(len(self.replicas) + worker.index, p, worker))
        self._members = [member for pool in members for member in pool]
        self._member_of = {member.index: member for member in self._members}
        self._fleet = Fleet(self.env, pools, members, self._world, self)
        self._sights = [Sight(Gauge(), Gauge()) for _ in pools]
        self._scalers = {
            p: Autoscaler(pool.autoscale, self._sights[p], pool.n_replicas)
            for p, pool in enumerate(pools)
            if pool.autoscale is not None
        }
        # a waiting request counts at every autoscaled pool that could serve it, shared evenly; at ControlNet pools wholly
        self._stakes: list[list[tuple[int, float]]] = []
        for group in self.groups:
            scaled = [p for p in group.pools if p in self._scalers]
            self._stakes.append([(p, 1.0 / len(scaled)) for p in scaled])
        self._pools_of_controlnet = [
            {n_base + names.index(worker.pool.name) for worker in hosting} & set(self._scalers)
            for hosting in self.placer.hosting
        ]

    def _stake_of(self, i: int) -> list[tuple[int, float]]:
        stakes = self._stakes[self.group_of[i]]
        pools = {p for code in self.controlnets[i] for p in self._pools_of_controlnet[code]}
        return [*stakes, *((p, 1.0) for p in sorted(pools))] if pools else stakes

    def _controlnet_pools_of(self, job: Job) -> list[int]:
        if not self.tables[job.replica.pool].is_remote[job.requests[0]]:
            return []
        return sorted({p for code in self.controlnets[job.requests[0]] for p in self._pools_of_controlnet[code]})

    def _usable(self, pools: Sequence[int], needs: Sequence[int]) -> list[int]:
        """Of these base pools, those with an idle replica, and ControlNet workers if they need some."""
        return [
            p
            for p in pools
            if self.idle[p] and (not needs or not self._is_decoupled[p] or self.placer.can_place(needs))
        ]

    def _best_idle_of(self, i: int) -> int:
        """The idle replica with most of what the request needs; -1 if none can take it."""
        found: list[int] = []
        values: list[int] = []
        now_s = self.env.now
        code, loras, controlnets = self.checkpoint[i], self.loras[i], self.controlnets[i]
        perfect = affinity(True, len(loras) + len(controlnets))
        for p in self._usable(self.groups[self.group_of[i]].pools, controlnets):
            is_remote = self.tables[p].is_remote[i]
            for index in self.idle[p]:
                candidate = self.replicas[index]
                n_warm = 0
                for lora in loras:
                    n_warm += self._has_lora(candidate, lora, now_s)
                if is_remote:
                    n_warm += len(controlnets)
                else:
                    for controlnet in controlnets:
                        n_warm += candidate.device.holds(self.n_checkpoints + controlnet)
                value = affinity(candidate.device.holds(code), n_warm)
                if value == perfect:
                    return index  # those before it have less, none can have more
                found.append(index)
                values.append(value)
        best = best_replica(values)
        return found[best] if best >= 0 else -1

    def _has_lora(self, candidate: BaseReplica, lora: int, now_s: float) -> bool:
        if self._tiers is None:
            return candidate.host_loras.holds(lora)
        return self._tiers[candidate.index].holds(lora, now_s)

    def _end(self, i: int) -> None:
        self._n_open -= 1

    def check_tiers(self) -> None:
        """Raises :class:`planner.consistency.BrokenRunError` if a LoRA tier held more than it has (our fault)."""
        for tier in self._tiers or ():
            if tier.peak_bytes > tier.capacity_bytes:
                raise BrokenRunError(f"a LoRA tier held {tier.peak_bytes} of {tier.capacity_bytes} bytes")

    def _dispatch(self, now_s: float) -> None:
        """Takes up whatever can start now."""
        raise NotImplementedError  # the queue's

    def is_in_use(self, member: Member) -> bool:
        """Whether a request runs on it."""
        raise NotImplementedError  # the run's, like those below

    def came_up(self, member: Member, now_s: float) -> None:
        """It serves from now on."""
        raise NotImplementedError

    def closed(self, member: Member, now_s: float) -> None:
        """It takes nothing new from now on."""
        raise NotImplementedError

    def stopped(self, member: Member, now_s: float) -> None:
        """Its process has ended."""
        raise NotImplementedError

    def lost(self, member: Member, why: str, now_s: float) -> None:
        """Whatever runs on it is lost: tried again, or failed."""
        raise NotImplementedError

    def load_s(self, member: Member) -> float:
        """Empties its memory and says how long loading what it starts with takes."""
        raise NotImplementedError

    def span(self, member: Member, state: State, begin_s: float, end_s: float) -> None:
        """It was in this state; for the records."""
        raise NotImplementedError
