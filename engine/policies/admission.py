"""Whether an arriving request may wait, whether a waiting one may run, and whether a failed one is tried again."""

from __future__ import annotations

UNLIMITED = -1


def is_admitted(n_waiting: int, queue_limit: int) -> bool:
    """Whether one more request may wait where ``n_waiting`` already do; ``queue_limit`` UNLIMITED admits all."""
    return queue_limit == UNLIMITED or n_waiting < queue_limit


def may_run(n_running_of_tenant: int, tenant_running_max: int) -> bool:
    """Whether one more request of a tenant may run; UNLIMITED lets all run."""
    return tenant_running_max == UNLIMITED or n_running_of_tenant < tenant_running_max


def wait_estimate_s(work_waiting_s: float, work_left_s: float, n_replicas: int) -> float:
    """Expected wait behind ``work_waiting_s`` of service that waits and ``work_left_s`` that runs, over ``n_replicas``.

    Work conservation: what is there is shared out evenly. Infinite without a replica. Neither batching nor switching is foreseen.
    """
    if n_replicas <= 0:
        return float("inf")
    return (work_waiting_s + work_left_s) / n_replicas


def can_meet_deadline(wait_s: float, service_s: float, deadline_s: float, slack_ratio: float) -> bool:
    """Whether an estimated latency is at most ``slack_ratio`` of the deadline (both counted from arrival)."""
    return wait_s + service_s <= deadline_s * slack_ratio


def is_tried_again(n_attempts: int, retry_max: int, now_s: float, deadline_at_s: float, service_s: float) -> bool:
    """Whether a request that failed through no fault of its own gets another attempt.

    Args:
        n_attempts: attempts so far.
        deadline_at_s: moment of its deadline; infinite for none.
        service_s: estimated length of one more attempt; 0 if unknown.
    """
    return n_attempts <= retry_max and now_s + service_s < deadline_at_s
