"""Where a request's models are, or go, compiled: ``_load_models`` of the SimPy model and ``planner.simulator.placement``."""

from __future__ import annotations

import numpy as np

from planner.fast import arrays as a
from planner.fast.arrays import Bytes, Floats, Ints, Smalls
from planner.fast.policies import affinity, compiled, insert, least_loaded, touch
from planner.fast.sharing import add_span


@compiled
def touch_model(links: Smalls, first: int, last: int, key: int, owner: int) -> bool:
    """Marks a model as used in the tier whose ring is ``first..last``; False if it is not there."""
    found: bool = touch(key, links[a.FOLLOWING, first:last, owner], links[a.PRECEDING, first:last, owner])
    return found


@compiled
def insert_model(
    links: Smalls,
    first: int,
    last: int,
    key: int,
    owner: int,
    ring_bytes: Ints,
    held_bytes: Ints,
    ring: int,
    n_pins: Ints,
) -> None:
    """Puts a model that is not there into a tier, as far as it fits."""
    held_bytes[a.USED, ring, owner] = insert(
        key,
        links[a.FOLLOWING, first:last, owner],
        links[a.PRECEDING, first:last, owner],
        ring_bytes[first:last],
        held_bytes[a.USED, ring, owner],
        held_bytes[a.CAPACITY, ring, owner],
        n_pins,
    )


@compiled
def is_in_host(
    links: Smalls, ring_start: Ints, key: int, owner: int, ring_bytes: Ints, held_bytes: Ints, ring: int, n_pins: Ints
) -> bool:
    """Whether a host tier holds a model; it does from now on, if it fits."""
    first, last = ring_start[ring], ring_start[ring + 1]
    if touch_model(links, first, last, key, owner):
        return True
    insert_model(links, first, last, key, owner, ring_bytes, held_bytes, ring, n_pins)
    return False


@compiled
def best_idle(
    code: int, first_lora: int, last_lora: int, loras: Smalls, first: int, last: int, controlnets: Smalls, is_remote: bool,
    links: Smalls, ring_start: Ints, first_replica: int, last_replica: int, is_idle: Bytes, scratch: Ints, n_found: int,
) -> tuple[int, int]:  # fmt: skip
    """Collects a pool's idle replicas with how much each has of what a request needs.

    Returns a replica that has everything (-1 if none has), and how many were collected so far.
    """
    perfect = affinity(True, last_lora - first_lora + last - first)
    n_checkpoints = ring_start[a.HOST_CONTROLNETS] - ring_start[a.HOST_CHECKPOINTS] - 1
    lora_ring = ring_start[a.HOST_LORAS]
    following = links[a.FOLLOWING]
    for replica in range(first_replica, last_replica):
        if not is_idle[replica]:
            continue
        n_warm = 0
        for entry in range(first_lora, last_lora):
            lora = loras[entry]
            n_warm += following[lora_ring + lora, replica] != lora
        if is_remote:
            n_warm += last - first  # not the base's concern
        else:
            for entry in range(first, last):
                key = n_checkpoints + controlnets[entry, a.CODE]
                n_warm += following[key, replica] != key
        value = affinity(following[code, replica] != code, n_warm)
        if value == perfect:
            return replica, n_found
        scratch[a.COMPONENT_WORKERS, n_found] = replica
        scratch[a.COMPONENT_CLIENTS, n_found] = value
        n_found += 1
    return -1, n_found


