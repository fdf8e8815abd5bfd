"""Denoising with shared ControlNet workers, compiled: what ``planner.simulator.coupling`` does, in its order of operations."""

from __future__ import annotations

from typing import Final

import numpy as np

from planner.fast import arrays as a
from planner.fast.arrays import Floats, Ints
from planner.fast.heap import push
from planner.fast.policies import compiled, fill_fair_step_rates, wait_in_passing_s
from planner.simulator.coupling import FULL

COMPLETION: Final = 0
DENOISE: Final = 1
WAKE: Final = 2
KINDS: Final = 3
"""What happens is request · KINDS + kind; for COMPLETION the replica stands for the request."""


@compiled
def add_span(
    spans: Floats, counts: Ints, worker: int, is_load: bool, start_s: float, end_s: float, work_s: float
) -> None:
    """Records one span of a ControlNet worker."""
    at = counts[a.N_SPANS]
    counts[a.N_SPANS] = at + 1
    spans[at, 0] = worker
    spans[at, 1] = is_load
    spans[at, 2] = start_s
    spans[at, 3] = end_s
    spans[at, 4] = work_s


@compiled
def set_rate(
    slot: int, request: int, rate_per_s: float, now_s: float, paces: Floats, due_s: Floats, events: Ints
) -> None:
    """Gives a client its new rate and wakes it when it will have finished."""
    pace = paces[slot]
    pace[a.LEFT] -= pace[a.RATE_PER_S] * (now_s - pace[a.UPDATED_S])
    pace[a.UPDATED_S] = now_s
    pace[a.RATE_PER_S] = rate_per_s
    finish_s = now_s + max(pace[a.LEFT], 0.0) / rate_per_s
    pace[a.FINISH_S] = finish_s
    if finish_s < pace[a.SCHEDULED_S]:
        pace[a.SCHEDULED_S] = finish_s
        push(due_s, events, finish_s, request * KINDS + WAKE)


@compiled
def share(
    n_seeds: int, now_s: float, clients: Ints, paces: Floats, edges: Ints, demands: Floats, workers: Ints,
    scratch: Ints, scratch_sums: Floats, due_s: Floats, events: Ints,
) -> None:  # fmt: skip
    """Recomputes the rates of everybody connected to the first ``n_seeds`` workers in scratch through full workers."""
    most = len(edges) // len(clients)
    members, local_worker = scratch[a.COMPONENT_WORKERS], scratch[a.LOCAL_WORKER]
    slots, local_client = scratch[a.COMPONENT_CLIENTS], scratch[a.LOCAL_CLIENT]
    n_workers = n_seeds
    for k in range(n_seeds):
        local_worker[members[k]] = k
    n_clients = 0
    n_edges = 0
    at = 0
    while at < n_workers:
        edge = workers[members[at], a.FIRST_EDGE]
        while edge >= 0:
            slot = edge // most
            local = local_client[slot]
            if local < 0:
                local = n_clients
                local_client[slot] = local
                slots[local] = slot
                scratch_sums[a.CLIENT_PACE_PER_S, local] = paces[slot, a.PACE_PER_S]
                n_clients += 1
                for k in range(clients[slot, a.N_WORKERS]):
                    other = edges[slot * most + k, a.WORKER]
                    if workers[other, a.IS_FULL] and local_worker[other] < 0:
                        local_worker[other] = n_workers
                        members[n_workers] = other
                        n_workers += 1
            scratch[a.EDGE_CLIENT, n_edges] = local
            scratch[a.EDGE_WORKER, n_edges] = at
            scratch_sums[a.EDGE_DEMAND_S, n_edges] = demands[edge, a.DEMAND_S]
            n_edges += 1
            edge = edges[edge, a.NEXT_EDGE]
        at += 1
    for k in range(n_workers):
        local_worker[members[k]] = -1
    if n_clients == 0:
        return
    rates = scratch_sums[a.RATES, :n_clients]
    fill_fair_step_rates(
        scratch_sums[a.CLIENT_PACE_PER_S, :n_clients],
        scratch[a.EDGE_CLIENT, :n_edges],
        scratch[a.EDGE_WORKER, :n_edges],
        scratch_sums[a.EDGE_DEMAND_S, :n_edges],
        rates,
        scratch_sums[a.IS_OPEN],
        scratch[a.IS_HELD],
        scratch_sums[a.LOADS],
        scratch_sums[a.OPEN_DEMAND_S],
        scratch_sums[a.LIMITS, :n_workers],
    )
    for k in range(n_clients):
        slot = slots[k]
        local_client[slot] = -1
        if rates[k] != paces[slot, a.RATE_PER_S]:
            set_rate(slot, clients[slot, a.REQUEST], rates[k], now_s, paces, due_s, events)


