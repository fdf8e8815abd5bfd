"""The queues of waiting jobs: order, counts and sums against a plain list."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.serving.estimates import ServiceEstimates, class_of, work_of
from engine.serving.job import ControlUse, Job
from engine.serving.waiting import Queue, Ticket, kind_of

JOBS = st.builds(
    Job,
    request_id=st.just("r"),
    n_steps=st.sampled_from([1, 30]),
    n_images=st.integers(1, 2),
    priority=st.integers(0, 2),
    controls=st.sampled_from([(), (ControlUse("c"),)]),
    tenant_id=st.sampled_from(["t", "u"]),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    jobs=st.lists(st.tuples(JOBS, st.sampled_from([("a",), ("b",), ("a", "b")])), max_size=30),
    removed=st.lists(st.integers(0, 29), max_size=30, unique=True),
    tags=st.lists(st.sampled_from([0.0, 1.0]), min_size=30, max_size=30),
)
def test_a_queue_is_a_sorted_list_for_every_group_and_its_sums_are_those_of_the_list(
    jobs: list[tuple[Job, tuple[str, ...]]], removed: list[int], tags: list[float]
) -> None:
    queue = Queue()
    tickets = [
        Ticket(job, number, float(number // 3), 1e9, False, group=group, urgency=job.priority, fair_tag=tags[number])
        for number, (job, group) in enumerate(jobs)
    ]
    for ticket in tickets:
        queue.add(ticket)
    for number in removed:
        if number < len(tickets):
            queue.remove(tickets[number])
    left = [ticket for ticket in tickets if ticket.number not in removed]
    assert queue.all_tickets() == sorted(left, key=lambda ticket: ticket.key)
    assert len(queue) == len(left)
    assert set(queue.groups()) == {ticket.group for ticket in left}
    for ticket in left:
        alike = [other for other in left if kind_of(other.job) == kind_of(ticket.job)]
        assert queue.waiting_batch(ticket) == sum(other.job.forward_batch for other in alike)
        assert {other.kind for other in alike} == {ticket.kind}
        assert queue.n_waiting_of(ticket.job.tenant_id) == sum(o.job.tenant_id == ticket.job.tenant_id for o in left)
        for urgency in (0, 1, 2):
            ahead = queue.work_ahead(ticket.group, urgency)
            for job_class in (0, 1):
                own = [
                    o for o in left if o.group == ticket.group and o.urgency >= urgency and class_of(o.job) == job_class
                ]
                # sums and differences of at most 60 doubles below 130
                assert ahead.get(job_class, 0.0) == pytest.approx(sum(work_of(o.job) for o in own), abs=1e-10)


def test_removing_what_does_not_wait_is_a_fault() -> None:
    ticket = Ticket(Job("r"), 0, 0.0, 1.0, False, group=("a",))
    with pytest.raises(KeyError):
        Queue().remove(ticket)


def test_service_is_learnt_apart_by_number_of_controlnets_and_scales_with_the_work() -> None:
    estimates = ServiceEstimates()
    plain, steered = Job("a", n_steps=10), Job("b", n_steps=10, controls=(ControlUse("c"),))
    assert estimates.service_s(plain) == 0.0
    estimates.observe(plain, 2.0, 1)
    assert estimates.service_s(Job("c", n_steps=30)) == pytest.approx(6.0)
    assert estimates.service_s(steered) == pytest.approx(2.0)  # nothing known of its class yet
    estimates.observe(steered, 4.0, 1)
    assert estimates.service_s(steered) == pytest.approx(4.0)
    estimates.observe(plain, 4.0, 2)  # two together in 4 s are 2 s each
    assert estimates.service_s(plain) == pytest.approx(2.0)
