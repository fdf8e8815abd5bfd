"""Loads as the engine's workers do them: a file is read once, checked, into the host tier; from there it is copied onto the device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

from calibrate.clock import DeviceClock
from calibrate.measurement import Features
from calibrate.storage import weight_files
from engine.models import ModelSpec
from engine.options import EngineOptions
from engine.workers.host_weights import host_layout
from engine.workers.model_sources import ModelSources, ModelWeights
from engine.workers.model_tier import ModelTier

What = Literal["checkpoint", "controlnet"]
STORED: Final = "stored"
TIER_GIB: Final = 64.0
"""The host's own memory is the limit where it has less."""


class ServingLoads:
    """A worker's way to one stored model, whose place on the device is ``target``."""

    def __init__(self, what: What, folder: Path, spec: ModelSpec, options: EngineOptions, target: Any) -> None:
        """``target``: a checkpoint or a ControlNet that is resident, of the same architecture as the folder."""
        self._what = what
        self._target = target
        self._clock = DeviceClock(options.device)
        self._layout = host_layout(options)
        self._tier = ModelTier(what, TIER_GIB)
        entry = {"kind": "base" if what == "checkpoint" else what, "architecture": spec.name, "file": folder.name}
        self._sources = ModelSources(
            spec, {STORED: entry}, str(folder.parent), layout=self._layout, checkpoints=self._tier, controlnets=self._tier
        )  # fmt: skip
        self.n_bytes = sum(path.stat().st_size for path in weight_files(folder))
        self.facts: dict[str, float] = {}
        """What page-locking had left to do when a read was through: share of the bytes, and seconds until it was done."""

    def features(self, ending: str) -> Features:
        """Of the rows; the variant is ``WHAT_ENDING``."""
        return Features(n_bytes=self.n_bytes, variant=f"{self._what}_{ending}")

    def both(self, n_repeats: int) -> list[float]:
        """Seconds to load what the host tier does not hold: read, check, copy."""
        return [self._timed(lambda: self._copy(self._read()), is_forgotten=True) for _ in range(n_repeats)]

    def reads(self, n_repeats: int) -> list[float]:
        """Seconds from the files, which the page cache holds, to checked weights in the host tier, in memory taken afresh."""
        return [self._one_read() for _ in range(n_repeats)]

    def _one_read(self) -> float:
        kept: list[ModelWeights] = []
        seconds = self._timed(lambda: kept.append(self._read()), is_forgotten=True)
        host = kept[0].host
        if kept[0].origin != "store" or host is None:
            raise RuntimeError(f"{self._what}: was to be read and came from {kept[0].origin}")
        if self._layout.locker is not None:
            self.facts[f"host_locked_ratio.{self._what}"] = host.locked_bytes / host.bytes
            start_s = time.perf_counter()
            self._layout.locker.settle()
            self.facts[f"host_lock_left_s.{self._what}"] = time.perf_counter() - start_s
        return seconds

    def copies(self, n_repeats: int) -> list[float]:
        """Seconds from the host tier into the place on the device, which is waited for."""
        self._copy(self._read())
        if self._layout.locker is not None:
            self._layout.locker.settle()
        if self._read().origin != "host":
            raise RuntimeError(f"{self._what}: the host tier does not keep it: too little memory")
        return [self._timed(lambda: self._copy(self._read()), is_forgotten=False) for _ in range(n_repeats)]

    def close(self) -> None:
        """Gives the host memory back."""
        self._forget()

    def _timed(self, call: Callable[[], object], *, is_forgotten: bool) -> float:
        if is_forgotten:
            self._forget()
        return self._clock.wall(call)

    def _forget(self) -> None:
        self._tier.drop(STORED)
        gc.collect()
        if self._layout.locker is not None:
            self._layout.locker.settle()

    def _read(self) -> ModelWeights:
        is_checkpoint = self._what == "checkpoint"
        return self._sources.read_checkpoint(STORED) if is_checkpoint else self._sources.read_controlnet(STORED)

    def _copy(self, weights: ModelWeights) -> None:
        if self._what == "checkpoint":
            self._sources.checkpoint_into(STORED, self._target, weights)
        else:
            self._sources.controlnet_into(STORED, self._target, weights)
