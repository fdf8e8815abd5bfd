"""The run: arrivals, queues, take-up, stages, completion, as SimPy events with callbacks.

A request that shares nothing needs two events (arrival, completion), because every stage's length is known when a replica
takes it up; one that denoises with ControlNet workers needs two more. Rules:

- Requests that the same base pools can serve wait in one queue, first come, first served. An arrival that finds idle replicas
  goes to the one that already holds most of what it needs; a replica that becomes free takes the oldest request it can serve.
- Checkpoints and in-process ControlNets share the device's memory, least recently used out first. A resident checkpoint is
  active at once; another is loaded from host memory, and fetched there first if that does not hold it.
- With ControlNet workers, loads run while the base switches checkpoint and encodes text; only what remains is waited for.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Mapping

import numpy as np
from simpy.events import Event

from engine.allocation import Allocation
from engine.policies.admission import UNLIMITED, is_admitted
from engine.policies.routing import affinity, best_replica
from planner.consistency import check_run
from planner.service import ServiceTable, Sizes
from planner.simulator.coupling import Client, Coupling
from planner.simulator.eligibility import pools_of_requests
from planner.simulator.environment import ARRIVAL, COMPLETION, EXPIRY, ExactEnvironment
from planner.simulator.mechanisms import check_mechanisms, mechanisms_in_use
from planner.simulator.placement import Placement, Placer, StepParts
from planner.simulator.records import Recorder
from planner.simulator.replicas import (
    BaseReplica,
    FactsByPool,
    build_base_replicas,
    build_controlnet_workers,
    check_memory,
    check_residency,
    check_services,
)
from planner.simulator.result import ProfileFacts, SimulationResult
from planner.simulator.start_state import StartState, set_start
from planner.simulator.world import STILL, World
from planner.workload import Workload


def simulate(
    workload: Workload,
    allocation: Allocation,
    services: Mapping[str, ServiceTable],
    sizes: Sizes,
    profile_facts: FactsByPool,
    *,
    until_s: float | None = None,
    world: World = STILL,
    start: StartState | None = None,
) -> SimulationResult:
    """Runs the workload through the allocation, from empty queues until every accepted request has ended.

    Deterministic: all randomness (arrivals, service noise, profile draw) is in ``workload`` and ``services``, and that of
    failures, reclaims and clients in ``world.seed``.

    Args:
        services: base pool name to the table of its topology; every base pool needs one, of the workload's length. A
            ControlNet pool may have one too, if its workers are of another kind than those of the base pools.
        profile_facts: the same for every pool, or by pool name where GPU kinds differ.
        until_s: leaves out requests that arrive at or after this; those before it still run to their end.
        start: what the workers hold at the start, beside what their pools name; None: nothing.

    Raises:
        InputError: something the requests need does not fit a device, a base pool has no table, or a mechanism is set in a way
            that cannot work.
        planner.consistency.BrokenRunError: the run violates conservation or causality (our fault).
    """
    n_requests = len(workload) if until_s is None else int(np.searchsorted(workload.arrival_s, until_s, side="left"))
    check_services(allocation, services, len(workload))
    offered_until_s = workload.duration_s if until_s is None else until_s
    is_mixed = any(pool.name in services for pool in allocation.pools_of("controlnet"))
    if mechanisms_in_use(allocation, world) or is_mixed or not isinstance(profile_facts, ProfileFacts):
        return simulate_fully(
            workload, allocation, services, sizes, profile_facts, n_requests, offered_until_s, world, start
        )
    check_memory(allocation, workload, sizes, profile_facts, n_requests)
    run = StaticRun(workload, allocation, services, sizes, profile_facts, n_requests)
    if start is not None:
        set_start(start, workload, run.replicas, run.workers, None)
    run.run()
    check_residency(run.replicas, run.workers)
    result = run.recorder.result(run.env.n_events, offered_until_s)
    check_run(result, workload)
    return result


def simulate_fully(
    workload: Workload,
    allocation: Allocation,
    services: Mapping[str, ServiceTable],
    sizes: Sizes,
    profile_facts: FactsByPool,
    n_requests: int,
    offered_until_s: float,
    world: World,
    start: StartState | None = None,
) -> SimulationResult:
    """:func:`simulate` with every mechanism at hand, whether one is on or not."""
    from planner.simulator.full_run import FullRun  # it extends StaticRun

    check_mechanisms(allocation, world, services, profile_facts)
    check_memory(allocation, workload, sizes, profile_facts, n_requests)
    run = FullRun(workload, allocation, services, sizes, profile_facts, n_requests, world)
    run.set_window(offered_until_s)
    if start is not None:
        set_start(start, workload, run.replicas, run.workers, run.lora_tiers)
    run.run()
    check_residency(run.replicas, run.workers)
    run.check_tiers()
    result = run.recorder.result(run.env.n_events, offered_until_s)
    check_run(result, workload, may_batch=allocation.policies.forward_batch_max is not None)
    return result


class _Group:
    """A queue of requests that the same pools can serve."""

    __slots__ = ("n_waiting", "pools", "waiting")

    def __init__(self, pools: tuple[int, ...]) -> None:
        self.pools = pools
        self.waiting: deque[int] = deque()
        """May still hold expired requests behind the first one."""
        self.n_waiting = 0


class Table:
    """A pool's service table as lists, read once per request."""

    __slots__ = (
        "attach_detach_s",
        "checkpoint_fetch_s",
        "checkpoint_load_s",
        "compute_s",
        "is_remote",
        "lora_fetch_s",
        "lora_hidden_s",
        "noise_ratio",
        "parts",
        "text_s",
    )

    def __init__(self, service: ServiceTable) -> None:
        self.text_s: list[float] = service.text_s.tolist()
        self.compute_s: list[float] = (service.text_s + service.denoise_alone_s + service.decode_s).tolist()
        self.attach_detach_s: list[float] = (service.lora_attach_s + service.lora_detach_s).tolist()
        self.lora_hidden_s: list[float] = service.lora_hidden_s.tolist()
        self.lora_fetch_s: list[float] = service.lora_fetch_s.tolist()
        self.checkpoint_load_s: list[float] = service.checkpoint_load_s.tolist()
        self.checkpoint_fetch_s: list[float] = service.checkpoint_fetch_s.tolist()
        self.noise_ratio: list[float] = service.noise_ratio.tolist()
        self.is_remote: list[bool] = service.is_remote.tolist()
        self.parts = StepParts(service)


