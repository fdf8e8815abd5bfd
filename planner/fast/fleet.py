"""The state in which an allocation starts, as arrays: the SimPy model builds one replica of each pool, which is then repeated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from engine.allocation import Allocation
from planner.fast import arrays as a
from planner.fast.arrays import Fleet, Ints, Smalls, Workers
from planner.fast.flat import FlatWorkload
from planner.fast.refusal import check_size
from planner.service import ServiceTable, Sizes
from planner.simulator.eligibility import pools_of_requests
from planner.simulator.replicas import (
    Cache,
    FactsByPool,
    build_base_replicas,
    build_controlnet_workers,
    check_memory,
    check_services,
    hosts,
)
from planner.workload import Workload


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """Everything the compiled loop needs beside requests and tables."""

    fleet: Fleet
    workers: Workers
    no_pins: Ints
    """[models, 1] zeros: only the devices of ControlNet workers pin what is in use."""
    asks: Smalls
    """[n, 3] of the requests, with their queues."""


def build_start(
    flat: FlatWorkload,
    allocation: Allocation,
    services: Mapping[str, ServiceTable],
    table_of_pool: Sequence[int],
    sizes: Sizes,
    facts: FactsByPool,
    n_requests: int,
) -> Start:
    """Lays the allocation out.

    Raises:
        NotModelledError: the state would not fit.
        InputError: as ``planner.simulator.simulate``.
    """
    workload = flat.workload
    check_services(allocation, services, len(workload))
    needs = _distinct_needs(flat, n_requests)
    check_memory(allocation, needs, sizes, facts, len(needs))
    n_checkpoints, n_controlnets, n_loras = (
        len(names) for names in (workload.checkpoint_names, workload.controlnet_names, workload.lora_names)
    )
    base, others = allocation.pools_of("base"), allocation.pools_of("controlnet")
    n_keys = 2 * n_checkpoints + 2 * n_controlnets + n_loras + 4
    check_size(n_keys, sum(pool.n_replicas for pool in base))
    check_size(2 * n_controlnets + 2, sum(pool.n_replicas for pool in others))
    one_each = replace(allocation, pools=tuple(replace(pool, n_replicas=1) for pool in allocation.pools))
    models = build_base_replicas(one_each, needs, sizes, facts, len(needs))
    rings = [(m.device, m.host_checkpoints, m.host_controlnets, m.host_loras) for m in models]
    counts = np.array([pool.n_replicas for pool in base], dtype=np.int64)
    links, held_bytes = _repeat(rings, counts)
    worker_models = build_controlnet_workers(one_each, needs, sizes, facts, len(needs))
    n_workers = np.array([pool.n_replicas for pool in others], dtype=np.int64)
    worker_rings: list[tuple[Cache, ...]] = [(model.device, model.host) for model in worker_models]
    if not worker_rings:  # arrays of no columns, so that the compiled types stay the same
        worker_rings, n_workers = [(Cache([0] * n_controlnets, 0),) * 2], np.zeros(1, dtype=np.int64)
    worker_links, worker_held = _repeat(worker_rings, n_workers)
    owners = np.repeat(np.arange(len(n_workers)), n_workers).tolist()
    may_hold = np.zeros((n_controlnets, len(owners)), dtype=np.uint8)
    for code, name in enumerate(workload.controlnet_names):
        may_hold[code] = [hosts(others[pool].controlnet_ids, name) for pool in owners]
    group_of_need, able = pools_of_requests(allocation, needs, [bool(row.any()) for row in may_hold], len(needs))
    can_serve = np.zeros((len(able), len(base)), dtype=np.uint8)
    for group, pools in enumerate(able):
        can_serve[group, list(pools)] = 1
    last = np.cumsum(counts)
    fleet = Fleet(
        can_serve=can_serve,
        pools=np.stack([np.array(table_of_pool, dtype=np.int64), last - counts, last], axis=1),
        pool_of=np.repeat(np.arange(len(base)), counts).astype(np.int64),
        ring_start=_ring_start(rings[0]),
        ring_bytes=_ring_bytes(rings[0]),
        links=links,
        held_bytes=held_bytes,
    )
    worker_counts = np.zeros((len(owners), 4), dtype=np.int64)
    worker_counts[:, a.FIRST_EDGE] = worker_counts[:, a.LAST_EDGE] = -1
    workers = Workers(
        may_hold=may_hold,
        ring_start=_ring_start(worker_rings[0]),
        ring_bytes=_ring_bytes(worker_rings[0]),
        links=worker_links,
        held_bytes=worker_held,
        n_pins=np.zeros((n_controlnets, len(owners)), dtype=np.int64),
        ready_s=np.zeros((n_controlnets, len(owners))),
        counts=worker_counts,
        sums=np.zeros((len(owners), 5)),
    )
    no_pins = np.zeros((max(n_checkpoints + n_controlnets, n_loras), 1), dtype=np.int64)
    asks = flat.asks[:n_requests].copy()
    asks[:, a.GROUP] = np.array(group_of_need, dtype=np.int32)[flat.need[:n_requests]]
    return Start(fleet, workers, no_pins, asks)


def _distinct_needs(flat: FlatWorkload, n_requests: int) -> Workload:
    """The first request of each need among the first n; each stands for the largest forward batch of all of those."""
    rows = flat.first_of_need[flat.first_of_need < n_requests]
    workload = flat.workload
    mask = np.zeros(len(workload), dtype=np.bool_)
    mask[rows] = True
    largest = int(workload.forward_batch[:n_requests].max(initial=0))
    return replace(workload.subset(mask), forward_batch=np.full(len(rows), largest, dtype=np.int64))


def _repeat(models: Sequence[tuple[Cache, ...]], counts: Ints) -> tuple[Smalls, Ints]:
    """Links [2, keys, owners], and used and capacity bytes [2, caches, owners]: each model's column, ``counts`` times."""
    links = np.array(
        [
            [np.concatenate([np.array(getattr(cache, name), dtype=np.int32) for cache in caches]) for caches in models]
            for name in ("following", "preceding")
        ]
    )
    held = np.array(
        [
            [[getattr(cache, name) for cache in caches] for caches in models]
            for name in ("used_bytes", "capacity_bytes")
        ],
        dtype=np.int64,
    )
    return (
        np.ascontiguousarray(np.repeat(links.transpose(0, 2, 1), counts, axis=2)),
        np.ascontiguousarray(np.repeat(held.transpose(0, 2, 1), counts, axis=2)),
    )


def _ring_start(caches: Sequence[Cache]) -> Ints:
    return np.cumsum([0, *(len(cache.n_bytes) + 1 for cache in caches)]).astype(np.int64)


def _ring_bytes(caches: Sequence[Cache]) -> Ints:
    return np.concatenate([np.array([*cache.n_bytes, 0], dtype=np.int64) for cache in caches])
