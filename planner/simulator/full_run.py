"""The run with mechanisms: the static model's stages, under queues with an order, workers that come and go, and second attempts.

Used only where some mechanism is on (``mechanisms_in_use``); with all of them off it gives what the static run gives, which
tests hold. Beyond the static model's rules:

- Every request joins the queue and every change may start some: in queue order, the first that can start, on the idle replica
  that already holds most of what it needs. One that cannot start now (tenant at its limit, batch not ripe, no worker up for a
  ControlNet of its) is passed by those that can.
- A request that loses its worker gives up all that was done for it and takes its old place in the queue.
"""

from __future__ import annotations

import math
from bisect import insort
from dataclasses import replace

import simpy
from simpy.events import Event

from engine.policies.admission import is_tried_again
from planner.simulator.environment import ARRIVAL, EXPIRY
from planner.simulator.fleet import Member, State
from planner.simulator.full_queue import FullQueue
from planner.simulator.full_records import DOWN, LOADING
from planner.simulator.full_state import Job
from planner.simulator.replicas import BaseReplica, ControlNetWorker, build_base_replicas, build_controlnet_workers

STRANDED_S = 3600.0
"""After the last arrival, with nothing running or starting and nobody taken up for so long, what still waits has failed."""


class FullRun(FullQueue):
    """The clock, and workers that come and go."""

    def run(self) -> None:
        """Runs until every request has ended."""
        for p in range(len(self.idle)):
            self.idle[p] = []
        self._fleet.begin()
        for member in self._members:
            if member.state == "ready" and isinstance(member.worker, BaseReplica):
                self.idle[member.worker.pool].append(member.worker.index)
        self._reopen()
        if self.n_requests:
            self.env.call_at(self.arrival_s[0], ARRIVAL, self._on_arrival, 0)
            for p, scaler in self._scalers.items():
                self.env.call_at(scaler.settings.look_s, EXPIRY, self._on_look, (p, 1))
            self._turn()
        ends = [end for end in self.recorder.end_s[: self.n_requests] if end == end]
        self._fleet.finish(max([*ends, self._offered_until_s, 0.0]))

    def _turn(self) -> None:
        n = 0
        while self._n_open > 0:
            try:
                self.env.step()
            except simpy.core.EmptySchedule:
                self._give_up()  # nothing will ever happen again
                return
            n += 1
            if n % 256 == 0:
                self._give_up_if_stranded(self.env.now)

    def set_window(self, offered_until_s: float) -> None:
        """Until when requests are offered: workers are allocated at least until then."""
        last_s = self.arrival_s[self.n_requests - 1] if self.n_requests else 0.0
        self._offered_until_s = max(offered_until_s, last_s)

    def _on_look(self, event: Event) -> None:
        p, number = event._value
        look_s = self._scalers[p].settings.look_s
        self._look(p, self.env.now)
        number += 1
        # looks at an idle pool are most events of a quiet day: where nothing lies between, they need no scheduler
        while self.env.skip_to(number * look_s):
            self._look(p, self.env.now)
            number += 1
        self.env.call_at(number * look_s, EXPIRY, self._on_look, (p, number))

    def _look(self, p: int, now_s: float) -> None:
        n_current = self._fleet.n_wanted[p]
        if p >= len(self.tables):  # of ControlNet workers what they do now counts
            busy = sum(
                min(1.0, m.worker.alone_load) for m in self._fleet.members[p] if isinstance(m.worker, ControlNetWorker)
            )
            self._sights[p].busy.add(busy - self._sights[p].busy.value, now_s)
        n = self._scalers[p].wanted(n_current, self._fleet.n_ready(p), now_s)
        if n != n_current:
            self._fleet.set_wanted(p, n, now_s)
            self._dispatch(now_s)

    def _give_up_if_stranded(self, now_s: float) -> None:
        quiet_since_s = max(self._last_taken_s, self.arrival_s[self.n_requests - 1])
        if self._jobs or now_s - quiet_since_s < STRANDED_S or self._fleet.is_changing():
            return
        self._give_up()

    def _give_up(self) -> None:
        now_s = self.env.now
        for i in sorted(self.room.waiting()):
            self._leave_room(i, now_s)
            self._end(i)
            self.recorder.turn_away(i, "failed", "no worker came up to serve it", now_s)

    def is_in_use(self, member: Member) -> bool:
        """Whether a request runs on it."""
        worker = member.worker
        return worker.index in self._jobs if isinstance(worker, BaseReplica) else worker.n_attached > 0

    def came_up(self, member: Member, now_s: float) -> None:
        """It serves from now on."""
        if isinstance(member.worker, BaseReplica):
            insort(self.idle[member.worker.pool], member.worker.index)
        else:
            self._reopen()
        self._dispatch(now_s)

    def closed(self, member: Member, now_s: float) -> None:
        """It takes nothing new from now on."""
        if isinstance(member.worker, BaseReplica):
            if member.worker.index in self.idle[member.worker.pool]:
                self.idle[member.worker.pool].remove(member.worker.index)
        else:
            self._reopen()

    def stopped(self, member: Member, now_s: float) -> None:
        """Its process has ended."""
        if isinstance(member.worker, ControlNetWorker):
            self.recorder.cut_loads(member.worker, now_s)

    def _reopen(self) -> None:
        self.placer.reopen(lambda worker: self._member_of[len(self.replicas) + worker.index].state == "ready")

    def lost(self, member: Member, why: str, now_s: float) -> None:
        """Whatever runs on it is lost: tried again, or failed."""
        worker = member.worker
        if isinstance(worker, BaseReplica):
            jobs = [self._jobs[worker.index]] if worker.index in self._jobs else []
        else:
            jobs = [job for job in self._jobs.values() if job.placement is not None and worker in job.placement.workers]
        for job in jobs:
            self._abort(
                job, why if isinstance(worker, BaseReplica) else why.replace("worker", "ControlNet worker"), now_s
            )
        self._dispatch(now_s)

    def _abort(self, job: Job, why: str, now_s: float) -> None:
        if job.client is not None:
            self.coupling.abandon(job.client, now_s)
            job.client = None
        self._release_placement(job, now_s)
        self._stop(job, now_s)
        member = self._member_of[job.replica.index]
        if member.state == "ready":
            insort(self.idle[job.replica.pool], job.replica.index)
        elif member.state in ("draining", "noticed"):
            self._fleet.released(member, now_s)
        for i in job.requests:
            n = self._n_attempts[i] = self._n_attempts.get(i, 0) + 1
            self.recorder.reopen(i)
            deadline_s = self.deadline_s[i]
            deadline_at_s = self.arrival_s[i] + deadline_s if deadline_s == deadline_s else math.inf
            if is_tried_again(n, self._policies.retry_max, now_s, deadline_at_s, 0.0):
                self._join_room(i, now_s, self._place_in_line[i])
                if deadline_at_s < math.inf and i not in self._has_expiry:
                    self._has_expiry.add(i)
                    self.env.call_at(deadline_at_s, EXPIRY, self._on_expiry, i)
            else:
                self._end(i)
                reason = why if n == 1 else f"{why}, tried {n} times"
                self.recorder.turn_away(i, "failed", reason, now_s)

    def load_s(self, member: Member) -> float:
        """Empties its memory and says how long loading what it starts with takes."""
        workload, sized, sizes, facts, n_requests = self._rebuild
        worker = member.worker
        if isinstance(worker, BaseReplica):
            pool = sized.pools_of("base")[worker.pool]
            one = replace(sized, pools=(replace(pool, n_replicas=1),), links=())
            fresh = build_base_replicas(one, workload, sizes, facts, n_requests, is_new_machine=True)[0]
            worker.device, worker.host_checkpoints = fresh.device, fresh.host_checkpoints
            worker.host_controlnets, worker.host_loras = fresh.host_controlnets, fresh.host_loras
            table = self.tables[worker.pool]
            held = [key for key in range(len(worker.device.n_bytes)) if worker.device.holds(key)]
            n = self.n_checkpoints
            checkpoints_s = sum(table.checkpoint_load_s[key] + table.checkpoint_fetch_s[key] for key in held if key < n)
            controlnets_s = sum(table.parts.load_s[key - n] + table.parts.fetch_s[key - n] for key in held if key >= n)
            return checkpoints_s + controlnets_s
        one = replace(sized, pools=(replace(worker.pool, n_replicas=1),), links=())
        fresh_worker = build_controlnet_workers(one, workload, sizes, facts, n_requests, is_new_machine=True)[0]
        worker.device, worker.host, worker.ready_s = fresh_worker.device, fresh_worker.host, fresh_worker.ready_s
        worker.loader_free_s = 0.0
        parts = self.placer.parts_of(worker.pool.name)
        return sum(
            parts.load_s[c] + parts.fetch_s[c] for c in range(len(worker.device.n_bytes)) if worker.device.holds(c)
        )

    def span(self, member: Member, state: State, begin_s: float, end_s: float) -> None:
        """It was in this state; for the records."""
        if state == "starting":
            self.recorder.away(member.index, LOADING, begin_s, end_s, is_paid=True)
        elif state == "down":
            self.recorder.away(member.index, DOWN, begin_s, end_s, is_paid=True)
        elif state in ("off", "gone"):
            self.recorder.away(member.index, DOWN, begin_s, end_s, is_paid=False)
