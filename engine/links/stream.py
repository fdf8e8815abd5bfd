"""Messages of a pair line over a connected stream socket; how tensors travel beside them is the subclass' business.

A frame is a 4-byte header length, an 8-byte payload length (big-endian), a JSON object and the payload. Receiving never blocks
on half a frame, so a ControlNet worker that serves several lines cannot be held up by one of them.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from engine.links.protocol import LineLostError

LENGTHS: Final = struct.Struct(">IQ")
MESSAGE_BYTES_MAX: Final = 2**20
BUFFER_BYTES_MAX: Final = 4 * 2**30
N_BUFFERS_MAX: Final = 256
RECEIVE_BYTES: Final = 64 * 2**10
INTERNAL: Final = "line_"
"""Message types that start like this belong to the line itself and are never heard."""


class StreamLine:
    """One end of a line. Not thread-safe: the work path of its process owns it."""

    transport = ""

    def __init__(self, connection: socket.socket, pair_id: str, peer: str, send_timeout_s: float = 30.0) -> None:
        self.pair_id = pair_id
        self.peer = peer
        self._connection = connection
        self._send_timeout_s = send_timeout_s
        self._received = bytearray()
        self._heard: deque[dict[str, Any]] = deque()
        self._buffers: dict[str, np.ndarray] = {}
        self._is_closed = False
        connection.setblocking(False)

    def tell(self, message: Mapping[str, Any]) -> None:
        """See :class:`engine.links.protocol.PairOfBase`."""
        self._send(self._encode(message, 0))

    def hear(self, timeout_s: float) -> dict[str, Any]:
        """See :class:`engine.links.protocol.PairOfBase`."""
        until = time.monotonic() + timeout_s
        while not self._heard:
            self._wait(select.POLLIN, until, f"nothing came from {self.peer} within {timeout_s:g} s")
            self._receive()
        return self._heard.popleft()

    def poll(self) -> dict[str, Any] | None:
        """The next message if one is there, without waiting; raises :class:`LineLostError` if the other side is gone."""
        if not self._heard:
            self._receive()
        return self._heard.popleft() if self._heard else None

    @property
    def has_heard(self) -> bool:
        """Whether a whole message waits here already, so that the socket need not become readable for it."""
        return bool(self._heard)

    def fileno(self) -> int:
        """See :class:`engine.links.protocol.PairOfBase`."""
        return self._connection.fileno()

    def buffer(self, name: str) -> np.ndarray:
        """See :class:`engine.links.protocol.PairOfBase`."""
        return self._buffers[name]

    def close(self) -> None:
        """See :class:`engine.links.protocol.PairOfBase`."""
        self._is_closed = True
        self._buffers.clear()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _encode(self, message: Mapping[str, Any], n_payload: int) -> bytes:
        try:
            header = json.dumps(message, separators=(",", ":"), allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise LineLostError(f"a message to {self.peer} cannot be sent: {error}") from None
        if len(header) > MESSAGE_BYTES_MAX:
            raise LineLostError(
                f"a message to {self.peer} has {len(header)} bytes, at most {MESSAGE_BYTES_MAX} are allowed"
            )
        return LENGTHS.pack(len(header), n_payload) + header

    def _send(self, data: bytes | memoryview, file_descriptors: list[int] | None = None) -> None:
        until = time.monotonic() + self._send_timeout_s
        view = memoryview(data)
        while len(view):
            try:
                if file_descriptors:
                    n_sent = socket.send_fds(self._connection, [view], file_descriptors)
                    file_descriptors = None
                else:
                    n_sent = self._connection.send(view)
                view = view[n_sent:]
            except BlockingIOError:
                self._wait(select.POLLOUT, until, f"{self.peer} took nothing for {self._send_timeout_s:g} s")
            except (OSError, ValueError) as error:
                raise LineLostError(f"the line to {self.peer} has ended: {error}") from None

    def _wait(self, event: int, until: float, complaint: str) -> None:
        if self._is_closed:
            raise LineLostError(f"the line to {self.peer} is closed")
        poll = select.poll()
        poll.register(self._connection, event)
        left_s = until - time.monotonic()
        if left_s <= 0 or not poll.poll(left_s * 1000):
            raise LineLostError(complaint)

    def _receive(self) -> None:
        """Takes what is there and turns whole frames into messages."""
        try:
            data = self._read(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except (OSError, ValueError) as error:
            raise LineLostError(f"the line to {self.peer} has ended: {error}") from None
        if not data:
            raise LineLostError(f"the line to {self.peer} has ended")
        self._received += data
        while self._take_frame():
            pass

    def _read(self, n_bytes: int) -> bytes:
        return self._connection.recv(n_bytes)

    def _take_frame(self) -> bool:
        if len(self._received) < LENGTHS.size:
            return False
        n_header, n_payload = LENGTHS.unpack_from(self._received)
        if not 2 <= n_header <= MESSAGE_BYTES_MAX or n_payload > BUFFER_BYTES_MAX:
            raise LineLostError(f"{self.peer} sent a frame of {n_header} + {n_payload} bytes, which is not allowed")
        if len(self._received) < LENGTHS.size + n_header:
            return False
        try:
            message = json.loads(self._received[LENGTHS.size : LENGTHS.size + n_header])
        except (ValueError, RecursionError) as error:
            raise LineLostError(f"{self.peer} sent what is not JSON: {error}") from None
        if not isinstance(message, dict) or not isinstance(message.get("type"), str):
            raise LineLostError(f"{self.peer} sent a message without a type")
        del self._received[: LENGTHS.size + n_header]
        if message["type"].startswith(INTERNAL):
            self._internal(message, n_payload)
        elif n_payload:
            raise LineLostError(f"{self.peer} sent bytes beside a message")
        else:
            self._heard.append(message)
        return True

    def _internal(self, message: dict[str, Any], n_payload: int) -> None:
        raise LineLostError(f"{self.peer} sent {message['type']!r}, which this transport does not know")

    def _sizes(self, message: dict[str, Any]) -> dict[str, int]:
        sizes = message.get("sizes")
        if not isinstance(sizes, dict) or len(sizes) > N_BUFFERS_MAX:
            raise LineLostError(f"{self.peer} announced buffers without sizes")
        for name, size in sizes.items():
            if type(size) is not int or not 0 < size <= BUFFER_BYTES_MAX:
                raise LineLostError(f"{self.peer} announced the buffer {name!r} of {size!r} bytes")
        return sizes
