"""How tensors travel over a pair line: each transport moves bytes between device memory and named lanes, in stream order.

A lane is a buffer of fixed size that one side writes and the other reads. The order of a transfer is always: write, publish,
tell (a message over the pair that says what lies where), hear, read. Messages belong to the caller.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

from engine.links.protocol import LineLostError, PairOfBase, PairOfControlNets

Pair = PairOfBase | PairOfControlNets
ALIGN_BYTES: Final = 256
POLL_S: Final = 20e-6
"""Between two looks at a device event; a wait is some hundred microseconds long."""


@dataclass(frozen=True, slots=True)
class Written:
    """Bytes of a lane that have been asked for in the order of a stream."""

    lane: str
    start: int
    stop: int
    event: torch.cuda.Event | None
    """None: they are there."""


class TensorLine(Protocol):
    """One end. Waits are bounded by the timeout it was made with; all calls raise :class:`LineLostError`."""

    transport: str
    """What is recorded with the attach."""
    is_stream_ordered: bool
    """True: :meth:`publish` need not wait for the device, the other side's stream does."""
    reads_any_range: bool
    """False: what was written in pieces must be read in the same pieces and order."""

    def make(self, sizes_bytes: Mapping[str, int]) -> dict[str, Any]:
        """Base's side: makes or enlarges lanes; returns what the next message must carry under ``lanes``."""

    def accept(self, lanes: Mapping[str, Any]) -> None:
        """The other side, on that message."""

    def write(self, lane: str, at_bytes: int, tensor: torch.Tensor) -> Written:
        """Copies a tensor into a lane, in the order of the current stream."""

    def is_done(self, written: Written) -> bool:
        """Whether :meth:`publish` would return at once."""

    def publish(self, written: Written) -> None:
        """Makes written bytes visible to whoever hears the next message."""

    def read(self, lane: str, at_bytes: int, out: torch.Tensor) -> None:
        """Copies from a lane into a dense tensor, in the order of the current stream."""

    def settle(self) -> None:
        """After the last write of a step: the current stream may overwrite what was written from."""

    def close(self) -> None:
        """Frees what this end holds; the pair itself is the caller's. Never raises."""


class HostTensorLine:
    """Over the pair's own buffers: shared memory on one host (registered with CUDA once, so that copies are asynchronous), or TCP."""

    is_stream_ordered = False
    reads_any_range = True

    def __init__(self, pair: Pair, device: torch.device | str, timeout_s: float) -> None:
        self.transport = pair.transport
        self._pair = pair
        self._device = torch.device(device)
        self._timeout_s = timeout_s
        self._views: dict[str, tuple[int, torch.Tensor]] = {}
        self._registered: dict[str, int] = {}
        self._side = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def make(self, sizes_bytes: Mapping[str, int]) -> dict[str, Any]:
        """See :class:`TensorLine`."""
        self._pair.make_buffers(sizes_bytes)  # type: ignore[union-attr]
        return {}

    def accept(self, lanes: Mapping[str, Any]) -> None:
        """Nothing: the pair has mapped the buffers already."""

    def write(self, lane: str, at_bytes: int, tensor: torch.Tensor) -> Written:
        """See :class:`TensorLine`."""
        source = _bytes_of(tensor)
        stop = at_bytes + source.numel()
        target = self._view(lane)[at_bytes:stop]
        if self._side is None:
            target.copy_(source)
            return Written(lane, at_bytes, stop, None)
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._side)
        source.record_stream(self._side)
        return Written(lane, at_bytes, stop, event)

    def is_done(self, written: Written) -> bool:
        """See :class:`TensorLine`."""
        return written.event is None or written.event.query()

    def publish(self, written: Written) -> None:
        """See :class:`TensorLine`."""
        if written.event is not None:
            wait_for(written.event, self._timeout_s)
        self._pair.push(written.lane, written.start, written.stop)

    def read(self, lane: str, at_bytes: int, out: torch.Tensor) -> None:
        """See :class:`TensorLine`."""
        target = _bytes_of(out)
        target.copy_(self._view(lane)[at_bytes : at_bytes + target.numel()], non_blocking=True)

    def settle(self) -> None:
        """See :class:`TensorLine`."""
        if self._side is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._side)

    def close(self) -> None:
        """See :class:`TensorLine`."""
        if self._side is not None:
            torch.cuda.synchronize(self._device)
        for address in self._registered.values():
            torch.cuda.cudart().cudaHostUnregister(address)
        self._registered.clear()
        self._views.clear()

    def _view(self, lane: str) -> torch.Tensor:
        """The pair's buffer as a tensor; registered with CUDA when it is seen first, and again if it has moved."""
        try:
            array = self._pair.buffer(lane)
        except KeyError:
            raise LineLostError(f"{self._pair.peer} uses buffer {lane!r}, which was never made") from None
        address = array.ctypes.data
        known = self._views.get(lane)
        if known is not None and known[0] == address and known[1].numel() == array.size:
            return known[1]
        view = torch.from_numpy(array)
        if self._side is not None:
            if lane in self._registered:
                torch.cuda.synchronize(self._device)
                torch.cuda.cudart().cudaHostUnregister(self._registered.pop(lane))
            # Without it copies still work, but the host waits inside each of them.
            if int(torch.cuda.cudart().cudaHostRegister(address, array.size, 0)) == 0:
                self._registered[lane] = address
        self._views[lane] = (address, view)
        return view


def wait_for(event: torch.cuda.Event, timeout_s: float) -> None:
    """Waits until the device has reached an event; raises :class:`LineLostError` after the timeout."""
    until = time.monotonic() + timeout_s
    while not event.query():
        if time.monotonic() > until:
            raise LineLostError(f"the device did not finish a copy within {timeout_s:g} s")
        time.sleep(POLL_S)


def aligned(n_bytes: int) -> int:
    """The next multiple of :data:`ALIGN_BYTES`."""
    return -(-n_bytes // ALIGN_BYTES) * ALIGN_BYTES


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor as bytes, without copying."""
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not dense")
    return tensor.view(-1).view(torch.uint8)
