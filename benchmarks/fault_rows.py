"""Rows of ``benchmarks/faults.py``: what is counted, and on which machine."""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from engine.serving.engine import Engine

RESULTS: Final = Path(__file__).parent / "results" / "faults.json"
MACHINE: Final = ("devices", "python", "platform", "n_cores", "gpus", "load_average_1_min")
TIMED: Final = ("ready", "attach", "detach", "drain")
"""Events of the engine that say how long they took."""


@dataclass(slots=True)
class Row:
    """Counts of one fault."""

    n_injected: int = 0
    n_jobs: int = 0
    n_lost: int = 0
    n_doubled: int = 0
    n_wrong: int = 0
    n_retried: int = 0
    n_failed_with_reason: int = 0
    reasons: list[str] = field(default_factory=list)
    """Why jobs failed, each once."""
    recovery_s: list[float] = field(default_factory=list)
    device_used_bytes: list[list[int]] = field(default_factory=list)

    def to_plain(self) -> dict[str, Any]:
        """JSON values."""
        plain = dataclasses.asdict(self)
        seconds = plain.pop("recovery_s")
        plain["recovery_s_median"] = round(statistics.median(seconds), 3) if seconds else None
        plain["recovery_s_max"] = round(max(seconds), 3) if seconds else None
        for name in ("device_used_bytes", "reasons"):
            if not plain[name]:
                del plain[name]
        return plain


def device_used_bytes(devices: Sequence[str]) -> list[int]:
    """Memory in use on each GPU that is named, as the driver counts it; [] without GPUs."""
    indices = sorted({device.partition(":")[2] or "0" for device in devices if device.startswith("cuda")})
    if not indices:
        return []
    command = ["nvidia-smi", f"--id={','.join(indices)}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    return [int(line) * 2**20 for line in done.stdout.split()]


def about(devices: Sequence[str]) -> dict[str, Any]:
    """The machine."""
    row: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "n_cores": os.cpu_count(),
        "load_average_1_min": round(os.getloadavg()[0], 1),
    }
    if any(device.startswith("cuda") for device in devices):
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        row["gpus"] = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=60).stdout.split(
            "\n"
        )[:-1]
    return row


def worker_times(engine: Engine) -> dict[str, Any]:
    """Seconds of starts (process, imports, weights, until ready), attaches and drains by pool, and bytes of each worker now."""
    seconds: dict[str, list[float]] = {}
    for event in engine.events.recent:
        if event.kind in TIMED and event.duration_s is not None:
            name = f"{event.kind} {event.pool}" + (f" {event.detail}" if event.kind == "attach" else "")
            seconds.setdefault(name, []).append(event.duration_s)
    return {
        "duration_s": {
            name: {"n": len(found), "median": round(statistics.median(found), 4), "max": round(max(found), 4)}
            for name, found in sorted(seconds.items())
        },
        "memory_bytes": {
            view.worker_id: dict(view.memory_bytes) for view in engine.view().workers if view.memory_bytes
        },
    }
