"""Which worker sits on which GPU of which host, for drawing. The plan says how many of each; workers are numbered through the hosts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.allocation import Allocation, Pool
from planner.export.cells import cells_of
from planner.run_series import WorkerLoad
from traces.problems import InputError


@dataclass(frozen=True, slots=True)
class PlacedGpu:
    """One GPU."""

    pool: str
    role: str
    workers: tuple[str, ...]
    """Worker ids; several where replicas share a GPU; the same id on as many GPUs as a replica spans."""
    busy_ratio: float | None
    """Mean over its workers; None if nothing is known about them."""
    loading_ratio: float | None


@dataclass(frozen=True, slots=True)
class Layout:
    """Hosts in order, each with its GPUs."""

    hosts: tuple[tuple[PlacedGpu, ...], ...]
    gpus_per_host: int
    not_cut: str
    """Why pools that must share a host could not be cut into hosts, and are drawn one after the other instead; empty if they could."""

    @property
    def n_unused(self) -> int:
        """GPUs of the hosts that nobody uses."""
        return sum(self.gpus_per_host - len(host) for host in self.hosts)


def layout_of(allocation: Allocation, gpus_per_host: int, loads: Mapping[str, WorkerLoad]) -> Layout:
    """Lays an allocation out on hosts of this many GPUs.

    Workers that must share a host because of their links do, as in the exported pods. Where they cannot, GPUs are filled one after
    the other, and ``not_cut`` says why.
    """
    numbers = {pool.name: 0 for pool in allocation.pools}
    hosts: list[tuple[PlacedGpu, ...]] = []
    try:
        cells = cells_of(allocation, gpus_per_host)
    except InputError as error:
        flat = [gpu for pool in allocation.pools for gpu in _gpus(pool, pool.n_replicas, numbers, loads)]
        hosts = [tuple(flat[first : first + gpus_per_host]) for first in range(0, len(flat), gpus_per_host)]
        return Layout(tuple(hosts), gpus_per_host, str(error.problems[0]))
    free: list[list[PlacedGpu]] = []
    for cell in cells:
        for _ in range(cell.n_pods):
            gpus = [gpu for pool in cell.allocation.pools for gpu in _gpus(pool, pool.n_replicas, numbers, loads)]
            # an autoscaled pool's pods are single replicas: they fill hosts together
            if cell.is_autoscaled and free and len(free[-1]) + len(gpus) <= gpus_per_host:
                free[-1] += gpus
            else:
                free.append(list(gpus))
    return Layout(tuple(map(tuple, free)), gpus_per_host, "")


def _gpus(pool: Pool, n_replicas: int, numbers: dict[str, int], loads: Mapping[str, WorkerLoad]) -> list[PlacedGpu]:
    """The GPUs of the next replicas of a pool."""
    found = []
    for first in range(0, n_replicas, pool.workers_per_gpu):
        n_here = min(pool.workers_per_gpu, n_replicas - first)
        workers = tuple(f"{pool.name}-{numbers[pool.name] + i}" for i in range(n_here))
        numbers[pool.name] += n_here
        known = [loads[worker] for worker in workers if worker in loads]
        # a worker that the records do not name did nothing, unless there are no records at all
        busy = sum(load.busy_ratio for load in known) / n_here if loads else None
        loading = sum(load.loading_ratio for load in known) / n_here if loads else None
        found += [PlacedGpu(pool.name, pool.role, workers, busy, loading)] * pool.n_gpus_per_replica
    return found
