"""Jobs that are alive, and the queues in which they wait: one queue for all jobs that the same base pools can serve."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from engine.policies.queue_order import queue_key
from engine.serving.estimates import class_of, work_of
from engine.serving.job import Job

Group = tuple[str, ...]
"""Names of the base pools that can serve a job, in order."""
Kind = tuple[Hashable, ...]
Key = tuple[int, float, float, int]


@dataclass(slots=True, eq=False)
class Ticket:
    """A job from its admission until it ends: what the dispatcher remembers of it."""

    job: Job
    number: int
    """Order of submission."""
    arrival_s: float
    deadline_at_s: float
    has_own_deadline: bool
    group: Group = ()
    urgency: int = 0
    """Its priority, where the policy looks at it."""
    fair_tag: float = 0.0
    """Its place between tenants, where the policy shares by weight."""
    kind: int = -1
    """Number of its :func:`kind_of` while it waits."""
    n_attempts: int = 0
    n_overtaken: int = 0
    is_alone: bool = False
    """It must not share a batch: an attempt failed, and whose fault it was is not known."""
    worker_id: str = ""
    """The base worker that has it; empty while it waits."""
    served_by: str = ""
    """The base worker that had it last."""
    topology: str = ""
    """Of that worker."""
    start_s: float | None = None
    had_company: bool = False
    """Another batch used one of its ControlNet workers while it ran last."""
    lora_misses: set[str] = field(default_factory=set)
    lora_hits: set[str] = field(default_factory=set)

    @property
    def key(self) -> Key:
        """Its place in a queue."""
        return queue_key(self.urgency, self.fair_tag, self.arrival_s, self.number)

    @property
    def lora_ids(self) -> tuple[str, ...]:
        """Its LoRAs, each once."""
        return tuple(dict.fromkeys(use.lora_id for use in self.job.loras))

    @property
    def controlnet_ids(self) -> tuple[str, ...]:
        """Its ControlNets, each once."""
        return tuple(dict.fromkeys(use.controlnet_id for use in self.job.controls))


def kind_of(job: Job) -> Kind:
    """Jobs with equal kinds may share a batch: all that the forwards of a batch have in common is in it."""
    controls = tuple((use.controlnet_id, use.scale, use.start, use.end) for use in job.controls)
    loras = tuple((use.lora_id, use.scale) for use in job.loras)
    return (
        job.base_model_id,
        job.width_px,
        job.height_px,
        job.n_steps,
        job.guidance_scale,
        controls,
        loras,
        job.wants_images,
    )


@dataclass(slots=True)
class _KindCount:
    number: int
    n_tickets: int = 0
    forward_batch: int = 0


class Queue:
    """All waiting jobs. Insertion and removal are a bisection and a shift; nothing of an ended job stays."""

    def __init__(self) -> None:
        self._groups: dict[Group, list[tuple[Key, Ticket]]] = {}
        self._work: dict[Group, dict[tuple[int, int], float]] = {}
        """Units of work that wait, by urgency and class of job."""
        self._kinds: dict[Kind, _KindCount] = {}
        self._n_kinds = 0
        self._of_tenant: dict[str, int] = {}
        self._n = 0

    def __len__(self) -> int:
        return self._n

    def add(self, ticket: Ticket) -> None:
        """Puts a ticket in the queue of its group; a tried-again one gets its old place back."""
        kind = kind_of(ticket.job)
        count = self._kinds.get(kind)
        if count is None:
            count = self._kinds[kind] = _KindCount(self._n_kinds)
            self._n_kinds += 1
        count.n_tickets += 1
        count.forward_batch += ticket.job.forward_batch
        ticket.kind = count.number
        insort(self._groups.setdefault(ticket.group, []), (ticket.key, ticket), key=_key)
        work = self._work.setdefault(ticket.group, {})
        sort = (ticket.urgency, class_of(ticket.job))
        work[sort] = work.get(sort, 0.0) + work_of(ticket.job)
        tenant = ticket.job.tenant_id
        self._of_tenant[tenant] = self._of_tenant.get(tenant, 0) + 1
        self._n += 1

    def remove(self, ticket: Ticket) -> None:
        """Takes a waiting ticket out."""
        entries = self._groups[ticket.group]
        place = bisect_left(entries, ticket.key, key=_key)
        if place == len(entries) or entries[place][1] is not ticket:
            raise KeyError(ticket.job.request_id)
        del entries[place]
        self._work[ticket.group][ticket.urgency, class_of(ticket.job)] -= work_of(ticket.job)
        if not entries:
            del self._groups[ticket.group]
            del self._work[ticket.group]  # and with it what rounding has left
        kind = kind_of(ticket.job)
        count = self._kinds[kind]
        count.n_tickets -= 1
        count.forward_batch -= ticket.job.forward_batch
        if count.n_tickets == 0:
            del self._kinds[kind]
        ticket.kind = -1
        tenant = ticket.job.tenant_id
        self._of_tenant[tenant] -= 1
        if self._of_tenant[tenant] == 0:
            del self._of_tenant[tenant]
        self._n -= 1

    def groups(self) -> list[Group]:
        """Groups in which somebody waits."""
        return list(self._groups)

    def in_order(self, groups: Sequence[Group]) -> Iterator[Ticket]:
        """Waiting tickets of some groups, in queue order. Must not be advanced after the queue has changed."""
        if len(groups) == 1:
            return (ticket for _, ticket in self._groups[groups[0]])
        return (ticket for _, ticket in heapq.merge(*(self._groups[group] for group in groups), key=_key))

    def all_tickets(self) -> list[Ticket]:
        """Every waiting ticket, in queue order."""
        return list(self.in_order(self.groups())) if self._groups else []

    def n_waiting(self, group: Group) -> int:
        """Waiting tickets of a group."""
        return len(self._groups.get(group, ()))

    def work_ahead(self, group: Group, urgency: int) -> dict[int, float]:
        """Units of work of a group that wait with this urgency or more, by class of job; without looking at each ticket."""
        ahead: dict[int, float] = {}
        for (other, job_class), work in self._work.get(group, {}).items():
            if other >= urgency:
                ahead[job_class] = ahead.get(job_class, 0.0) + max(0.0, work)
        return ahead

    def n_waiting_of(self, tenant_id: str) -> int:
        """Waiting tickets of a tenant."""
        return self._of_tenant.get(tenant_id, 0)

    def waiting_batch(self, ticket: Ticket) -> int:
        """Samples of a forward of all waiting tickets of this one's kind, itself included."""
        return self._kinds[kind_of(ticket.job)].forward_batch


def _key(entry: tuple[Key, Ticket]) -> Key:
    return entry[0]
