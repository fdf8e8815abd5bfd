"""A pair line on one host: messages over a Unix-domain socket, tensors in shared memory that has no name.

Buffers are ``memfd`` files whose descriptors travel over the socket, so there is nothing in ``/dev/shm`` to be left over,
whenever either side is killed: the kernel frees the memory when the last process that mapped it is gone.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.links.protocol import LineLostError
from engine.links.stream import StreamLine

DESCRIPTORS_MAX = 64
"""Descriptors of one message; the kernel's own limit is 253."""


class HostMemoryLine(StreamLine):
    """Either end; :meth:`make_buffers` is for the base's."""

    transport = "host_memory"

    def __init__(self, connection: socket.socket, pair_id: str, peer: str, send_timeout_s: float = 30.0) -> None:
        super().__init__(connection, pair_id, peer, send_timeout_s)
        self._descriptors: deque[int] = deque()

    def make_buffers(self, sizes_bytes: Mapping[str, int]) -> None:
        """See :class:`engine.links.protocol.PairOfBase`. Views taken before of an enlarged buffer are stale."""
        wanted = {
            name: size
            for name, size in sizes_bytes.items()
            if name not in self._buffers or self._buffers[name].size < size
        }
        for names in _chunks(sorted(wanted), DESCRIPTORS_MAX):
            descriptors = []
            try:
                for name in names:
                    descriptor = os.memfd_create(f"diffplan-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                    descriptors.append(descriptor)
                    os.ftruncate(descriptor, wanted[name])
                    # A file that cannot shrink cannot turn the other side's read into a SIGBUS.
                    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
                    self._buffers[name] = _map(descriptor, wanted[name])
                message = {"type": "line_buffers", "sizes": {name: wanted[name] for name in names}}
                self._send(self._encode(message, 0), descriptors)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)

    def push(self, name: str, start: int, stop: int) -> None:
        """Nothing to do: both sides map the same memory."""

    def close(self) -> None:
        """See :class:`engine.links.protocol.PairOfBase`."""
        super().close()
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def _read(self, n_bytes: int) -> bytes:
        data, descriptors, _, _ = socket.recv_fds(self._connection, n_bytes, DESCRIPTORS_MAX)
        self._descriptors.extend(descriptors)
        return data

    def _internal(self, message: dict[str, Any], n_payload: int) -> None:
        if message["type"] != "line_buffers" or n_payload:
            super()._internal(message, n_payload)
        sizes = self._sizes(message)
        if len(sizes) > len(self._descriptors):
            raise LineLostError(f"{self.peer} announced {len(sizes)} buffers and sent {len(self._descriptors)}")
        for name, size in sizes.items():
            descriptor = self._descriptors.popleft()
            try:
                if os.fstat(descriptor).st_size != size:
                    raise LineLostError(f"{self.peer} announced {size} bytes for buffer {name!r} and sent another size")
                self._buffers[name] = _map(descriptor, size)
            finally:
                os.close(descriptor)


def _map(descriptor: int, size: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(descriptor, size), dtype=np.uint8)


def _chunks(names: list[str], n: int) -> list[list[str]]:
    return [names[at : at + n] for at in range(0, len(names), n)]
