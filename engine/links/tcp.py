"""A pair line between two hosts: messages and tensors over one TCP connection, into buffers that both sides hold.

Whoever connects proves that the front process sent it: a token of the pair, known to both sides from their control channels,
is compared in constant time before anything else is read.
"""

from __future__ import annotations

import contextlib
import hmac
import socket
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from engine.links.protocol import LineLostError
from engine.links.stream import RECEIVE_BYTES, StreamLine

TOKEN_BYTES: Final = 32
ID_BYTES_MAX: Final = 512


class TcpLine(StreamLine):
    """Either end; :meth:`make_buffers` is for the base's. What one side writes reaches the other by :meth:`push`."""

    transport = "tcp"

    def __init__(self, connection: socket.socket, pair_id: str, peer: str, send_timeout_s: float = 30.0) -> None:
        super().__init__(connection, pair_id, peer, send_timeout_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._filling: memoryview | None = None

    def make_buffers(self, sizes_bytes: Mapping[str, int]) -> None:
        """See :class:`engine.links.protocol.PairOfBase`. Views taken before of an enlarged buffer are stale."""
        wanted = {
            name: size
            for name, size in sizes_bytes.items()
            if name not in self._buffers or self._buffers[name].size < size
        }
        if wanted:
            self._make(wanted)
            self._send(self._encode({"type": "line_buffers", "sizes": wanted}, 0))

    def push(self, name: str, start: int, stop: int) -> None:
        """Sends these bytes; returns when the kernel has taken them."""
        if stop > start:
            message = {"type": "line_bytes", "name": name, "start": start, "stop": stop}
            self._send(self._encode(message, stop - start))
            self._send(memoryview(self._buffers[name])[start:stop])

    def _make(self, sizes: Mapping[str, int]) -> None:
        for name, size in sizes.items():
            self._buffers[name] = np.zeros(size, dtype=np.uint8)

    def _internal(self, message: dict[str, Any], n_payload: int) -> None:
        if message["type"] == "line_buffers" and not n_payload:
            self._make(self._sizes(message))
            return
        if message["type"] != "line_bytes":
            super()._internal(message, n_payload)
        name, start, stop = message.get("name"), message.get("start"), message.get("stop")
        buffer = self._buffers.get(name) if isinstance(name, str) else None
        is_inside = type(start) is int and type(stop) is int and buffer is not None and 0 <= start < stop <= buffer.size
        if not is_inside or stop - start != n_payload:
            raise LineLostError(f"{self.peer} sent bytes outside buffer {name!r}")
        n_here = min(len(self._received), n_payload)
        target = memoryview(buffer)[start:stop]
        target[:n_here] = self._received[:n_here]
        del self._received[:n_here]
        self._filling = target[n_here:] if n_here < n_payload else None

    def _receive(self) -> None:
        """Fills the buffer that bytes are on their way to, without a copy in between; then as usual."""
        try:
            while self._filling is not None:
                n_read = self._connection.recv_into(self._filling)
                if n_read == 0:
                    raise LineLostError(f"the line to {self.peer} has ended")
                self._filling = self._filling[n_read:] if n_read < len(self._filling) else None
        except BlockingIOError:
            return
        except OSError as error:
            raise LineLostError(f"the line to {self.peer} has ended: {error}") from None
        super()._receive()

    def _take_frame(self) -> bool:
        return self._filling is None and super()._take_frame()


def connect(address: str, pair_id: str, token: str, timeout_s: float) -> socket.socket:
    """Connects to a listening worker and shows the pair's token; raises :class:`LineLostError`."""
    host, _, port = address.rpartition(":")
    name = pair_id.encode()
    connection = None
    try:
        connection = socket.create_connection((host, int(port)), timeout=timeout_s)
        connection.sendall(bytes.fromhex(token) + len(name).to_bytes(2, "big") + name)
    except (OSError, ValueError) as error:
        if connection is not None:
            connection.close()
        raise LineLostError(f"cannot connect to {address}: {error}") from None
    return connection


def accept(listener: socket.socket, tokens: Mapping[str, str], timeout_s: float) -> tuple[str, socket.socket]:
    """Accepts one connection, and returns it with the id of its pair, if it shows the token of an expected pair.

    Args:
        listener: a listening socket that is readable.
        tokens: pair id to its token (64 hexadecimal digits).

    Raises:
        LineLostError: it does not; it has been closed.
    """
    try:
        connection, _ = listener.accept()
    except OSError as error:
        raise LineLostError(f"nobody could be accepted: {error}") from None
    try:
        connection.settimeout(timeout_s)
        shown = _exactly(connection, TOKEN_BYTES)
        n_name = int.from_bytes(_exactly(connection, 2), "big")
        if n_name > ID_BYTES_MAX:
            raise LineLostError(f"got a pair id of {n_name} bytes")
        pair_id = _exactly(connection, n_name).decode("utf-8", "replace")
        token = tokens.get(pair_id)
        if not hmac.compare_digest(shown.hex(), token or "0" * 2 * TOKEN_BYTES) or token is None:
            raise LineLostError("somebody connected without the token of an expected pair")
    except (OSError, LineLostError) as error:
        with contextlib.suppress(OSError):
            connection.close()
        raise LineLostError(str(error)) from None
    return pair_id, connection


def _exactly(connection: socket.socket, n_bytes: int) -> bytes:
    data = b""
    while len(data) < n_bytes:
        part = connection.recv(min(n_bytes - len(data), RECEIVE_BYTES))
        if not part:
            raise LineLostError("the connection ended before it named a pair")
        data += part
    return data
