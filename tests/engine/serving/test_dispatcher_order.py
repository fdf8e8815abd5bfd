"""What waits, in which order it goes, and what is rejected or expires; time and workers are made up."""

from __future__ import annotations

import pytest

from engine.allocation import Policies, Pool, TenantShare
from engine.serving.dispatcher import DispatchLimits
from tests.engine.serving.fakes import World
from traces.problems import InputError

# queues and order


def test_a_job_starts_at_once_on_an_idle_replica_and_ends_once() -> None:
    world = World()
    world.base()
    world.submit("r1")
    assert world.runs() == {"b0": ["r1"]}
    world.now_s = 3.0
    world.done()
    outcome = world.outcomes["r1"]
    assert (outcome.status, outcome.worker_id, outcome.topology, outcome.n_attempts) == ("done", "b0", "decoupled", 1)
    assert (outcome.arrival_s, outcome.start_s, outcome.end_s, outcome.code) == (0.0, 0.0, 3.0, "")
    assert world.dispatcher.is_idle("b0")


def test_jobs_wait_first_come_first_served_and_the_more_urgent_go_first_if_the_policy_says_so() -> None:
    for order, expected in (("fifo", ["r0", "r1", "r2", "r3"]), ("priority", ["r0", "r3", "r1", "r2"])):
        world = World(Policies(queue_order=order))
        world.base()
        for name, priority in (("r0", 0), ("r1", 0), ("r2", 0), ("r3", 5)):
            world.submit(name, priority=priority)
        for _ in range(4):
            world.done()
        assert world.order() == expected


def test_tenants_share_the_replicas_by_weight_whoever_came_first() -> None:
    shares = (TenantShare("heavy", weight=2.0),)
    world = World(Policies(queue_order="weighted_tenants", tenants=shares))
    world.base()
    world.submit("first")
    for number in range(6):
        world.submit(f"light-{number}", tenant_id="light")
    for number in range(6):
        world.submit(f"heavy-{number}", tenant_id="heavy")
    for _ in range(10):
        world.done()
    assert sum(name.startswith("heavy") for name in world.order()[1:10]) == 6


def test_a_job_that_no_pool_can_serve_is_rejected_and_one_whose_workers_are_not_up_waits() -> None:
    pools = (Pool("base", "base", 1, "cpu", base_model_ids=("a", "b"), controlnet_ids=()),)
    world = World(pools=pools)
    world.submit("other", base_model_id="c")
    world.submit("net", base_model_id="a", controls=("n",))
    assert {world.outcomes[name].code for name in ("other", "net")} == {"unservable"}
    assert world.outcomes["other"].retry_after_s is None
    world.submit("early", base_model_id="a")
    assert world.dispatcher.snapshot().n_waiting == 1
    world.base(topology="colocated", base_model_ids=("a", "b"))
    assert world.runs() == {"b0": ["early"]}


def test_a_replica_that_has_the_checkpoint_is_preferred() -> None:
    world = World()
    world.base("b0", resident_base_model_ids=("x",))
    world.base("b1", resident_base_model_ids=("y",))
    world.submit("r1", base_model_id="y")
    assert world.runs() == {"b1": ["r1"]}
    world.done("b1")
    world.submit("r2", base_model_id="z")  # nobody has it: the first
    world.submit("r3", base_model_id="y")
    assert world.runs() == {"b0": ["r2"], "b1": ["r3"]}


def test_a_checkpoint_that_had_to_be_loaded_again_is_no_longer_believed_resident_with_others() -> None:
    world = World()
    world.base("b0", resident_base_model_ids=("x", "y"))
    world.base("b1", resident_base_model_ids=("y",))
    world.submit("r1", base_model_id="x")
    world.done("b0", is_switch=True)  # it had lost x, so it may have lost y too
    world.submit("r2", base_model_id="y")
    assert world.runs() == {"b1": ["r2"]}


def test_a_request_that_needs_another_checkpoint_lets_as_many_pass_as_the_policy_says() -> None:
    world = World(Policies(switch_overtake_max=1))
    world.base(resident_base_model_ids=("x",))
    world.submit("r0", base_model_id="x")
    for name, checkpoint in (("r1", "y"), ("r2", "x"), ("r3", "x")):
        world.submit(name, base_model_id=checkpoint)
    for _ in range(4):
        world.done()
    assert world.order() == ["r0", "r2", "r1", "r3"]


def test_a_full_queue_rejects_with_a_time_to_come_back() -> None:
    world = World(Policies(queue_limit=1))
    world.base()
    for name in ("r0", "r1", "r2"):
        world.submit(name)
    outcome = world.outcomes["r2"]
    assert (outcome.status, outcome.code) == ("rejected", "queue_full")
    assert outcome.retry_after_s is not None
    assert outcome.retry_after_s >= 1.0
    world.done()
    world.submit("r3")
    assert world.runs() == {"b0": ["r1"]}
    assert "r3" not in world.outcomes


