"""The line between a base worker and a ControlNet worker: JSON through a store, tensors through NCCL or gloo. Nothing is pickled.

Every wait is bounded: store waits by their own timeout, tensor exchanges by the process group's. An idle worker waits on the
store, which may time out and be waited on again, never on a tensor.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist

BASE_RANK: Final = 0
WORKER_RANK: Final = 1
ARRIVAL_KEY: Final = "worker_is_here"
EXCHANGE_TIMEOUT_S: Final = 60.0
"""The longest wait for one tensor. A step takes milliseconds; compiling happens between messages, under its own limit."""
CONNECT_TIMEOUT_S: Final = 300.0
"""Building models on the other side included."""
MESSAGE_BYTES_MAX: Final = 1 << 20


class LinkError(RuntimeError):
    """The other side is gone, late, or said that it failed."""


class Link:
    """One end of the line between rank 0 (base) and rank 1 (ControlNet worker)."""

    def __init__(
        self, store: dist.Store, rank: int, device: torch.device | str, exchange_timeout_s: float = EXCHANGE_TIMEOUT_S
    ) -> None:
        self.rank = rank
        self.peer = WORKER_RANK if rank == BASE_RANK else BASE_RANK
        self.device = torch.device(device)
        # A connection of its own: a long wait must not hold up the process group's threads, which use the store too.
        self._control = dist.PrefixStore("control", store.clone())
        self._n_sent = 0
        self._n_received = 0
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast is not for two ranks
        dist.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=exchange_timeout_s),
        )
        self._is_open = True

    def greet(self) -> None:
        """One eager exchange both ways: NCCL connects lazily, and must not do so while a graph is captured."""
        mine = torch.full((8,), float(self.rank + 1), device=self.device)
        theirs = torch.zeros_like(mine)
        if self.rank == BASE_RANK:
            dist.send(mine, self.peer)
            dist.recv(theirs, self.peer)
        else:
            dist.recv(theirs, self.peer)
            dist.send(mine, self.peer)
        if theirs.tolist() != [float(self.peer + 1)] * 8:
            raise LinkError(f"the greeting of rank {self.peer} arrived as {theirs.tolist()}")

    def tell(self, message: Mapping[str, Any]) -> None:
        """Sends a small message."""
        text = json.dumps(message, sort_keys=True, allow_nan=False)
        self._control.set(f"{self.rank}/{self._n_sent}", text)
        self._n_sent += 1

    def hear(self, timeout_s: float) -> dict[str, Any] | None:
        """The next message of the other side; None if none came in time.

        Raises:
            LinkError: the store is gone (its process ended) or the message is not what this code sends.
        """
        key = f"{self.peer}/{self._n_received}"
        try:
            self._control.wait([key], timedelta(seconds=timeout_s))
        except dist.DistStoreError:
            return None
        except (dist.DistNetworkError, RuntimeError) as error:
            raise LinkError(f"the line to rank {self.peer} is gone: {error}") from None
        data = self._control.get(key)
        self._control.delete_key(key)
        self._n_received += 1
        message = json.loads(data) if len(data) <= MESSAGE_BYTES_MAX else None
        if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
            raise LinkError(f"rank {self.peer} sent {data[:80]!r}, which is no message")
        return message

    def expect(self, kind: str, timeout_s: float) -> dict[str, Any]:
        """The next message, which must be of this kind.

        Raises:
            LinkError: it did not come in time, or the other side reports a failure.
        """
        message = self.hear(timeout_s)
        if message is None:
            raise LinkError(f"rank {self.peer} did not answer {kind!r} within {timeout_s:g} s")
        if message["kind"] != kind:
            raise LinkError(f"rank {self.peer} answered {message} in place of {kind!r}")
        return message

    def send(self, tensor: torch.Tensor) -> dist.Work:
        """Sends a contiguous tensor in the order of the current stream; keep the work until the next exchange."""
        return self._work(dist.isend(tensor, self.peer))

    def receive(self, tensor: torch.Tensor) -> None:
        """Receives into a contiguous tensor. On CUDA the current stream waits, not the host; on a CPU the host does."""
        self._work(dist.irecv(tensor, self.peer)).wait()

    def _work(self, work: dist.Work | None) -> dist.Work:
        if work is None:
            raise LinkError("this process is not part of the process group")
        return work

    def close(self, timeout_s: float = 10.0) -> None:
        """Leaves the process group. Bounded: a group that does not come down is left to the end of the process."""
        if not self._is_open:
            return
        self._is_open = False
        closer = threading.Thread(target=_destroy, daemon=True)
        closer.start()
        closer.join(timeout_s)


def _destroy() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def host_store(timeout_s: float = CONNECT_TIMEOUT_S) -> tuple[dist.TCPStore, int]:
    """Starts a store on a free loopback port in this process; returns it and the port."""
    store = dist.TCPStore(
        "127.0.0.1", 0, 2, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
    )
    return store, store.port


def join_store(host: str, port: int, timeout_s: float = CONNECT_TIMEOUT_S) -> dist.TCPStore:
    """Connects to the store of another process."""
    return dist.TCPStore(host, port, 2, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


def store_from_environment(timeout_s: float = CONNECT_TIMEOUT_S) -> tuple[dist.Store, int]:
    """The store and rank that torchrun's variables name (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    Raises:
        LinkError: the world does not consist of two ranks.
    """
    if os.environ.get("WORLD_SIZE") != "2":
        raise LinkError(f"WORLD_SIZE is {os.environ.get('WORLD_SIZE')}, needs 2: rank 0 base, rank 1 ControlNets")
    from torch.distributed.rendezvous import rendezvous

    store, rank, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    return dist.PrefixStore("diffplan", store), rank
