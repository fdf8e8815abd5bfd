"""One run of one allocation, as the search and the confirmation need it: compiled where the fast tier covers it, else SimPy."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Generic, TypeVar

import numpy as np

from engine.allocation import Allocation, Topology
from planner.answers import answers_about, confirmation_of, plain_confirmation
from planner.candidates import Counts, Shape
from planner.fast import FastRun, FlatWorkload, NotModelledError, Prepared, flatten, prepare, simulate_fast
from planner.fast import arrays as a
from planner.fast.metrics import Columns, columns_of, summarise_fast
from planner.replication import (
    LOSSES,
    SHARING,
    Confirmation,
    Inputs,
    evaluate,
    load_inputs,
    repetition_service,
    run_allocation,
    warmup_of,
)
from planner.scenario import Scenario
from planner.search import QUEUE, Evaluation
from planner.service import ServiceTable
from planner.simulator import mechanisms_in_use
from planner.simulator.world import World
from planner.statistics import Metrics
from planner.traffic import build_traffic, source_trace, stream_seed, variation_of
from planner.workload import Floats, Workload

T = TypeVar("T")
KEPT_REQUESTS_MAX: Final = 1_200_000
"""Requests of repetitions that a process keeps laid out (about 0.3 GiB); one beyond that is built again when it is needed."""


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """Traffic and one topology's service times, laid out once for every allocation that is tried on them."""

    scenario: Scenario
    inputs: Inputs
    workload: Workload
    service: ServiceTable
    prepared: Prepared | None
    """None: the compiled tier cannot lay this workload out."""
    repetition: int | None = None

    @classmethod
    def of(
        cls,
        scenario: Scenario,
        inputs: Inputs,
        traffic: Workload | FlatWorkload,
        service: ServiceTable,
        repetition: int | None = None,
    ) -> Bench:
        """Lays the traffic out, if it is not yet."""
        workload = traffic if isinstance(traffic, Workload) else traffic.workload
        try:
            prepared = prepare(traffic, [service])
        except NotModelledError:
            prepared = None
        return cls(scenario, inputs, workload, service, prepared, repetition)

    def is_compiled(self, allocation: Allocation) -> bool:
        """Whether the compiled tier has everything that the allocation and the scenario switch on."""
        return self.prepared is not None and not mechanisms_in_use(self.as_one_kind(allocation), self._world())

    def run(self, allocation: Allocation) -> FastRun | None:
        """The compiled run of an allocation; None if only the SimPy model has what it or the scenario switches on."""
        if self.prepared is None:
            return None
        services = {pool.name: self.service for pool in allocation.pools_of("base")}
        sizes, facts = self.inputs.sizes, self.inputs.facts_of(allocation)
        one_kind = self.as_one_kind(allocation)
        try:
            return simulate_fast(self.prepared, one_kind, services, sizes, facts, world=self._world())
        except NotModelledError:
            return None

    def as_one_kind(self, allocation: Allocation) -> Allocation:
        """The allocation with ControlNet workers of the planned kind under the base's name: the service table has their times."""
        workers = self.inputs.workers
        if workers is None:
            return allocation
        own = self.inputs.gpu_kind
        return replace(
            allocation,
            pools=tuple(
                replace(pool, gpu_kind=own) if (pool.role, pool.gpu_kind) == ("controlnet", workers.gpu_kind) else pool
                for pool in allocation.pools
            ),
        )

    def _world(self) -> World:
        number = 0 if self.repetition is None else 1 + self.repetition
        return self.scenario.world.world(stream_seed(self.scenario.simulation.seed, "world", number))


def evaluate_counts(bench: Bench, shape: Shape, counts: Counts) -> Evaluation:
    """One point of the search."""
    scenario = bench.scenario
    allocation = shape.allocation(counts)
    run = bench.run(allocation)
    if run is None:
        return evaluate(scenario, bench.inputs, bench.workload, shape, bench.service, counts)
    columns = columns_of(run)
    metrics, images_per_s = measured(bench, run, columns)
    lost = lost_seconds_fast(run, columns, scenario.slo.latency_s)
    warmup_s = warmup_of(scenario, bench.workload)
    offered = columns.arrival_s >= warmup_s
    latency_s = np.where(columns.is_done[offered], columns.latency_s[offered], np.inf)
    return Evaluation(
        counts,
        metrics.slo_attainment_ratio,
        images_per_s,
        tuple(metrics.busy_ratio[pool.name] + metrics.loading_ratio[pool.name] for pool in allocation.pools),
        metrics.is_saturated,
        max(lost, key=lambda column: (lost[column], column == QUEUE)),
        float(np.quantile(latency_s, scenario.slo.attainment_ratio, method="inverted_cdf")),
    )


