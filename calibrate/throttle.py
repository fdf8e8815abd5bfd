"""Watches the GPU while it is measured: clocks, temperature, power, and the driver's reasons for slowing it down."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

PERIOD_S: Final = 0.2
POWER_CAP: Final = 0x4
"""NVML's bit of ``clocks_event_reasons`` for the board's power limit; at full load it is nearly always set."""
AT_POWER_LIMIT: Final = "power_cap"
SLOWING: Final = {0x8: "hardware_slowdown", 0x20: "software_thermal", 0x40: "hardware_thermal", 0x80: "power_brake"}
"""Bits that mean that something is wrong with the machine (idle, and clocks set on purpose, are none)."""
SLOW_CLOCK_RATIO: Final = 0.95
"""A GPU at its power limit counts as slowed once its clock falls below this share of the fastest seen in the session."""


@dataclass(slots=True)
class GpuWindow:
    """What was seen of one GPU since the last look."""

    n_samples: int = 0
    sm_mhz_min: int = 0
    sm_mhz_max: int = 0
    temperature_c_max: int = 0
    power_w_max: float = 0.0
    reasons: int = 0

    def add(self, sm_mhz: int, temperature_c: int, power_w: float, reasons: int) -> None:
        """One more sample."""
        self.sm_mhz_min = min(self.sm_mhz_min, sm_mhz) if self.n_samples else sm_mhz
        self.sm_mhz_max = max(self.sm_mhz_max, sm_mhz)
        self.temperature_c_max = max(self.temperature_c_max, temperature_c)
        self.power_w_max = max(self.power_w_max, power_w)
        self.reasons |= reasons
        self.n_samples += 1

    def join(self, other: GpuWindow) -> None:
        """Takes another window's samples in."""
        if other.n_samples:
            self.sm_mhz_min = min(self.sm_mhz_min, other.sm_mhz_min) if self.n_samples else other.sm_mhz_min
            self.sm_mhz_max = max(self.sm_mhz_max, other.sm_mhz_max)
            self.temperature_c_max = max(self.temperature_c_max, other.temperature_c_max)
            self.power_w_max = max(self.power_w_max, other.power_w_max)
            self.reasons |= other.reasons
            self.n_samples += other.n_samples

    def slowed_by(self, sm_mhz_fastest: int) -> list[str]:
        """Why it ran below full speed, if it did; ``sm_mhz_fastest`` is the highest clock seen in the session."""
        found = [name for bit, name in SLOWING.items() if self.reasons & bit]
        if self.reasons & POWER_CAP and self.sm_mhz_min < SLOW_CLOCK_RATIO * sm_mhz_fastest:
            found.append(AT_POWER_LIMIT)
        return found


def flags_of(slowed_by: Collection[str]) -> list[str]:
    """What a row is flagged with: a GPU at its power limit is at work, one that heat or hardware slows down is in trouble."""
    found = ["throttled"] if set(slowed_by) - {AT_POWER_LIMIT} else []
    return [*found, *(["power_limited"] if AT_POWER_LIMIT in slowed_by else [])]


def visible_gpus(n_gpus: int) -> list[int]:
    """Indices of the GPUs that this process may use: NVML knows nothing of ``CUDA_VISIBLE_DEVICES``. Named by UUID: all."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    indices = [int(item) for item in named.split(",") if item.strip().isdigit()]
    return [index for index in indices if index < n_gpus] or list(range(n_gpus))


class GpuWatch:
    """Samples all GPUs from a thread of its own through NVML; without NVML (or a GPU) it sees nothing and says so."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._windows: list[GpuWindow] = []
        self._handles: list[Any] = []
        self._stop = threading.Event()
        self._nvml: Any = None
        self._reasons: Any = None
        with contextlib.suppress(Exception):  # no driver, no library, no permission: nothing to watch
            import pynvml  # type: ignore[import-not-found]

            pynvml.nvmlInit()
            self._nvml = pynvml
            # the newer name, where the library has it
            self._reasons = getattr(
                pynvml, "nvmlDeviceGetCurrentClocksEventReasons", pynvml.nvmlDeviceGetCurrentClocksThrottleReasons
            )
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in visible_gpus(pynvml.nvmlDeviceGetCount())]
        self._windows = [GpuWindow() for _ in self._handles]
        self.sm_mhz_fastest = 0
        self._thread = threading.Thread(target=self._run, name="gpu-watch", daemon=True)
        if self._handles:
            self._thread.start()

    @property
    def can_see(self) -> bool:
        """Whether there is anything to watch."""
        return bool(self._handles)

    def look(self) -> list[GpuWindow]:
        """What was seen since the last call, one entry a GPU."""
        self._sample()
        with self._lock:
            seen, self._windows = self._windows, [GpuWindow() for _ in self._handles]
        return seen

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(2)

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_S):
            self._sample()

    def _sample(self) -> None:
        nvml = self._nvml
        for place, handle in enumerate(self._handles):
            try:
                seen = (
                    int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
                    int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
                    nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
                    int(self._reasons(handle)),
                )
            except Exception:  # noqa: S112 - a query that this GPU does not answer; measuring goes on
                continue
            with self._lock:
                self._windows[place].add(*seen)
                self.sm_mhz_fastest = max(self.sm_mhz_fastest, seen[0])
