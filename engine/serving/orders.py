"""Carries out what the dispatcher decides: batches to replicas, fetches to loaders, ends to whoever waits for them."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Protocol

from engine.serving.events import EventLog
from engine.serving.fetching import Fetches
from engine.serving.job import Job, Outcome
from engine.serving.pairing import Pairs
from engine.serving.ports import Start
from engine.serving.running import RunningBatch
from engine.serving.shipping import Shipping
from engine.serving.supervisor import Replica
from traces.problems import one_problem


class Observer(Protocol):
    """Who keeps records."""

    def ended(self, job: Job, outcome: Outcome) -> None:
        """A job has ended; called once for every submitted job."""


class Orders:
    """Implements :class:`engine.serving.ports.Actions`."""

    def __init__(self, replicas: Mapping[str, Replica], events: EventLog, clock: Callable[[], float]) -> None:
        self._replicas = replicas
        self._events = events
        self._clock = clock
        self._batch_ids = itertools.count(1)
        self.pairs: Pairs | None = None
        self.fetches: Fetches | None = None
        self.shipping = Shipping()
        self.batches: dict[str, RunningBatch] = {}
        self.waiters: dict[str, tuple[Job, asyncio.Future[Outcome]]] = {}
        self.observers: list[Observer] = []
        self.stop_reason = ""
        """Why jobs are cancelled by the engine itself; empty while it serves."""
        self.n_unexpected_ends = 0
        """Ends of jobs that had ended already or were never submitted; anything but 0 is a fault of the dispatcher."""

    def expect(self, job: Job) -> asyncio.Future[Outcome]:
        """The end of a job that is about to be submitted. Raises :class:`InputError` if its name is in use."""
        if job.request_id in self.waiters:
            raise one_problem(f"job {job.request_id!r}", "is running or waiting already", "a name of its own")
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self.waiters[job.request_id] = (job, future)
        return future

    def start(self, start: Start) -> None:
        """See :class:`engine.serving.ports.Actions`."""
        replica = self._replicas[start.worker_id]
        batch = RunningBatch(next(self._batch_ids), start, len(replica.ranks), self._clock())
        self.batches[start.worker_id] = batch
        batch.send(replica, self._pair_id, self.shipping.path_for)

    def cancel(self, worker_id: str, request_id: str) -> None:
        """See :class:`engine.serving.ports.Actions`."""
        if worker_id in self._replicas:
            self._replicas[worker_id].send({"type": "cancel", "request_id": request_id})

    def fetch_lora(self, lora_id: str) -> None:
        """See :class:`engine.serving.ports.Actions`."""
        if self.fetches is not None:
            self.fetches.ask(lora_id)

    def drop_lora(self, lora_id: str, path: str) -> None:
        """See :class:`engine.serving.ports.Actions`."""
        self.shipping.drop(self._replicas.values(), lora_id, path)
        if self.fetches is not None:
            self.fetches.drop(path)

    def lora_ready(self, worker_id: str, lora_id: str, path: str) -> None:
        """See :class:`engine.serving.ports.Actions`."""
        for rank in self._replicas[worker_id].ranks if worker_id in self._replicas else ():
            path_there = self.shipping.path_for(rank, lora_id, path)
            if path_there is not None:
                rank.send({"type": "lora_ready", "lora_id": lora_id, "path": path_there})

    def lora_refused(self, worker_id: str, lora_id: str, reason: str) -> None:
        """See :class:`engine.serving.ports.Actions`."""
        if worker_id in self._replicas:
            self._replicas[worker_id].send({"type": "lora_refused", "lora_id": lora_id, "reason": reason})

    def finish(self, outcome: Outcome) -> None:
        """See :class:`engine.serving.ports.Actions`."""
        waiter = self.waiters.pop(outcome.request_id, None)
        if waiter is None:
            self.n_unexpected_ends += 1
            self._events.add("fault", detail=f"{outcome.request_id} ended again: {outcome.status} {outcome.reason}")
            return
        job, future = waiter
        if self.stop_reason and outcome.reason == "cancelled":
            outcome = dataclasses.replace(outcome, reason=self.stop_reason)
        if not future.done():
            future.set_result(outcome)
        for observer in self.observers:
            observer.ended(job, outcome)

    def _pair_id(self, base_worker_id: str, controlnet_worker_id: str, rank: int) -> str | None:
        return self.pairs.pair_id(base_worker_id, controlnet_worker_id, rank) if self.pairs is not None else None
