"""What an engine shows of itself at one moment: workers and queues, for health, metrics, records and the admin API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from engine.allocation import PoolRole
from engine.serving.ports import DispatchSnapshot

WorkerState = Literal["starting", "ready", "draining", "restarting", "stopped"]


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One replica as its supervisor sees it."""

    worker_id: str
    pool: str
    role: PoolRole | Literal["loader"]
    state: WorkerState
    pids: tuple[int, ...] = ()
    """Its processes; two for a CFG pair."""
    is_busy: bool = False
    progress_age_s: float = 0.0
    """Seconds since its work path last moved while it was busy; 0 if it is idle."""
    busy_s: float = 0.0
    """Seconds of work since the engine's start, restarts included."""
    n_restarts: int = 0
    reason: str = ""
    """Why it is not ready; empty if it is."""
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    """As ``Painter.memory`` reports it."""
    shapes: tuple[str, ...] = ()
    """What a base worker has compiled and captured (``engine.serving.warm_shapes``): requests of these shapes wait for nothing."""


@dataclass(frozen=True, slots=True)
class EngineView:
    """One engine at one moment, for health, metrics and the admin API."""

    workers: tuple[WorkerView, ...]
    dispatch: DispatchSnapshot
    wanted: Mapping[str, int]
    """Pool to its number of replicas in the allocation."""
    is_admitting: bool = True
    n_events: Mapping[str, int] = field(default_factory=dict)
    """Kind of event (start, ready, attach, detach, drain, restart, kill, …) to how often it happened."""
