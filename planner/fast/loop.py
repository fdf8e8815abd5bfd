"""The compiled run: arrivals, queues, take-up, stages, completion, in the order of the SimPy model (``planner.simulator.model``).

Events at one time go by kind (expiry, completion, arrival), then by order of scheduling. Strict IEEE arithmetic in the SimPy
model's order of operations, so that latencies are equal and ties fall alike.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from planner.fast import arrays as a
from planner.fast.arrays import Bytes, Clients, Fleet, Ints, Outcome, Queues, Requests, Scratch, Smalls, Tables, Workers
from planner.fast.cache import compiled_once
from planner.fast.heap import N_QUEUED, WHAT, pop, push
from planner.fast.placing import best_idle, is_in_host, load_models, period_s, place, release
from planner.fast.policies import best_replica, compiled, is_admitted
from planner.fast.sharing import COMPLETION, DENOISE, KINDS, change

DONE: Final = 0
NO_POOL: Final = 1
QUEUE_FULL: Final = 2
EXPIRED: Final = 3
WAITING: Final = 4
"""Only during a run: neither taken up nor turned away."""


@compiled
def oldest_waiting(pool: int, can_serve: Bytes, waiting: Ints, next_waiting: Smalls, states: Smalls) -> int:
    """The queue whose first request is the oldest that a pool can serve; -1 if all are empty. Drops who has expired."""
    oldest = -1
    for group in range(len(waiting)):
        if not can_serve[group, pool]:
            continue
        first = waiting[group, a.FIRST_WAITING]
        while first >= 0 and states[first, a.ENDING] != WAITING:
            first = next_waiting[first]
        waiting[group, a.FIRST_WAITING] = first
        if first >= 0 and (oldest < 0 or first < waiting[oldest, a.FIRST_WAITING]):
            oldest = group
    return oldest


@compiled_once
def run(
    requests: Requests, tables: Tables, fleet: Fleet, workers: Workers, no_pins: Ints, clients: Clients, scratch: Scratch,
    queues: Queues, outcome: Outcome, queue_limit: int,
) -> bool:  # fmt: skip
    """Runs every request of ``outcome`` to its end; all arrays but requests and tables are state.

    Compiled without memory management, which would count references at every view: where the heap has no room left it returns
    False, and goes on when it is called again with more.
    """
    arrival_s, expiry_s, expiry_order, asks, add_on_start, loras, controlnets = requests
    compute_s, lora_s, steps, checkpoint_s, controlnet_s, lora_fetch_s = tables
    can_serve, pools, pool_of, ring_start, ring_bytes, links, held_bytes = fleet
    (
        may_hold,
        worker_rings,
        worker_ring_bytes,
        worker_links,
        worker_held_bytes,
        n_pins,
        ready_s,
        worker_counts,
        worker_sums,
    ) = workers
    client_counts, paces, edges, demands = clients
    scratch_counts, scratch_sums = scratch
    waiting, next_waiting, is_idle, n_idle, due_s, events = queues
    times_s, states, lora_outcome, controlnet_outcome, spans, counts = outcome
    none_pinned = no_pins[:, 0]
    n = len(times_s)
    n_replicas = len(pool_of)
    with_add_ons = len(add_on_start) > 0
    arriving, expiring = counts[a.N_ARRIVED], counts[a.N_EXPIRIES]
    n_events = counts[a.N_EVENTS]
    while True:
        if events[0, N_QUEUED] + n_replicas + 4 > len(due_s):  # nothing schedules more than that at once
            counts[a.N_ARRIVED], counts[a.N_EXPIRIES], counts[a.N_EVENTS] = arriving, expiring, n_events
            return False
        next_arrival_s = arrival_s[arriving] if arriving < n else np.inf
        next_end_s = due_s[1] if events[0, N_QUEUED] > 0 else np.inf
        if expiring < len(expiry_order):
            i = expiry_order[expiring]
            if i < arriving and expiry_s[i] <= next_end_s and expiry_s[i] <= next_arrival_s:
                expiring += 1
                if states[i, a.ENDING] == WAITING:
                    n_events += 1
                    waiting[asks[i, a.GROUP], a.N_WAITING] -= 1
                    states[i, a.ENDING] = EXPIRED
                    times_s[i, a.END_S] = expiry_s[i]
                continue
        if next_end_s <= next_arrival_s:
            if events[0, N_QUEUED] == 0:
                counts[a.N_EVENTS] = n_events
                return True
            n_events += 1
            now_s = next_end_s
            what = events[1, WHAT]
            pop(due_s, events)
            kind = what % KINDS
            i = what // KINDS
            if kind == COMPLETION:
                replica = i
                pool = pool_of[replica]
                group = oldest_waiting(pool, can_serve, waiting, next_waiting, states)
                if group < 0:
                    is_idle[replica] = 1
                    n_idle[pool] += 1
                    continue
                i = waiting[group, a.FIRST_WAITING]
                waiting[group, a.FIRST_WAITING] = next_waiting[i]
                waiting[group, a.N_WAITING] -= 1
            else:
                replica = np.int64(states[i, a.REPLICA])
                table = pools[pool_of[replica], a.TABLE]
                pace = paces[replica]
                if kind == DENOISE:
                    pace[a.LENGTH] = asks[i, a.N_STEPS] * steps[table, i, a.NOISE_RATIO]
                    controlnet_outcome[i, a.DENOISE_START_S] = now_s
                    controlnet_outcome[i, a.DENOISE_ALONE_S] = pace[a.LENGTH] * pace[a.PERIOD_S]
                elif client_counts[replica, a.REQUEST] != i or now_s != pace[a.SCHEDULED_S]:
                    continue  # it has left, or was woken earlier
                elif pace[a.FINISH_S] > now_s:
                    pace[a.SCHEDULED_S] = pace[a.FINISH_S]
                    push(due_s, events, pace[a.FINISH_S], what)
                    continue
                change(
                    kind == DENOISE, replica, i, now_s, client_counts, paces, edges, demands, worker_counts, worker_sums,
                    scratch_counts, scratch_sums, spans, counts, due_s, events,
                )  # fmt: skip
                if kind != DENOISE:
                    release(replica, client_counts, edges, demands, worker_counts, worker_sums, n_pins)
                    controlnet_outcome[i, a.DENOISE_S] = now_s - controlnet_outcome[i, a.DENOISE_START_S]
                    end_s = now_s + steps[table, i, a.DECODE_S]
                    times_s[i, a.END_S] = end_s
                    push(due_s, events, end_s, replica * KINDS + COMPLETION)
                continue
        else:
            i = arriving
            arriving += 1
            n_events += 1
            now_s = next_arrival_s
            replica = -1
        # request i is taken up by a replica that became free, or arrives and looks for one
        code = np.int64(asks[i, a.CHECKPOINT])
        first_lora = last_lora = first_controlnet = last_controlnet = 0
        if with_add_ons:
            first_lora, last_lora = add_on_start[i, a.LORAS], add_on_start[i + 1, a.LORAS]
            first_controlnet, last_controlnet = add_on_start[i, a.CONTROLNETS], add_on_start[i + 1, a.CONTROLNETS]
        if replica < 0:
            group = asks[i, a.GROUP]
            n_able = 0
            n_found = np.int64(0)
            for pool in range(len(pools)):
                if not can_serve[group, pool]:
                    continue
                n_able += 1
                if replica >= 0 or n_idle[pool] == 0:
                    continue
                is_remote = last_controlnet > first_controlnet and steps[pools[pool, a.TABLE], i, a.IS_REMOTE] != 0.0
                replica, n_found = best_idle(
                    code, first_lora, last_lora, loras, first_controlnet, last_controlnet, controlnets, is_remote, links,
                    ring_start, pools[pool, a.FIRST_REPLICA], pools[pool, a.LAST_REPLICA], is_idle, scratch_counts, n_found,
                )  # fmt: skip
            if replica < 0 and n_found > 0:
                replica = scratch_counts[
                    a.COMPONENT_WORKERS, best_replica(scratch_counts[a.COMPONENT_CLIENTS, :n_found])
                ]
            if replica < 0:
                if n_able == 0 or not is_admitted(waiting[group, a.N_WAITING], queue_limit):
                    states[i, a.ENDING] = NO_POOL if n_able == 0 else QUEUE_FULL
                    times_s[i, a.END_S] = now_s
                    continue
                states[i, a.ENDING] = WAITING
                if waiting[group, a.FIRST_WAITING] < 0:
                    waiting[group, a.FIRST_WAITING] = i
                else:
                    next_waiting[waiting[group, a.LAST_WAITING]] = i
                waiting[group, a.LAST_WAITING] = i
                waiting[group, a.N_WAITING] += 1
                continue
            is_idle[replica] = 0
            n_idle[pool_of[replica]] -= 1
        # take-up: every stage's length is known now, but for shared denoising
        table = pools[pool_of[replica], a.TABLE]
        states[i, a.ENDING] = DONE
        states[i, a.REPLICA] = replica
        times_s[i, a.START_S] = now_s
        is_remote = last_controlnet > first_controlnet and steps[table, i, a.IS_REMOTE] != 0.0
        switch_s, load_s = load_models(
            i, code, replica, checkpoint_s[table], controlnet_s[table], first_controlnet,
            first_controlnet if is_remote else last_controlnet, controlnets, links, ring_start, ring_bytes, held_bytes,
            none_pinned, times_s, states, controlnet_outcome,
        )  # fmt: skip
        lora_wait_s = 0.0
        if last_lora > first_lora:
            fetch_s = 0.0
            for entry in range(first_lora, last_lora):
                lora = np.int64(loras[entry])
                if not is_in_host(links, ring_start, lora, replica, ring_bytes, held_bytes, a.HOST_LORAS, none_pinned):
                    fetch_s += lora_fetch_s[table, lora]
                    lora_outcome[i, a.LORA_MISSES] += 1
            exposed_s = max(0.0, fetch_s - lora_s[table, i, a.HIDDEN_S])
            lora_wait_s = exposed_s + lora_s[table, i, a.ATTACH_DETACH_S]
            lora_outcome[i, a.LORA_FETCH_S] = exposed_s
            lora_outcome[i, a.LORA_WAIT_S] = lora_wait_s
        if is_remote:
            step = steps[table, i]
            placed_s = place(
                i, replica, asks[i, a.N_STEPS], now_s, first_controlnet, last_controlnet, controlnets, step, controlnet_s[table],
                may_hold, worker_links, worker_rings, worker_ring_bytes, worker_held_bytes, n_pins, none_pinned, ready_s,
                worker_counts, worker_sums, client_counts, edges, demands, scratch_counts, scratch_sums, controlnet_outcome,
                spans, counts,
            )  # fmt: skip
            windows = controlnets[first_controlnet:last_controlnet]
            paces[replica, a.PERIOD_S] = period_s(
                asks[i, a.N_STEPS], windows, scratch_counts[a.CHOSEN], scratch_counts[a.EDGE_CLIENT], step
            )
            prepared_s = now_s + switch_s + step[a.TEXT_S]
            exposed_s = max(0.0, placed_s - prepared_s)
            times_s[i, a.CONTROLNET_LOAD_S] = exposed_s
            push(due_s, events, prepared_s + exposed_s + lora_wait_s, i * KINDS + DENOISE)
        else:
            end_s = now_s + (switch_s + load_s + lora_wait_s + compute_s[table, i])
            times_s[i, a.END_S] = end_s
            push(due_s, events, end_s, replica * KINDS + COMPLETION)
