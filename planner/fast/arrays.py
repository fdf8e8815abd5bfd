"""The arrays that the compiled loop works on. Few and wide: each array costs compile time in every function that it passes.

n requests, T service tables, P base pools, R base replicas, W ControlNet workers, G queues, K ControlNets of one request at
most (1 if none). A block of constants names the last index of the array above it; shapes are in square brackets.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Smalls = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]


class Requests(NamedTuple):
    """What is asked for, in order of arrival."""

    arrival_s: Floats  # [n]
    expiry_s: Floats  # [n] when it gives up waiting; infinite for never
    expiry_order: Ints  # requests that have an expiry, by time and then by request
    asks: Smalls  # [n, 3] CHECKPOINT, GROUP, N_STEPS
    add_on_start: (
        Smalls  # [n + 1, 2] where the request's LORAS and CONTROLNETS begin in the next two; [0, 2] if nobody has any
    )
    lora: Smalls
    controlnet: Smalls  # [·, 3] CODE, FIRST_STEP, LAST_STEP


CHECKPOINT: Final = 0
GROUP: Final = 1
N_STEPS: Final = 2

LORAS: Final = 0
CONTROLNETS: Final = 1

CODE: Final = 0
FIRST_STEP: Final = 1
LAST_STEP: Final = 2


class Tables(NamedTuple):
    """Service times."""

    compute_s: Floats  # [T, n] text, denoising alone, decoding
    lora_s: Floats  # [T, n, 2] ATTACH_DETACH_S, HIDDEN_S; [T, 0, 2] if nobody has LoRAs
    steps: Floats  # [T, n, 9] the constants below; [T, 0, 9] if nobody has ControlNets
    checkpoint_s: Floats  # [T, checkpoints, 2] LOAD_S, FETCH_S
    controlnet_s: Floats  # [T, ControlNets, 2] LOAD_S, FETCH_S
    lora_fetch_s: Floats  # [T, LoRAs]


ATTACH_DETACH_S: Final = 0
HIDDEN_S: Final = 1

IS_REMOTE: Final = 0
TEXT_S: Final = 1
DECODE_S: Final = 2
NOISE_RATIO: Final = 3
PLAIN_S: Final = 4
ENCODER_S: Final = 5
DECODER_S: Final = 6
FORWARD_S: Final = 7
TRANSFER_S: Final = 8

LOAD_S: Final = 0
FETCH_S: Final = 1


class Fleet(NamedTuple):
    """The base replicas and who may use them.

    The four rings of a replica (DEVICE, HOST_CHECKPOINTS, HOST_CONTROLNETS, HOST_LORAS) lie one after the other along the second
    index of ``links``, each with its anchor; one model's residency on all replicas is one row.
    """

    can_serve: Bytes  # [G, P]
    pools: Ints  # [P, 3] TABLE, FIRST_REPLICA, LAST_REPLICA (half-open)
    pool_of: Ints  # [R]
    ring_start: Ints  # [5]
    ring_bytes: Ints  # [ring_start[4]] bytes of each key, 0 for an anchor
    links: Smalls  # [2, ring_start[4], R] FOLLOWING, PRECEDING; state
    held_bytes: Ints  # [2, 4, R] USED, CAPACITY; state


TABLE: Final = 0
FIRST_REPLICA: Final = 1
LAST_REPLICA: Final = 2

DEVICE: Final = 0
HOST_CHECKPOINTS: Final = 1
HOST_CONTROLNETS: Final = 2
HOST_LORAS: Final = 3

FOLLOWING: Final = 0
PRECEDING: Final = 1

USED: Final = 0
CAPACITY: Final = 1


class Workers(NamedTuple):
    """The ControlNet workers; the rings of a worker (DEVICE, WORKER_HOST) lie one after the other, as in :class:`Fleet`. State."""

    may_hold: Bytes  # [ControlNets, W]
    ring_start: Ints  # [3]
    ring_bytes: Ints  # [ring_start[2]]
    links: Smalls  # [2, ring_start[2], W]
    held_bytes: Ints  # [2, 2, W]
    n_pins: Ints  # [ControlNets, W]
    ready_s: Floats  # [ControlNets, W] when each one's last load is complete
    counts: Ints  # [W, 4] N_ATTACHED, FIRST_EDGE, LAST_EDGE, IS_FULL
    sums: Floats  # [W, 5] ATTACHED_LOAD, LOADER_FREE_S, ALONE_LOAD, SPAN_START_S, WORK_S


WORKER_HOST: Final = 1

N_ATTACHED: Final = 0
FIRST_EDGE: Final = 1  # edges of a worker in order of joining; −1 if nobody denoises there
LAST_EDGE: Final = 2
IS_FULL: Final = 3

ATTACHED_LOAD: Final = 0  # by all requests attached, each at its own pace: what placement balances
LOADER_FREE_S: Final = 1
ALONE_LOAD: Final = 2  # by those that denoise there, each at its own pace
SPAN_START_S: Final = 3
WORK_S: Final = 4


class Clients(NamedTuple):
    """For each base replica, the request that it runs with ControlNet workers. Edge r · K + k joins it to its k-th. State."""

    counts: Ints  # [R, 3] REQUEST (−1 unless it denoises), N_WORKERS, N_PINNED
    paces: Floats  # [R, 9] the constants below
    edges: Ints  # [R K, 5] WORKER, NEXT_EDGE, PREVIOUS_EDGE, PINNED_WORKER, PINNED_CODE
    demands: Floats  # [R K, 2] DEMAND_S (of that worker per step of median length), LOAD (added to its attached load)


REQUEST: Final = 0
N_WORKERS: Final = 1
N_PINNED: Final = 2

PERIOD_S: Final = 0  # of a step when nobody shares the workers
LENGTH: Final = 1  # steps of median length in all
LEFT: Final = 2
ALONE_PER_S: Final = 3
RATE_PER_S: Final = 4
UPDATED_S: Final = 5
FINISH_S: Final = 6
SCHEDULED_S: Final = 7
PACE_PER_S: Final = 8  # ALONE_PER_S with the waits for others in passing

WORKER: Final = 0
NEXT_EDGE: Final = 1
PREVIOUS_EDGE: Final = 2
PINNED_WORKER: Final = 3
PINNED_CODE: Final = 4

DEMAND_S: Final = 0
LOAD: Final = 1


class Scratch(NamedTuple):
    """Room for one component of replicas and workers, and for one choice."""

    counts: Ints  # [10, max(R K, W, 2 K + 2)] the constants below; LOCAL_* are −1 and IS_MATE 0 between uses
    sums: Floats  # [7, ·] likewise


COMPONENT_WORKERS: Final = 0
LOCAL_WORKER: Final = 1
COMPONENT_CLIENTS: Final = 2
LOCAL_CLIENT: Final = 3
EDGE_CLIENT: Final = 4
EDGE_WORKER: Final = 5
IS_HELD: Final = 6
CHOSEN: Final = 7
MATES: Final = 8
IS_MATE: Final = 9

EDGE_DEMAND_S: Final = 0
CLIENT_PACE_PER_S: Final = 1
LOADS: Final = 2
OPEN_DEMAND_S: Final = 3
LIMITS: Final = 4
RATES: Final = 5
IS_OPEN: Final = 6


class Queues(NamedTuple):
    """Who waits, who is idle, and what will happen. State."""

    waiting: Ints  # [G, 3] FIRST_WAITING, LAST_WAITING (−1 if none; may still hold expired requests), N_WAITING
    next_waiting: Smalls  # [n] the next in its queue, −1 at the end
    is_idle: Bytes  # [R]
    n_idle: Ints  # [P]
    due_s: Floats  # the heap of planner.fast.heap
    events: Ints


FIRST_WAITING: Final = 0
LAST_WAITING: Final = 1
N_WAITING: Final = 2


class Outcome(NamedTuple):
    """What happened to each request; NaN and −1 where it did not."""

    times_s: Floats  # [n, 4] START_S, END_S, SWITCH_S, CONTROLNET_LOAD_S
    states: Smalls  # [n, 3] ENDING, REPLICA, IS_SWITCH
    loras: Floats  # [n, 3] LORA_WAIT_S, LORA_FETCH_S, LORA_MISSES; [0, 3] if nobody has LoRAs
    controlnets: Floats  # [n, 4] DENOISE_START_S, DENOISE_S, DENOISE_ALONE_S, CONTROLNET_MISSES; [0, 4] likewise
    spans: Floats  # [·, 5] of ControlNet workers: WORKER, IS_LOAD, start, end, work, in the order in which they end
    counts: Ints  # [4] N_SPANS, N_EVENTS, N_ARRIVED, N_EXPIRIES (entries of expiry_order that are past)


START_S: Final = 0
END_S: Final = 1
SWITCH_S: Final = 2
CONTROLNET_LOAD_S: Final = 3

ENDING: Final = 0
REPLICA: Final = 1
IS_SWITCH: Final = 2

LORA_WAIT_S: Final = 0
LORA_FETCH_S: Final = 1
LORA_MISSES: Final = 2

DENOISE_START_S: Final = 0
DENOISE_S: Final = 1  # this and the next only of requests that used ControlNet workers
DENOISE_ALONE_S: Final = 2
CONTROLNET_MISSES: Final = 3

N_SPANS: Final = 0
N_EVENTS: Final = 1
N_ARRIVED: Final = 2
N_EXPIRIES: Final = 3


def new_clients(n_replicas: int, n_controlnets: int) -> Clients:
    """Nobody denoising."""
    n_edges = n_replicas * max(1, n_controlnets)
    counts = np.zeros((n_replicas, 3), dtype=np.int64)
    counts[:, REQUEST] = -1
    return Clients(counts, np.zeros((n_replicas, 9)), np.full((n_edges, 5), -1, dtype=np.int64), np.zeros((n_edges, 2)))


def new_scratch(n_replicas: int, n_workers: int, n_controlnets: int) -> Scratch:
    """Empty room."""
    k = max(1, n_controlnets)
    size = max(n_replicas * k, n_workers, 2 * k + 2)
    counts = np.zeros((10, size), dtype=np.int64)
    counts[LOCAL_WORKER] = counts[LOCAL_CLIENT] = -1
    return Scratch(counts, np.zeros((7, size)))


def new_queues(n_requests: int, n_groups: int, n_replicas: int, replicas_of_pool: Ints) -> Queues:
    """Every replica idle, nobody waiting."""
    waiting = np.full((n_groups, 3), -1, dtype=np.int64)
    waiting[:, N_WAITING] = 0
    room = 4 * n_replicas + 64
    return Queues(
        waiting=waiting,
        next_waiting=np.full(n_requests, -1, dtype=np.int32),
        is_idle=np.ones(n_replicas, dtype=np.uint8),
        n_idle=replicas_of_pool,
        due_s=np.zeros(room),
        events=np.zeros((room, 2), dtype=np.int64),
    )


def with_more_room(queues: Queues) -> Queues:
    """The same queues with twice the room for events."""
    return queues._replace(
        due_s=np.concatenate([queues.due_s, queues.due_s]), events=np.concatenate([queues.events, queues.events])
    )
