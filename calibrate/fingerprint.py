"""Where a measurement was taken: GPU, driver, clocks, host and the versions of everything that decides a latency."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

SOLD_AS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "nvidia-h100-80gb-hbm3": "nvidia-h100",
        "nvidia-a100-sxm4-80gb": "nvidia-a100-80gb",
    }
)
"""What drivers call the GPUs that price tables know by a shorter name; cards of another form factor keep theirs."""
PACKAGES: Final = ("torch", "triton", "diffusers", "transformers", "peft", "safetensors", "numpy", "diffplan")
_CLOCK_QUERY: Final = "clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active"


def software() -> dict[str, str]:
    """Package to version, of those that are installed, and Python's."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def host() -> dict[str, Any]:
    """CPU model, cores this process may use, kernel."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text(encoding="utf-8", errors="replace"))
        model = match.group(1).strip() if match else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": model, "cpu_cores": cores, "kernel": platform.release(), "system": platform.system()}


def clocks() -> list[str]:
    """One line per GPU: SM and memory clock, temperature, power, reasons for slowing down; empty without nvidia-smi."""
    return _nvidia_smi(_CLOCK_QUERY)


def driver() -> str:
    """Version of the NVIDIA driver, or empty."""
    lines = _nvidia_smi("driver_version")
    return lines[0] if lines else ""


def engine_version() -> str:
    """First 12 digits of a sha256 over the sources of ``engine`` and ``kernels``: what was measured, with or without git."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted([*(root / "engine").rglob("*.py"), *(root / "kernels").rglob("*.py")]):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def engine_digest() -> str:
    """First 12 digits of the sha256 of the sources that were measured; the same checkout gives the same digits anywhere."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(path for package in ("engine", "kernels") for path in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def gpu_kind(gpu_name: str) -> str:
    """``NVIDIA H200`` becomes ``nvidia-h200``, the spelling of allocations and price tables; also where drivers say more."""
    plain = re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")
    return SOLD_AS.get(plain, plain)


def _nvidia_smi(query: str) -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    text = _run([tool, f"--query-gpu={query}", "--format=csv,noheader"])
    return [line.strip() for line in text.splitlines() if line.strip()]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
