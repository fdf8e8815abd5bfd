"""The two ends of the line between one base rank and one ControlNet worker.

Every pair has a line of its own: a stream socket for small messages (its end is noticed at once when a process dies) and
buffers for tensors. Buffers are named, of fixed size, made by the base at the announcement of a shape, and written by one side
only. A message that says "buffer X holds step i" follows the bytes, so neither side polls memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


class LineLostError(Exception):
    """The other side is gone, late, or sent what this code does not send."""


class _Pair(Protocol):
    pair_id: str
    peer: str
    """Worker id of the other side."""
    transport: str
    """``host_memory`` (shared memory of one host), ``tcp``, ``gloo``, ``nccl`` or ``cuda_ipc``; recorded with every attach."""

    def tell(self, message: Mapping[str, Any]) -> None:
        """Sends a small JSON message (at most 1 MiB). Raises :class:`LineLostError` if the other side is gone."""

    def hear(self, timeout_s: float) -> dict[str, Any]:
        """The next message; raises :class:`LineLostError` if none comes in time or the other side is gone."""

    def fileno(self) -> int:
        """For ``selectors``: readable when :meth:`hear` has something, or the end, to report."""

    def buffer(self, name: str) -> np.ndarray:
        """A uint8 view of a shared buffer. Raises KeyError if it was not made."""

    def push(self, name: str, start: int, stop: int) -> None:
        """Makes these bytes of a buffer, written here, visible to the other side before it hears the next message.

        Nothing to do over shared memory; sends them over ``tcp``.
        """

    def close(self) -> None:
        """Frees everything; bounded; may be called twice."""


class PairOfBase(_Pair, Protocol):
    """The base rank's end."""

    def make_buffers(self, sizes_bytes: Mapping[str, int]) -> None:
        """Makes (or enlarges) named buffers and tells the other side, which maps them before it hears the next message."""


class PairOfControlNets(_Pair, Protocol):
    """The ControlNet worker's end."""