def test_the_queue_is_bounded_even_where_the_policy_sets_no_limit() -> None:
    world = World(limits=DispatchLimits(n_waiting_max=2))
    world.base()
    for number in range(4):
        world.submit(f"r{number}")
    assert [world.outcomes[name].code for name in world.outcomes] == ["queue_full"]


def test_a_name_that_is_alive_is_refused_and_may_be_used_again_afterwards() -> None:
    world = World()
    world.base()
    world.submit("r1")
    with pytest.raises(InputError, match="r1"):
        world.submit("r1")
    world.done()
    world.outcomes.clear()
    world.submit("r1")
    assert world.runs() == {"b0": ["r1"]}


# tenants


def test_a_tenant_at_its_limit_waits_and_is_passed_by_others() -> None:
    world = World(Policies(tenant_running_max=1, tenant_waiting_max=1))
    world.base("b0")
    world.base("b1")
    world.submit("a1", tenant_id="a")
    world.submit("a2", tenant_id="a")
    assert world.runs() == {"b0": ["a1"]}
    world.submit("a3", tenant_id="a")
    assert world.outcomes["a3"].code == "tenant_limit"
    world.submit("c1", tenant_id="c")
    assert world.runs() == {"b0": ["a1"], "b1": ["c1"]}
    world.done("b1")
    assert world.runs() == {"b0": ["a1"]}
    world.done("b0")
    assert world.runs() == {"b0": ["a2"]}


def test_a_tenant_may_have_limits_of_its_own() -> None:
    shares = (TenantShare("vip", running_max=2, waiting_max=0),)
    world = World(Policies(tenant_running_max=1, tenants=shares))
    for worker in ("b0", "b1", "b2", "b3"):
        world.base(worker)
    for name in ("vip", "other"):
        for number in range(3):
            world.submit(f"{name}-{number}", tenant_id=name)
    assert sorted(world.order()) == ["other-0", "vip-0", "vip-1"]
    assert [(name, world.outcomes[name].code) for name in world.outcomes] == [("vip-2", "tenant_limit")]


# deadlines


def test_a_waiting_job_expires_at_its_deadline_and_the_dispatcher_says_when_to_wake_it() -> None:
    world = World()
    world.base()
    world.submit("r1")
    world.submit("r2", deadline_s=5.0)
    assert world.at(1.0) == 5.0
    assert world.at(4.999) == 5.0
    assert "r2" not in world.outcomes
    world.at(5.0)
    assert (world.outcomes["r2"].status, world.outcomes["r2"].end_s) == ("expired", 5.0)


def test_a_running_job_is_given_up_at_its_deadline_and_its_replica_stays_busy_until_it_reports() -> None:
    world = World()
    world.base()
    world.submit("r1", deadline_s=5.0)
    world.submit("r2")
    world.at(5.0)
    assert world.status("r1") == "expired"
    assert world.cancelled == [("b0", "r1")]
    assert world.order() == ["r1"]
    world.done()
    assert world.runs() == {"b0": ["r2"]}


def test_a_result_after_the_deadline_is_late_even_if_nobody_ticked() -> None:
    world = World()
    world.base()
    world.submit("r1", deadline_s=5.0)
    world.now_s = 5.0
    world.done()
    assert world.status("r1") == "expired"


def test_a_job_without_deadline_ends_at_the_limit_of_the_engine() -> None:
    world = World(limits=DispatchLimits(request_limit_s=30.0), pools=(Pool("base", "base", 1, "cpu"),))
    world.submit("r1")
    world.at(30.0)
    assert world.outcomes["r1"].status == "expired"
    assert "limit" in world.outcomes["r1"].reason


def test_the_policy_gives_a_deadline_to_jobs_that_name_none() -> None:
    world = World(Policies(deadline_s=2.0))
    world.base()
    world.submit("r1")
    world.submit("r2", deadline_s=9.0)
    assert world.at(0.0) == 2.0
    world.at(2.0)
    assert world.status("r1") == "expired"
    assert "r2" not in world.outcomes


def test_what_cannot_be_in_time_is_rejected_once_service_times_are_known() -> None:
    world = World(Policies(admission_slack_ratio=1.0))
    world.base()
    world.submit("first", deadline_s=100.0)
    world.submit("unknown", deadline_s=0.5)  # nothing has ended yet: nothing is estimated
    world.now_s = 0.4
    assert "unknown" not in world.outcomes
    world.now_s = 10.0
    world.done()  # a job takes 10 s
    world.submit("r1", deadline_s=10.0)
    assert world.runs() == {"b0": ["r1"]}
    world.submit("r2", deadline_s=19.9)
    outcome = world.outcomes["r2"]
    assert (outcome.status, outcome.code) == ("rejected", "deadline_unreachable")
    world.submit("r3", deadline_s=20.0)
    world.submit("r4")  # no deadline: never refused for it
    assert world.dispatcher.snapshot().n_waiting == 2
    world.lose()
    world.submit("r5", deadline_s=500.0)
    assert "no replica that could serve it is up" in world.outcomes["r5"].reason


