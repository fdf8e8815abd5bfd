"""Placement where workers come and go, differ in speed, and are reached over links of different length that others share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import ClassVar

from engine.allocation import GIB, Allocation, Pool
from engine.policies.routing import least_loaded
from planner.service import ServiceTable
from planner.simulator.coupling import Client
from planner.simulator.placement import Placement, Placer, StepParts
from planner.simulator.replicas import ControlNetWorker
from planner.workload import Workload


class SharedLine(ControlNetWorker):
    """A line that several links go through: it serves bytes as a ControlNet worker serves forwards, max–min fair."""

    __slots__ = ()
    has_waits: ClassVar[bool] = False
    """Bytes of several go side by side."""

    def __init__(self, name: str) -> None:
        self.worker_id = name
        self.clients: dict[Client, float] = {}
        self.alone_load = 0.0
        self.is_full = False
        self.span_start_s = 0.0
        self.work_s = 0.0


class Route:
    """From one base pool to one ControlNet pool."""

    __slots__ = ("bytes_per_s", "compression_ratio", "line", "transfer_s")

    def __init__(
        self, transfer_s: list[float], line: SharedLine | None, bytes_per_s: float, compression_ratio: float
    ) -> None:
        self.transfer_s = transfer_s
        self.line = line
        self.bytes_per_s = bytes_per_s
        self.compression_ratio = compression_ratio


class FullPlacer(Placer):
    """As :class:`Placer`, among the workers that serve now."""

    def __init__(
        self,
        workload: Workload,
        allocation: Allocation,
        services: Mapping[str, ServiceTable],
        workers: Sequence[ControlNetWorker],
        record_load: Callable[[ControlNetWorker, float, float], None],
    ) -> None:
        super().__init__(workload, workers, record_load)
        self._open = [list(hosting) for hosting in self.hosting]
        self._base_pools = allocation.pools_of("base")
        # a ControlNet pool with a table of its own (another GPU kind, a part of a GPU) computes and loads as that says
        self._own_parts = {
            pool.name: StepParts(services[pool.name])
            for pool in allocation.pools_of("controlnet")
            if pool.name in services
        }
        apart = [pool.name for pool in self._base_pools if pool.topology == "decoupled"]
        self._common_parts = StepParts(services[(apart or [self._base_pools[0].name])[0]])
        self._bytes: list[list[float]] = []
        self._routes: list[dict[str, Route]] = []
        lines: dict[str, SharedLine] = {}
        for base in self._base_pools:
            table = services[base.name]
            routes: dict[str, Route] = {}
            if base.topology == "decoupled":
                for pool in allocation.pools_of("controlnet"):
                    routes[pool.name] = self._route(allocation, base, pool, table, lines)
            self._routes.append(routes)
            self._bytes.append(table.residual_bytes.tolist() if table.residual_bytes is not None else [])

    @staticmethod
    def _route(
        allocation: Allocation, base: Pool, pool: Pool, table: ServiceTable, lines: dict[str, SharedLine]
    ) -> Route:
        for link in allocation.links:
            if (link.base_pool, link.controlnet_pool) == (base.name, pool.name) and table.transfers:
                line = lines.setdefault(link.uplink, SharedLine(link.uplink)) if link.uplink else None
                bytes_per_s = (link.uplink_gib_per_s or 0.0) * GIB
                transfer_s = table.transfers[link.kind, link.compression_ratio].tolist()
                return Route(transfer_s, line, bytes_per_s, link.compression_ratio)
        return Route(table.transfer_s.tolist(), None, 0.0, 1.0)

    def parts_of(self, pool: str) -> StepParts:
        """What forwards and loads take on a ControlNet pool; another pool's workers do as the base pool's table says."""
        return self._own_parts.get(pool, self._common_parts)

    def reopen(self, is_open: Callable[[ControlNetWorker], bool]) -> None:
        """Looks again at which workers take requests."""
        self._open = [[worker for worker in hosting if is_open(worker)] for hosting in self.hosting]

    def can_place(self, codes: Sequence[int]) -> bool:
        """Whether each of these ControlNets has a worker that takes requests now."""
        return all(self._open[code] for code in codes)

    def place_from(self, base_pool: int, i: int, parts: StepParts, now_s: float) -> Placement:
        """As :meth:`Placer.place`, for a request on a base replica of this pool."""
        windows, n_steps = self._windows[i], self._n_steps[i]
        routes = self._routes[base_pool]
        slowest_s = 0.0
        transfers_s = 0.0
        for code in self._controlnets[i]:
            pool = self._open[code][0].pool.name
            slowest_s = max(slowest_s, self._forward_s(i, pool, parts))
            transfers_s += self._transfer_s(i, base_pool, routes[pool])
        # before the workers are known: its pace if each ControlNet has a worker of its own
        pace_per_s = 1.0 / (max(parts.encoder_s[i], slowest_s + transfers_s) + parts.decoder_s[i])
        chosen: list[ControlNetWorker] = []
        pinned: list[tuple[ControlNetWorker, int]] = []
        loads: dict[ControlNetWorker, float] = {}
        demand_s: dict[ControlNetWorker, float] = {}
        ready_s = now_s
        n_misses = 0
        for j, code in enumerate(self._controlnets[i]):
            candidates = self._open[code]
            attached = [candidate.attached_load for candidate in candidates]
            resident = [candidate.device.following[code] != code for candidate in candidates]
            worker = candidates[least_loaded(attached, resident)]
            forward_s = self._forward_s(i, worker.pool.name, parts)
            first, last = windows[j]
            share = (last - first) / n_steps
            load = share * forward_s * pace_per_s
            worker.attached_load += load
            if worker not in loads:
                worker.n_attached += 1
            loads[worker] = loads.get(worker, 0.0) + load
            demand_s[worker] = demand_s.get(worker, 0.0) + share * forward_s
            chosen.append(worker)
            own = self._own_parts.get(worker.pool.name, parts)
            model_ready_s, is_miss = self._ensure(worker, code, own, now_s, pinned)
            n_misses += is_miss
            ready_s = max(ready_s, model_ready_s)
        period_s, line_demand_s = self._walk(i, base_pool, parts, chosen)
        workers = list(loads)
        load_list = list(loads.values())
        return Placement(
            [*workers, *line_demand_s], [*demand_s.values(), *line_demand_s.values()], period_s, load_list, pinned, ready_s,
            n_misses, len(line_demand_s),
        )  # fmt: skip

    def _forward_s(self, i: int, pool: str, parts: StepParts) -> float:
        return self._own_parts[pool].forward_s[i] if pool in self._own_parts else parts.forward_s[i]

    def _transfer_s(self, i: int, base_pool: int, route: Route) -> float:
        if route.line is None:
            return route.transfer_s[i]
        return max(route.transfer_s[i], self._bytes[base_pool][i] / route.compression_ratio / route.bytes_per_s)

    def _walk(
        self, i: int, base_pool: int, parts: StepParts, chosen: Sequence[ControlNetWorker]
    ) -> tuple[float, dict[SharedLine, float]]:
        """Mean seconds of a step when nobody shares, and of that each shared line's part.

        As :meth:`Placer._period_s`: max(encoder, busiest worker + all transfers) + decoder; plain steps where none is active.
        """
        windows, n_steps = self._windows[i], self._n_steps[i]
        routes = self._routes[base_pool]
        bounds = sorted({0, n_steps, *(bound for window in windows for bound in window)})
        total_s = 0.0
        line_s: dict[SharedLine, float] = {}
        for first, last in pairwise(bounds):
            work_s: dict[ControlNetWorker, float] = {}
            for worker, window in zip(chosen, windows, strict=True):
                if window[0] <= first and last <= window[1]:
                    work_s[worker] = work_s.get(worker, 0.0) + self._forward_s(i, worker.pool.name, parts)
            step_s = parts.plain_s[i]
            if work_s:
                transfers_s = 0.0
                for worker in work_s:
                    route = routes[worker.pool.name]
                    transfers_s += self._transfer_s(i, base_pool, route)
                    if route.line is not None:
                        sent_s = self._bytes[base_pool][i] / route.compression_ratio / route.bytes_per_s
                        line_s[route.line] = line_s.get(route.line, 0.0) + (last - first) * sent_s / n_steps
                step_s = max(parts.encoder_s[i], max(work_s.values()) + transfers_s) + parts.decoder_s[i]
            total_s += (last - first) * step_s
        return total_s / n_steps, line_s

    def release(self, placement: Placement) -> None:
        """Takes the request off its workers."""
        n_workers = len(placement.workers) - placement.n_lines
        placement.workers = placement.workers[:n_workers]
        super().release(placement)
