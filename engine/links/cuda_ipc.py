"""Tensors between GPUs of one host: the receive buffers lie on the base's GPU and are opened by the other process once.

After that a transfer is one copy in the order of a stream, by NVLink or PCIe between GPUs or within one, and an event that the
other side's stream waits for; nothing is opened again until a larger shape comes. Who serves several others waits for the event on the
host instead: the event of a process that was killed may never come, and a stream that waits for it holds up everybody.
The driver is called directly: torch's own sharing opens memory without mapping it peer to peer, which is ten times slower.
"""

from __future__ import annotations

import ctypes
import select
import time
from collections.abc import Mapping
from typing import Any, Final, Protocol

import torch

from engine.links.protocol import LineLostError
from engine.links.tensor_line import POLL_S, Pair, Written

HANDLE_BYTES: Final = 64
LAZY_PEER_ACCESS: Final = 1


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class Driver:
    """The six driver calls that are needed."""

    def __init__(self) -> None:
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise LineLostError(f"the NVIDIA driver's library is not there: {error}") from None

    def allocate(self, n_bytes: int) -> int:
        """Device memory of the current context, on its own: handles always mean whole allocations."""
        address = ctypes.c_uint64()
        self._check("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(n_bytes))
        return address.value

    def free(self, address: int) -> None:
        """Frees what :meth:`allocate` gave."""
        self._check("cuMemFree_v2", ctypes.c_uint64(address))

    def handle_of(self, address: int) -> bytes:
        """What another process opens the memory with."""
        handle = _IpcHandle()
        self._check("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return ctypes.string_at(ctypes.addressof(handle), HANDLE_BYTES)

    def open(self, data: bytes) -> int:
        """Maps another process' memory into the current context, peer to peer if it lies on another GPU."""
        handle, address = _IpcHandle(), ctypes.c_uint64()
        ctypes.memmove(ctypes.addressof(handle), data, HANDLE_BYTES)
        self._check("cuIpcOpenMemHandle_v2", ctypes.byref(address), handle, ctypes.c_uint(LAZY_PEER_ACCESS))
        return address.value

    def unmap(self, address: int) -> None:
        """Ends what :meth:`open` began."""
        self._check("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def copy(self, to: int, source: int, n_bytes: int, stream: torch.cuda.Stream) -> None:
        """Copies in the order of a stream."""
        self._check(
            "cuMemcpyAsync",
            ctypes.c_uint64(to),
            ctypes.c_uint64(source),
            ctypes.c_size_t(n_bytes),
            ctypes.c_void_p(stream.cuda_stream),
        )

    def _check(self, name: str, *arguments: Any) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorName(code, ctypes.byref(text))
            raise LineLostError(f"{name} failed: {(text.value or b'error').decode()} ({code})")


class CudaIpcLine:
    """See :class:`engine.links.tensor_line.TensorLine`."""

    transport = "cuda_ipc"
    is_stream_ordered = True
    reads_any_range = True

    def __init__(
        self,
        pair: Pair,
        device: torch.device,
        driver: Driver,
        mine: torch.cuda.Event,
        theirs: torch.cuda.Event,
        timeout_s: float,
        *,
        waits_on_host: bool,
    ) -> None:
        """Use :func:`open_line`."""
        self._timeout_s = timeout_s
        self._waits_on_host = waits_on_host
        self._pair = pair
        self._device = device
        self._driver = driver
        self._lanes: dict[str, tuple[int, int]] = {}
        """Address and size of each."""
        self._owned: list[int] = []
        """Everything that was allocated here. A lane that grew stays until the end: the other side may still map it."""
        self._side = torch.cuda.Stream(device)
        self._mine = mine
        self._theirs = theirs

    def make(self, sizes_bytes: Mapping[str, int]) -> dict[str, Any]:
        """See :class:`engine.links.tensor_line.TensorLine`."""
        with torch.cuda.device(self._device):
            for name, size in sizes_bytes.items():
                if self._lanes.get(name, (0, 0))[1] >= size:
                    continue
                self._lanes[name] = (self._driver.allocate(size), size)
                self._owned.append(self._lanes[name][0])
            return {
                name: {"handle": self._driver.handle_of(address).hex(), "n_bytes": size}
                for name, (address, size) in self._lanes.items()
            }

    def accept(self, lanes: Mapping[str, Any]) -> None:
        """See :class:`engine.links.tensor_line.TensorLine`."""
        if not lanes:
            return
        with torch.cuda.device(self._device):
            torch.cuda.synchronize(self._device)
            opened = dict(self._lanes)
            self._lanes.clear()
            for address, _ in opened.values():
                self._driver.unmap(address)
            for name, item in lanes.items():
                handle = bytes.fromhex(str(item["handle"]))
                if len(handle) != HANDLE_BYTES:
                    raise LineLostError(f"{self._pair.peer} sent a handle of {len(handle)} bytes")
                self._lanes[name] = (self._driver.open(handle), int(item["n_bytes"]))

    def write(self, lane: str, at_bytes: int, tensor: torch.Tensor) -> Written:
        """See :class:`engine.links.tensor_line.TensorLine`."""
        stop = at_bytes + tensor.numel() * tensor.element_size()
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        self._driver.copy(self._address(lane, at_bytes, stop), tensor.data_ptr(), stop - at_bytes, self._side)
        tensor.record_stream(self._side)
        return Written(lane, at_bytes, stop, None)

    def is_done(self, written: Written) -> bool:
        """Always: the other side's stream waits."""
        return True

    def publish(self, written: Written) -> None:
        """See :class:`engine.links.tensor_line.TensorLine`."""
        self._mine.record(self._side)

    def read(self, lane: str, at_bytes: int, out: torch.Tensor) -> None:
        """See :class:`engine.links.tensor_line.TensorLine`."""
        stop = at_bytes + out.numel() * out.element_size()
        stream = torch.cuda.current_stream(self._device)
        if self._waits_on_host:
            wait_while_peer_lives(self._theirs, self._pair, self._timeout_s)
        else:
            stream.wait_event(self._theirs)
        self._driver.copy(out.data_ptr(), self._address(lane, at_bytes, stop), stop - at_bytes, stream)

    def settle(self) -> None:
        """See :class:`engine.links.tensor_line.TensorLine`."""
        torch.cuda.current_stream(self._device).wait_stream(self._side)

    def close(self) -> None:
        """See :class:`engine.links.tensor_line.TensorLine`."""
        try:
            with torch.cuda.device(self._device):
                torch.cuda.synchronize(self._device)
                for address, _ in self._lanes.values():
                    if address not in self._owned:
                        self._driver.unmap(address)
                for address in self._owned:
                    self._driver.free(address)
        except (LineLostError, RuntimeError):
            pass  # the driver frees everything with the process
        self._lanes.clear()
        self._owned.clear()

    def _address(self, lane: str, start: int, stop: int) -> int:
        if lane not in self._lanes or stop > self._lanes[lane][1]:
            raise LineLostError(f"bytes {start}..{stop} of lane {lane!r} were never made")
        return self._lanes[lane][0] + start


def open_line(
    pair: Pair, device: torch.device | str, timeout_s: float, *, waits_on_host: bool = False
) -> CudaIpcLine | str:
    """Exchanges one event a direction with the other side, which is inside this too; or says why that cannot be.

    Args:
        pair: messages to the other side.
        device: of this process.
        timeout_s: for every wait.
        waits_on_host: this process serves others too, and must go on when the other side is killed.

    Raises:
        LineLostError: the pair is lost.
    """
    device = torch.device(device)
    handle, reason = "", ""
    driver: Driver | None = None
    try:
        driver = Driver()
        torch.cuda.set_device(device)
        # It says that everything written so far is there.
        mine = torch.cuda.Event(interprocess=True)
        mine.record(torch.cuda.current_stream(device))
        handle = mine.ipc_handle().hex()
    except (LineLostError, RuntimeError) as error:
        reason = str(error)
    pair.tell({"type": "opened", "what": "event", "handle": handle, "reason": reason})
    message = pair.hear(timeout_s)
    if message.get("what") != "event":
        raise LineLostError(f"{pair.peer} sent {str(message)[:200]} in place of its event")
    reason = reason or str(message.get("reason", ""))
    if reason or driver is None:
        return reason
    try:
        theirs = torch.cuda.Event.from_ipc_handle(device, bytes.fromhex(str(message["handle"])))
    except (RuntimeError, ValueError) as error:
        return f"the event of {pair.peer} cannot be opened: {error}"
    return CudaIpcLine(pair, device, driver, mine, theirs, timeout_s, waits_on_host=waits_on_host)


class Event(Protocol):
    """Of ``torch.cuda.Event`` what is used here."""

    def query(self) -> bool:
        """Whether the device has reached it."""


def wait_while_peer_lives(event: Event, pair: Pair, timeout_s: float) -> None:
    """Waits on the host for an event that another process records.

    Raises:
        LineLostError: the process is gone, or the event did not come in time.
    """
    until = time.monotonic() + timeout_s
    poll = select.poll()
    poll.register(pair.fileno(), select.POLLRDHUP)  # also seen while messages wait to be heard
    try:
        while not event.query():
            if poll.poll(0):
                raise LineLostError(f"{pair.peer} went before the bytes it had announced were there")
            if time.monotonic() > until:
                raise LineLostError(f"the bytes that {pair.peer} announced did not come within {timeout_s:g} s")
            time.sleep(POLL_S)
    except RuntimeError as error:
        raise LineLostError(f"the event of {pair.peer} cannot be asked: {error}") from None
