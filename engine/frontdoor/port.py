"""What the front door asks of an engine: the seam between HTTP and everything behind it.

:class:`engine.serving.engine.Engine` is one; tests use a fake. All methods are called on one event loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from engine.allocation import Allocation, PoolRole
from engine.catalogue import Catalogue
from engine.serving.job import Job, Outcome
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


class ServingEngine(Protocol):
    """An engine that runs one allocation. :meth:`view` answers at any time, before :meth:`start` and after :meth:`stop` too."""

    async def start(self) -> None:
        """Starts the allocation's workers; returns when all are ready, in bounded time.

        Raises:
            InputError: the allocation does not fit this machine, or its models cannot be loaded.
        """

    async def stop(self) -> None:
        """Ends every worker, in bounded time; jobs that still run fail with a reason."""

    async def submit(self, job: Job) -> Outcome:
        """Runs a job; every submitted job ends with exactly one outcome, in bounded time."""

    def cancel(self, request_id: str) -> bool:
        """Ends a job early; its ``submit`` returns. False if it is unknown or has ended."""

    def view(self) -> EngineView:
        """The state now; cheap enough for every request."""

    async def apply(self, allocation: Allocation) -> Mapping[str, Any]:
        """Moves to another allocation without disturbing workers that stay; what was done, as JSON values.

        Raises:
            InputError: the allocation does not fit this machine; nothing has changed.
        """

    async def admit(self, catalogue: Catalogue) -> Mapping[str, Any]:
        """Makes new entries of the catalogue known to the workers while they serve; what was done, as JSON values."""

    async def drain(self, timeout_s: float) -> bool:
        """Admits nothing more and waits for what was admitted; True if all of it ended in time."""
