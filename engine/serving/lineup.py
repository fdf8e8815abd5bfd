"""Which waiting job starts next, on which replica and with which company: the rules of ``engine.policies`` put together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from engine.allocation import Policies
from engine.policies.admission import may_run, wait_estimate_s
from engine.policies.batching import ALONE, batch_of, is_ripe
from engine.policies.queue_order import may_be_passed, next_in_line
from engine.policies.routing import best_replica
from engine.serving.estimates import ServiceEstimates
from engine.serving.lora_cache import LoraCache
from engine.serving.roster import Base, Roster
from engine.serving.tenants import Tenants
from engine.serving.waiting import Queue, Ticket

LOOK_AHEAD_MAX: Final = 128
"""Tickets that could start and may be passed that are looked at for one that may not: a bound on the cost of a decision."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What is looked at, and not changed, to decide."""

    queue: Queue
    roster: Roster
    loras: LoraCache
    tenants: Tenants
    estimates: ServiceEstimates


@dataclass(frozen=True, slots=True)
class Choice:
    """What is to happen next."""

    base: Base | None
    """Takes a batch; None: nothing can start now."""
    tickets: Sequence[Ticket] = ()
    """The batch."""
    passed: Sequence[Ticket] = ()
    """Tickets that this batch overtakes."""
    window_closes_s: float = math.inf
    """When a batching window that held somebody back closes."""


@dataclass(slots=True)
class _Place:
    """One ticket that could start now."""

    ticket: Ticket
    bases: list[Base]
    is_ready: bool
    is_resident: bool


def next_choice(scene: Scene, policies: Policies, now_s: float) -> Choice:
    """The next batch to start. Tickets whose deadline has passed must be gone from the queue."""
    line, window_closes_s = _line(scene, policies, now_s)
    if not line:
        return Choice(None, window_closes_s=window_closes_s)
    index = next_in_line(
        [place.is_ready for place in line],
        [place.is_resident for place in line],
        [place.ticket.n_overtaken for place in line],
        policies.overtake_max,
        policies.switch_overtake_max,
    )
    chosen = line[index]
    values = [scene.roster.affinity_of(base, chosen.ticket) for base in chosen.bases]
    return Choice(
        base=chosen.bases[best_replica(values)],
        tickets=_company_of(chosen.ticket, scene, policies),
        passed=[place.ticket for place in line[:index]],
        window_closes_s=window_closes_s,
    )


def could_start_now(scene: Scene, ticket: Ticket) -> bool:
    """Whether a replica that could serve it is idle."""
    return any(scene.roster.can_start(base, ticket) for base in scene.roster.open_bases(ticket.group))


def expected_wait_s(scene: Scene, ticket: Ticket, now_s: float) -> float:
    """Estimated wait of an arriving ticket: everything of its own or higher urgency that shares a pool with it is ahead.

    Too long where that work may also go to pools that this ticket cannot use. Infinite while no replica that could serve it is up.
    """
    roster = scene.roster
    if could_start_now(scene, ticket):
        return 0.0
    pools = set(ticket.group)
    waiting_s = sum(
        scene.estimates.s_per_work(job_class) * work
        for group in scene.queue.groups()
        if pools.intersection(group)
        for job_class, work in scene.queue.work_ahead(group, ticket.urgency).items()
    )
    left_s = 0.0
    for base in roster.bases.values():
        if base.batch is not None and base.info.pool in pools:
            expected_s = sum(scene.estimates.service_s(other.job) for other in base.batch.tickets.values())
            left_s += max(0.0, base.batch.start_s + expected_s - now_s)
    return wait_estimate_s(waiting_s, left_s, roster.n_replicas(ticket.group))


def _line(scene: Scene, policies: Policies, now_s: float) -> tuple[list[_Place], float]:
    """What can start now, in queue order, up to the first that may not be passed; and when a window that held one back closes."""
    line: list[_Place] = []
    window_closes_s = math.inf
    open_bases = {group: scene.roster.open_bases(group) for group in scene.queue.groups()}
    groups = [group for group, bases in open_bases.items() if bases]
    if not groups:
        return line, window_closes_s
    for ticket in scene.queue.in_order(groups):
        if not scene.tenants.may_run(ticket.job.tenant_id):
            continue
        bases = [base for base in open_bases[ticket.group] if scene.roster.can_start(base, ticket)]
        if not bases:
            continue
        if not _is_ripe(ticket, scene, policies, now_s):
            window_closes_s = min(window_closes_s, ticket.arrival_s + policies.batch_window_s)
            continue
        is_ready = all(scene.loras.path_of(lora_id) is not None for lora_id in ticket.lora_ids)
        is_resident = any(ticket.job.base_model_id in base.resident for base in bases)
        line.append(_Place(ticket, bases, is_ready, is_resident))
        if len(line) == LOOK_AHEAD_MAX or not may_be_passed(
            is_ready, is_resident, ticket.n_overtaken, policies.overtake_max, policies.switch_overtake_max
        ):
            break
    return line, window_closes_s


def _is_ripe(ticket: Ticket, scene: Scene, policies: Policies, now_s: float) -> bool:
    limit = policies.forward_batch_max
    if limit is None or ticket.is_alone or policies.batch_window_s <= 0.0:
        return True
    return is_ripe(
        now_s,
        ticket.arrival_s,
        policies.batch_window_s,
        ticket.job.forward_batch,
        scene.queue.waiting_batch(ticket),
        limit,
    )


def _company_of(head: Ticket, scene: Scene, policies: Policies) -> list[Ticket]:
    """The tickets that run as one batch with this one, itself first."""
    limit = policies.forward_batch_max
    if limit is None or limit == ALONE or head.is_alone:
        return [head]
    alike = [ticket for ticket in scene.queue.in_order([head.group]) if ticket.kind == head.kind]
    counts = scene.tenants.running()
    counts[head.job.tenant_id] = counts.get(head.job.tenant_id, 0) + 1
    is_free = []
    for ticket in alike:
        tenant = ticket.job.tenant_id
        within = may_run(counts.get(tenant, 0), scene.tenants.running_max(tenant))
        may_join = ticket is head or (not ticket.is_alone and within)
        if may_join and ticket is not head:
            counts[tenant] = counts.get(tenant, 0) + 1
        is_free.append(may_join)
    members = batch_of(
        alike.index(head),
        [ticket.kind for ticket in alike],
        [ticket.job.forward_batch for ticket in alike],
        is_free,
        limit,
    )
    return [alike[index] for index in members]
