"""Why an arriving job is turned away: the admission rules of ``engine.policies`` with what the dispatcher knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from engine.allocation import Policies
from engine.policies.admission import can_meet_deadline, is_admitted
from engine.serving.job import OutcomeCode
from engine.serving.lineup import Scene, could_start_now, expected_wait_s
from engine.serving.tenants import or_unlimited
from engine.serving.waiting import Ticket

RETRY_AFTER_S: Final = (1.0, 60.0)
"""Bounds of what a rejected client is told."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A job is not taken."""

    code: OutcomeCode
    reason: str
    retry_after_s: float | None = None
    """None: never worth trying again."""


@dataclass(frozen=True, slots=True)
class WaitingBefore:
    """Who waited when a ticket arrived."""

    n_in_group: int
    n_of_tenant: int
    n_in_all: int


def waiting_before(scene: Scene, ticket: Ticket) -> WaitingBefore:
    """Counts before the ticket is put into its queue."""
    queue = scene.queue
    return WaitingBefore(queue.n_waiting(ticket.group), queue.n_waiting_of(ticket.job.tenant_id), len(queue))


def rejection_at_once(
    scene: Scene, policies: Policies, ticket: Ticket, now_s: float, not_admitting: str, refusal: str
) -> Rejection | None:
    """What speaks against a ticket whether or not it has to wait.

    Args:
        not_admitting: why nothing is admitted; empty if jobs are.
        refusal: why one of its LoRAs may not be used; empty if all may.
    """
    if not_admitting:
        return Rejection("not_admitting", not_admitting, RETRY_AFTER_S[0])
    if not ticket.group:
        return Rejection("unservable", "no pool can serve it")
    if refusal:
        return Rejection("lora_refused", refusal)
    slack = policies.admission_slack_ratio
    service_s = scene.estimates.service_s(ticket.job)
    if slack is None or not ticket.has_own_deadline or service_s <= 0.0:  # nothing has ended yet: nothing is known
        return None
    if could_start_now(scene, ticket):
        # It costs nobody a turn, and shows how long such a job takes: one slow first image must not have all later ones refused.
        return None
    wait_s = expected_wait_s(scene, ticket, now_s)
    if can_meet_deadline(wait_s, service_s, ticket.deadline_at_s - now_s, slack):
        return None
    wait = f"about {wait_s:.1f} s of waiting" if wait_s < float("inf") else "no replica that could serve it is up"
    reason = f"its deadline cannot be met: {wait}, {service_s:.1f} s of work"
    return Rejection("deadline_unreachable", reason, _bounded(wait_s))


def rejection_of_waiting(
    scene: Scene, policies: Policies, ticket: Ticket, before: WaitingBefore, n_waiting_max: int, now_s: float
) -> Rejection | None:
    """What speaks against letting a ticket wait that nobody could start."""
    if not is_admitted(before.n_in_group, or_unlimited(policies.queue_limit)) or not is_admitted(
        before.n_in_all, n_waiting_max
    ):
        return Rejection("queue_full", "queue is full", _bounded(expected_wait_s(scene, ticket, now_s)))
    if not is_admitted(before.n_of_tenant, scene.tenants.waiting_max(ticket.job.tenant_id)):
        reason = f"the tenant has {before.n_of_tenant} waiting jobs already"
        return Rejection("tenant_limit", reason, _bounded(expected_wait_s(scene, ticket, now_s)))
    return None


def _bounded(wait_s: float) -> float:
    shortest_s, longest_s = RETRY_AFTER_S
    return min(longest_s, max(shortest_s, wait_s))
