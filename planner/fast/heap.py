"""The compiled event queue: a binary heap in two arrays, ordered by time, then by order of scheduling.

Only what ends (kind COMPLETION of the SimPy model) is in it: arrivals and expiries are known beforehand and walked in order.
"""

from __future__ import annotations

from typing import Final

from planner.fast.arrays import Floats, Ints
from planner.fast.policies import compiled

# events[0] holds N_QUEUED and N_SCHEDULED; event number k of the heap is row k + 1: ORDER, WHAT
N_QUEUED: Final = 0
N_SCHEDULED: Final = 1
ORDER: Final = 0
WHAT: Final = 1


@compiled
def push(due_s: Floats, events: Ints, event_s: float, what: int) -> None:
    """Schedules an event; the arrays must have room for it."""
    at = events[0, N_QUEUED] + 1
    order = events[0, N_SCHEDULED]
    events[0, N_QUEUED] = at
    events[0, N_SCHEDULED] = order + 1
    while at > 1:
        above = at >> 1
        if due_s[above] <= event_s:  # among equals the one scheduled first stays above
            break
        due_s[at] = due_s[above]
        events[at, ORDER] = events[above, ORDER]
        events[at, WHAT] = events[above, WHAT]
        at = above
    due_s[at] = event_s
    events[at, ORDER] = order
    events[at, WHAT] = what


@compiled
def pop(due_s: Floats, events: Ints) -> None:
    """Removes the first event (row 1), which the caller has read."""
    last = events[0, N_QUEUED]
    events[0, N_QUEUED] = last - 1
    event_s = due_s[last]
    order = events[last, ORDER]
    at = 1
    while True:
        child = 2 * at
        if child >= last:
            break
        other = child + 1
        if other < last and (
            due_s[other] < due_s[child]
            or (due_s[other] == due_s[child] and events[other, ORDER] < events[child, ORDER])
        ):
            child = other
        if event_s < due_s[child] or (event_s == due_s[child] and order < events[child, ORDER]):
            break
        due_s[at] = due_s[child]
        events[at, ORDER] = events[child, ORDER]
        events[at, WHAT] = events[child, WHAT]
        at = child
    due_s[at] = event_s
    events[at, ORDER] = order
    events[at, WHAT] = events[last, WHAT]
