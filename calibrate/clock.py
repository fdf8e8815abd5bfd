"""Times work on a device: events on a GPU, the monotonic clock on a CPU; and what the measured things are called by name."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch


class DeviceClock:
    """Times calls on one device."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.is_cuda = self.device.type == "cuda"

    def synchronize(self) -> None:
        """Waits until the device has nothing left to do."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def tick(self) -> Any:
        """A mark in the stream of work; see :meth:`between`."""
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, ticks: list[Any]) -> list[float]:
        """Seconds between neighbouring marks."""
        self.synchronize()
        if not self.is_cuda:
            return [b - a for a, b in pairwise(ticks)]
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(ticks)]

    def burst(self, call: Callable[[], object], n_repeats: int, n_warm: int = 3) -> list[float]:
        """Seconds per call of ``n_repeats`` calls issued back to back, as in a denoising loop, after ``n_warm`` untimed."""
        for _ in range(n_warm):
            call()
        ticks = [self.tick()]
        for _ in range(n_repeats):
            call()
            ticks.append(self.tick())
        return self.between(ticks)

    def wall(self, call: Callable[[], object]) -> float:
        """Seconds of one call as its caller waits for it: starts with an idle device, ends when it is idle again."""
        self.synchronize()
        start_s = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start_s

    def free(self) -> None:
        """Returns cached device memory, so that programs that share the GPU find it."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def allocated_bytes(self) -> int:
        """Device memory held by live tensors; 0 on a CPU."""
        return int(torch.cuda.memory_allocated(self.device)) if self.is_cuda else 0

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Device memory a call needs beyond what was held before it; 0 on a CPU."""
        if not self.is_cuda:
            call()
            return 0
        self.free()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = self.allocated_bytes()
        call()
        self.synchronize()
        return int(torch.cuda.max_memory_allocated(self.device)) - before
