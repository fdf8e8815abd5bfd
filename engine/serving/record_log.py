"""What happened, written down while it happens: a row for every ended request and every span of a worker.

Rows go to JSON lines at once, so that a kill loses none but the last; :mod:`engine.serving.record_tables` makes Parquet tables of
them that read like a simulator's. Base workers: spans of batches, exact. ControlNet workers: their own busy time, looked up every
second or so. Every worker: when it was down or starting. Loader processes occupy no GPU and have no rows.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from engine.allocation import Allocation, Pool
from engine.serving.engine_view import EngineView, WorkerView
from engine.serving.events import Event
from engine.serving.job import Job, Outcome
from engine.serving.line_file import LineFiles, LineFileSettings
from engine.serving.ports import BatchSpan
from engine.serving.record_rows import interval_row, request_row
from traces.records import WorkerState

NAME: Final = "records"
SAMPLE_S: Final = 1.0
OPEN_SPAN_S: Final = 60.0
"""A ControlNet worker's span that has lasted this long is written and a new one begun, so that a kill loses no more than it."""


@dataclass(slots=True)
class _Meter:
    """A ControlNet worker's busy time between two looks."""

    pool: str
    busy_s: float
    looked_s: float
    start_s: float | None = None
    """Of the span that is open."""
    pending_s: float = 0.0
    """Work heard of in the open span. Heartbeats come late, so some of it may belong to a later span."""


class RecordLog:
    """Writes rows; times count from ``origin_s`` of the engine's clock.

    Args:
        pools: of the allocation; workers of other pools (loaders) have no rows.
    """

    def __init__(
        self,
        folder: Path,
        clock: Callable[[], float],
        pools: Sequence[Pool],
        *,
        origin_s: float = 0.0,
        settings: LineFileSettings | None = None,
    ) -> None:
        self.folder = folder
        self._clock = clock
        self._origin_s = origin_s
        self._lines = LineFiles(folder, NAME, clock, settings)
        self._pools: dict[str, Pool] = {}
        self.set_pools(pools)
        self._down_since: dict[str, tuple[float, str]] = {}
        """Worker to when it went down, and its pool."""
        self._meters: dict[str, _Meter] = {}
        self._seen: set[str] = set()

    @property
    def n_lost(self) -> int:
        """Rows that could not be written."""
        return self._lines.n_lost

    def set_pools(self, pools: Sequence[Pool]) -> None:
        """Pools of another allocation; earlier ones stay known."""
        self._pools.update((pool.name, pool) for pool in pools)

    def ended(self, job: Job, outcome: Outcome) -> None:
        """A job has ended (:class:`engine.serving.orders.Observer`)."""
        self._lines.write({"table": "requests", **request_row(job, outcome, self._origin_s)})

    def batch_ended(self, span: BatchSpan) -> None:
        """A base replica has given a batch back (``Dispatcher.batch_observers``)."""
        ready_s = min(span.start_s + span.loading_s, span.end_s)
        self._span(span.info.worker_id, span.info.pool, "loading", span.start_s, ready_s)
        self._span(span.info.worker_id, span.info.pool, "busy", ready_s, span.end_s, span.end_s - ready_s)

    def event(self, event: Event) -> None:
        """Something happened to a worker (``EventLog.listeners``)."""
        if event.kind == "down":
            self._down_since[event.worker_id] = (event.at_s, event.pool)
            self._meters.pop(event.worker_id, None)
        elif event.kind == "ready":
            start_s = event.at_s - (event.duration_s or 0.0)
            down_s, _ = self._down_since.pop(event.worker_id, (start_s, ""))
            self._span(event.worker_id, event.pool, "down", down_s, start_s)
            self._span(event.worker_id, event.pool, "loading", max(start_s, down_s), event.at_s)
        elif event.kind == "stop":
            self._down_since.pop(event.worker_id, None)
            self._meters.pop(event.worker_id, None)

    def sample(self, workers: Iterable[WorkerView]) -> None:
        """Looks at the workers: notes who is there, and the busy time of ControlNet workers since the last look."""
        now_s = self._clock()
        for worker in workers:
            pool = self._pools.get(worker.pool)
            if pool is None:
                continue
            if worker.worker_id not in self._seen and worker.state == "ready":
                self._seen.add(worker.worker_id)
                self._span(worker.worker_id, worker.pool, "idle", now_s, now_s)  # it is there, even if it never works
            if pool.role == "controlnet":
                self._look(worker, now_s)

    def close(self) -> None:
        """Writes what is open; bounded. Workers that are down stay so until now."""
        now_s = self._clock()
        for worker_id, meter in self._meters.items():
            self._close_span(worker_id, meter, now_s)
        for worker_id, (since_s, pool) in self._down_since.items():
            self._span(worker_id, pool, "down", since_s, now_s)
        self._down_since.clear()
        self._meters.clear()
        self._lines.close()

    def _look(self, worker: WorkerView, now_s: float) -> None:
        meter = self._meters.get(worker.worker_id)
        if meter is None:
            self._meters[worker.worker_id] = _Meter(worker.pool, worker.busy_s, now_s)
            return
        worked_s = worker.busy_s - meter.busy_s
        meter.busy_s = worker.busy_s
        if worked_s > 0.0:
            meter.start_s = meter.looked_s if meter.start_s is None else meter.start_s
            meter.pending_s += worked_s
            if now_s - meter.start_s >= OPEN_SPAN_S:
                self._close_span(worker.worker_id, meter, now_s)
        else:
            self._close_span(worker.worker_id, meter, meter.looked_s)
        meter.looked_s = now_s

    def _close_span(self, worker_id: str, meter: _Meter, end_s: float) -> None:
        if meter.start_s is None:
            return
        busy_s = min(meter.pending_s, end_s - meter.start_s)
        self._span(worker_id, meter.pool, "busy", meter.start_s, end_s, busy_s)
        meter.pending_s -= busy_s
        meter.start_s = None

    def _span(
        self, worker_id: str, pool_name: str, state: WorkerState, start_s: float, end_s: float, busy_s: float = 0.0
    ) -> None:
        pool = self._pools.get(pool_name)
        if pool is None or (end_s <= start_s and state != "idle"):
            return
        row = interval_row(worker_id, pool, state, start_s - self._origin_s, end_s - self._origin_s, busy_s)
        self._lines.write({"table": "workers", **row})


