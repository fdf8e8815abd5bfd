"""Decides which job runs where and when, and sees every job to exactly one end. No process, no socket, no clock of its own.

One thread calls it as things happen (:class:`engine.serving.ports.Dispatching`); what is to be done goes out through
:class:`engine.serving.ports.Actions`. The rules themselves are the functions of ``engine.policies`` that the simulator calls too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from engine.allocation import GIB, Policies, Pool
from engine.serving.attempts import Attempts
from engine.serving.estimates import ServiceEstimates, work_of
from engine.serving.gate import rejection_at_once, rejection_of_waiting, waiting_before
from engine.serving.job import Job
from engine.serving.ledger import Ledger
from engine.serving.lineup import Scene, next_choice
from engine.serving.lora_cache import LoraCache
from engine.serving.lora_desk import LoraDesk
from engine.serving.ports import Actions, BaseReplicaInfo, BatchSpan, ControlNetWorkerInfo, DispatchSnapshot
from engine.serving.roster import Roster
from engine.serving.tenants import Tenants
from engine.serving.waiting import Queue, Ticket
from traces.problems import one_problem


@dataclass(frozen=True, slots=True)
class DispatchLimits:
    """Bounds that hold whatever the policies say: nothing waits, and nothing grows, for ever."""

    request_limit_s: float = 600.0
    """A job ends at the latest this long after its arrival."""
    n_waiting_max: int = 10_000
    """Jobs that may wait in all."""
    fetch_limit_s: float = 300.0
    """A LoRA fetch that was not reported on for this long counts as failed."""


class Dispatcher:
    """Implements :class:`engine.serving.ports.Dispatching`.

    Args:
        clock: engine time in seconds, never going back.
        pools: of the allocation. A job that none of them can serve is rejected at once; one whose workers are not up waits.
            Without pools, the workers that have come up count instead.
        lora_cache_bytes: what the host can hold of LoRAs. All base replicas share one tier of ``policies.lora_cache_gib`` for each
            of them, if the host holds so much (a simulation with ``replicas_per_host`` equal to their number has the same tier).
    """

    def __init__(
        self,
        actions: Actions,
        clock: Callable[[], float],
        policies: Policies | None = None,
        pools: Sequence[Pool] = (),
        *,
        limits: DispatchLimits | None = None,
        lora_cache_bytes: int | None = None,
    ) -> None:
        policies = policies if policies is not None else Policies()
        self._clock = clock
        self._limits = limits if limits is not None else DispatchLimits()
        self._host_bytes = math.inf if lora_cache_bytes is None else lora_cache_bytes
        self.loras = LoraCache(0)
        self._roster = Roster(pools)
        self._size_lora_cache(policies, pools)
        self._desk = LoraDesk(actions, self.loras, self._roster)
        self._queue = Queue()
        self._estimates = ServiceEstimates()
        self._ledger = Ledger(actions, clock)
        self._tenants = Tenants(policies)
        self._scene = Scene(self._queue, self._roster, self.loras, self._tenants, self._estimates)
        self._not_admitting = ""
        self._window_closes_s = math.inf
        self._attempts = Attempts(actions, clock, policies, self._scene, self._desk, self._ledger)

    @property
    def batch_observers(self) -> list[Callable[[BatchSpan], None]]:
        """Told of every batch that has ended; they must not call back."""
        return self._attempts.observers

    def limit_lora_cache(self, n_bytes: int) -> None:
        """The host holds no more of LoRAs than this."""
        self._host_bytes = n_bytes
        self.loras.capacity_bytes = min(self.loras.capacity_bytes, n_bytes)

    def _size_lora_cache(self, policies: Policies, pools: Sequence[Pool]) -> None:
        n_replicas = sum(pool.n_replicas for pool in pools if pool.role == "base")
        wanted_bytes = policies.lora_cache_gib * GIB * max(1, n_replicas)
        self.loras.capacity_bytes = int(min(wanted_bytes, self._host_bytes))
        self.loras.set_policy(policies.lora_cache_policy, policies.lora_cache_ttl_s)

    # workers

    def set_allocation(self, pools: Sequence[Pool], policies: Policies) -> None:
        """Another allocation is in force; waiting jobs that its pools cannot serve are ended."""
        self._attempts.policies = policies
        self._tenants.set_policies(policies)
        self._size_lora_cache(policies, pools)
        self._roster.set_pools(pools)
        self._regroup()
        self._pump()

    def base_up(self, info: BaseReplicaInfo) -> None:
        """A replica is ready. For one that is up already: what it holds has changed, and it is not draining any more."""
        if self._roster.base_up(info):
            self._regroup()
        self._pump()

    def base_draining(self, worker_id: str) -> None:
        """It finishes what it has and gets nothing more."""
        base = self._roster.bases.get(worker_id)
        if base is not None:
            base.is_draining = True

    def base_down(self, worker_id: str, reason: str) -> None:
        """It is gone; its jobs are tried once more elsewhere, or fail with this reason."""
        batch = self._roster.base_down(worker_id)
        if batch is not None:
            self._attempts.lost(batch, reason)
        self._pump()

    def controlnet_up(self, info: ControlNetWorkerInfo) -> None:
        """A ControlNet worker is ready; bases may use it once they are attached."""
        if self._roster.controlnet_up(info):
            self._regroup()
        self._pump()

    def controlnet_draining(self, worker_id: str) -> None:
        """It serves the batches that use it and gets no others."""
        worker = self._roster.controlnets.get(worker_id)
        if worker is not None:
            worker.is_draining = True

    def controlnet_down(self, worker_id: str, reason: str) -> None:
        """It is gone. Bases that were using it report their batches as failed by themselves."""
        self._roster.controlnet_down(worker_id)

    def attached(self, base_worker_id: str, controlnet_worker_id: str) -> None:
        """From now on this base may use this ControlNet worker."""
        self._roster.attach(base_worker_id, controlnet_worker_id)
        self._pump()

    def detached(self, base_worker_id: str, controlnet_worker_id: str) -> None:
        """From its next batch on it may not."""
        self._roster.detach(base_worker_id, controlnet_worker_id)

    def is_idle(self, worker_id: str) -> bool:
        """No job runs on, or uses, this worker: a draining one may be stopped now."""
        return not self._roster.is_used(worker_id)

    # jobs

    def submit(self, job: Job) -> None:
        """Queues, starts or rejects a job; ``Actions.finish`` reports a rejection before this returns.

        Raises:
            InputError: a job of this name has not ended yet; this one was not taken.
        """
        if job.request_id in self._ledger:
            raise one_problem(f"job {job.request_id!r}", "is running or waiting already", "a name of its own")
        now_s = self._clock()
        self._attempts.expire(now_s)
        policies = self._attempts.policies
        own_s = job.deadline_s if job.deadline_s is not None else policies.deadline_s
        limit_s = self._limits.request_limit_s if own_s is None else min(own_s, self._limits.request_limit_s)
        ticket = Ticket(job, self._ledger.n_submitted, now_s, now_s + limit_s, own_s is not None and own_s <= limit_s)
        self._ledger.enter(ticket)
        ticket.urgency = 0 if policies.queue_order == "fifo" else job.priority
        ticket.group = self._roster.group_of(job)
        refusal = self._desk.refusal_of(ticket)
        rejection = rejection_at_once(self._scene, policies, ticket, now_s, self._not_admitting, refusal)
        if rejection is not None:
            self._ledger.finish(ticket, "rejected", rejection.code, rejection.reason, rejection.retry_after_s)
            return
        self._ledger.admit(ticket)
        before = waiting_before(self._scene, ticket)
        ticket.fair_tag = self._tenants.tag(job.tenant_id, work_of(job))
        self._queue.add(ticket)
        self._attempts.expire(now_s)  # this one too, if its deadline is the moment of its arrival
        self._start_what_can(now_s)
        if job.request_id in self._ledger and not ticket.worker_id:  # it has to wait
            rejection = rejection_of_waiting(self._scene, policies, ticket, before, self._limits.n_waiting_max, now_s)
            if rejection is not None:
                self._queue.remove(ticket)
                self._ledger.finish(ticket, "rejected", rejection.code, rejection.reason, rejection.retry_after_s)
        self._prefetch(now_s)

    def cancel(self, request_id: str) -> bool:
        """Ends a job (status ``failed``, reason ``cancelled``); False if it has ended already or is unknown."""
        ticket = self._ledger.get(request_id)
        if ticket is None:
            return False
        worker_id = self._attempts.withdraw(ticket)
        self._ledger.finish(ticket, "failed", "cancelled", "cancelled")
        self._attempts.give_up(worker_id, ticket)
        self._pump()
        return True

    def batch_done(self, worker_id: str, results: Mapping[str, object]) -> None:
        """A batch ended well: request id to :class:`engine.serving.job.WorkerResult`."""
        self._attempts.ended(worker_id, {}, results, is_retryable=False)
        self._pump()

    def batch_failed(
        self, worker_id: str, failures: Mapping[str, str], *, is_retryable: bool, done: Mapping[str, object]
    ) -> None:
        """A batch ended with failures (request id to sentence); jobs of it in ``done`` ended well.

        Jobs of the batch that are in neither are tried again alone. So are, once, those of a batch of several whose failure is
        not retryable: one of them is at fault, and only that one is to fail.
        """
        self._attempts.ended(worker_id, failures, done, is_retryable=is_retryable)
        self._pump()

    # LoRAs

    def lora_fetched(self, lora_id: str, path: str, n_bytes: int) -> None:
        """A checked LoRA is in the host tier; replicas that wait for it are told."""
        self._desk.fetched(lora_id, path, n_bytes, self._clock())
        self._pump()

    def lora_refused(self, lora_id: str, reason: str, *, is_final: bool) -> None:
        """Fetching failed. Final: the file is not what it claims, it is quarantined and later jobs with it are rejected."""
        self._desk.refused(lora_id, reason, self._clock(), is_final=is_final)
        if is_final:
            for ticket in self._queue.all_tickets():
                if lora_id in ticket.lora_ids:
                    self._queue.remove(ticket)
                    self._ledger.finish(ticket, "failed", "lora_refused", self._desk.refusal_of(ticket))
        self._pump()

    def lora_pardoned(self, lora_id: str) -> None:
        """The file behind a refused id was replaced: jobs with it are taken again."""
        self.loras.pardon(lora_id)

    # time

    def tick(self) -> float | None:
        """Expires deadlines, closes batching windows; engine time of the next moment it wants to be called, None for never."""
        now_s = self._clock()
        for lora_id in self.loras.overdue(now_s, self._limits.fetch_limit_s):
            self.lora_refused(
                lora_id, f"no answer from the loader for {self._limits.fetch_limit_s:g} s", is_final=False
            )
        self._pump()
        oldest_fetch_s = self.loras.oldest_fetch_s()
        overdue_s = math.inf if oldest_fetch_s is None else oldest_fetch_s + self._limits.fetch_limit_s
        next_s = min(self._window_closes_s, self._ledger.next_deadline_s, overdue_s, self.loras.next_stale_s())
        return None if next_s == math.inf else next_s

    def snapshot(self) -> DispatchSnapshot:
        """Numbers for health and metrics. A job that several pools can serve waits at each of them."""
        by_pool = dict.fromkeys(self._roster.base_pools, 0)
        for group in self._queue.groups():
            for pool in group:
                by_pool[pool] = by_pool.get(pool, 0) + self._queue.n_waiting(group)
        oldest_s = self._ledger.oldest_waiting_s()
        running = {
            worker_id: tuple(base.batch.tickets)
            for worker_id, base in self._roster.bases.items()
            if base.batch is not None
        }
        return DispatchSnapshot(
            n_waiting=len(self._queue),
            n_running=sum(len(names) for names in running.values()),
            n_waiting_by_pool=by_pool,
            oldest_wait_s=0.0 if oldest_s is None else self._clock() - oldest_s,
            n_submitted=self._ledger.n_submitted,
            n_ended=dict(self._ledger.n_ended),
            n_retried=self._attempts.n_retried,
            n_lora_hits=self._desk.n_hits,
            n_lora_misses=self._desk.n_misses,
            lora_cache_bytes=self.loras.held_bytes,
            running=running,
        )

    def n_remembered(self) -> int:
        """Jobs of which anything is still held; those alive."""
        return len(self._ledger) + len(self._queue) + self._tenants.n_running

    def stop_admitting(self, reason: str) -> None:
        """Rejects every later job."""
        self._not_admitting = reason

    # starting

    def _regroup(self) -> None:
        """The pools have changed: who can serve a waiting job is decided anew."""
        for ticket in self._queue.all_tickets():
            group = self._roster.group_of(ticket.job)
            if group == ticket.group:
                continue
            self._queue.remove(ticket)
            ticket.group = group
            if group:
                self._queue.add(ticket)
            else:
                self._ledger.finish(ticket, "failed", "unservable", "no pool can serve it any more")

    def _pump(self) -> None:
        """Everything that may follow from a change: expiries, starts, prefetches."""
        now_s = self._clock()
        self._attempts.expire(now_s)
        self._desk.expire(now_s)
        self._start_what_can(now_s)
        self._prefetch(now_s)

    def _start_what_can(self, now_s: float) -> None:
        while True:
            choice = next_choice(self._scene, self._attempts.policies, now_s)
            self._window_closes_s = choice.window_closes_s
            for ticket in choice.passed:
                ticket.n_overtaken += 1
                self._desk.want(ticket, now_s)
            if choice.base is None:
                return
            self._attempts.start(choice.base, choice.tickets, now_s)

    def _prefetch(self, now_s: float) -> None:
        depth = self._attempts.policies.lora_prefetch_depth
        if depth > 0 and len(self._queue) > 0:
            for ticket in list(islice(self._queue.in_order(self._queue.groups()), depth)):
                self._desk.want(ticket, now_s)
