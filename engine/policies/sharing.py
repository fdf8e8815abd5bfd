"""How fast clients of shared ControlNet workers proceed: max–min fair step rates by progressive filling, after waits in passing.

Denoising is closed: a client has one step in flight, and a saturated worker takes its clients in turn, so each gets the same
number of steps unless its own pace is slower. That is max–min fairness of step rates (Bertsekas and Gallager, Data Networks,
6.5.2). Its own pace is that of a step alone and of what it waits on a worker that is not saturated, :func:`wait_in_passing_s`. An
approximation: who finds whom running depends on all of them, not on pairs.
"""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from typing import Final

SLACK = 1e-12
"""Two levels closer than this, relatively, freeze together, so that rounding cannot split one bottleneck into two rounds."""


NEAR: Final = 0.05
"""Clients whose steps alone take so nearly the same, relatively, fall in behind one another and are taken not to wait."""


def wait_in_passing_s(alone_per_s: float, other_per_s: float, other_demand_s: float) -> float:
    """Seconds a step that a client waits, on average, for one other client's forward on a worker with room for both.

    At paces that differ it comes at random moments: with probability ``other_demand_s · other_per_s`` the forward is running, half of it
    is left. It waits no more than the difference of their steps, at which it goes along behind the slower one.

    Args:
        alone_per_s: its own steps a second when nobody shares.
        other_per_s: the other's.
        other_demand_s: seconds of the worker that one step of the other takes.
    """
    difference_s = abs(1.0 / alone_per_s - 1.0 / other_per_s)
    if difference_s * alone_per_s <= NEAR:
        return 0.0
    return min(0.5 * other_demand_s * other_demand_s * other_per_s, difference_s)


def fair_step_rates(
    alone_per_s: Sequence[float],
    edge_client: Sequence[int],
    edge_worker: Sequence[int],
    edge_demand_s: Sequence[float],
    n_workers: int,
) -> list[float]:
    """Step rate of each client, in steps per second.

    Client ``edge_client[e]`` takes ``edge_demand_s[e]`` (> 0) seconds of worker ``edge_worker[e]`` per step, and does at most
    ``alone_per_s[client]`` (> 0) steps per second. No worker is loaded above 1; a client gets less than alone only if one of
    its workers is full and none of that worker's clients is faster.
    """
    n_clients = len(alone_per_s)
    n_edges = len(edge_client)
    rates = [0.0] * n_clients
    is_frozen = [False] * n_clients
    n_left = n_clients
    while n_left > 0:
        frozen_load = [0.0] * n_workers
        open_demand_s = [0.0] * n_workers
        for e in range(n_edges):
            if is_frozen[edge_client[e]]:
                frozen_load[edge_worker[e]] += rates[edge_client[e]] * edge_demand_s[e]
            else:
                open_demand_s[edge_worker[e]] += edge_demand_s[e]
        limit = [-1.0] * n_workers  # the level at which a worker is full; -1: nobody is open there
        level = -1.0
        for w in range(n_workers):
            if open_demand_s[w] > 0.0:
                limit[w] = max(1.0 - frozen_load[w], 0.0) / open_demand_s[w]
                if level < 0.0 or limit[w] < level:
                    level = limit[w]
        for c in range(n_clients):
            if not is_frozen[c] and (level < 0.0 or alone_per_s[c] < level):
                level = alone_per_s[c]
        reach = level * (1.0 + SLACK)
        for e in range(n_edges):
            c = edge_client[e]
            if not is_frozen[c] and limit[edge_worker[e]] <= reach:
                rates[c] = -1.0  # to freeze, after every worker has been looked at
        for c in range(n_clients):
            if not is_frozen[c] and (rates[c] < 0.0 or alone_per_s[c] <= reach):
                rates[c] = min(level, alone_per_s[c])
                is_frozen[c] = True
                n_left -= 1
    return rates


def fill_fair_step_rates(
    alone_per_s: Sequence[float],
    edge_client: Sequence[int],
    edge_worker: Sequence[int],
    edge_demand_s: Sequence[float],
    rates: MutableSequence[float],
    is_open: MutableSequence[float],
    is_held: MutableSequence[int],
    frozen_load: MutableSequence[float],
    open_demand_s: MutableSequence[float],
    limit: MutableSequence[float],
) -> None:
    """The same rates to the last bit, into ``rates``, for compiled callers: no allocation, no branch on a client's state.

    What the buffers after ``rates`` hold does not matter: two with an entry a client, three with an entry a worker.
    """
    n_clients = len(alone_per_s)
    n_edges = len(edge_client)
    n_workers = len(limit)
    for c in range(n_clients):
        rates[c] = 0.0
        is_open[c] = 1.0
        is_held[c] = 0
    for w in range(n_workers):
        frozen_load[w] = 0.0
        open_demand_s[w] = 0.0
    n_left = n_clients
    while n_left > 0:
        for e in range(n_edges):  # no branch, because it would be taken at random: an open client's rate is still 0
            c = edge_client[e]
            w = edge_worker[e]
            demand_s = edge_demand_s[e]
            frozen_load[w] += rates[c] * demand_s
            open_demand_s[w] += is_open[c] * demand_s
        level = -1.0
        for w in range(n_workers):
            demand_s = open_demand_s[w]
            full_at = -1.0  # the level at which a worker is full; -1: nobody is open there
            if demand_s > 0.0:
                full_at = max(1.0 - frozen_load[w], 0.0) / demand_s
                if level < 0.0 or full_at < level:
                    level = full_at
            limit[w] = full_at
            frozen_load[w] = 0.0
            open_demand_s[w] = 0.0
        for c in range(n_clients):
            if is_open[c] and (level < 0.0 or alone_per_s[c] < level):
                level = alone_per_s[c]
        reach = level * (1.0 + SLACK)
        for e in range(n_edges):
            if limit[edge_worker[e]] <= reach:
                is_held[edge_client[e]] = 1  # of no matter where nobody is open
        for c in range(n_clients):
            if is_open[c] and (is_held[c] or alone_per_s[c] <= reach):
                rates[c] = min(level, alone_per_s[c])
                is_open[c] = 0.0
                n_left -= 1
