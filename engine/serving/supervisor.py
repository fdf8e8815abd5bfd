"""Keeps one replica alive: starts its ranks, watches their pulse, ends them together, starts them again with backoff.

A replica is killed when a rank's process or channel ends, when a heartbeat stops (SIGSTOP, a stuck interpreter) or when the
work path stands still for longer than its phase allows although the heart beats.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from engine.serving.events import EventLog
from engine.serving.join import JoinDesk, Joined, remote_rank
from engine.serving.reconcile import WorkerSpec
from engine.serving.settings import EngineSettings
from engine.serving.wire import WireFormatError
from engine.serving.worker_handle import WorkerHandle, adopt, spawn
from engine.workers.setup import WorkerSetup

KINDS_TOLD: Final[Mapping[str, frozenset[str]]] = {
    "base": frozenset({"base", "controlnet"}),
    "controlnet": frozenset({"controlnet"}),
    "loader": frozenset(),
}
"""Kinds of catalogue entries that a role is told of; a loader gets a LoRA's entry with the order to fetch it."""
ReplicaState = Literal["starting", "ready", "draining", "restarting", "stopped"]
WATCHES_PER_BOUND: Final = 4
WATCH_MAX_S: Final = 1.0


class Owner(Protocol):
    """Who is told what becomes of a replica; called on the event loop."""

    def replica_ready(self, replica: Replica) -> None:
        """All ranks are ready."""

    def replica_down(self, replica: Replica, reason: str) -> None:
        """It was ready and is gone; its processes are dead, not yet reaped."""

    def replica_said(
        self, replica: Replica, handle: WorkerHandle, message: dict[str, Any], blobs: tuple[bytes, ...]
    ) -> None:
        """A rank sent a message that is not about its life."""

    def replica_asked_to_go(self, replica: Replica) -> None:
        """A rank got SIGTERM: drain it, then call :meth:`Replica.renew`."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all replicas of an engine share."""

    settings: EngineSettings
    owner: Owner
    events: EventLog
    clock: Callable[[], float]
    logs: Path
    host_tier: Path
    sources: Mapping[str, Mapping[str, Any]]
    """Catalogue entries as JSON values; the mapping changes as entries are admitted."""
    join: JoinDesk


