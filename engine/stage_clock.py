"""Seconds of an image's stages, each counted until the device is done with it."""

from __future__ import annotations

import time

import torch

from engine.options import EngineOptions


class StageClock:
    """Wall time between synchronised points."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._start = self._last = self._now()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = self._now()
        lap, self._last = now - self._last, now
        return lap

    def total_s(self) -> float:
        """Seconds from the start to the last lap."""
        return self._last - self._start

    def _now(self) -> float:
        if self._options.is_cuda:
            torch.cuda.synchronize(self._options.device)
        return time.perf_counter()
