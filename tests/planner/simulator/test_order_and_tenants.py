"""Who is served next, how much one tenant may have, who is turned away and asks again: on time lines added up by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.allocation import Policies, TenantShare
from planner.service import ServiceTable, build_service
from planner.simulator import ProfileFacts, SimulationResult
from planner.simulator.world import Retries, World
from tests.simulation_builders import SIZES, base_pool, constant_profile, run, workload_of
from traces.problems import InputError


def queue(
    arrival_s: list[float],
    service_s: list[float],
    n: int,
    policies: Policies,
    world: World | None = None,
    **columns: Any,
) -> SimulationResult:
    workload = workload_of(arrival_s, base_model_id="m", **columns)
    service = ServiceTable.from_service_s(workload, np.asarray(service_s))
    options = {"world": world} if world is not None else {}
    return run(workload, [base_pool(n, base_model_ids=("m",))], service, policies=policies, **options)


def starts(result: SimulationResult) -> list[float]:
    return result.requests["start_s"].tolist()


def test_larger_priority_goes_first_and_nobody_is_interrupted() -> None:
    result = queue([0.0, 1.0, 2.0, 3.0], [10.0] * 4, 1, Policies(queue_order="priority"), priority=[0, 0, 5, 5])
    assert starts(result) == [0.0, 30.0, 10.0, 20.0]


def test_without_the_switch_priorities_are_not_looked_at() -> None:
    result = queue([0.0, 1.0, 2.0], [10.0] * 3, 1, Policies(), priority=[0, 0, 5])
    assert starts(result) == [0.0, 10.0, 20.0]


def test_a_tenant_at_its_limit_waits_and_is_passed() -> None:
    tenants = ["a", "a", "b", "a"]
    result = queue([0.0, 1.0, 2.0, 3.0], [10.0] * 4, 2, Policies(tenant_running_max=1), tenant_id=tenants)
    # the second of a waits for the first although a replica is idle; b passes; then a's in turn
    assert starts(result) == [0.0, 10.0, 2.0, 20.0]
    own = Policies(tenant_running_max=1, tenants=(TenantShare("a", running_max=2),))
    assert starts(queue([0.0, 1.0, 2.0, 3.0], [10.0] * 4, 2, own, tenant_id=tenants)) == [0.0, 1.0, 10.0, 11.0]


def test_one_tenant_cannot_fill_the_queue() -> None:
    tenants = ["a", "a", "a", "b"]
    result = queue([0.0, 1.0, 2.0, 3.0], [10.0] * 4, 1, Policies(tenant_waiting_max=1), tenant_id=tenants)
    assert result.requests["status"].tolist() == ["done", "done", "rejected", "done"]
    assert result.requests["reason"].iloc[2] == "its tenant has too many waiting"


def test_weights_share_the_service_while_both_wait() -> None:
    # a asks for twelve at once, b for six just after; weights 1 and 2, ten seconds each
    n_a, n_b = 12, 6
    result = queue(
        [0.0] * n_a + [1.0] * n_b, [10.0] * (n_a + n_b), 1,
        Policies(queue_order="weighted_tenants", tenants=(TenantShare("b", weight=2.0),)), tenant_id=["a"] * n_a + ["b"] * n_b,
    )  # fmt: skip
    order = result.requests.sort_values("start_s")["tenant_id"].tolist()
    # start tags: a 0, 10, 20, …; b joins at virtual time 0: 0, 5, 10, 15, …; equal tags by arrival
    assert order[:9] == ["a", "b", "b", "a", "b", "b", "a", "b", "b"]
    assert order[9:] == ["a"] * 9
    # b had two thirds of the service while it waited
    assert order[:9].count("b") == 6


def test_a_tenant_that_was_silent_has_saved_nothing_up() -> None:
    arrival_s = [0.0, 0.0, 0.0, 0.0, 35.0, 35.0]
    result = queue(
        arrival_s, [10.0] * 6, 1, Policies(queue_order="weighted_tenants"), tenant_id=["a", "a", "a", "a", "b", "b"]
    )
    # at 35 a's last, tag 30, is in service: b's first joins at the virtual time 30, not at 0, its second at 40
    order = result.requests.sort_values("start_s").index.tolist()
    assert order[:4] == [0, 1, 2, 3]
    assert order[4:] == [4, 5]


def test_a_rejected_client_asks_again_and_counts_once() -> None:
    world = World(retries=Retries(n_max=3, backoff_s=4.0, backoff_factor=2.0, jitter_ratio=0.0))
    result = queue([0.0, 1.0], [10.0, 10.0], 1, Policies(queue_limit=0), world)
    # asks at 1, 5 and 13; only then is the replica idle; its latency counts from 1
    assert result.requests["status"].tolist() == ["done", "done"]
    assert starts(result) == [0.0, 13.0]
    assert result.requests["latency_s"].tolist() == [10.0, 22.0]


def test_a_client_gives_up_after_its_last_attempt_or_when_its_deadline_would_pass() -> None:
    world = World(retries=Retries(n_max=2, backoff_s=1.0, backoff_factor=1.0, jitter_ratio=0.0))
    result = queue([0.0, 1.0], [10.0, 10.0], 1, Policies(queue_limit=0), world)
    assert result.requests["status"].iloc[1] == "rejected"
    assert result.requests["reason"].iloc[1] == "queue is full, asked 3 times"
    assert result.requests["end_s"].iloc[1] == 3.0
    late = queue([0.0, 1.0], [10.0, 10.0], 1, Policies(queue_limit=0), world, deadline_s=[np.nan, 1.5])
    assert late.requests["end_s"].iloc[1] == 2.0  # the third attempt, at 3, would come after 2.5


def test_jitter_is_drawn_by_request_and_attempt_and_stays_below_the_backoff() -> None:
    arrival_s = [0.0, *[1.0] * 50]
    policies = Policies(queue_limit=0)
    seen = []
    for seed in (0, 0, 1):
        world = World(retries=Retries(n_max=1, backoff_s=8.0, jitter_ratio=0.5), seed=seed)
        result = queue(arrival_s, [100.0] * 51, 1, policies, world)
        seen.append(result.requests["end_s"].to_numpy()[1:])
    assert (seen[0] == seen[1]).all()
    assert (seen[0] != seen[2]).all()
    assert (seen[0] > 1.0 + 4.0).all()
    assert (seen[0] <= 1.0 + 8.0).all()
    # even on (5, 9]: the mean of 50 has a standard error of 4/√12/√50 = 0.163; four of them
    assert abs(seen[0].mean() - 7.0) < 4 * 0.163


def test_a_request_that_would_be_late_by_estimate_is_rejected_at_once() -> None:
    policies = Policies(deadline_s=25.0, admission_slack_ratio=1.0)
    result = queue([0.0, 1.0, 2.0, 3.0], [10.0] * 4, 1, policies)
    # at 1: 9 left + 10; at 2: 8 left + 10 waiting + 10 = 28 > 25; at 3: 7 + 10 + 10 = 27 > 25
    assert result.requests["status"].tolist() == ["done", "done", "rejected", "rejected"]
    assert result.requests["reason"].iloc[2] == "it would miss its deadline"
    assert result.requests["end_s"].iloc[2] == 2.0
    lax = queue([0.0, 1.0, 2.0, 3.0], [10.0] * 4, 1, Policies(deadline_s=25.0))
    assert lax.requests["status"].tolist() == ["done", "done", "done", "expired"]


def test_a_request_that_needs_a_switch_is_passed_as_often_as_the_policy_allows() -> None:
    profile = constant_profile()
    workload = workload_of([0.0] * 6, n_steps=10, base_model_id=["a", "b", "a", "a", "a", "a"])
    service = build_service(workload, "colocated", profile, SIZES)
    # room for one checkpoint: 10 GiB less one sample's activations of 2 images under guidance
    facts = ProfileFacts(device_memory_gib=10.0, activation_gib_per_sample=0.5)
    for most, place in ((0, 1), (2, 3), (9, 5)):
        result = run(
            workload, [base_pool(1, base_model_ids=("a", "*"))], service, policies=Policies(switch_overtake_max=most),
            facts=facts,
        )  # fmt: skip
        order = result.requests.sort_values("start_s")["base_model_id"].tolist()
        assert order.index("b") == place


def test_retries_and_limits_out_of_range_are_refused_together() -> None:
    world = World(retries=Retries(n_max=0, backoff_s=-1.0))
    policies = Policies(tenants=(TenantShare("a", weight=0.0),), tenant_running_max=0)
    with pytest.raises(InputError) as caught:
        queue([0.0], [1.0], 1, policies, world)
    text = str(caught.value)
    for sentence in (
        "retries.n_max: got 0",
        "retries.backoff_s: got -1.0",
        "weight of 'a' is 0.0",
        "tenant_running_max",
    ):
        assert sentence in text
