"""An engine without processes: the real dispatcher, and workers that sleep for a while and return a small PNG."""

from __future__ import annotations

import asyncio
import contextlib
import time
import zlib
from collections.abc import Mapping
from typing import Any

from engine.allocation import Allocation, Policies, Pool
from engine.catalogue import Catalogue
from engine.serving.dispatcher import Dispatcher
from engine.serving.engine_view import EngineView, WorkerView
from engine.serving.job import Job, Outcome, StageSeconds, WorkerResult
from engine.serving.ports import BaseReplicaInfo, Start


def png(width_px: int, height_px: int, seed: int = 0, extra: bytes = b"") -> bytes:
    """A grey PNG, made by hand so that ``extra`` chunks can be put before its pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = width_px.to_bytes(4, "big") + height_px.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    rows = b"".join(bytes([0]) + bytes([seed % 256]) * width_px for _ in range(height_px))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


class DispatcherEngine:
    """Implements ``ServingEngine``. Colocated replicas, so that every ControlNet runs in process."""

    def __init__(self, n_workers: int = 1, service_s: float = 0.01, policies: Policies | None = None) -> None:
        self._n_workers = n_workers
        self.service_s = service_s
        pool = Pool("base", "base", n_workers, "cpu", topology="colocated")
        self._origin_s = time.monotonic()
        self._dispatcher = Dispatcher(_Actions(self), lambda: time.monotonic() - self._origin_s, policies, [pool])
        self._waiting: dict[str, asyncio.Future[Outcome]] = {}
        self._running: dict[str, tuple[Start, asyncio.Task[None]]] = {}
        self.states: dict[str, str] = {}
        self.busy_s: dict[str, float] = {}
        self.jobs: list[Job] = []
        self.cancelled: list[str] = []
        self.applied: list[Allocation] = []
        self.admitted: list[Catalogue] = []
        self.failures: dict[str, str] = {}
        """Prompt to the sentence with which its job fails."""
        self._is_admitting = True
        self._ticker: asyncio.Task[None] | None = None

    # ServingEngine

    async def start(self) -> None:
        for index in range(self._n_workers):
            self.up(f"base-{index}")
        self._ticker = asyncio.create_task(self._tick())

    async def stop(self) -> None:
        self._dispatcher.stop_admitting("the engine stops")
        for _, task in self._running.values():
            task.cancel()
        for request_id in list(self._waiting):
            self.finish(Outcome(request_id, "failed", "the engine stops", code="not_admitting"))
        if self._ticker is not None:
            self._ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticker

    async def submit(self, job: Job) -> Outcome:
        self.jobs.append(job)
        waiting = self._waiting[job.request_id] = asyncio.get_running_loop().create_future()
        self._dispatcher.submit(job)
        return await waiting

    def cancel(self, request_id: str) -> bool:
        return self._dispatcher.cancel(request_id)

    def view(self) -> EngineView:
        workers = tuple(
            WorkerView(name, "base", "base", state, busy_s=self.busy_s[name])  # type: ignore[arg-type]
            for name, state in self.states.items()
        )
        return EngineView(workers, self._dispatcher.snapshot(), {"base": self._n_workers}, self._is_admitting)

    async def apply(self, allocation: Allocation) -> Mapping[str, Any]:
        self.applied.append(allocation)
        return {"started": []}

    async def admit(self, catalogue: Catalogue) -> Mapping[str, Any]:
        self.admitted.append(catalogue)
        return {"admitted": len(catalogue.entries)}

    async def drain(self, timeout_s: float) -> bool:
        self._is_admitting = False
        self._dispatcher.stop_admitting("draining")
        if self._waiting:
            await asyncio.wait(list(self._waiting.values()), timeout=timeout_s)
        return not self._waiting

    # workers

    def up(self, name: str) -> None:
        self.states[name] = "ready"
        self.busy_s.setdefault(name, 0.0)
        self._dispatcher.base_up(BaseReplicaInfo(name, "base", "colocated", ("*",), ("tiny",), ("*",)))

    def down(self, name: str) -> None:
        self.states[name] = "restarting"
        self._running.pop(name)[1].cancel() if name in self._running else None
        self._dispatcher.base_down(name, "killed by the test")

    async def _work(self, start: Start) -> None:
        await asyncio.sleep(self.service_s)
        self.busy_s[start.worker_id] += self.service_s
        del self._running[start.worker_id]
        job = start.jobs[0]
        if job.prompt in self.failures:
            failures = {job.request_id: self.failures[job.prompt]}
            self._dispatcher.batch_failed(start.worker_id, failures, is_retryable=False, done={})
            return
        images = tuple(png(8, 8, job.seed + index) for index in range(job.n_images))
        result = WorkerResult(StageSeconds(text_s=0.001, denoise_s=self.service_s), images=images)
        self._dispatcher.batch_done(start.worker_id, {job.request_id: result})

    async def _tick(self) -> None:
        while True:
            self._dispatcher.tick()
            await asyncio.sleep(0.01)

    # Actions

    def start_batch(self, start: Start) -> None:
        self._running[start.worker_id] = (start, asyncio.create_task(self._work(start)))

    def cancel_running(self, worker_id: str, request_id: str) -> None:
        self.cancelled.append(request_id)
        _, task = self._running.pop(worker_id)
        task.cancel()
        asyncio.get_running_loop().call_soon(
            lambda: self._dispatcher.batch_failed(worker_id, {request_id: "given up"}, is_retryable=False, done={})
        )

    def fetch_lora(self, lora_id: str) -> None:
        asyncio.get_running_loop().call_soon(lambda: self._dispatcher.lora_fetched(lora_id, f"/host/{lora_id}", 1000))

    def drop_lora(self, lora_id: str, path: str) -> None: ...

    def lora_ready(self, worker_id: str, lora_id: str, path: str) -> None: ...

    def lora_refused(self, worker_id: str, lora_id: str, reason: str) -> None: ...

    def finish(self, outcome: Outcome) -> None:
        waiting = self._waiting.pop(outcome.request_id)
        if not waiting.done():
            waiting.set_result(outcome)


class _Actions:
    """Gives the engine's methods the names of ``Actions``: ``start`` and ``cancel`` mean something else to the front door."""

    def __init__(self, engine: DispatcherEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, {"start": "start_batch", "cancel": "cancel_running"}.get(name, name))
