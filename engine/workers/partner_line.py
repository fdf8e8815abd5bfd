"""Opens the line between the two ranks of a CFG pair, once, before anything is loaded: they live and die together."""

from __future__ import annotations

import select
import socket

from engine.links.protocol import LineLostError
from engine.links.tcp import accept, connect
from engine.serving.wire import WireFormatError
from engine.workers.agreement import HostMemoryPartner, Partner, TcpPartner
from engine.workers.harness import Harness
from engine.workers.setup import WorkerSetup


def partner_line(harness: Harness, setup: WorkerSetup) -> Partner:
    """Opens this rank's end; the front says how in a ``partner`` message. Raises :class:`LineLostError` if it takes too long."""
    timeout_s = setup.line_timeout_s
    peer = f"rank {1 - setup.rank} of {setup.worker_id}"
    frame = harness.take(timeout_s)
    if frame is None or frame[0]["type"] != "partner":
        raise WireFormatError(f"the front did not say within {timeout_s:g} s how to reach {peer}")
    message = frame[0]
    pair_id = message["pair_id"]
    if message["transport"] == "host_memory":
        try:
            return HostMemoryPartner(harness.receive_line(pair_id, timeout_s), pair_id, peer, timeout_s)
        except TimeoutError as error:
            raise LineLostError(str(error)) from None
    if setup.rank > 0:
        return TcpPartner(connect(message["address"], pair_id, message["token"], timeout_s), pair_id, peer, timeout_s)
    with listening(message["host"]) as listener:
        harness.send({"type": "listening", "pair_id": pair_id, "port": listener.getsockname()[1]})
        if not select.select([listener], [], [], timeout_s)[0]:
            raise LineLostError(f"{peer} did not connect within {timeout_s:g} s")
        _, connection = accept(listener, {pair_id: message["token"]}, timeout_s)
    return TcpPartner(connection, pair_id, peer, timeout_s)


def listening(host: str) -> socket.socket:
    """A TCP socket that listens on a free port of this interface."""
    return socket.create_server((host, 0), backlog=16)
