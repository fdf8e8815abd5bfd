"""Every job from its submission to its one end: who is alive, when each expires, how many ended and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from engine.serving.deadlines import Deadlines
from engine.serving.job import Outcome, OutcomeCode, WorkerResult
from engine.serving.ports import Actions
from engine.serving.waiting import Ticket
from traces.records import REQUEST_STATUSES, RequestStatus


class Ledger:
    """The only place that ends jobs; of a job that has ended nothing is kept but the counts."""

    def __init__(self, actions: Actions, clock: Callable[[], float]) -> None:
        self._actions = actions
        self._clock = clock
        self._live: dict[str, Ticket] = {}
        self._deadlines = Deadlines()
        self.n_submitted = 0
        self.n_ended: dict[str, int] = dict.fromkeys(REQUEST_STATUSES, 0)

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._live

    @property
    def next_deadline_s(self) -> float:
        """When the next job may expire; infinite for never."""
        return self._deadlines.next_s

    def get(self, request_id: str) -> Ticket | None:
        """The ticket of a job that is alive."""
        return self._live.get(request_id)

    def enter(self, ticket: Ticket) -> None:
        """A job was submitted."""
        self.n_submitted += 1
        self._live[ticket.job.request_id] = ticket

    def admit(self, ticket: Ticket) -> None:
        """It was not rejected at once: from now on its deadline counts."""
        self._deadlines.add(ticket, self._live, len(self._live))

    def due(self, now_s: float) -> Iterator[Ticket]:
        """Live tickets whose deadline has come, each once; they must be ended."""
        while (entry := self._deadlines.pop_due(now_s)) is not None:
            number, request_id = entry
            ticket = self._live.get(request_id)
            if ticket is not None and ticket.number == number:
                yield ticket

    def oldest_waiting_s(self) -> float | None:
        """Arrival of the job that has waited longest. Live jobs are in order of arrival and few of them run: it is near."""
        return next((ticket.arrival_s for ticket in self._live.values() if not ticket.worker_id), None)

    def is_late(self, ticket: Ticket, now_s: float) -> bool:
        """Ends a ticket that a replica has just given back if its deadline has passed, whichever was heard of first."""
        if now_s < ticket.deadline_at_s:
            return False
        self.expire(ticket, "while it ran")
        return True

    def expire(self, ticket: Ticket, where: str) -> None:
        """Ends a ticket whose deadline has passed."""
        whose = "its deadline" if ticket.has_own_deadline else "the engine's limit for a job"
        self.finish(ticket, "expired", "deadline", f"{whose} passed {where}")

    def finish(
        self,
        ticket: Ticket,
        status: RequestStatus,
        code: OutcomeCode,
        reason: str,
        retry_after_s: float | None = None,
        result: WorkerResult | None = None,
    ) -> None:
        """Ends a ticket that is alive; raises KeyError for any other."""
        del self._live[ticket.job.request_id]
        self.n_ended[status] += 1
        self._actions.finish(
            Outcome(
                request_id=ticket.job.request_id,
                status=status,
                reason=reason,
                retry_after_s=retry_after_s,
                worker_id=ticket.served_by,
                n_attempts=ticket.n_attempts,
                arrival_s=ticket.arrival_s,
                start_s=ticket.start_s,
                end_s=self._clock(),
                n_lora_misses=len(ticket.lora_misses),
                result=result,
                code=code,
                topology=ticket.topology,
                had_company=ticket.had_company,
            )
        )