@compiled
def load_models(
    request: int, code: int, replica: int, load_s: Floats, controlnet_s: Floats, first: int, last: int, controlnets: Smalls,
    links: Smalls, ring_start: Ints, ring_bytes: Ints, held_bytes: Ints, no_pins: Ints,
    times_s: Floats, states: Smalls, misses: Floats,
) -> tuple[float, float]:  # fmt: skip
    """Makes checkpoint and in-process ControlNets resident; seconds for the checkpoint and for the ControlNets."""
    n_checkpoints = ring_start[a.HOST_CONTROLNETS] - ring_start[a.HOST_CHECKPOINTS] - 1
    none, device = ring_start[0], ring_start[1]
    has_checkpoint = touch_model(links, none, device, code, replica)
    missing = 0  # one bit for each of its ControlNets
    for entry in range(first, last):
        if not touch_model(links, none, device, n_checkpoints + np.int64(controlnets[entry, a.CODE]), replica):
            missing |= 1 << (entry - first)
    if has_checkpoint and missing == 0:
        return 0.0, 0.0
    switch_s = 0.0
    loading_s = 0.0
    if not has_checkpoint:
        switch_s = load_s[code, a.LOAD_S]
        if not is_in_host(links, ring_start, code, replica, ring_bytes, held_bytes, a.HOST_CHECKPOINTS, no_pins):
            switch_s += load_s[code, a.FETCH_S]
        insert_model(links, none, device, code, replica, ring_bytes, held_bytes, a.DEVICE, no_pins)
        times_s[request, a.SWITCH_S] = switch_s
        states[request, a.IS_SWITCH] = 1
    for entry in range(first, last):
        if not (missing >> (entry - first)) & 1:
            continue
        controlnet = np.int64(controlnets[entry, a.CODE])
        key = n_checkpoints + controlnet
        if touch_model(links, none, device, key, replica):  # asked for twice by this request
            continue
        loading_s += controlnet_s[controlnet, a.LOAD_S]
        if not is_in_host(links, ring_start, controlnet, replica, ring_bytes, held_bytes, a.HOST_CONTROLNETS, no_pins):
            loading_s += controlnet_s[controlnet, a.FETCH_S]
        insert_model(links, none, device, key, replica, ring_bytes, held_bytes, a.DEVICE, no_pins)
        misses[request, a.CONTROLNET_MISSES] += 1
    times_s[request, a.CONTROLNET_LOAD_S] = loading_s
    return switch_s, loading_s


