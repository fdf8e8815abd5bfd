"""Where a request's ControlNets run, and how fast it then denoises by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from engine.policies.routing import least_loaded
from planner.service import ServiceTable
from planner.simulator.replicas import ControlNetWorker, hosts
from planner.workload import Workload


@dataclass(slots=True)
class Placement:
    """A request's ControlNets on workers."""

    workers: list[ControlNetWorker]
    """Each once."""
    demand_s: list[float]
    """Seconds of each worker per step of median length, on average over the request's steps."""
    period_s: float
    """Seconds per step, on average, when nobody shares the workers."""
    loads: list[float]
    """What was added to each worker's ``attached_load``."""
    pinned: list[tuple[ControlNetWorker, int]]
    ready_s: float
    """When all its ControlNets are on their devices."""
    n_misses: int
    n_lines: int = 0
    """Shared lines at the end of ``workers``."""


class Placer:
    """Chooses workers, keeps their residency, and releases them."""

    def __init__(
        self,
        workload: Workload,
        workers: Sequence[ControlNetWorker],
        record_load: Callable[[ControlNetWorker, float, float], None],
    ) -> None:
        names = workload.controlnet_names
        self.hosting = [[worker for worker in workers if hosts(worker.pool.controlnet_ids, name)] for name in names]
        self._controlnets = workload.controlnets
        self._windows = workload.control_steps
        self._n_steps: list[int] = workload.n_steps.tolist()
        self._record_load = record_load

    def hosted(self) -> list[bool]:
        """For each ControlNet code, whether any worker may hold it."""
        return [bool(workers) for workers in self.hosting]

    def place(self, i: int, parts: StepParts, now_s: float) -> Placement:
        """Puts each ControlNet of request i on the least loaded worker that may hold it, and starts loads that are needed."""
        windows = self._windows[i]
        n_steps = self._n_steps[i]
        forward_s = parts.forward_s[i]
        # before the workers are known: its pace if each ControlNet has a worker of its own
        remote_s = forward_s + len(windows) * parts.transfer_s[i]
        pace_per_s = 1.0 / (max(parts.encoder_s[i], remote_s) + parts.decoder_s[i])
        chosen: list[ControlNetWorker] = []
        pinned: list[tuple[ControlNetWorker, int]] = []
        loads: dict[ControlNetWorker, float] = {}
        demand_s: dict[ControlNetWorker, float] = {}
        ready_s = now_s
        n_misses = 0
        for j, code in enumerate(self._controlnets[i]):
            candidates = self.hosting[code]
            if len(candidates) == 1:
                worker = candidates[0]
            else:
                attached = [candidate.attached_load for candidate in candidates]
                resident = [candidate.device.following[code] != code for candidate in candidates]
                worker = candidates[least_loaded(attached, resident)]
            first, last = windows[j]
            share = (last - first) / n_steps
            load = share * forward_s * pace_per_s
            worker.attached_load += load
            if worker not in loads:
                worker.n_attached += 1
            loads[worker] = loads.get(worker, 0.0) + load
            demand_s[worker] = demand_s.get(worker, 0.0) + share * forward_s
            chosen.append(worker)
            model_ready_s, is_miss = self._ensure(worker, code, parts, now_s, pinned)
            n_misses += is_miss
            if model_ready_s > ready_s:
                ready_s = model_ready_s
        period_s = self._period_s(i, parts, chosen)
        return Placement(
            list(loads), list(demand_s.values()), period_s, list(loads.values()), pinned, ready_s, n_misses
        )

    def release(self, placement: Placement) -> None:
        """Takes the request off its workers."""
        for worker, code in placement.pinned:
            worker.device.n_pins[code] -= 1
        for worker, load in zip(placement.workers, placement.loads, strict=True):
            worker.attached_load -= load
            worker.n_attached -= 1
            if worker.n_attached == 0:
                worker.attached_load = 0.0  # rounding must not decide ties between idle workers

    def _ensure(
        self,
        worker: ControlNetWorker,
        code: int,
        parts: StepParts,
        now_s: float,
        pinned: list[tuple[ControlNetWorker, int]],
    ) -> tuple[float, bool]:
        device = worker.device
        if device.touch(code):
            device.n_pins[code] += 1
            pinned.append((worker, code))
            return worker.ready_s[code], False
        load_s = parts.load_s[code]
        if not worker.host.touch(code):
            load_s += parts.fetch_s[code]
            worker.host.insert(code)
        start_s = max(now_s, worker.loader_free_s)  # loads of one worker follow one another
        worker.loader_free_s = start_s + load_s
        worker.ready_s[code] = worker.loader_free_s
        self._record_load(worker, start_s, worker.loader_free_s)
        # if everything else on the device is in use, the ControlNet is streamed for this request and not kept
        if device.insert(code):
            device.n_pins[code] += 1
            pinned.append((worker, code))
        return worker.loader_free_s, True

    def _period_s(self, i: int, parts: StepParts, chosen: Sequence[ControlNetWorker]) -> float:
        """Mean over the steps of max(encoder, busiest worker + transfers) + decoder; the plain step where none is active.

        Workers that push their residuals into one GPU at once share its ingress, so each waits for all of them.
        """
        windows, n_steps = self._windows[i], self._n_steps[i]
        forward_s, transfer_s = parts.forward_s[i], parts.transfer_s[i]
        bounds = sorted({0, n_steps, *(bound for window in windows for bound in window)})
        total_s = 0.0
        for first, last in pairwise(bounds):
            count: dict[ControlNetWorker, int] = {}
            for worker, window in zip(chosen, windows, strict=True):
                if window[0] <= first and last <= window[1]:
                    count[worker] = count.get(worker, 0) + 1
            if count:
                remote_s = max(count.values()) * forward_s + len(count) * transfer_s
                step_s = max(parts.encoder_s[i], remote_s) + parts.decoder_s[i]
            else:
                step_s = parts.plain_s[i]
            total_s += (last - first) * step_s
        return total_s / n_steps


class StepParts:
    """Columns of a service table as lists: reading one number from a list is several times faster than from an array."""

    __slots__ = ("decoder_s", "encoder_s", "fetch_s", "forward_s", "load_s", "plain_s", "transfer_s")

    def __init__(self, service: ServiceTable) -> None:
        self.plain_s: list[float] = service.plain_step_s.tolist()
        self.encoder_s: list[float] = service.encoder_s.tolist()
        self.decoder_s: list[float] = service.decoder_s.tolist()
        self.forward_s: list[float] = service.controlnet_forward_s.tolist()
        self.transfer_s: list[float] = service.transfer_s.tolist()
        self.load_s: list[float] = service.controlnet_load_s.tolist()
        self.fetch_s: list[float] = service.controlnet_fetch_s.tolist()
