"""The life of workers: asked for, starting, serving, draining, failed, reclaimed, given back. Base and ControlNet alike.

A worker's place (its name and its GPUs) is fixed; what comes and goes is whether it is allocated and whether it serves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Literal, Protocol, TypeVar

from engine.allocation import Pool
from planner.simulator.environment import COMPLETION, ExactEnvironment
from planner.simulator.replicas import BaseReplica, ControlNetWorker
from planner.simulator.world import Failures, Reclaims, World

State = Literal["off", "warm", "starting", "ready", "draining", "noticed", "down", "gone"]
Draw = Callable[[], float]
HazardT = TypeVar("HazardT", Failures, Reclaims)
LEAVE_FIRST: Final[tuple[State, ...]] = ("gone", "down", "starting", "noticed")
"""Who goes first when a pool shrinks: what serves nobody."""


class Member:
    """One place of a pool."""

    __slots__ = ("epoch", "index", "n_lives", "pool", "since_s", "start_left_s", "state", "until_s", "worker")

    def __init__(self, index: int, pool: int, worker: BaseReplica | ControlNetWorker) -> None:
        self.index = index
        self.pool = pool
        self.worker = worker
        self.state: State = "off"
        self.since_s = 0.0
        self.epoch = 0
        """Counts changes of state, so that an event meant for an earlier one is known."""
        self.until_s = 0.0
        """While warm: when its start is over. While starting: when it is ready."""
        self.start_left_s = 0.0
        self.n_lives = 0


class Owner(Protocol):
    """What the fleet asks of the run."""

    def is_in_use(self, member: Member) -> bool:
        """Whether a request runs on it."""

    def came_up(self, member: Member, now_s: float) -> None:
        """It serves from now on."""

    def closed(self, member: Member, now_s: float) -> None:
        """It takes nothing new from now on."""

    def stopped(self, member: Member, now_s: float) -> None:
        """Its process has ended."""

    def lost(self, member: Member, why: str, now_s: float) -> None:
        """Whatever runs on it is lost."""

    def load_s(self, member: Member) -> float:
        """Empties its memory and says how long loading what it starts with takes."""

    def span(self, member: Member, state: State, begin_s: float, end_s: float) -> None:
        """It was in this state; for the records."""


class Fleet:
    """All places of all pools."""

    def __init__(
        self,
        env: ExactEnvironment,
        pools: Sequence[Pool],
        members: Sequence[Sequence[Member]],
        world: World,
        owner: Owner,
    ) -> None:
        self._env = env
        self._pools = pools
        self.members = members
        self._world = world
        self._owner = owner
        self.n_wanted = [pool.n_replicas for pool in pools]
        self._failures = self._hazards_of("failure", world.failures)
        self._reclaims = self._hazards_of("reclaim", world.reclaims)

    def _hazards_of(self, purpose: str, hazard: HazardT | None) -> dict[int, tuple[Draw, HazardT]]:
        """Member to its exponential draws of mean 1, and the hazard."""
        found: dict[int, tuple[Draw, HazardT]] = {}
        if hazard is not None:
            for pool, members in zip(self._pools, self.members, strict=True):
                if not hazard.pools or pool.name in hazard.pools:
                    for member in members:
                        stream = self._world.stream(purpose, member.worker.worker_id)
                        found[member.index] = stream.standard_exponential, hazard
        return found

    def begin(self) -> None:
        """At time 0 the first ``n_replicas`` of each pool serve, their models loaded; warm ones beyond have started."""
        for pool, members in zip(self._pools, self.members, strict=True):
            for member in members[: pool.n_replicas]:
                self._set(member, "ready", 0.0)
                self._hazards(member, 0.0)
            n_warm = pool.autoscale.warm_replicas if pool.autoscale else 0
            for member in members[pool.n_replicas : pool.n_replicas + n_warm]:
                self._set(member, "warm", 0.0)

    def finish(self, horizon_s: float) -> None:
        """Closes every open span."""
        for members in self.members:
            for member in members:
                self._owner.span(member, member.state, member.since_s, horizon_s)

    def counted(self, pool: int) -> list[Member]:
        """The places that stand for replicas asked for."""
        return [m for m in self.members[pool] if m.state in ("starting", "ready", "noticed", "down", "gone")]

    def n_ready(self, pool: int) -> int:
        """Replicas that serve."""
        return sum(member.state == "ready" for member in self.members[pool])

    def is_changing(self) -> bool:
        """Whether some worker will serve without anybody asking for more."""
        return any(member.state in ("starting", "down", "gone") for members in self.members for member in members)

    def set_wanted(self, pool: int, n: int, now_s: float) -> None:
        """Asks for n replicas: starts more, or lets some go; those that work finish what they do first."""
        self.n_wanted[pool] = n
        self._settle(pool, now_s)

    def _settle(self, pool: int, now_s: float) -> None:
        surplus = len(self.counted(pool)) - self.n_wanted[pool]
        if surplus > 0:
            for member in self._leavers(pool)[:surplus]:
                self._release(member, now_s)
        elif surplus < 0:
            places = [m for m in self.members[pool] if m.state == "warm"]
            places += [m for m in self.members[pool] if m.state == "off"]
            for member in places[:-surplus]:
                self._start(member, self._start_s(pool), now_s)
        self._keep_warm(pool, now_s)

    def _leavers(self, pool: int) -> list[Member]:
        """In the order in which they go: what serves nobody, then idle, then busy; within each the last place first."""

        def rank(member: Member) -> tuple[int, int]:
            if member.state in LEAVE_FIRST:
                return LEAVE_FIRST.index(member.state), -member.index
            return len(LEAVE_FIRST) + self._owner.is_in_use(member), -member.index

        return sorted(self.counted(pool), key=rank)

    def _release(self, member: Member, now_s: float) -> None:
        serves = member.state in ("ready", "noticed")
        self._set(member, "draining" if serves and self._owner.is_in_use(member) else "off", now_s)
        if serves:
            self._owner.closed(member, now_s)

    def _keep_warm(self, pool: int, now_s: float) -> None:
        settings = self._pools[pool].autoscale
        if settings is None:
            return
        warm = [m for m in self.members[pool] if m.state == "warm"]
        for member in warm[settings.warm_replicas :]:
            self._set(member, "off", now_s)
        missing = settings.warm_replicas - len(warm)
        if missing > 0:
            for member in [m for m in self.members[pool] if m.state == "off"][:missing]:
                self._set(member, "warm", now_s)
                member.until_s = now_s + settings.start_s

    def _start_s(self, pool: int) -> float:
        settings = self._pools[pool].autoscale
        return settings.start_s if settings is not None else 0.0

    def _start(self, member: Member, start_s: float, now_s: float) -> None:
        left_s = max(0.0, member.until_s - now_s) if member.state == "warm" else start_s
        settings = self._pools[member.pool].autoscale
        attach_s = settings.attach_s if settings is not None else 0.0
        left_s += self._owner.load_s(member) + attach_s
        self._set(member, "starting", now_s)
        self._later(member, now_s + left_s, self._ready)

    def _ready(self, member: Member, now_s: float) -> None:
        self._set(member, "ready", now_s)
        self._hazards(member, now_s)
        self._owner.came_up(member, now_s)

    def released(self, member: Member, now_s: float) -> None:
        """A worker that takes nothing new has finished its last request."""
        if member.state == "draining":
            self._set(member, "off", now_s)
            self._settle(member.pool, now_s)
        elif member.state == "noticed":
            self._gone(member, now_s)

    def _hazards(self, member: Member, now_s: float) -> None:
        """When it will fail and when it will be reclaimed, if it still serves then."""
        member.n_lives += 1
        if member.index in self._failures:
            draw, failures = self._failures[member.index]
            self._in_this_life(member, now_s + draw() * failures.mtbf_s, self._fail)
        if member.index in self._reclaims:
            draw, reclaims = self._reclaims[member.index]
            self._in_this_life(member, now_s + draw() * reclaims.mean_s, self._notice)

    def _fail(self, member: Member, now_s: float) -> None:
        draw, failures = self._failures[member.index]
        if member.state not in ("ready", "draining", "noticed"):
            return
        was_draining = member.state == "draining"
        self._set(member, "off" if was_draining else "down", now_s)
        self._owner.closed(member, now_s)
        self._owner.lost(member, "its worker failed", now_s)
        if was_draining:
            self._settle(member.pool, now_s)
        else:
            self._later(member, now_s + draw() * failures.mttr_s, self._restart)

    def _restart(self, member: Member, now_s: float) -> None:
        settings = self._pools[member.pool].autoscale
        if settings is not None:
            start_s = settings.start_s
        elif member.state == "down":
            start_s = self._failures[member.index][1].start_s
        else:
            start_s = self._reclaims[member.index][1].start_s
        self._start(member, start_s, now_s)

    def _notice(self, member: Member, now_s: float) -> None:
        notice_s = self._reclaims[member.index][1].notice_s
        if member.state == "draining":  # it is going anyway; what it still does must be over by then
            self._in_this_life(member, now_s + notice_s, self._reclaim)
        elif member.state == "ready":
            self._set(member, "noticed", now_s)
            self._owner.closed(member, now_s)
            if self._owner.is_in_use(member):
                self._in_this_life(member, now_s + notice_s, self._reclaim)
            else:
                self._gone(member, now_s)

    def _reclaim(self, member: Member, now_s: float) -> None:
        if member.state == "draining":
            self._set(member, "off", now_s)
            self._owner.lost(member, "its worker was reclaimed", now_s)
            self._settle(member.pool, now_s)
        elif member.state == "noticed":
            self._gone(member, now_s)
            self._owner.lost(member, "its worker was reclaimed", now_s)

    def _gone(self, member: Member, now_s: float) -> None:
        draw, reclaims = self._reclaims[member.index]
        self._set(member, "gone", now_s)
        self._later(member, now_s + draw() * reclaims.return_s, self._restart)

    def _set(self, member: Member, state: State, now_s: float) -> None:
        if now_s > member.since_s:
            self._owner.span(member, member.state, member.since_s, now_s)
        if state in ("off", "down", "gone"):
            self._owner.stopped(member, now_s)
        member.state = state
        member.since_s = now_s
        member.epoch += 1

    def _later(self, member: Member, time_s: float, action: Callable[[Member, float], None]) -> None:
        """Acts unless the state has changed by then."""
        epoch = member.epoch
        self._env.call_at(
            time_s, COMPLETION, lambda _: action(member, self._env.now) if member.epoch == epoch else None, None
        )

    def _in_this_life(self, member: Member, time_s: float, action: Callable[[Member, float], None]) -> None:
        """Acts unless the worker has been down, gone or off in between."""
        life = member.n_lives
        self._env.call_at(
            time_s, COMPLETION, lambda _: action(member, self._env.now) if member.n_lives == life else None, None
        )
