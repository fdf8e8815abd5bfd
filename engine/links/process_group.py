"""Tensors over a process group of two ranks that belongs to one pair alone: losing it takes nobody else down.

``gloo`` between any two processes, ``nccl`` between different GPUs. Not the default group, which every rank of a world shares.
Both sides post sends and receives in the order of the messages, so nothing is matched by name.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from engine.links.protocol import LineLostError
from engine.links.tensor_line import Pair, Written

BASE_RANK = 0
GREETING = 7.0


class GroupLine:
    """See :class:`engine.links.tensor_line.TensorLine`."""

    is_stream_ordered = True
    reads_any_range = False

    def __init__(self, pair: Pair, device: torch.device | str, kind: str, timeout_s: float, *, is_base: bool) -> None:
        """Both sides are inside this at the same time.

        Raises:
            LineLostError: the other side did not come, or the first exchange failed.
        """
        self.transport = kind
        self._device = torch.device(device)
        self._timeout = timedelta(seconds=timeout_s)
        self._rank = BASE_RANK if is_base else 1 - BASE_RANK
        self._sent: deque[tuple[Any, torch.Tensor]] = deque()
        try:
            self._store = self._rendezvous(pair, timeout_s, is_base=is_base)
            self._group = self._make(kind)
            self._greet()
        except (RuntimeError, OSError) as error:
            raise LineLostError(f"no {kind} group with {pair.peer}: {str(error)[:300]}") from error

    def make(self, sizes_bytes: Mapping[str, int]) -> dict[str, Any]:
        """Nothing: a group has no buffers."""
        return {}

    def accept(self, lanes: Mapping[str, Any]) -> None:
        """Nothing to open."""

    def write(self, lane: str, at_bytes: int, tensor: torch.Tensor) -> Written:
        """See :class:`engine.links.tensor_line.TensorLine`."""
        flat = tensor.view(-1).view(torch.uint8)
        self._run(lambda: self._sent.append((self._group.send([flat], 1 - self._rank, 0), flat)))
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()
        return Written(lane, at_bytes, at_bytes + flat.numel(), None)

    def is_done(self, written: Written) -> bool:
        """Always: the other side waits for the bytes, not for the message."""
        return True

    def publish(self, written: Written) -> None:
        """Nothing: a send may only end once the other side has posted its receive, which it does on the message."""

    def read(self, lane: str, at_bytes: int, out: torch.Tensor) -> None:
        """See :class:`engine.links.tensor_line.TensorLine`. On a GPU the stream waits, on a CPU the host does."""
        flat = out.view(-1).view(torch.uint8)

        def receive() -> None:
            work = self._group.recv([flat], 1 - self._rank, 0)
            if self.transport == "nccl":
                work.wait()
            else:
                work.wait(self._timeout)

        self._run(receive)

    def settle(self) -> None:
        """See :class:`engine.links.tensor_line.TensorLine`. Over gloo the other side's answer says that it has everything."""
        if self.transport == "nccl":
            while self._sent:
                self._sent.popleft()[0].wait()

    def close(self) -> None:
        """See :class:`engine.links.tensor_line.TensorLine`."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._sent.clear()
        if self.transport == "nccl":
            self._group.abort()  # a peer that is gone never answers a clean shutdown
        self._group = None
        self._store = None

    def _rendezvous(self, pair: Pair, timeout_s: float, *, is_base: bool) -> dist.Store:
        timeout = timedelta(seconds=timeout_s)
        if is_base:
            with socket.socket(fileno=os.dup(pair.fileno())) as own:
                is_tcp = own.family in {socket.AF_INET, socket.AF_INET6}
                host = own.getsockname()[0] if is_tcp else "127.0.0.1"
            store = dist.TCPStore(host, 0, 2, is_master=True, timeout=timeout, wait_for_workers=False)
            pair.tell({"type": "step", "what": "group", "host": host, "port": store.port})
            return store
        message = pair.hear(timeout_s)
        if message.get("what") != "group":
            raise LineLostError(f"{pair.peer} sent {str(message)[:200]} in place of its group's address")
        return dist.TCPStore(
            str(message["host"]), int(message["port"]), 2, is_master=False, timeout=timeout, wait_for_workers=False
        )

    def _make(self, kind: str) -> Any:
        store = dist.PrefixStore("pair", self._store)
        if kind == "gloo":
            return dist.ProcessGroupGloo(store, self._rank, 2, self._timeout)
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast is not for two ranks
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = self._timeout
        torch.cuda.set_device(self._device)
        return dist.ProcessGroupNCCL(store, self._rank, 2, options)

    def _greet(self) -> None:
        """One exchange both ways now: NCCL connects lazily, and must not do so while a graph is captured."""
        device = self._device if self.transport == "nccl" else torch.device("cpu")
        mine, theirs = torch.full((8,), GREETING, device=device), torch.zeros(8, device=device)
        for sender in (BASE_RANK, 1 - BASE_RANK):
            if sender == self._rank:
                self.write("", 0, mine)
            else:
                self.read("", 0, theirs)
        if theirs.tolist() != [GREETING] * 8:
            raise LineLostError(f"the greeting of the other side arrived as {theirs.tolist()}")

    def _run(self, call: Any) -> None:
        if self._group is None:
            raise LineLostError("the group is closed")
        try:
            call()
        except RuntimeError as error:
            raise LineLostError(f"the {self.transport} group failed: {str(error)[:300]}") from error
