"""Host memory that weights wait in: anonymous segments, page-locked for the device by a thread of their own.

Page-locking costs 0.3 to 0.5 s per GB where it was measured, so it runs beside whoever fills the memory. A segment that is not (yet)
page-locked is used all the same; copies from it are slower. What failed once is not tried again.
"""

from __future__ import annotations

import atexit
import mmap
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch

SEGMENT_BYTES: Final = 128 * 2**20
"""A segment is closed when it has so many; no tensor crosses from one into the next, for a copy must lie in one registration."""
ALIGN_BYTES: Final = 256
HUGE_PAGE_BYTES: Final = 2 * 2**20
CU_HOST_REGISTER_PORTABLE: Final = 1
SETTLE_S: Final = 120.0
_NO_LIMIT: Final = 2**62
_MEMORY: Final = Path("/proc/meminfo")
_GROUPS: Final = (
    # cgroup v2, v1: limit, used, statistics, and what its names of cached files, which the kernel gives back, begin with
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", ""),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_",
    ),
)


class Segment:
    """Consecutive host memory, given back to the system when nobody refers to it any more."""

    def __init__(self, n_bytes: int) -> None:
        room = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if n_bytes >= HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
            room.madvise(mmap.MADV_HUGEPAGE)  # fewer faults while it is filled, fewer pages to lock
        self.bytes = np.frombuffer(room, dtype=np.uint8)
        self.is_locked = False
        self.is_given_up = False

    @property
    def n_bytes(self) -> int:
        """Its size."""
        return int(self.bytes.size)

    @property
    def address(self) -> int:
        """Where it begins."""
        return int(self.bytes.ctypes.data)


def segments_for(sizes: Sequence[int]) -> tuple[list[Segment], list[tuple[int, int]]]:
    """Room for tensors of so many bytes: the segments, and of each tensor which segment it lies in and where it begins there."""
    ends: list[int] = []
    places: list[tuple[int, int]] = []
    for n_bytes in sizes:
        if not ends or ends[-1] >= SEGMENT_BYTES:
            ends.append(0)
        places.append((len(ends) - 1, ends[-1]))
        ends[-1] += -(-n_bytes // ALIGN_BYTES) * ALIGN_BYTES
    return [Segment(end) for end in ends], places


class PageLocker:
    """Locks and unlocks segments for a CUDA device, one after the other, on its own thread."""

    def __init__(
        self,
        device: str,
        say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
        register: Callable[[int, int], int] | None = None,
        unregister: Callable[[int], int] | None = None,
    ) -> None:
        """``register(address, n_bytes)`` and ``unregister(address)`` return 0 if they could; None: CUDA's own."""
        self._device = device
        self._say = say
        self._register = register or _cuda_register
        self._unregister = unregister or _cuda_unregister
        self._has_failed = False
        self._is_over = False
        self._asked: queue.SimpleQueue[tuple[str, Segment | None, threading.Event | None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.RLock()  # a finaliser may ask in the middle of asking

    def lock(self, segments: Sequence[Segment]) -> None:
        """Has them page-locked, soon."""
        for segment in segments:
            self._ask("lock", segment, None)

    def release(self, segments: Sequence[Segment]) -> None:
        """Has them unlocked and given back, soon; no copy from or to them is under way."""
        for segment in segments:
            segment.is_given_up = True  # a lock that still waits is not done any more
            self._ask("release", segment, None)

    def settle(self) -> bool:
        """Waits until all that was asked before has been done; False if it takes longer than two minutes."""
        if self._is_over:
            return True
        done = threading.Event()
        self._ask("tell", None, done)
        return done.wait(SETTLE_S)

    def close(self) -> None:
        """Does what was asked before, and nothing more."""
        if self._thread is not None:
            self.settle()
        self._is_over = True

    def _ask(self, what: str, segment: Segment | None, done: threading.Event | None) -> None:
        with self._starting:
            if self._is_over:
                return  # the system frees everything now
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="page-locker", daemon=True)
                self._thread.start()
                # An interpreter that ends while a thread is inside CUDA would be aborted.
                atexit.register(self.close)
        self._asked.put((what, segment, done))

    def _run(self) -> None:
        if torch.device(self._device).type == "cuda":
            torch.cuda.set_device(self._device)  # a new thread's current device is the first GPU
        while True:
            what, segment, done = self._asked.get()
            if segment is not None and what == "lock":
                self._lock(segment)
            elif segment is not None and segment.is_locked:
                segment.is_locked = False
                self._unregister(segment.address)
            if done is not None:
                done.set()
            del segment, done  # or it would be held until the next one comes

    def _lock(self, segment: Segment) -> None:
        if self._has_failed or segment.is_given_up:
            return
        try:
            code: object = self._register(segment.address, segment.n_bytes)
            segment.is_locked = code == 0
        except (RuntimeError, OSError) as error:
            code = error
        if not segment.is_locked:
            self._has_failed = True
            self._say(
                f"host tier: {segment.n_bytes} bytes cannot be page-locked ({code}); models are kept all the same, and loads "
                "from the host take longer. Check the limit of locked memory (ulimit -l) and the host's free memory."
            )


def _cuda_register(address: int, n_bytes: int) -> int:
    return int(torch.cuda.cudart().cudaHostRegister(address, n_bytes, CU_HOST_REGISTER_PORTABLE))


def _cuda_unregister(address: int) -> int:
    return int(torch.cuda.cudart().cudaHostUnregister(address))


def available_bytes() -> int:
    """Host memory that this process can still take: of the system and of its control group, whichever is less."""
    least = _NO_LIMIT
    try:
        lines = dict(line.split(":", 1) for line in _MEMORY.read_text(encoding="ascii").splitlines() if ":" in line)
        least = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError, IndexError):
        pass  # another system: no limit is known
    for limit, used, statistics, prefix in _GROUPS:
        try:
            most, taken = Path(limit).read_text(encoding="ascii"), int(Path(used).read_text(encoding="ascii"))
            rows = dict(line.split() for line in Path(statistics).read_text(encoding="ascii").splitlines())
            if most.strip() != "max":
                cached = sum(int(rows.get(f"{prefix}{kind}_file", "0")) for kind in ("active", "inactive"))
                least = min(least, int(most) - taken + cached)
        except (OSError, ValueError):
            continue
    return max(0, least)
