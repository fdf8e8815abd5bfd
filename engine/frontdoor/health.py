"""Whether the service makes images, judged by its work: workers that are ready, work that moves, requests that end.

A process that answers is *live*. A service that admits requests and has a base worker to run them is *ready*. Healthy,
degraded or unhealthy says how much of the allocation works, with a reason for everything that does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.serving.engine_view import EngineView, WorkerView

HealthStatus = Literal["healthy", "degraded", "unhealthy"]
_ORDER: dict[HealthStatus, int] = {"healthy": 0, "degraded": 1, "unhealthy": 2}


@dataclass(frozen=True, slots=True)
class HealthLimits:
    """When slow becomes stuck."""

    progress_age_s_max: float = 60.0
    """A busy worker whose work path stands still for longer is reported (its supervisor has limits of its own, by phase)."""
    done_age_s_max: float = 180.0
    """Requests wait, and none has been done for longer: the engine is unhealthy."""


@dataclass(frozen=True, slots=True)
class PoolHealth:
    """One pool of one engine."""

    status: HealthStatus
    n_ready: int
    n_wanted: int
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """One engine."""

    status: HealthStatus
    is_ready: bool
    """It admits, and a base worker is ready."""
    pools: Mapping[str, PoolHealth]
    reasons: tuple[str, ...] = ()

    def to_plain(self, *, with_reasons: bool) -> dict[str, Any]:
        """JSON values; without reasons for callers that are not told internals."""
        plain: dict[str, Any] = {"status": self.status, "ready": self.is_ready}
        if with_reasons:
            plain["reasons"] = list(self.reasons)
            plain["pools"] = {
                name: {
                    "status": pool.status,
                    "n_ready": pool.n_ready,
                    "n_wanted": pool.n_wanted,
                    "reasons": list(pool.reasons),
                }
                for name, pool in self.pools.items()
            }
        return plain


@dataclass(slots=True)
class DoneWatch:
    """Remembers when a request was last done while others waited."""

    limits: HealthLimits = field(default_factory=HealthLimits)
    _n_done: int = -1
    _since_s: float = 0.0
    _was_idle: bool = True

    def look(self, view: EngineView, now_s: float) -> float:
        """Seconds for which requests have waited without one being done; 0 if none waits."""
        n_done = view.dispatch.n_ended.get("done", 0)
        is_idle = view.dispatch.n_waiting + view.dispatch.n_running == 0
        if n_done != self._n_done or is_idle or self._was_idle:
            self._n_done, self._since_s = n_done, now_s
        self._was_idle = is_idle
        return max(0.0, now_s - self._since_s)


def engine_health(view: EngineView, done_age_s: float, limits: HealthLimits) -> EngineHealth:
    """Judges one engine at one moment."""
    wanted = dict(view.wanted)
    for worker in view.workers:  # loaders belong to the engine, no allocation names them
        if worker.role == "loader":
            wanted[worker.pool] = sum(other.pool == worker.pool for other in view.workers)
    pools = {name: _pool(name, n_wanted, view.workers, limits) for name, n_wanted in sorted(wanted.items())}
    roles = {worker.pool: worker.role for worker in view.workers}
    bases = [pool for name, pool in pools.items() if roles.get(name, "base") == "base"]
    n_bases_ready = sum(pool.n_ready for pool in bases)
    reasons = []
    status: HealthStatus = max((pool.status for pool in pools.values()), key=_ORDER.__getitem__, default="healthy")
    if status == "unhealthy" and n_bases_ready:
        status = "degraded"  # some requests still find all they need
    if not n_bases_ready:
        reasons.append("no base worker is ready")
        status = "unhealthy"
    if done_age_s > limits.done_age_s_max:
        n_waiting = view.dispatch.n_waiting + view.dispatch.n_running
        reasons.append(f"{n_waiting} requests wait and none was done for {done_age_s:.0f} s")
        status = "unhealthy"
    if not view.is_admitting:
        reasons.append("draining: no request is admitted")
    return EngineHealth(status, view.is_admitting and n_bases_ready > 0, pools, tuple(reasons))


def worst(statuses: Sequence[HealthStatus]) -> HealthStatus:
    """The worst of several; healthy if there are none."""
    return max(statuses, key=_ORDER.__getitem__, default="healthy")


def _pool(name: str, n_wanted: int, workers: Sequence[WorkerView], limits: HealthLimits) -> PoolHealth:
    mine = [worker for worker in workers if worker.pool == name]
    reasons = []
    n_ready = 0
    for worker in mine:
        if worker.state not in ("ready", "draining"):
            reasons.append(f"{worker.worker_id} is {worker.state}" + (f": {worker.reason}" if worker.reason else ""))
        elif worker.is_busy and worker.progress_age_s > limits.progress_age_s_max:
            reasons.append(f"{worker.worker_id} has made no progress for {worker.progress_age_s:.0f} s")
        elif worker.state == "ready":
            n_ready += 1
    n_missing = n_wanted - len([worker for worker in mine if worker.state != "draining"])
    if n_missing > 0:
        reasons.append(f"{n_missing} of {n_wanted} replicas have not been started")
    status: HealthStatus = "healthy" if n_ready >= n_wanted else "degraded" if n_ready else "unhealthy"
    return PoolHealth(status, n_ready, n_wanted, tuple(reasons))