@compiled
def place(
    request: int, replica: int, n_steps: int, now_s: float, first_entry: int, last_entry: int, controlnets: Smalls,
    steps: Floats, controlnet_s: Floats, may_hold: Bytes, links: Smalls, ring_start: Ints, ring_bytes: Ints, held_bytes: Ints,
    n_pins: Ints, no_pins: Ints, ready: Floats, workers: Ints, sums: Floats, clients: Ints, edges: Ints, demands: Floats,
    scratch: Ints, scratch_sums: Floats, outcome: Floats, spans: Floats, counts: Ints,
) -> float:  # fmt: skip
    """Puts each ControlNet of a request on the least loaded worker that may hold it; when all are on their devices."""
    forward_s = steps[a.FORWARD_S]
    # before the workers are known: its pace if each ControlNet has a worker of its own
    remote_s = forward_s + (last_entry - first_entry) * steps[a.TRANSFER_S]
    pace_per_s = 1.0 / (max(steps[a.ENCODER_S], remote_s) + steps[a.DECODER_S])
    none, device = ring_start[0], ring_start[1]
    base = replica * (len(edges) // len(clients))
    ready_s = now_s
    n_used = 0
    n_pinned = 0
    for entry in range(first_entry, last_entry):
        code = np.int64(controlnets[entry, a.CODE])
        n_candidates = 0
        for candidate in range(len(workers)):
            if may_hold[code, candidate]:
                scratch[a.COMPONENT_WORKERS, n_candidates] = candidate
                scratch[a.COMPONENT_CLIENTS, n_candidates] = links[a.FOLLOWING, code, candidate] != code
                scratch_sums[a.LOADS, n_candidates] = sums[candidate, a.ATTACHED_LOAD]
                n_candidates += 1
        chosen = least_loaded(scratch_sums[a.LOADS, :n_candidates], scratch[a.COMPONENT_CLIENTS, :n_candidates])
        worker = scratch[a.COMPONENT_WORKERS, chosen]
        part = (controlnets[entry, a.LAST_STEP] - controlnets[entry, a.FIRST_STEP]) / n_steps
        load = part * forward_s * pace_per_s
        sums[worker, a.ATTACHED_LOAD] += load
        edge = base
        while edge < base + n_used and edges[edge, a.WORKER] != worker:
            edge += 1
        if edge == base + n_used:
            workers[worker, a.N_ATTACHED] += 1
            edges[edge, a.WORKER] = worker
            demands[edge, a.DEMAND_S] = 0.0
            demands[edge, a.LOAD] = 0.0
            n_used += 1
        demands[edge, a.DEMAND_S] += part * forward_s
        demands[edge, a.LOAD] += load
        scratch[a.CHOSEN, entry - first_entry] = worker
        is_resident = touch_model(links, none, device, code, worker)
        is_held = is_resident
        if is_resident:
            model_ready_s = ready[code, worker]
        else:
            load_s = controlnet_s[code, a.LOAD_S]
            if not is_in_host(links, ring_start, code, worker, ring_bytes, held_bytes, a.WORKER_HOST, no_pins):
                load_s += controlnet_s[code, a.FETCH_S]
            start_s = max(now_s, sums[worker, a.LOADER_FREE_S])  # loads of one worker follow one another
            model_ready_s = start_s + load_s
            sums[worker, a.LOADER_FREE_S] = model_ready_s
            ready[code, worker] = model_ready_s
            add_span(spans, counts, worker, not is_resident, start_s, model_ready_s, 0.0)
            # if everything else on the device is in use, the ControlNet is streamed for this request and not kept
            insert_model(links, none, device, code, worker, ring_bytes, held_bytes, a.DEVICE, n_pins[:, worker])
            is_held = links[a.FOLLOWING, code, worker] != code
            outcome[request, a.CONTROLNET_MISSES] += 1
        if is_held:
            n_pins[code, worker] += 1
            edges[base + n_pinned, a.PINNED_WORKER] = worker
            edges[base + n_pinned, a.PINNED_CODE] = code
            n_pinned += 1
        ready_s = max(ready_s, model_ready_s)
    clients[replica, a.N_WORKERS] = n_used
    clients[replica, a.N_PINNED] = n_pinned
    return ready_s


@compiled
def period_s(n_steps: int, windows: Smalls, chosen: Ints, bounds: Ints, steps: Floats) -> float:
    """Mean step of a request whose k-th ControlNet runs on worker ``chosen[k]`` when nobody shares its workers.

    ``windows`` are its ControlNets' rows, ``bounds`` is room for 2 K + 2 numbers.
    """
    n_windows = len(windows)
    bounds[0] = 0
    bounds[1] = n_steps
    n_bounds = 2
    for k in range(2 * n_windows):
        bound = np.int64(windows[k >> 1, a.FIRST_STEP + (k & 1)])
        at = n_bounds
        while at > 0 and bounds[at - 1] > bound:
            at -= 1
        if at > 0 and bounds[at - 1] == bound:
            continue
        for j in range(n_bounds, at, -1):
            bounds[j] = bounds[j - 1]
        bounds[at] = bound
        n_bounds += 1
    total_s = 0.0
    for b in range(n_bounds - 1):
        first, last = bounds[b], bounds[b + 1]
        n_distinct = 0
        busiest = 0
        for k in range(n_windows):
            if windows[k, a.FIRST_STEP] > first or last > windows[k, a.LAST_STEP]:
                continue
            n_same = 0
            is_first = 1
            for j in range(n_windows):
                if chosen[j] == chosen[k] and windows[j, a.FIRST_STEP] <= first and last <= windows[j, a.LAST_STEP]:
                    n_same += 1
                    if j < k:
                        is_first = 0
            n_distinct += is_first
            busiest = max(busiest, n_same)
        if n_distinct:
            remote_s = busiest * steps[a.FORWARD_S] + n_distinct * steps[a.TRANSFER_S]
            step_s = max(steps[a.ENCODER_S], remote_s) + steps[a.DECODER_S]
        else:
            step_s = steps[a.PLAIN_S]
        total_s += (last - first) * step_s
    return total_s / n_steps


@compiled
def release(
    replica: int, clients: Ints, edges: Ints, demands: Floats, workers: Ints, sums: Floats, n_pins: Ints
) -> None:
    """Takes the request that a replica runs off its ControlNet workers."""
    base = replica * (len(edges) // len(clients))
    for edge in range(base, base + clients[replica, a.N_PINNED]):
        n_pins[edges[edge, a.PINNED_CODE], edges[edge, a.PINNED_WORKER]] -= 1
    for edge in range(base, base + clients[replica, a.N_WORKERS]):
        worker = edges[edge, a.WORKER]
        sums[worker, a.ATTACHED_LOAD] -= demands[edge, a.LOAD]
        workers[worker, a.N_ATTACHED] -= 1
        if workers[worker, a.N_ATTACHED] == 0:
            sums[worker, a.ATTACHED_LOAD] = 0.0  # rounding must not decide ties between idle workers