@compiled
def own_pace(slot: int, clients: Ints, paces: Floats, edges: Ints, demands: Floats, workers: Ints) -> float:
    """Steps a second of a client where no worker is full: alone, but for waits in passing."""
    most = len(edges) // len(clients)
    alone_per_s: float = paces[slot, a.ALONE_PER_S]
    longest_s = 0.0
    for edge in range(slot * most, slot * most + clients[slot, a.N_WORKERS]):
        wait_s = 0.0
        other = workers[edges[edge, a.WORKER], a.FIRST_EDGE]
        while other >= 0:
            other_per_s = paces[other // most, a.ALONE_PER_S]
            if other_per_s != alone_per_s:
                wait_s += wait_in_passing_s(alone_per_s, other_per_s, demands[other, a.DEMAND_S])
            other = edges[other, a.NEXT_EDGE]
        longest_s = max(longest_s, wait_s)
    return 1.0 / (1.0 / alone_per_s + longest_s) if longest_s > 0.0 else alone_per_s


@compiled
def find_mates(
    slot: int, clients: Ints, paces: Floats, edges: Ints, demands: Floats, workers: Ints, scratch: Ints
) -> int:
    """Those on a worker of this client who wait for it, or it for them: into ``scratch[MATES]``; how many."""
    most = len(edges) // len(clients)
    alone_per_s = paces[slot, a.ALONE_PER_S]
    mates, is_mate = scratch[a.MATES], scratch[a.IS_MATE]
    n_mates = 0
    for edge in range(slot * most, slot * most + clients[slot, a.N_WORKERS]):
        other = workers[edges[edge, a.WORKER], a.FIRST_EDGE]
        while other >= 0:
            other_slot = other // most
            other_per_s = paces[other_slot, a.ALONE_PER_S]
            if other_per_s != alone_per_s and not is_mate[other_slot]:
                waits_s = wait_in_passing_s(other_per_s, alone_per_s, demands[edge, a.DEMAND_S])
                if waits_s > 0.0 or wait_in_passing_s(alone_per_s, other_per_s, demands[other, a.DEMAND_S]) > 0.0:
                    mates[n_mates] = other_slot
                    is_mate[other_slot] = 1
                    n_mates += 1
            other = edges[other, a.NEXT_EDGE]
    for k in range(n_mates):
        is_mate[mates[k]] = 0
    return n_mates


@compiled
def is_bound(slot: int, clients: Ints, edges: Ints, workers: Ints) -> bool:
    """Whether a worker of this client is full."""
    first = slot * (len(edges) // len(clients))
    n_full = 0
    for edge in range(first, first + clients[slot, a.N_WORKERS]):
        n_full += workers[edges[edge, a.WORKER], a.IS_FULL]
    return n_full > 0


@compiled
def change(
    is_join: bool, slot: int, request: int, now_s: float, clients: Ints, paces: Floats, edges: Ints, demands: Floats,
    workers: Ints, sums: Floats, scratch: Ints, scratch_sums: Floats, spans: Floats, counts: Ints, due_s: Floats, events: Ints,
) -> None:  # fmt: skip
    """Starts or ends the denoising of the request that replica ``slot`` runs; its LENGTH, PERIOD_S and edges are set."""
    pace = paces[slot]
    if is_join:
        clients[slot, a.REQUEST] = request
        pace[a.LEFT] = pace[a.LENGTH]
        pace[a.ALONE_PER_S] = 1.0 / pace[a.PERIOD_S]
        pace[a.RATE_PER_S] = 0.0
        pace[a.UPDATED_S] = now_s
        pace[a.SCHEDULED_S] = np.inf
    else:
        clients[slot, a.REQUEST] = -1
    first = slot * (len(edges) // len(clients))
    n_mates = 0 if is_join else find_mates(slot, clients, paces, edges, demands, workers, scratch)
    n_seeds = np.int64(0)  # not a literal: numba compiles callees anew for those
    for edge in range(first, first + clients[slot, a.N_WORKERS]):
        worker = edges[edge, a.WORKER]
        load = demands[edge, a.DEMAND_S] * pace[a.ALONE_PER_S]
        if is_join:
            last = workers[worker, a.LAST_EDGE]
            if last < 0:
                sums[worker, a.SPAN_START_S] = now_s
                workers[worker, a.FIRST_EDGE] = edge
            else:
                edges[last, a.NEXT_EDGE] = edge
            edges[edge, a.PREVIOUS_EDGE] = last
            edges[edge, a.NEXT_EDGE] = -1
            workers[worker, a.LAST_EDGE] = edge
            sums[worker, a.ALONE_LOAD] += load
            if sums[worker, a.ALONE_LOAD] > FULL:
                workers[worker, a.IS_FULL] = 1
                scratch[a.COMPONENT_WORKERS, n_seeds] = worker
                n_seeds += 1
            continue
        before, after = edges[edge, a.PREVIOUS_EDGE], edges[edge, a.NEXT_EDGE]
        if before < 0:
            workers[worker, a.FIRST_EDGE] = after
        else:
            edges[before, a.NEXT_EDGE] = after
        if after < 0:
            workers[worker, a.LAST_EDGE] = before
        else:
            edges[after, a.PREVIOUS_EDGE] = before
        sums[worker, a.WORK_S] += pace[a.LENGTH] * demands[edge, a.DEMAND_S]
        if workers[worker, a.IS_FULL]:
            scratch[a.COMPONENT_WORKERS, n_seeds] = worker
            n_seeds += 1
        if workers[worker, a.FIRST_EDGE] >= 0:
            sums[worker, a.ALONE_LOAD] -= load
            workers[worker, a.IS_FULL] = sums[worker, a.ALONE_LOAD] > FULL
        else:
            sums[worker, a.ALONE_LOAD] = 0.0
            workers[worker, a.IS_FULL] = 0
            add_span(spans, counts, worker, is_join, sums[worker, a.SPAN_START_S], now_s, sums[worker, a.WORK_S])
            sums[worker, a.WORK_S] = 0.0
    is_alone = n_seeds == 0
    if is_join:
        n_mates = find_mates(slot, clients, paces, edges, demands, workers, scratch)
        pace[a.PACE_PER_S] = own_pace(slot, clients, paces, edges, demands, workers)
    # whose own pace depends on this one's; the first of the list are then those for whom it has changed
    mates, seeds = scratch[a.MATES], scratch[a.COMPONENT_WORKERS]
    n_changed = 0
    for k in range(n_mates):
        mate = mates[k]
        pace_per_s = own_pace(mate, clients, paces, edges, demands, workers)
        if pace_per_s != paces[mate, a.PACE_PER_S]:
            paces[mate, a.PACE_PER_S] = pace_per_s
            mates[n_changed] = mate
            n_changed += 1
            begin = mate * (len(edges) // len(clients))
            for edge in range(begin, begin + clients[mate, a.N_WORKERS]):
                worker = edges[edge, a.WORKER]
                is_new = workers[worker, a.IS_FULL] == 1
                for at in range(n_seeds):
                    if seeds[at] == worker:
                        is_new = False
                if is_new:
                    seeds[n_seeds] = worker
                    n_seeds += 1
    if n_seeds:
        share(n_seeds, now_s, clients, paces, edges, demands, workers, scratch, scratch_sums, due_s, events)
    for k in range(n_changed):
        mate = mates[k]
        if not is_bound(mate, clients, edges, workers) and paces[mate, a.RATE_PER_S] != paces[mate, a.PACE_PER_S]:
            set_rate(mate, clients[mate, a.REQUEST], paces[mate, a.PACE_PER_S], now_s, paces, due_s, events)
    if is_join and is_alone:
        set_rate(slot, request, pace[a.PACE_PER_S], now_s, paces, due_s, events)
