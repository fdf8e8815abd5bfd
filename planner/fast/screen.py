"""Counts late requests of a bare queue, compiled: what the search's first guess asks a few dozen times of every request."""

from __future__ import annotations

import math
from typing import Final, cast

import numpy as np

from planner.fast.arrays import Floats
from planner.fast.cache import compiled_once

MARGIN: Final = 1
"""The first row of the heap stays unused, so that the children of row k are 2 k and 2 k + 1."""


def n_late(arrival_s: Floats, service_s: Floats, n_servers: int, latency_s: float, enough: float) -> int:
    """Requests of first come, first served on ``n_servers`` that take longer than ``latency_s``; stops past ``enough``.

    Kiefer–Wolfowitz: who comes next takes the server that is free first.
    """
    free_at_s = np.full(n_servers + MARGIN, -math.inf)
    arrival_s, service_s = np.ascontiguousarray(arrival_s), np.ascontiguousarray(service_s)
    return int(cast("int", _count(arrival_s, service_s, free_at_s, float(latency_s), float(enough))))


@compiled_once
def _count(arrival_s: Floats, service_s: Floats, free_at_s: Floats, latency_s: float, enough: float) -> int:
    n_servers = len(free_at_s) - 1
    late = 0
    for i in range(len(arrival_s)):
        end_s = max(arrival_s[i], free_at_s[1]) + service_s[i]
        at = 1
        while True:  # the first server's place in the heap goes down to where its new time belongs
            child = 2 * at
            if child > n_servers:
                break
            if child < n_servers and free_at_s[child + 1] < free_at_s[child]:
                child += 1
            if end_s <= free_at_s[child]:
                break
            free_at_s[at] = free_at_s[child]
            at = child
        free_at_s[at] = end_s
        if end_s - arrival_s[i] > latency_s:
            late += 1
            if late > enough:
                break
    return late
