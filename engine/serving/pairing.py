"""Attaches and detaches base ranks and ControlNet workers, each pair over a line of its own, while both go on serving."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from engine.serving.events import EventLog
from engine.serving.reconcile import Pairing
from engine.serving.supervisor import Replica
from engine.serving.worker_handle import WorkerHandle


class PairListener(Protocol):
    """Who may use which ControlNet worker: the dispatcher."""

    def attached(self, base_worker_id: str, controlnet_worker_id: str) -> None: ...
    def detached(self, base_worker_id: str, controlnet_worker_id: str) -> None: ...


@dataclass(slots=True)
class _Line:
    """One rank's line of a pairing."""

    pair_id: str
    pairing: Pairing
    rank: int
    base: WorkerHandle
    controlnet: WorkerHandle
    transport: Literal["host_memory", "tcp"]
    token: str
    started_s: float
    tensors: str = ""
    """How tensors travel, as the base reports it: the line's own way, or a faster one that was set up over it."""
    base_said: bool = False
    controlnet_said: bool = False

    @property
    def is_attached(self) -> bool:
        return self.base_said and self.controlnet_said


class Pairs:
    """Keeps every wanted pairing of two ready replicas attached."""

    def __init__(
        self,
        replicas: Mapping[str, Replica],
        listener: PairListener,
        events: EventLog,
        clock: Callable[[], float],
        reattach_s: float,
    ) -> None:
        self._replicas = replicas
        self._listener = listener
        self._events = events
        self._clock = clock
        self._reattach_s = reattach_s
        self._wanted: frozenset[Pairing] = frozenset()
        self._lines: dict[str, _Line] = {}
        self._retries: dict[Pairing, asyncio.TimerHandle] = {}
        self._detaching: dict[str, tuple[Pairing, float]] = {}

    def want(self, pairings: frozenset[Pairing]) -> None:
        """These are wanted from now on; others are detached, each base after the batch that it runs."""
        self._wanted = pairings
        for pairing in sorted({line.pairing for line in self._lines.values()} - pairings):
            self._drop(pairing)
        self.attach_ready()

    def attach_ready(self) -> None:
        """Attaches what is wanted, possible and not attached."""
        for pairing in sorted(self._wanted):
            if pairing in self._retries:
                continue
            base, controlnet = (self._replicas.get(name) for name in pairing)
            if base is None or controlnet is None or not base.is_ready or not controlnet.is_ready:
                continue
            have = {line.rank for line in self._lines.values() if line.pairing == pairing}
            for rank in base.ranks:
                if rank.rank not in have:
                    self._begin(pairing, rank, controlnet.ranks[0])

    def replica_gone(self, worker_id: str) -> None:
        """Its lines ended with it; the other sides forget theirs. The dispatcher knows already."""
        for line in [line for line in self._lines.values() if worker_id in line.pairing]:
            self._forget(line)
        for pairing in [pairing for pairing in self._retries if worker_id in pairing]:
            self._retries.pop(pairing).cancel()
        self._detaching = {name: value for name, value in self._detaching.items() if worker_id not in value[0]}

    def pair_id(self, base_worker_id: str, controlnet_worker_id: str, rank: int) -> str | None:
        """The attached line of a rank; None if there is none."""
        for line in self._lines.values():
            if line.pairing == (base_worker_id, controlnet_worker_id) and line.rank == rank and line.is_attached:
                return line.pair_id
        return None

    @property
    def transports(self) -> dict[str, str]:
        """Attached line to the way its tensors travel."""
        return {line.pair_id: line.tensors for line in self._lines.values() if line.is_attached}

    def is_settled(self) -> bool:
        """Whether every wanted pairing of two ready replicas is attached."""
        for pairing in self._wanted:
            base, controlnet = (self._replicas.get(name) for name in pairing)
            is_possible = base is not None and controlnet is not None and base.is_ready and controlnet.is_ready
            if base is not None and is_possible and not self._is_attached(pairing, len(base.ranks)):
                return False
        return True

    def close(self) -> None:
        """Nothing is attached any more from now on."""
        self._wanted = frozenset()
        for retry in self._retries.values():
            retry.cancel()
        self._retries.clear()
        self._lines.clear()

    # messages of workers

    def said(self, handle: WorkerHandle, message: Mapping[str, Any]) -> None:
        """``attaching``, ``listening``, ``attached``, ``detached`` or ``pair_lost``."""
        if message["type"] == "detached" and message["pair_id"] in self._detaching:
            pairing, asked_s = self._detaching.pop(message["pair_id"])
            self._events.add("detach", pairing[0], duration_s=self._clock() - asked_s, peer=pairing[1])
            return
        line = self._lines.get(message["pair_id"])
        if line is None:
            return  # of a line that was given up meanwhile
        kind = message["type"]
        if kind == "attaching":
            self._connect(line)
        elif kind == "listening":
            address = f"{line.controlnet.host or line.base.local_address()}:{message['port']}"
            line.base.send({**_attach(line, line.controlnet.worker_id), "address": address})
        elif kind == "attached":
            line.controlnet_said |= handle is line.controlnet
            if handle is line.base:
                # The base's end is the last to be set up, so it knows how tensors travel.
                line.base_said, line.tensors = True, str(message["transport"])
            if line.is_attached:
                self._attached(line)
        elif kind == "pair_lost":
            self._lost(line, handle, str(message["reason"]))

    def _begin(self, pairing: Pairing, base: WorkerHandle, controlnet: WorkerHandle) -> None:
        is_local = not base.host and not controlnet.host
        line = _Line(
            pair_id=f"{pairing[0]}.{base.rank}~{pairing[1]}#{secrets.token_hex(4)}",
            pairing=pairing,
            rank=base.rank,
            base=base,
            controlnet=controlnet,
            transport="host_memory" if is_local else "tcp",
            token=secrets.token_hex(32),
            started_s=self._clock(),
        )
        self._lines[line.pair_id] = line
        # The base goes first and says when it is between two batches: the ControlNet worker, which may have to meet it to set
        # up a transport, must not wait for it while other clients wait for residuals. Listening costs no wait.
        if is_local:
            base.send(_attach(line, controlnet.worker_id))
        else:
            host = controlnet.host or base.local_address()
            controlnet.send({**_attach(line, pairing[0]), "host": host})

    def _connect(self, line: _Line) -> None:
        ends = socket.socketpair()
        is_passed = [
            handle.pass_line(line.pair_id, end) for handle, end in zip((line.base, line.controlnet), ends, strict=True)
        ]
        if all(is_passed):
            line.controlnet.send(_attach(line, line.pairing[0]))
        else:
            self._lost(line, line.controlnet if is_passed[0] else line.base, "the line could not be passed on")

    def _attached(self, line: _Line) -> None:
        self._events.add(
            "attach",
            line.pairing[0],
            self._replicas[line.pairing[0]].spec.pool,
            duration_s=self._clock() - line.started_s,
            detail=line.tensors,
            peer=line.pairing[1],
        )
        if self._is_attached(line.pairing, len(self._replicas[line.pairing[0]].ranks)):
            self._listener.attached(*line.pairing)

    def _is_attached(self, pairing: Pairing, n_ranks: int) -> bool:
        return sum(line.is_attached for line in self._lines.values() if line.pairing == pairing) == n_ranks

    def _lost(self, line: _Line, handle: WorkerHandle, reason: str) -> None:
        """Both workers live, the line does not: the others of the pairing stay, this one comes again after a moment."""
        self._events.add(
            "pair_lost", line.pairing[0], self._replicas[line.pairing[0]].spec.pool, detail=reason, peer=line.pairing[1]
        )
        self._listener.detached(*line.pairing)
        self._forget(line)
        if line.pairing not in self._retries:
            loop = asyncio.get_running_loop()
            self._retries[line.pairing] = loop.call_later(self._reattach_s, self._retry, line.pairing)

    def _retry(self, pairing: Pairing) -> None:
        self._retries.pop(pairing, None)
        self.attach_ready()

    def _drop(self, pairing: Pairing) -> None:
        self._listener.detached(*pairing)
        for line in [line for line in self._lines.values() if line.pairing == pairing]:
            self._forget(line)
            self._detaching[line.pair_id] = (pairing, self._clock())

    def _forget(self, line: _Line) -> None:
        """The base drops its end between two batches; the ControlNet worker sees the end of the line, or stops expecting it."""
        del self._lines[line.pair_id]
        line.base.send({"type": "detach", "pair_id": line.pair_id})
        line.controlnet.send({"type": "forget", "pair_id": line.pair_id})


def _attach(line: _Line, peer: str) -> dict[str, Any]:
    return {
        "type": "attach", "pair_id": line.pair_id, "peer": peer, "transport": line.transport, "token": line.token
    }  # fmt: skip
