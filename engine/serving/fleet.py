"""The replicas of an engine: adds, drains and removes them, and makes models known to those that run."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from engine.catalogue import CatalogueEntry
from engine.serving.events import EventLog
from engine.serving.join import JoinDesk
from engine.serving.reconcile import Devices, WorkerSpec
from engine.serving.settings import EngineSettings
from engine.serving.supervisor import KINDS_TOLD, Owner, Replica, Surroundings

LOOK_S: Final = 0.02
"""Between two looks at whether a worker that is to go has become idle."""


class Drainable(Protocol):
    """Who gives work to replicas: the dispatcher."""

    def base_draining(self, worker_id: str) -> None: ...
    def controlnet_draining(self, worker_id: str) -> None: ...
    def is_idle(self, worker_id: str) -> bool: ...


class Fleet:
    """State of all replicas; decides nothing."""

    def __init__(self, settings: EngineSettings, owner: Owner, events: EventLog, clock: Callable[[], float]) -> None:
        self.replicas: dict[str, Replica] = {}
        self.devices = Devices(settings.devices)
        self.join = JoinDesk(settings.join_address, settings.join_token)
        self.sources: dict[str, Mapping[str, Any]] = {}
        """Catalogue entries as JSON values, by id."""
        self._settings = settings
        self._owner = owner
        self._events = events
        self._clock = clock
        self._logs = settings.run_dir / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._host_tier: Path | None = None
        self._asked: dict[tuple[str, str], asyncio.Future[str]] = {}

    async def open(self, host_tier: Path) -> None:
        """From now on replicas can be added. Raises :class:`InputError` if nobody can join at the address given."""
        self._host_tier = host_tier
        await self.join.open()

    async def close(self) -> None:
        """Ends every replica; bounded."""
        await asyncio.gather(*(replica.stop() for replica in self.replicas.values()))
        await self.join.close()

    def learn(self, entries: Iterable[CatalogueEntry]) -> None:
        """Replicas that start from now on know these."""
        for entry in entries:
            self.sources[entry.id] = dataclasses.asdict(entry)

    def add(self, spec: WorkerSpec) -> Replica:
        """Starts a replica; ``devices.can_take`` must hold."""
        if self._host_tier is None:
            raise RuntimeError("the engine has not been started")
        surroundings = Surroundings(
            settings=self._settings,
            owner=self._owner,
            events=self._events,
            clock=self._clock,
            logs=self._logs,
            host_tier=self._host_tier,
            sources=self.sources,
            join=self.join,
        )
        replica = self.replicas[spec.worker_id] = Replica(spec, self.devices.take(spec), surroundings)
        return replica

    async def remove(self, worker_id: str) -> None:
        """Ends a replica; its devices are free afterwards."""
        await self.replicas[worker_id].stop()
        del self.replicas[worker_id]
        self.devices.give_back(worker_id)

    async def drain(self, replica: Replica, dispatcher: Drainable) -> bool:
        """Lets a replica finish what it has, and gives it nothing more; False if that took too long."""
        began_s, bound_s = self._clock(), self._settings.bounds.drain_s
        worker_id, was_ready = replica.worker_id, replica.is_ready
        if was_ready:
            replica.state, replica.reason = "draining", "is draining"
        if replica.spec.role == "base":
            dispatcher.base_draining(worker_id)
        elif replica.spec.role == "controlnet":
            dispatcher.controlnet_draining(worker_id)
        while not dispatcher.is_idle(worker_id) and self._clock() - began_s < bound_s:
            await asyncio.sleep(LOOK_S)
        is_idle = dispatcher.is_idle(worker_id)
        if was_ready:
            detail = "" if is_idle else f"not idle after {bound_s:g} s"
            self._events.add("drain", worker_id, replica.spec.pool, duration_s=self._clock() - began_s, detail=detail)
        return is_idle

    async def wait_tried(self, replicas: Iterable[Replica]) -> None:
        """Waits until each is ready or has failed once."""
        await asyncio.gather(*(replica.wait_tried(self._settings.bounds.ready_s) for replica in replicas))

    # models

    async def make_known(
        self, kind: str, model_ids: Iterable[str], worker_ids: Iterable[str] | None = None
    ) -> dict[str, str]:
        """Tells replicas of models and waits for their answers.

        Args:
            worker_ids: None: all whose role has to do with this kind.

        Returns:
            Refusals: ``worker id`` + space + ``model id`` to the reason. A base worker answers between two batches; one that is
            lost meanwhile knows the model when it comes back.
        """
        loop = asyncio.get_running_loop()
        asked = {}
        for worker_id in list(self.replicas) if worker_ids is None else worker_ids:
            replica = self.replicas[worker_id]
            if kind not in KINDS_TOLD[replica.spec.role] or not replica.is_ready:
                continue
            for model_id in model_ids:
                key = (worker_id, model_id)
                asked[key] = self._asked[key] = loop.create_future()
                source = dict(self.sources.get(model_id, {}))
                replica.send({"type": "admit", "kind": kind, "id": model_id, "source": source})
        if asked:
            await asyncio.wait(asked.values(), timeout=self._settings.bounds.drain_s)
        refusals = {}
        for (worker_id, model_id), answer in asked.items():
            self._asked.pop((worker_id, model_id), None)
            reason = answer.result() if answer.done() else "no answer in time"
            if reason:
                refusals[f"{worker_id} {model_id}"] = reason
        return refusals

    def admitted(self, replica: Replica, model_id: str, reason: str) -> None:
        """A rank has answered; an empty reason: it knows the model now."""
        kind = "admit_failed" if reason else "admit"
        self._events.add(kind, replica.worker_id, replica.spec.pool, detail=f"{model_id} {reason}".strip())
        answer = self._asked.get((replica.worker_id, model_id))
        if answer is not None and not answer.done():
            answer.set_result(reason)

    def lost(self, worker_id: str) -> None:
        """A replica has gone down: it answers nothing more."""
        for (asked_id, _), answer in self._asked.items():
            if asked_id == worker_id and not answer.done():
                answer.set_result("")
