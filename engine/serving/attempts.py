"""A job's attempts: started on a replica, ended with it, tried again; and jobs that are taken back while they wait or run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from engine.allocation import Policies
from engine.policies.admission import is_tried_again
from engine.serving.job import OutcomeCode, WorkerResult
from engine.serving.ledger import Ledger
from engine.serving.lineup import Scene
from engine.serving.lora_desk import LoraDesk
from engine.serving.ports import Actions, BatchSpan, Start
from engine.serving.roster import Base, Batch
from engine.serving.waiting import Ticket


class Attempts:
    """Moves tickets between the queue, the batches and their ends; :class:`engine.serving.dispatcher.Dispatcher` says when."""

    def __init__(
        self,
        actions: Actions,
        clock: Callable[[], float],
        policies: Policies,
        scene: Scene,
        desk: LoraDesk,
        ledger: Ledger,
    ) -> None:
        self.policies = policies
        self.n_retried = 0
        self.observers: list[Callable[[BatchSpan], None]] = []
        """Told of every batch that has ended; they must not call back."""
        self._actions = actions
        self._clock = clock
        self._scene = scene
        self._desk = desk
        self._ledger = ledger

    def start(self, base: Base, tickets: Sequence[Ticket], now_s: float) -> None:
        """Takes tickets out of the queue and has an open replica run them as one batch."""
        for ticket in tickets:
            self._desk.want(ticket, now_s)
            self._scene.queue.remove(ticket)
            ticket.worker_id = ticket.served_by = base.info.worker_id
            ticket.topology = base.info.topology
            ticket.start_s = now_s
            ticket.n_attempts += 1
            self._scene.tenants.started(ticket.job.tenant_id, ticket.fair_tag)
        batch = self._scene.roster.begin(base, tickets, now_s)
        lora_paths = self._desk.begin(batch, now_s)
        n_steps = tickets[0].job.n_steps
        patch_by = min(self.policies.lora_patch_by_step, n_steps - 1) if base.is_decoupled else 0
        self._actions.start(
            Start(
                worker_id=base.info.worker_id,
                jobs=tuple(ticket.job for ticket in tickets),
                attempt=max(ticket.n_attempts for ticket in tickets),
                controlnet_workers=batch.controlnet_workers,
                lora_paths=lora_paths,
                patch_by_step=patch_by,
            )
        )

    def ended(
        self, worker_id: str, failures: Mapping[str, str], results: Mapping[str, object], *, is_retryable: bool
    ) -> None:
        """A replica reports on its batch (:meth:`engine.serving.dispatcher.Dispatcher.batch_failed` says what may be reported)."""
        base = self._scene.roster.bases.get(worker_id)
        batch = None if base is None else base.batch
        reported = failures.keys() | results.keys()
        if batch is None or (reported and not reported & batch.request_ids):
            return  # a report on a batch that was given up with an earlier process of this worker
        now_s = self._clock()
        n_in_batch = len(batch.request_ids)
        for ticket in self._end(batch, _loading_s(results)):
            name = ticket.job.request_id
            result = results.get(name)
            if self._ledger.is_late(ticket, now_s):
                continue
            if isinstance(result, WorkerResult):
                if result.is_switch and batch.was_resident:
                    self._scene.roster.switched(worker_id, ticket.job.base_model_id)
                self._scene.estimates.observe(ticket.job, now_s - batch.start_s, n_in_batch)
                self._ledger.finish(ticket, "done", "", "", result=result)
                continue
            sentence = failures.get(name)
            refusal = self._desk.refusal_of(ticket)
            lost = sorted(batch.lost_loras.intersection(ticket.lora_ids))
            if refusal:
                self._ledger.finish(ticket, "failed", "lora_refused", refusal)
            elif sentence is None or is_retryable:
                self.try_again(ticket, "worker_lost", sentence or f"worker {worker_id} reported nothing of this job")
            elif lost:
                self.try_again(ticket, "job_error", f"LoRA {', '.join(lost)} could not be fetched: {sentence}")
            elif n_in_batch > 1:
                self.try_again(ticket, "job_error", sentence)
            else:
                self._ledger.finish(ticket, "failed", "job_error", sentence)

    def lost(self, batch: Batch, reason: str) -> None:
        """The replica that ran it is gone, and has been taken off the roster."""
        for ticket in self._end(batch):
            self.try_again(ticket, "worker_lost", f"worker {batch.worker_id} was lost: {reason}")

    def _end(self, batch: Batch, loading_s: float = 0.0) -> list[Ticket]:
        """Frees what a batch held; gives its tickets that have not ended, in order."""
        span = BatchSpan(batch.info, batch.start_s, self._clock(), loading_s)
        for observer in self.observers:
            observer(span)
        self._scene.roster.end(batch)
        self._desk.end(batch)
        tickets = list(batch.tickets.values())
        for ticket in tickets:
            self._scene.tenants.given_back(ticket.job.tenant_id)
            ticket.worker_id = ""
            ticket.had_company = batch.had_company
        batch.tickets.clear()
        return tickets

    def try_again(self, ticket: Ticket, code: OutcomeCode, sentence: str) -> None:
        """Another attempt, alone and at its old place in the queue, if policy and deadline allow; else the job has failed."""
        now_s = self._clock()
        if self._ledger.is_late(ticket, now_s):
            return
        service_s = self._scene.estimates.service_s(ticket.job)
        if is_tried_again(ticket.n_attempts, self.policies.retry_max, now_s, ticket.deadline_at_s, service_s):
            refusal = self._desk.refusal_of(ticket)
            if refusal:
                self._ledger.finish(ticket, "failed", "lora_refused", refusal)
                return
            ticket.group = self._scene.roster.group_of(ticket.job)
            if ticket.group:
                self.n_retried += 1
                ticket.is_alone = True
                ticket.start_s = None
                self._scene.queue.add(ticket)
                return
        tries = "once" if ticket.n_attempts == 1 else f"{ticket.n_attempts} times"
        self._ledger.finish(ticket, "failed", code, f"{sentence} (tried {tries})")

    def expire(self, now_s: float) -> None:
        """Ends the tickets whose deadline has come."""
        for ticket in self._ledger.due(now_s):
            worker_id = self.withdraw(ticket)
            self._ledger.expire(ticket, "while it ran" if worker_id else "in the queue")
            self.give_up(worker_id, ticket)

    def withdraw(self, ticket: Ticket) -> str:
        """Takes a ticket that is to end out of the queue, or out of the batch of the replica that is returned."""
        worker_id = ticket.worker_id
        if not worker_id:
            self._scene.queue.remove(ticket)
            return ""
        batch = self._scene.roster.bases[worker_id].batch
        if batch is not None:
            del batch.tickets[ticket.job.request_id]
        self._scene.tenants.given_back(ticket.job.tenant_id)
        return worker_id

    def give_up(self, worker_id: str, ticket: Ticket) -> None:
        """Asks the replica that runs an ended job to stop it; it stays busy until it reports."""
        if worker_id:
            self._actions.cancel(worker_id, ticket.job.request_id)


def _loading_s(results: Mapping[str, object]) -> float:
    """A batch loads once; every job of it reports that."""
    stages = [result.stages for result in results.values() if isinstance(result, WorkerResult)]
    return max((stage.switch_s + stage.controlnet_load_s for stage in stages), default=0.0)