def measured(bench: Bench, run: FastRun, columns: Columns) -> tuple[Metrics, float]:
    """Metrics of a compiled run, and in-SLO images per second of the counted window."""
    scenario, workload = bench.scenario, bench.workload
    warmup_s = warmup_of(scenario, workload)
    metrics = summarise_fast(run, scenario.slo.latency_s, warmup_s=warmup_s, columns=columns)
    in_time = columns.is_done & (columns.latency_s <= scenario.slo.latency_s) & (columns.arrival_s >= warmup_s)
    images = float(workload.n_images[: run.n_requests][in_time].sum())
    return metrics, images / max(metrics.window_s, workload.duration_s - warmup_s)


def lost_seconds_fast(run: FastRun, columns: Columns, latency_s: float) -> dict[str, float]:
    """As :func:`planner.replication.lost_seconds`."""
    late = columns.is_done & (columns.latency_s > latency_s)

    def total(values: Floats) -> float:
        return float(values[late].sum()) if len(values) else 0.0

    times_s = run.outcome.times_s
    lost = dict(
        zip(
            LOSSES,
            (
                total(columns.queue_wait_s),
                total(times_s[:, a.SWITCH_S]),
                total(times_s[:, a.CONTROLNET_LOAD_S]),
                total(run.outcome.loras[:, a.LORA_WAIT_S]),
            ),
            strict=True,
        )
    )
    lost[SHARING] = total(np.clip(columns.denoise_s - columns.denoise_alone_s, 0.0, None))
    return lost


def confirm(
    scenario: Scenario,
    folder: Path,
    repetition: int,
    allocations: tuple[tuple[Topology, Allocation], ...],
    store: Path | None = None,
) -> tuple[Confirmation, ...]:
    """Runs one repetition (its arrivals, its profile draw, its service noise) of every allocation given.

    Args:
        store: a run store that is asked first and told afterwards; none if None.
    """
    with answers_about(store, scenario, folder, repetition) as known:
        return tuple(
            known.get(
                f"confirmation {topology}",
                allocation,
                functools.partial(_confirm, scenario, folder, repetition, topology, allocation),
                plain_confirmation,
                confirmation_of,
            )
            for topology, allocation in allocations
        )


def _confirm(
    scenario: Scenario, folder: Path, repetition: int, topology: Topology, allocation: Allocation
) -> Confirmation:
    bench = repetition_bench(scenario, folder, topology, repetition)
    run = bench.run(allocation)
    if run is None:
        slow = run_allocation(scenario, bench.inputs, bench.workload, allocation, bench.service, repetition)
        return Confirmation(slow.metrics, slow.in_slo_images_per_s)
    return Confirmation(*measured(bench, run, columns_of(run)))


def repetition_bench(scenario: Scenario, folder: Path, topology: Topology, repetition: int) -> Bench:
    """Traffic and service times of one repetition; a few are kept, for the next allocation is often tried on the same."""

    def build() -> Bench:
        inputs = load_inputs(scenario, folder)
        traffic = _repetition_traffic(scenario, folder, repetition)
        workload = traffic if isinstance(traffic, Workload) else traffic.workload
        service = repetition_service(scenario, inputs, workload, topology, repetition)
        return Bench.of(scenario, inputs, traffic, service, repetition)

    return _benches.get((scenario, folder, topology, repetition), build)


def _repetition_traffic(scenario: Scenario, folder: Path, repetition: int) -> Workload | FlatWorkload:
    """Laid out once for all topologies, and for all repetitions where they have the same arrivals."""
    varies = variation_of(scenario, source_trace(scenario, folder).duration_s) != "none"
    # what else a scenario asks leaves its requests as they are, so plans over several GPU kinds lay them out once
    key = scenario.traffic, scenario.simulation.seed, folder, repetition if varies else None
    return _traffic.get(key, lambda: _laid_out(scenario, folder, repetition))


def _laid_out(scenario: Scenario, folder: Path, repetition: int) -> Workload | FlatWorkload:
    workload = build_traffic(scenario, folder, repetition).workload
    try:
        return flatten(workload)
    except NotModelledError:
        return workload


class _Kept(Generic[T]):
    """The most recently used results, as many as ``KEPT_REQUESTS_MAX`` requests allow; always the last one."""

    def __init__(self, n_requests: Callable[[T], int]) -> None:
        self._n_requests = n_requests
        self._held: dict[object, T] = {}
        self._lock = threading.Lock()

    def get(self, key: object, build: Callable[[], T]) -> T:
        with self._lock:
            found = self._held.pop(key, None)
        value = build() if found is None else found
        with self._lock:
            self._held[key] = value  # most recently used last
            while len(self._held) > 1 and sum(map(self._n_requests, self._held.values())) > KEPT_REQUESTS_MAX:
                del self._held[next(iter(self._held))]
        return value


_traffic: _Kept[Workload | FlatWorkload] = _Kept(len)
_benches: _Kept[Bench] = _Kept(lambda bench: len(bench.workload))