def test_an_idle_replica_tries_what_is_believed_too_slow_and_so_learns_better() -> None:
    world = World(Policies(admission_slack_ratio=1.0))
    world.base()
    world.submit("captures", deadline_s=100.0)
    world.now_s = 60.0
    world.done()  # the first of its shape
    for k in range(30):
        world.submit(f"r{k}", deadline_s=10.0)
        assert world.runs() == {"b0": [f"r{k}"]}
        world.now_s += 2.0
        world.done()
    world.submit("running", deadline_s=10.0)
    world.submit("behind", deadline_s=10.0)  # 2 s and what is left of the first 60 are believed of each by now
    assert world.dispatcher.snapshot().n_waiting == 1


# batches


def test_compatible_jobs_that_wait_run_together_up_to_the_largest_forward() -> None:
    world = World(Policies(forward_batch_max=4))
    world.base()
    world.submit("r0")
    world.submit("r1", prompt="a cat", seed=3)
    world.submit("other", n_steps=7)
    world.submit("r2")
    world.submit("r3")
    world.done()
    assert world.runs() == {"b0": ["r1", "r2"]}
    world.done()
    assert world.runs() == {"b0": ["other"]}
    world.done()
    assert world.runs() == {"b0": ["r3"]}


@pytest.mark.parametrize(
    "difference",
    [
        {"base_model_id": "x"}, {"width_px": 512}, {"height_px": 512}, {"n_steps": 31}, {"guidance_scale": 7.0},
        {"guidance_scale": 0.0}, {"controls": ("n",)}, {"loras": ("l",)}, {"wants_images": False},
    ],
)  # fmt: skip
def test_jobs_that_differ_in_what_a_forward_shares_run_apart(difference: dict[str, object]) -> None:
    world = World(Policies(forward_batch_max=8))
    world.base()
    world.controlnet("c0")
    world.submit("r0")
    world.submit("r1")
    world.submit("r2", **difference)
    world.done()
    assert world.runs() == {"b0": ["r1"]}


def test_a_job_waits_for_company_until_its_window_closes_or_the_batch_is_full() -> None:
    world = World(Policies(forward_batch_max=4, batch_window_s=0.5))
    world.base("b0")
    world.base("b1")
    world.submit("r1")
    assert world.runs() == {}
    assert world.at(0.1) == 0.5
    world.submit("r2")
    assert world.runs() == {"b0": ["r1", "r2"]}  # full
    world.submit("r3")
    assert world.at(0.2) == 0.6
    world.at(0.6)
    assert world.runs()["b1"] == ["r3"]


def test_a_job_that_fills_a_forward_by_itself_waits_for_nobody() -> None:
    world = World(Policies(forward_batch_max=4, batch_window_s=0.5))
    world.base()
    world.submit("r1", n_images=3)
    assert world.runs() == {"b0": ["r1"]}


def test_of_a_failed_batch_each_job_is_tried_alone_so_that_only_the_guilty_one_fails() -> None:
    world = World(Policies(forward_batch_max=8))
    world.base()
    world.submit("r0")
    world.submit("good")
    world.submit("guilty")
    world.done()
    assert world.runs() == {"b0": ["good", "guilty"]}
    world.fail(reason="image cannot be decoded", is_retryable=False)
    assert world.runs() == {"b0": ["good"]}
    world.done()
    assert world.runs() == {"b0": ["guilty"]}
    world.fail(reason="image cannot be decoded", is_retryable=False)
    assert world.statuses() == {"done": 2, "failed": 1}


def test_jobs_of_a_failed_batch_that_were_done_are_done() -> None:
    world = World(Policies(forward_batch_max=8))
    world.base()
    for name in ("r0", "r1", "r2"):
        world.submit(name)
    world.done()
    world.fail(is_retryable=True, done=["r1"])
    assert world.status("r1") == "done"
    assert world.runs() == {"b0": ["r2"]}


def test_a_job_that_is_tried_again_is_not_taken_along_by_a_more_urgent_one() -> None:
    world = World(Policies(forward_batch_max=8, queue_order="priority"))
    world.base()
    world.submit("again")
    world.lose()
    world.submit("urgent", priority=5)
    world.base()
    assert world.runs() == {"b0": ["urgent"]}
    world.done()
    assert world.runs() == {"b0": ["again"]}


def test_a_name_that_is_used_again_has_the_deadline_of_its_new_job() -> None:
    world = World()
    world.base()
    world.submit("r1", deadline_s=5.0)
    world.done()
    world.outcomes.clear()
    world.submit("r1", deadline_s=50.0)
    world.at(5.0)
    assert world.outcomes == {}
    world.at(50.0)
    assert world.status("r1") == "expired"
