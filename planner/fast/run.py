"""One run of the compiled tier: a workload through an allocation, as arrays of what happened to each request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from engine.allocation import Allocation
from engine.policies.admission import UNLIMITED
from planner.fast import arrays as a
from planner.fast.arrays import Ints, Outcome, Requests, Tables, new_clients, new_queues, new_scratch, with_more_room
from planner.fast.flat import FlatWorkload, flat_tables, flatten
from planner.fast.fleet import build_start
from planner.fast.loop import DONE, EXPIRED, NO_POOL, QUEUE_FULL, run
from planner.fast.refusal import NotModelledError, check_mechanisms
from planner.service import ServiceTable, Sizes
from planner.simulator.replicas import FactsByPool
from planner.simulator.world import STILL, World
from planner.workload import Workload
from traces.records import RequestStatus

CONTROLNETS_MAX: Final = 62
"""ControlNets of one request: a bit each in a 64-bit word."""
ENDINGS: Final[tuple[tuple[RequestStatus, str], ...]] = (
    ("done", ""),
    ("rejected", "no pool can serve it"),
    ("rejected", "queue is full"),
    ("expired", "deadline passed in the queue"),
)
"""Status and reason by code of ``Outcome.ending``."""
assert tuple(range(len(ENDINGS))) == (DONE, NO_POOL, QUEUE_FULL, EXPIRED)  # noqa: S101


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A workload with the service tables of its topologies, laid out once for many runs."""

    flat: FlatWorkload
    services: tuple[ServiceTable, ...]
    tables: Tables


def prepare(workload: Workload | FlatWorkload, services: Sequence[ServiceTable]) -> Prepared:
    """Lays out a workload and the service tables that runs on it will use; tables that occur twice are kept once.

    Raises:
        NotModelledError: the workload is larger than the compiled tier's counters.
        ValueError: there is no table, or one is not of the workload's length.
    """
    flat = workload if isinstance(workload, FlatWorkload) else flatten(workload)
    if flat.controlnets_max > CONTROLNETS_MAX:
        raise NotModelledError((f"{flat.controlnets_max} ControlNets in one request",))
    distinct = tuple({id(service): service for service in services}.values())
    if not distinct or any(len(service) != len(flat) for service in distinct):
        raise ValueError(f"needs service tables of {len(flat)} rows, got {[len(service) for service in distinct]}")
    for service in distinct:
        if (service.is_remote & ~(service.controlnet_forward_s > 0)).any():  # its rate would be infinite
            raise NotModelledError(("ControlNets on workers that take no time",))
    return Prepared(flat, distinct, flat_tables(distinct, flat))


@dataclass(frozen=True, slots=True, eq=False)
class FastRun:
    """What happened, as arrays in order of arrival: the SimPy model's run without its tables of text."""

    prepared: Prepared
    allocation: Allocation
    outcome: Outcome
    pool_of: Ints
    """Base pool of each replica."""
    table_of_pool: tuple[int, ...]
    offered_until_s: float
    """As in ``SimulationResult``."""
    horizon_s: float

    @property
    def workload(self) -> Workload:
        """The workload; the run has its first ``n_requests`` requests."""
        return self.prepared.flat.workload

    @property
    def n_requests(self) -> int:
        """Requests that were run."""
        return len(self.outcome.states)

    @property
    def n_events(self) -> int:
        """Events that changed something, or were looked at."""
        return int(self.outcome.counts[a.N_EVENTS])


def simulate_fast(
    prepared: Prepared,
    allocation: Allocation,
    services: Mapping[str, ServiceTable],
    sizes: Sizes,
    facts: FactsByPool,
    *,
    until_s: float | None = None,
    world: World = STILL,
) -> FastRun:
    """Runs a workload through an allocation, as ``planner.simulator.simulate`` does, compiled.

    The order of events is the SimPy model's and every time agrees with it to 1e-9 relative (tests/planner/fast). Several threads
    may run at once. The first call on a machine compiles.

    Args:
        services: base pool name to its table, each one of ``prepared.services``.
        until_s: leaves out requests that arrive at or after this; those before it still run to their end.

    Raises:
        NotModelledError: the allocation or the world switches something on that only the SimPy model knows.
        InputError: something the requests need does not fit a device, or a base pool has no table.
        ValueError: a table was not prepared.
    """
    check_mechanisms(allocation, world, services, facts)
    flat = prepared.flat
    workload = flat.workload
    n = len(workload) if until_s is None else int(np.searchsorted(workload.arrival_s, until_s, side="left"))
    index = {id(table): k for k, table in enumerate(prepared.services)}
    table_of_pool = [index.get(id(services.get(pool.name)), -1) for pool in allocation.pools_of("base")]
    start = build_start(flat, allocation, services, table_of_pool, sizes, facts, n)
    if min(table_of_pool, default=0) < 0:
        raise ValueError("a pool's service table is not one of prepared.services")
    order = flat.expiry_order
    requests = Requests(
        arrival_s=flat.arrival_s,
        expiry_s=flat.expiry_s,
        expiry_order=order if n == len(flat) else order[order < n],
        asks=start.asks,
        add_on_start=flat.add_on_start,
        lora=flat.lora,
        controlnet=flat.controlnet,
    )
    n_replicas, n_workers = len(start.fleet.pool_of), len(start.workers.sums)
    outcome = _empty_outcome(n, flat, n_workers)
    limit = allocation.policies.queue_limit
    clients = new_clients(n_replicas, flat.controlnets_max)
    scratch = new_scratch(n_replicas, n_workers, flat.controlnets_max)
    fleet = start.fleet
    counts = fleet.pools[:, a.LAST_REPLICA] - fleet.pools[:, a.FIRST_REPLICA]
    queues = new_queues(n, len(fleet.can_serve), n_replicas, counts)
    queue_limit = UNLIMITED if limit is None else limit
    while not run(
        requests, prepared.tables, fleet, start.workers, start.no_pins, clients, scratch, queues, outcome, queue_limit
    ):
        queues = with_more_room(queues)
    offered_until_s = workload.duration_s if until_s is None else until_s
    offered_until_s = max(offered_until_s, float(workload.arrival_s[n - 1]) if n else 0.0)
    horizon_s = max(float(outcome.times_s[:, a.END_S].max(initial=0.0)), offered_until_s)
    return FastRun(prepared, allocation, outcome, start.fleet.pool_of, tuple(table_of_pool), offered_until_s, horizon_s)


def _empty_outcome(n: int, flat: FlatWorkload, n_workers: int) -> Outcome:
    times_s = np.zeros((n, 4))
    times_s[:, : a.SWITCH_S] = np.nan
    states = np.zeros((n, 3), dtype=np.int32)
    states[:, a.REPLICA] = -1
    controlnets = np.zeros((n if len(flat.controlnet) else 0, 4))
    controlnets[:, : a.CONTROLNET_MISSES] = np.nan
    return Outcome(
        times_s=times_s,
        states=states,
        loras=np.zeros((n if len(flat.lora) else 0, 3)),
        controlnets=controlnets,
        # each use of a ControlNet adds at most one load, and one end of a span
        spans=np.empty((2 * len(flat.controlnet) if n_workers else 0, 5)),
        counts=np.zeros(4, dtype=np.int64),
    )