class StaticRun:
    """State of one run of the static model: no mechanism of ``mechanisms_in_use`` is on."""

    def __init__(
        self,
        workload: Workload,
        allocation: Allocation,
        services: Mapping[str, ServiceTable],
        sizes: Sizes,
        facts: FactsByPool,
        n_requests: int,
    ) -> None:
        pools = allocation.pools_of("base")
        self.env = ExactEnvironment()
        self.n_requests = n_requests
        self.arrival_s: list[float] = workload.arrival_s.tolist()
        self.deadline_s: list[float] = workload.deadline_s.tolist()
        self.checkpoint: list[int] = workload.checkpoint.tolist()
        self.n_steps: list[int] = workload.n_steps.tolist()
        self.controlnets = workload.controlnets
        self.loras = workload.loras
        self.n_checkpoints = len(workload.checkpoint_names)
        self.tables = [Table(services[pool.name]) for pool in pools]
        self.decode_s: list[list[float]] = [services[pool.name].decode_s.tolist() for pool in pools]
        self.replicas = build_base_replicas(allocation, workload, sizes, facts, n_requests)
        self.workers = build_controlnet_workers(allocation, workload, sizes, facts, n_requests)
        self.recorder = Recorder(workload, pools, services, self.replicas, self.workers, n_requests)
        self.placer = Placer(workload, self.workers, self.recorder.controlnet_load)
        self.coupling = Coupling(self.env, self.recorder.controlnet_span)
        self.group_of, able = pools_of_requests(allocation, workload, self.placer.hosted(), n_requests)
        self.groups = [_Group(pools_of_group) for pools_of_group in able]
        self.groups_of_pool = [[group for group in self.groups if p in group.pools] for p in range(len(pools))]
        self.idle: list[list[int]] = [[] for _ in pools]
        for replica in self.replicas:
            self.idle[replica.pool].append(replica.index)
        limit = allocation.policies.queue_limit
        self.queue_limit = UNLIMITED if limit is None else limit
        self.placements: dict[int, tuple[Placement, BaseReplica]] = {}

    def run(self) -> None:
        if self.n_requests:
            self.env.call_at(self.arrival_s[0], ARRIVAL, self._on_arrival, 0)
            self.env.run()

    def _on_arrival(self, event: Event) -> None:
        i: int = event._value
        now_s = self.arrival_s[i]
        if i + 1 < self.n_requests:
            self.env.call_at(self.arrival_s[i + 1], ARRIVAL, self._on_arrival, i + 1)
        group = self.groups[self.group_of[i]]
        index = self._best_idle(i, group)
        if index >= 0:
            replica = self.replicas[index]
            self.idle[replica.pool].remove(index)
            self._take_up(i, replica, now_s)
        elif not group.pools:
            self.recorder.turn_away(i, "rejected", "no pool can serve it", now_s)
        elif not is_admitted(group.n_waiting, self.queue_limit):
            self.recorder.turn_away(i, "rejected", "queue is full", now_s)
        else:
            group.waiting.append(i)
            group.n_waiting += 1
            deadline_s = self.deadline_s[i]
            if deadline_s == deadline_s:  # not NaN
                self.env.call_at(now_s + deadline_s, EXPIRY, self._on_expiry, i)

    def _on_expiry(self, event: Event) -> None:
        i: int = event._value
        if self.recorder.is_open(i):
            group = self.groups[self.group_of[i]]
            group.n_waiting -= 1
            self.recorder.turn_away(i, "expired", "deadline passed in the queue", self.env.now)

    def _best_idle(self, i: int, group: _Group) -> int:
        """The idle replica with most of what the request needs; -1 if none is idle."""
        code = self.checkpoint[i]
        loras = self.loras[i]
        controlnets = self.controlnets[i]
        perfect = affinity(True, len(loras) + len(controlnets))
        found: list[int] = []
        values: list[int] = []
        for p in group.pools:
            idle = self.idle[p]
            if not idle:
                continue
            is_remote = self.tables[p].is_remote[i]
            for index in idle:
                replica = self.replicas[index]
                device = replica.device.following
                n_warm = 0
                if loras:
                    host = replica.host_loras.following
                    for lora in loras:
                        n_warm += host[lora] != lora
                if is_remote:
                    n_warm += len(controlnets)  # not the base's concern
                else:
                    for controlnet in controlnets:
                        key = self.n_checkpoints + controlnet
                        n_warm += device[key] != key
                value = affinity(device[code] != code, n_warm)
                if value == perfect:
                    return index  # those before it have less, none can have more: what best_replica would choose
                found.append(index)
                values.append(value)
        best = best_replica(values)
        return found[best] if best >= 0 else -1

    def _take_up(self, i: int, replica: BaseReplica, now_s: float) -> None:
        table = self.tables[replica.pool]
        record = self.recorder
        record.start(i, replica.index, now_s)
        is_remote = table.is_remote[i]
        switch_s, load_s = self._load_models(i, replica, table, is_remote)
        lora_wait_s = 0.0
        if self.loras[i]:
            fetch_s = 0.0
            host = replica.host_loras
            for lora in self.loras[i]:
                if not host.touch(lora):
                    fetch_s += table.lora_fetch_s[lora]
                    record.n_lora_misses[i] += 1
                    host.insert(lora)
            exposed_s = max(0.0, fetch_s - table.lora_hidden_s[i])
            record.lora_fetch_s[i] = exposed_s
            lora_wait_s = record.lora_wait_s[i] = exposed_s + table.attach_detach_s[i]
        if not is_remote:
            end_s = now_s + (switch_s + load_s + lora_wait_s + table.compute_s[i])
            self.env.call_at(end_s, COMPLETION, self._on_completion, (i, replica, end_s))
            return
        placement = self.placer.place(i, table.parts, now_s)
        record.n_controlnet_misses[i] = placement.n_misses
        prepared_s = now_s + switch_s + table.text_s[i]
        exposed_s = max(0.0, placement.ready_s - prepared_s)
        record.controlnet_load_s[i] = exposed_s
        self.placements[i] = (placement, replica)
        self.env.call_at(prepared_s + exposed_s + lora_wait_s, COMPLETION, self._on_denoise, i)

    def _load_models(self, i: int, replica: BaseReplica, table: Table, is_remote: bool) -> tuple[float, float]:
        """Makes checkpoint and in-process ControlNets resident; seconds for the checkpoint and for the ControlNets."""
        device = replica.device
        code = self.checkpoint[i]
        controlnets = () if is_remote else self.controlnets[i]
        has_checkpoint = device.touch(code)
        missing = [c for c in controlnets if not device.touch(self.n_checkpoints + c)] if controlnets else ()
        if has_checkpoint and not missing:
            return 0.0, 0.0
        switch_s = load_s = 0.0
        record = self.recorder
        if not has_checkpoint:
            switch_s = table.checkpoint_load_s[code]
            if not replica.host_checkpoints.touch(code):
                switch_s += table.checkpoint_fetch_s[code]
                replica.host_checkpoints.insert(code)
            device.insert(code)
            record.switch_s[i] = switch_s
            record.is_switch[i] = 1
        for controlnet in missing:
            key = self.n_checkpoints + controlnet
            if device.touch(key):  # asked for twice by this request
                continue
            load_s += table.parts.load_s[controlnet]
            if not replica.host_controlnets.touch(controlnet):
                load_s += table.parts.fetch_s[controlnet]
                replica.host_controlnets.insert(controlnet)
            device.insert(key)
            record.n_controlnet_misses[i] += 1
        record.controlnet_load_s[i] = load_s
        return switch_s, load_s

    def _on_denoise(self, event: Event) -> None:
        i: int = event._value
        now_s = self.env.now
        placement, replica = self.placements[i]
        n_steps = self.n_steps[i] * self.tables[replica.pool].noise_ratio[i]
        self.recorder.denoise_start_s[i] = now_s
        self.recorder.denoise_alone_s[i] = n_steps * placement.period_s
        client = Client(i, n_steps, 1.0 / placement.period_s, placement.workers, placement.demand_s, self._on_denoised)
        self.coupling.join(client, now_s)

    def _on_denoised(self, client: Client, now_s: float) -> None:
        i = client.request
        placement, replica = self.placements.pop(i)
        self.placer.release(placement)
        self.recorder.denoise_s[i] = now_s - self.recorder.denoise_start_s[i]
        end_s = now_s + self.decode_s[replica.pool][i]
        self.env.call_at(end_s, COMPLETION, self._on_completion, (i, replica, end_s))

    def _on_completion(self, event: Event) -> None:
        i, replica, end_s = event._value
        self.recorder.end_s[i] = end_s
        oldest: _Group | None = None
        for group in self.groups_of_pool[replica.pool]:
            waiting = group.waiting
            while waiting and not self.recorder.is_open(waiting[0]):
                waiting.popleft()
            if waiting and (oldest is None or waiting[0] < oldest.waiting[0]):
                oldest = group
        if oldest is None:
            insort(self.idle[replica.pool], replica.index)
            return
        oldest.n_waiting -= 1
        self._take_up(oldest.waiting.popleft(), replica, end_s)
