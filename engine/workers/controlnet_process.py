"""The work path of a ControlNet worker: serves its clients (base ranks) in turn, one message at a time."""

from __future__ import annotations

import contextlib
import selectors
import socket
import sys
import time
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from engine.links.host_memory import HostMemoryLine
from engine.links.protocol import LineLostError
from engine.links.tcp import TcpLine, accept
from engine.workers.harness import Harness
from engine.workers.painter import ControlHost, JobError, PeerLostError
from engine.workers.partner_line import listening
from engine.workers.setup import WorkerSetup, make_control_host

POLL_S: Final = 0.005
"""Between two looks at a read that is under way while nobody else has work."""
SHOW_TOKEN_S: Final = 1.0
"""A connection that does not show its token within this time is dropped; clients wait meanwhile."""


@dataclass(slots=True)
class _Client:
    name: str
    line: HostMemoryLine | TcpLine


class ControlNetProcess:
    """Serves until told to stop."""

    def __init__(self, harness: Harness, setup: WorkerSetup) -> None:
        self._harness = harness
        self._setup = setup
        self._selector = selectors.DefaultSelector()
        self._selector.register(harness.wake_fileno, selectors.EVENT_READ, None)
        self._clients: dict[str, _Client] = {}
        self._turns: deque[str] = deque()
        self._expected: dict[str, Mapping[str, Any]] = {}
        self._listener: socket.socket | None = None
        harness.listen()
        self._host: ControlHost = make_control_host(setup, harness.progress)

    def run(self) -> None:
        """Serves until told to stop."""
        harness, host = self._harness, self._host
        harness.ready({"controlnet_ids": host.resident()}, host.memory())
        while True:
            awaited = host.awaited()
            self._listen_to_all_but(awaited)
            waiting = [p for p, client in self._clients.items() if client.line.has_heard and p not in awaited]
            if awaited:
                # A piece for those who wait, then whoever else has something: nobody waits for more than that.
                is_under_way = not host.advance()
                ready = self._selector.select(0 if waiting or not is_under_way else POLL_S)
            else:
                if not waiting:
                    harness.idle()
                ready = self._selector.select(0 if waiting else None)
            if ready or waiting or not awaited:
                harness.progress("step")
            readable = {key.data for key, _ in ready}
            if None in readable:
                harness.clear_wake()
                while (frame := harness.take(0)) is not None:
                    if not self._obey(frame[0]):
                        return
            if "listener" in readable:
                self._accept()
            for pair_id in [pair_id for pair_id in self._turns if pair_id in readable or pair_id in waiting]:
                if pair_id in self._clients and pair_id not in host.awaited():
                    self._serve_one(pair_id)

    def _listen_to_all_but(self, awaited: Collection[str]) -> None:
        """Lines of clients whose job cannot go on are left alone: what they sent stays readable, and would wake us for nothing."""
        listened = {key.data for key in self._selector.get_map().values()}
        for pair_id, client in self._clients.items():
            if pair_id in awaited and pair_id in listened:
                self._selector.unregister(client.line)
            elif pair_id not in awaited and pair_id not in listened:
                self._selector.register(client.line, selectors.EVENT_READ, pair_id)

    def _obey(self, message: dict[str, Any]) -> bool:
        kind = message["type"]
        if kind == "attach":
            self._attach(message)
        elif kind == "forget":
            # A line that is attached ends with the base's end of it, after the batch that uses it.
            self._expected.pop(message["pair_id"], None)
        elif kind == "admit":
            self._admit(message)
        elif kind == "stop":
            for pair_id in list(self._clients):
                self._drop(pair_id)
            return False
        return True

    def _attach(self, message: Mapping[str, Any]) -> None:
        pair_id = message["pair_id"]
        if message["transport"] == "tcp":
            if self._listener is None:
                self._listener = listening(message["host"])
                self._selector.register(self._listener, selectors.EVENT_READ, "listener")
            self._expected[pair_id] = message
            self._harness.send({"type": "listening", "pair_id": pair_id, "port": self._listener.getsockname()[1]})
            return
        try:
            connection = self._harness.receive_line(pair_id, self._setup.line_timeout_s)
        except TimeoutError as error:
            self._harness.send({"type": "pair_lost", "pair_id": pair_id, "reason": str(error)})
            return
        self._open(message, HostMemoryLine(connection, pair_id, message["peer"], self._setup.line_timeout_s))

    def _accept(self) -> None:
        if self._listener is None:
            return
        tokens = {pair_id: message["token"] for pair_id, message in self._expected.items()}
        try:
            pair_id, connection = accept(self._listener, tokens, SHOW_TOKEN_S)
        except LineLostError as error:
            sys.stderr.write(f"refused a connection: {error}\n")
            return
        message = self._expected.pop(pair_id)
        self._open(message, TcpLine(connection, pair_id, message["peer"], self._setup.line_timeout_s))

    def _open(self, message: Mapping[str, Any], line: HostMemoryLine | TcpLine) -> None:
        pair_id = line.pair_id
        started = time.monotonic()
        self._clients[pair_id] = _Client(message["peer"], line)
        self._turns.append(pair_id)
        self._selector.register(line, selectors.EVENT_READ, pair_id)
        try:
            # Clients are told apart by pair: the same base may attach anew before its old line's end is seen.
            self._host.open(pair_id, line)
        except (LineLostError, PeerLostError) as error:
            self._drop(pair_id)
            self._harness.send({"type": "pair_lost", "pair_id": pair_id, "reason": f"attaching failed: {error}"})
            return
        self._harness.send({
            "type": "attached", "pair_id": pair_id, "transport": line.transport, "duration_s": time.monotonic() - started
        })  # fmt: skip

    def _drop(self, pair_id: str) -> None:
        client = self._clients.pop(pair_id, None)
        if client is None:
            return
        self._turns.remove(pair_id)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(client.line)
        self._host.close(pair_id)
        client.line.close()

    def _serve_one(self, pair_id: str) -> None:
        """One message of one client, which then goes to the end of the queue."""
        self._turns.remove(pair_id)
        self._turns.append(pair_id)
        line = self._clients[pair_id].line
        try:
            message = line.poll()
            if message is None:
                return
            self._harness.progress("step")
            try:
                if message["type"] == "begin":
                    self._host.begin(pair_id, message)
                elif message["type"] == "step":
                    self._host.step(pair_id, message)
                else:
                    raise LineLostError(f"it sent {message['type']!r}, which is neither begin nor step")
            except JobError as error:
                line.tell({"type": "refused", "reason": str(error), "request_id": error.request_id})
        except (LineLostError, PeerLostError) as error:
            self._drop(pair_id)
            self._harness.send({"type": "pair_lost", "pair_id": pair_id, "reason": str(error)})

    def _admit(self, message: Mapping[str, Any]) -> None:
        try:
            self._host.admit(message["id"], message["source"])
        except JobError as error:
            self._harness.send({"type": "admit_failed", "id": message["id"], "reason": str(error)})
            return
        self._harness.send({"type": "admitted", "id": message["id"]})