class Replica:
    """One supervised replica."""

    def __init__(self, spec: WorkerSpec, devices: Sequence[str], surroundings: Surroundings) -> None:
        self.spec = spec
        self.devices = tuple(devices)
        self.state: ReplicaState = "starting"
        self.reason = ""
        self.n_restarts = 0
        self.n_failures_in_row = 0
        self.ranks: list[WorkerHandle] = []
        self.memory: Mapping[str, int] = {}
        self._at = surroundings
        self._bounds = surroundings.settings.bounds
        self._busy_before_s = 0.0
        self._ended = asyncio.Event()
        self._end_reason = ""
        self._readied = asyncio.Event()
        self._partner_message: dict[str, Any] = {}
        self._is_wanted = True
        self._is_renewed = False
        self._stopping = asyncio.Event()
        self._has_tried = asyncio.Event()
        self._life = asyncio.create_task(self._live(), name=f"replica {spec.worker_id}")

    # what the engine asks

    @property
    def worker_id(self) -> str:
        """Of the replica."""
        return self.spec.worker_id

    @property
    def is_ready(self) -> bool:
        """Whether it can be given work."""
        return self.state == "ready"

    @property
    def busy_s(self) -> float:
        """Seconds of work of its leader, restarts included."""
        return self._busy_before_s + (self.ranks[0].busy_s if self.ranks else 0.0)

    @property
    def progress_age_s(self) -> float:
        """Seconds since the work path of its slowest rank moved; 0 if idle."""
        now_s = asyncio.get_running_loop().time()
        return max((now_s - rank.progress_s for rank in self.ranks if rank.phase != "idle"), default=0.0)

    @property
    def is_busy(self) -> bool:
        """Whether a rank works."""
        return any(rank.phase != "idle" for rank in self.ranks)

    def send(self, message: Mapping[str, Any], blobs: Sequence[bytes] = ()) -> None:
        """Sends to every rank."""
        for rank in self.ranks:
            rank.send(message, blobs)

    async def wait_tried(self, timeout_s: float) -> bool:
        """Waits until it is ready or has failed once; True if it is ready."""
        try:
            await asyncio.wait_for(self._has_tried.wait(), timeout_s)
        except TimeoutError:
            return False
        return self.state == "ready"

    def kill(self, reason: str) -> None:
        """Ends the processes now; they are started again if the replica is wanted."""
        if self.ranks and not self._ended.is_set():
            self._at.events.add("kill", self.worker_id, self.spec.pool, detail=reason)
            self._end(reason)

    def renew(self) -> None:
        """Has idle processes end in good order and starts new ones at once: not a failure."""
        self._is_renewed = True
        self._end("asked to go")

    async def stop(self) -> None:
        """Ends the replica for good: asks, waits, kills, reaps. Bounded by ``stop_s`` and the kernel."""
        started_s = self._at.clock()
        self._is_wanted = False
        self._stopping.set()
        was_running = bool(self.ranks)
        self._end("stopped")
        await asyncio.gather(self._life, return_exceptions=True)
        self.state, self.reason = "stopped", "stopped"
        if was_running:
            self._at.events.add("stop", self.worker_id, self.spec.pool, duration_s=self._at.clock() - started_s)

    # its life

    async def _live(self) -> None:
        while self._is_wanted:
            since_s = self._at.clock()
            try:
                ready_s = await self._one_life()
            except Exception as error:
                # A fault of the front's own: shown, and treated like a failure of the worker so that the service goes on.
                traceback.print_exc()
                self._end_reason, ready_s = f"fault of the engine: {type(error).__name__}: {error}", None
            if not self._is_wanted:
                return
            healthy_for_s = self._at.clock() - ready_s if ready_s is not None else 0.0
            if self._is_renewed:
                self._is_renewed = False
                backoff_s = 0.0
            else:
                self.n_failures_in_row = 1 if healthy_for_s >= self._bounds.healthy_s else self.n_failures_in_row + 1
                backoff_s = min(
                    self._bounds.backoff_max_s, self._bounds.backoff_first_s * 2 ** min(self.n_failures_in_row - 1, 30)
                )
            self.n_restarts += 1
            self.state = "restarting"
            self.reason = (
                f"starts again in {backoff_s:g} s after {self.n_failures_in_row} failures in a row: {self._end_reason}"
            )
            self._has_tried.set()
            self._at.events.add(
                "restart", self.worker_id, self.spec.pool, duration_s=self._at.clock() - since_s, detail=self.reason
            )
            try:
                await asyncio.wait_for(self._stopping.wait(), backoff_s)
            except TimeoutError:
                continue

    async def _one_life(self) -> float | None:
        """From start to end of one set of processes; returns when it got ready."""
        self._ended.clear()
        self._readied.clear()
        self._end_reason = ""
        self.state = "starting"
        ready_at_s: float | None = None
        started_s = self._at.clock()
        try:
            await self._start_ranks()
            await self._watch(until=self._readied, within_s=self._bounds.ready_s)
            if self._readied.is_set() and not self._ended.is_set():
                ready_at_s = self._at.clock()
                self.state, self.reason = "ready", ""
                self.memory = dict(self.ranks[0].memory)
                self._at.events.add("ready", self.worker_id, self.spec.pool, duration_s=ready_at_s - started_s)
                self._has_tried.set()
                self._at.owner.replica_ready(self)
                if any(rank.is_asked_to_go for rank in self.ranks):
                    self._at.owner.replica_asked_to_go(self)
                await self._watch(until=None, within_s=float("inf"))
        except (OSError, TimeoutError, WireFormatError) as error:
            self._end(str(error) or type(error).__name__)
        finally:
            if ready_at_s is not None:
                self.state = "restarting"
                self._at.events.add("down", self.worker_id, self.spec.pool, detail=self._end_reason)
                self._at.owner.replica_down(self, self._end_reason)
            await self._end_ranks()
        return ready_at_s

    async def _start_ranks(self) -> None:
        self._at.events.add("start", self.worker_id, self.spec.pool, detail=",".join(self.devices))
        remote = await self._joined()
        devices = list(self.devices)
        for rank in range(len(devices)):
            if rank in remote:
                handle = adopt(self.worker_id, rank, remote[rank], self._said, self._rank_ended)
                devices[rank] = _device_of(self._at.settings.model, remote[rank][2])
            else:
                handle = await spawn(
                    self.worker_id, rank, self._at.logs, self._at.settings.environment, self._said, self._rank_ended
                )
            self.ranks.append(handle)
        for handle, device in zip(self.ranks, devices, strict=True):
            handle.send({"type": "setup", "setup": self._setup(handle.rank, device).to_plain()})
        if len(self.ranks) > 1:
            self._introduce()

    async def _joined(self) -> dict[int, Joined]:
        """The workers of other hosts that are to be ranks of this replica; raises TimeoutError unless all join in time."""
        joined: dict[int, Joined] = {}
        try:
            for rank, device in enumerate(self.devices):
                number = remote_rank(device)
                if number is not None:
                    self.reason = f"waits for a worker of another host to join with RANK={number}"
                    joined[rank] = await self._at.join.take(number, self._bounds.join_s, self._stopping)
        except TimeoutError:
            for _, writer, _ in joined.values():
                writer.transport.abort()
            raise
        return joined

    def _introduce(self) -> None:
        """Gives the two ranks of a CFG pair a line to each other."""
        leader, other = self.ranks
        pair_id = f"{self.worker_id}#{secrets.token_hex(4)}"
        if not leader.host and not other.host:
            ends = socket.socketpair()
            for handle, end in zip((leader, other), ends, strict=True):
                handle.send({"type": "partner", "pair_id": pair_id, "transport": "host_memory"})
                handle.pass_line(pair_id, end)
            return
        token = secrets.token_hex(32)
        host = leader.host or other.local_address()
        message = {"type": "partner", "pair_id": pair_id, "transport": "tcp", "token": token, "host": host}
        leader.send(message)
        self._partner_message = message  # completed by the leader's port

    def _said(self, handle: WorkerHandle, message: dict[str, Any], blobs: tuple[bytes, ...]) -> None:
        kind = message["type"]
        if kind == "heartbeat":
            was_asked = handle.is_asked_to_go
            handle.beat(message)
            if handle.is_asked_to_go and not was_asked and self.state == "ready":
                self._at.owner.replica_asked_to_go(self)
        elif kind == "ready":
            handle.is_ready = True
            handle.memory, handle.resident = message["memory"], message["resident"]
            if all(rank.is_ready for rank in self.ranks) and len(self.ranks) == len(self.devices):
                self._readied.set()
        elif kind == "listening" and len(self.ranks) > 1 and handle is self.ranks[0]:
            address = f"{self._partner_message['host']}:{message['port']}"
            self.ranks[1].send({**self._partner_message, "address": address})
        elif self.state in {"ready", "draining"}:
            self._at.owner.replica_said(self, handle, message, blobs)

    def _rank_ended(self, handle: WorkerHandle, reason: str) -> None:
        self._end(f"rank {handle.rank}: {reason}" if len(self.devices) > 1 else reason)

    def _end(self, reason: str) -> None:
        if not self._ended.is_set():
            self._end_reason = reason
            self._ended.set()

    async def _watch(self, until: asyncio.Event | None, within_s: float) -> None:
        """Returns when ``until`` is set or the replica has ended; ends it if a pulse fails."""
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        every_s = min(WATCH_MAX_S, self._bounds.silence_s / WATCHES_PER_BOUND)
        waits = [asyncio.create_task(event.wait()) for event in (self._ended, until) if event is not None]
        try:
            while not self._ended.is_set() and not (until is not None and until.is_set()):
                await asyncio.wait(waits, timeout=every_s, return_when=asyncio.FIRST_COMPLETED)
                complaint = self._complaint(loop.time())
                if loop.time() - started_s > within_s:
                    complaint = complaint or f"not ready within {within_s:g} s"
                if complaint and not self._ended.is_set():
                    self.kill(complaint)
        finally:
            for wait in waits:
                wait.cancel()

    def _complaint(self, now_s: float) -> str:
        for rank in self.ranks:
            bound_s = self._bounds.hello_s if rank.counter < 0 else self._bounds.silence_s
            silent_s = now_s - rank.heard_s
            if silent_s > bound_s:
                return f"rank {rank.rank}: no heartbeat for {silent_s:.1f} s, at most {bound_s:g} s are allowed"
            stands_s, limit_s = now_s - rank.progress_s, self._bounds.standstill_s(rank.phase)
            if rank.counter >= 0 and stands_s > limit_s:
                return (
                    f"rank {rank.rank}: heart beats, but the work path stood still in phase {rank.phase!r} for {stands_s:.1f} s, "
                    f"at most {limit_s:g} s are allowed"
                )
        return ""

    async def _end_ranks(self) -> None:
        """Ends every rank: in good order if it was stopped or renewed, else at once. Reaps and frees all of it."""
        ranks, self.ranks = self.ranks, []
        self._busy_before_s += ranks[0].busy_s if ranks else 0.0
        if not self._is_wanted or self._is_renewed:
            for rank in ranks:
                rank.send({"type": "stop"})
            await asyncio.gather(*(rank.wait_gone(self._bounds.stop_s) for rank in ranks))
        await asyncio.gather(*(rank.close() for rank in ranks))

    def _setup(self, rank: int, device: str) -> WorkerSetup:
        settings, bounds, spec = self._at.settings, self._bounds, self.spec
        return WorkerSetup(
            worker_id=spec.worker_id,
            role=spec.role,
            model=settings.model,
            device=device,
            pool=spec.pool,
            topology=spec.topology,
            rank=rank,
            n_ranks=len(self.devices),
            base_model_ids=spec.base_model_ids,
            controlnet_ids=spec.controlnet_ids,
            sources={
                model_id: source
                for model_id, source in self._at.sources.items()
                if source.get("kind") in KINDS_TOLD[spec.role]
            },
            host_tier=str(self._at.host_tier),
            store=settings.store,
            line_timeout_s=bounds.line_s,
            lora_wait_s=bounds.lora_wait_s,
            heartbeat_s=bounds.heartbeat_s,
            warm=() if spec.role == "loader" else tuple(str(shape) for shape in settings.warm),
            options={
                **(self._loader_options() if spec.role == "loader" else {}),
                **{k: v for k, v in settings.options.items() if spec.role == "loader" or not k.startswith("loader_")},
                **({"weights": settings.weights} if settings.weights else {}),
            },
        )

    def _loader_options(self) -> dict[str, Any]:
        """The type in which base workers compute (a LoRA is checked into it), and where refused files are kept."""
        settings = self._at.settings
        is_cuda = any(device.startswith("cuda") for device in settings.devices)
        return {"loader_dtype": "BF16" if is_cuda else "F32", "loader_quarantine": str(settings.run_dir / "quarantine")}


def _device_of(model: str, hello: Mapping[str, Any]) -> str:
    return "cpu" if model != "sdxl" else f"cuda:{hello['local_rank']}"
