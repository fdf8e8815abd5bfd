"""The engine: one allocation running as worker processes, behind ``await submit(job)``.

Brings the dispatcher's decisions and the workers together: tells the dispatcher what becomes of the workers
(:class:`engine.serving.supervisor.Owner`); :mod:`engine.serving.orders` carries its decisions out. One event loop; nothing here
blocks, computes, or imports torch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, Final

from engine.allocation import Allocation
from engine.allocation_checks import check_allocation
from engine.catalogue import Catalogue
from engine.serving.dispatcher import Dispatcher, DispatchLimits
from engine.serving.engine_view import EngineView
from engine.serving.events import EventLog
from engine.serving.fetching import Fetches
from engine.serving.fleet import LOOK_S, Fleet
from engine.serving.host_tier import HostTier
from engine.serving.job import Job, Outcome
from engine.serving.orders import Orders
from engine.serving.pairing import Pairs
from engine.serving.reconcile import Devices, Difference, Wanted, WorkerSpec, check_runnable, difference, wanted_by
from engine.serving.settings import EngineSettings, with_cpu_threads, with_host_budgets
from engine.serving.supervisor import Replica
from engine.serving.views import base_info, controlnet_info, worker_view
from engine.serving.worker_handle import WorkerHandle
from traces.problems import InputError, Problem

TICK_MIN_S: Final = 0.001


class Engine:
    """See :class:`engine.frontdoor.port.ServingEngine`. Lives on one event loop from :meth:`start` to :meth:`stop`."""

    def __init__(
        self,
        allocation: Allocation,
        settings: EngineSettings,
        catalogue: Catalogue | None = None,
        limits: DispatchLimits | None = None,
    ) -> None:
        """Raises :class:`InputError` if this engine cannot run the allocation on these devices."""
        self.allocation = allocation
        self._wanted = _checked(allocation, settings)
        n_computing = sum(spec.n_ranks for spec in self._wanted.workers.values() if spec.role != "loader")
        settings = with_host_budgets(with_cpu_threads(settings, n_computing), allocation.policies)
        self.settings = settings
        self._began_s = time.monotonic()
        settings.run_dir.mkdir(parents=True, exist_ok=True)
        self.events = EventLog(self.clock, settings.run_dir)
        self.fleet = Fleet(settings, self, self.events, self.clock)
        self.fleet.learn(catalogue.entries.values() if catalogue is not None else ())
        self.replicas = self.fleet.replicas
        self.orders = Orders(self.replicas, self.events, self.clock)
        self.dispatcher = Dispatcher(self.orders, self.clock, allocation.policies, allocation.pools, limits=limits)
        self.pairs = Pairs(self.replicas, self.dispatcher, self.events, self.clock, settings.bounds.reattach_s)
        self.orders.pairs = self.pairs
        self._tier: HostTier | None = None
        self._fetches: Fetches | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_tick_due = False
        self._changing = asyncio.Lock()
        self._errands: set[asyncio.Task[None]] = set()
        self._refusing = ""

    # life

    def clock(self) -> float:
        """Engine time: seconds since it was made."""
        return time.monotonic() - self._began_s

    async def start(self) -> None:
        """Starts the allocation's workers; returns when every one is ready or has failed once, in bounded time.

        Raises:
            InputError: no base replica got ready; all workers have been stopped again.
        """
        self._tier = HostTier(self.settings.host_tier_parent)
        self.dispatcher.limit_lora_cache(self._tier.room_bytes())
        self._fetches = self.orders.fetches = Fetches(
            self.replicas, self.dispatcher, self._tier.folder, self.fleet.sources
        )
        await self.fleet.open(self._tier.folder)
        for spec in self._wanted.workers.values():
            self.fleet.add(spec)
        self.pairs.want(self._wanted.pairings)
        await self.fleet.wait_tried(self.replicas.values())
        bases = [r for r in self.replicas.values() if r.spec.role == "base"]
        if not any(replica.is_ready for replica in bases):
            problems = [_not_ready(replica) for replica in self.replicas.values() if not replica.is_ready]
            await self.stop()
            raise InputError(problems)
        await self._wait_attached()

    @property
    def join_port(self) -> int:
        """TCP port on which workers of other hosts join; 0 if none can."""
        return self.fleet.join.port

    @property
    def host_tier(self) -> Path | None:
        """Folder of checked LoRA files; None before :meth:`start`."""
        return self._tier.folder if self._tier is not None else None

    async def stop(self) -> None:
        """Ends every worker and every job, in bounded time; may be called twice."""
        self.orders.stop_reason = "the engine was stopped"
        self.stop_admitting(self.orders.stop_reason)
        for errand in list(self._errands):
            errand.cancel()
        await asyncio.gather(*self._errands, return_exceptions=True)
        self.pairs.close()
        self.orders.shipping.close()
        for request_id in list(self.orders.waiters):
            self.dispatcher.cancel(request_id)
        await self.fleet.close()
        for request_id in list(self.orders.waiters):
            self.dispatcher.cancel(request_id)
        if self._timer is not None:
            self._timer.cancel()
        if self._tier is not None:
            self._tier.close()
        self.events.close()

    async def drain(self, timeout_s: float) -> bool:
        """Admits nothing more and waits for what was admitted; True if all of it ended in time."""
        self.stop_admitting("the engine is draining")
        until_s = self.clock() + timeout_s
        while self.orders.waiters and self.clock() < until_s:
            await asyncio.sleep(LOOK_S)
        return not self.orders.waiters

    def stop_admitting(self, reason: str) -> None:
        """Rejects every later job."""
        self._refusing = reason
        self.dispatcher.stop_admitting(reason)

    # jobs

    async def submit(self, job: Job) -> Outcome:
        """Runs a job; every submitted job ends with exactly one outcome. Cancelling the call cancels the job.

        Raises:
            InputError: a job of this name has not ended yet.
        """
        future = self.orders.expect(job)
        try:
            self.dispatcher.submit(job)
        except BaseException:
            self.orders.waiters.pop(job.request_id, None)
            raise
        self._changed()
        try:
            return await future
        except asyncio.CancelledError:
            self.cancel(job.request_id)
            raise

    def cancel(self, request_id: str) -> bool:
        """Ends a job early; its ``submit`` returns. False if it is unknown or has ended."""
        is_live = self.dispatcher.cancel(request_id)
        self._changed()
        return is_live

    # what becomes of the workers (Owner)

    def replica_ready(self, replica: Replica) -> None:
        """It takes part from now on."""
        self._tell_up(replica)
        self.pairs.attach_ready()
        if replica.spec.role == "loader" and self._fetches is not None:
            self._fetches.hand_out()
        self._changed()

    def replica_down(self, replica: Replica, reason: str) -> None:
        """Its work is tried elsewhere."""
        worker_id = replica.worker_id
        self.orders.batches.pop(worker_id, None)
        self.fleet.lost(worker_id)
        self.pairs.replica_gone(worker_id)
        if replica.spec.role == "base":
            self.dispatcher.base_down(worker_id, reason)
        elif replica.spec.role == "controlnet":
            self.dispatcher.controlnet_down(worker_id, reason)
        elif self._fetches is not None:
            self._fetches.loader_gone(worker_id, reason)
        self._changed()

    def replica_said(
        self, replica: Replica, handle: WorkerHandle, message: dict[str, Any], blobs: tuple[bytes, ...]
    ) -> None:
        """A worker reports."""
        kind = message["type"]
        if kind in {"batch_done", "batch_failed"}:
            self._batch_reported(replica, handle, message, blobs)
        elif kind in {"attaching", "listening", "attached", "detached", "pair_lost"}:
            self.pairs.said(handle, message)
        elif kind in {"lora_fetched", "lora_refused"} and self._fetches is not None:
            self._fetches.said(replica.worker_id, message)
        elif kind in {"admitted", "admit_failed"}:
            self.fleet.admitted(replica, message["id"], str(message.get("reason", "")))
        self._changed()

    def replica_asked_to_go(self, replica: Replica) -> None:
        """Somebody sent it SIGTERM: it finishes what it has and comes back in a new process."""
        self._errand(self._drain_and_renew(replica))

    def _batch_reported(
        self, replica: Replica, handle: WorkerHandle, message: Mapping[str, Any], blobs: tuple[bytes, ...]
    ) -> None:
        batch = self.orders.batches.get(replica.worker_id)
        if batch is None or message["batch_id"] != batch.batch_id:
            return
        if handle.rank == 0 and "resident" in message:
            handle.resident, replica.memory = message["resident"], message["memory"]
        end = batch.report(handle.rank, message, blobs)
        if end is None:
            return
        del self.orders.batches[replica.worker_id]
        if end.failures:
            self.dispatcher.batch_failed(
                replica.worker_id, end.failures, is_retryable=end.is_retryable, done=end.results
            )
        else:
            self.dispatcher.batch_done(replica.worker_id, end.results)

    def _tell_up(self, replica: Replica) -> None:
        if replica.spec.role == "base":
            self.dispatcher.base_up(base_info(replica))
        elif replica.spec.role == "controlnet":
            self.dispatcher.controlnet_up(controlnet_info(replica))

    # time

    def _changed(self) -> None:
        """Something happened that may move the dispatcher's next moment: looked up once per turn of the loop."""
        if not self._is_tick_due:
            self._is_tick_due = True
            asyncio.get_running_loop().call_soon(self._tick)

    def _tick(self) -> None:
        self._is_tick_due = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        next_s = self.dispatcher.tick()
        if next_s is not None:
            wait_s = max(TICK_MIN_S, next_s - self.clock())
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._tick)

    # changing the allocation

    async def apply(self, allocation: Allocation) -> Mapping[str, Any]:
        """Moves to another allocation. Workers that are in both keep their processes and go on serving.

        New workers for which a device is free start first, and must get ready before anything is taken away; the others start on
        devices of workers that have been drained.

        Raises:
            InputError: the allocation does not fit this machine, or a new worker did not get ready; nothing has changed.
        """
        wanted = _checked(allocation, self.settings)
        async with self._changing:
            began_s = self.clock()
            todo = difference(self._wanted, wanted)
            first = [spec for spec in todo.start if spec.worker_id not in self.replicas]
            started = [self.fleet.add(spec) for spec in first if self.fleet.devices.can_take(spec.n_ranks)]
            await self.fleet.wait_tried(started)
            if any(not replica.is_ready for replica in started):
                problems = [_not_ready(replica) for replica in started if not replica.is_ready]
                await asyncio.gather(*(self.fleet.remove(replica.worker_id) for replica in started))
                raise InputError(problems)
            for spec in todo.update:
                await self._update(spec)
            self.allocation, self._wanted = allocation, wanted
            self.dispatcher.set_allocation(allocation.pools, allocation.policies)
            self.pairs.want(wanted.pairings)
            self._changed()
            await asyncio.gather(*(self._drain_and_remove(worker_id) for worker_id in todo.stop))
            have = {replica.worker_id for replica in started}
            await self.fleet.wait_tried([self.fleet.add(spec) for spec in todo.start if spec.worker_id not in have])
            self.pairs.attach_ready()
            await self._wait_attached()
            report = self._report(todo, self.clock() - began_s)
            self.events.add("apply", duration_s=report["duration_s"], detail=str(report["text"]))
            return report

    async def admit(self, catalogue: Catalogue) -> Mapping[str, Any]:
        """Makes new entries of the catalogue known to the workers while they serve; entries they know already stay."""
        async with self._changing:
            new = [entry for entry in catalogue.entries.values() if entry.id not in self.fleet.sources]
            self.fleet.learn(new)
            refusals: dict[str, str] = {}
            for kind in ("base", "controlnet"):
                refusals.update(await self.fleet.make_known(kind, [entry.id for entry in new if entry.kind == kind]))
            return {"admitted": [entry.id for entry in new], "refused": refusals}

    async def _update(self, spec: WorkerSpec) -> None:
        """The same processes may hold other models from now on."""
        replica = self.replicas[spec.worker_id]
        for kind, now, then in (
            ("base", replica.spec.base_model_ids, spec.base_model_ids),
            ("controlnet", replica.spec.controlnet_ids, spec.controlnet_ids),
        ):
            await self.fleet.make_known(kind, sorted({*then} - {*now}), [spec.worker_id])
        replica.spec = spec
        if replica.is_ready:
            self._tell_up(replica)

    async def _drain_and_remove(self, worker_id: str) -> None:
        await self.fleet.drain(self.replicas[worker_id], self.dispatcher)
        await self.fleet.remove(worker_id)

    async def _drain_and_renew(self, replica: Replica) -> None:
        if await self.fleet.drain(replica, self.dispatcher):
            replica.renew()
        else:
            replica.kill("it was asked to go and did not finish in time")

    def _errand(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    async def _wait_attached(self) -> None:
        """Waits for the pairs of ready workers; a base attaches between two batches, so this is bounded, not certain."""
        until_s = self.clock() + self.settings.bounds.line_s
        while not self.pairs.is_settled() and self.clock() < until_s:
            await asyncio.sleep(LOOK_S)

    def _report(self, todo: Difference, duration_s: float) -> dict[str, Any]:
        started = [spec.worker_id for spec in todo.start]
        text = f"started {len(started)}, stopped {len(todo.stop)}, kept {len(todo.keep)}"
        return {
            "text": text,
            "started": started,
            "stopped": list(todo.stop),
            "updated": [spec.worker_id for spec in todo.update],
            "kept": list(todo.keep),
            "not_ready": {r.worker_id: r.reason for r in self.replicas.values() if not r.is_ready},
            "is_attached": self.pairs.is_settled(),
            "duration_s": duration_s,
        }

    # looking

    def view(self) -> EngineView:
        """The state now; cheap, and possible at any time."""
        workers = tuple(
            worker_view(replica, self.orders.batches.get(replica.worker_id), self.clock())
            for replica in self.replicas.values()
        )
        return EngineView(
            workers=workers,
            dispatch=self.dispatcher.snapshot(),
            wanted={pool.name: pool.n_replicas for pool in self.allocation.pools},
            is_admitting=not self._refusing,
            n_events=dict(self.events.counts),
        )


def _checked(allocation: Allocation, settings: EngineSettings) -> Wanted:
    problems = [*check_allocation(allocation), *check_runnable(allocation)]
    if problems:
        raise InputError(problems)
    wanted = wanted_by(allocation, settings.n_loaders)
    Devices(settings.devices).check(tuple(wanted.workers.values()))
    return wanted


def _not_ready(replica: Replica) -> Problem:
    return Problem(
        f"worker {replica.worker_id}", replica.reason or "did not get ready", "", "Its log is in the run folder."
    )