class RecordedEngine(Protocol):
    """What :func:`recording` needs of :class:`engine.serving.engine.Engine`."""

    allocation: Allocation

    @property
    def orders(self) -> Any:
        """With ``observers``."""

    @property
    def events(self) -> Any:
        """With ``listeners``."""

    @property
    def dispatcher(self) -> Any:
        """With ``batch_observers``."""

    def view(self) -> EngineView:
        """The state now."""


@contextlib.asynccontextmanager
async def recording(
    engine: RecordedEngine, log: RecordLog, *, with_requests: bool = True, sample_s: float = SAMPLE_S
) -> AsyncIterator[RecordLog]:
    """Keeps a log of an engine while the block runs, and closes it.

    Args:
        with_requests: False where the caller notes the ends of jobs itself.
    """
    if with_requests:
        engine.orders.observers.append(log)
    engine.events.listeners.append(log.event)
    engine.dispatcher.batch_observers.append(log.batch_ended)
    sampler = asyncio.create_task(_sample(engine, log, sample_s))
    try:
        yield log
    finally:
        sampler.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampler
        log.sample(engine.view().workers)
        engine.dispatcher.batch_observers.remove(log.batch_ended)
        engine.events.listeners.remove(log.event)
        if with_requests:
            engine.orders.observers.remove(log)
        log.close()


async def _sample(engine: RecordedEngine, log: RecordLog, sample_s: float) -> None:
    while True:
        log.set_pools(engine.allocation.pools)
        log.sample(engine.view().workers)
        await asyncio.sleep(sample_s)
