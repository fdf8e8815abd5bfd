"""What the dispatcher makes of workers that are lost, drain, or serve ControlNets; time and workers are made up."""

from __future__ import annotations

from engine.allocation import Policies, Pool
from tests.engine.serving.fakes import World

# failures


def test_a_lost_worker_gives_its_job_one_more_attempt_ahead_of_younger_jobs() -> None:
    world = World()
    world.base("b0")
    world.submit("r1")
    world.submit("r2")
    world.base("b1")
    world.submit("r3")
    world.lose("b0")
    world.done("b1")
    assert world.runs() == {"b1": ["r1"]}
    assert world.started[-1].attempt == 2
    world.lose("b1", reason="killed again")
    outcome = world.outcomes["r1"]
    assert (outcome.status, outcome.code, outcome.n_attempts) == ("failed", "worker_lost", 2)
    assert "killed again" in outcome.reason
    assert world.dispatcher.snapshot().n_retried == 1


def test_no_second_attempt_where_it_would_end_after_the_deadline() -> None:
    world = World()
    world.base()
    world.submit("r0")
    world.now_s = 4.0
    world.done()  # a job takes 4 s
    world.submit("r1", deadline_s=5.0)
    world.now_s = 6.0
    world.lose()
    assert (world.outcomes["r1"].status, world.outcomes["r1"].code) == ("failed", "worker_lost")


def test_a_job_that_is_at_fault_itself_fails_at_once_and_the_replica_goes_on() -> None:
    world = World()
    world.base()
    world.submit("r1")
    world.submit("r2")
    world.fail(reason="size does not fit", is_retryable=False)
    outcome = world.outcomes["r1"]
    assert (outcome.status, outcome.code, outcome.reason) == ("failed", "job_error", "size does not fit")
    assert world.runs() == {"b0": ["r2"]}


def test_a_lost_peer_gives_one_more_attempt_on_the_same_replica() -> None:
    world = World()
    world.base()
    world.submit("r1")
    world.fail(reason="peer lost", is_retryable=True)
    assert world.runs() == {"b0": ["r1"]}
    world.fail(reason="peer lost", is_retryable=True)
    assert world.status("r1") == "failed"


def test_a_report_on_a_batch_that_was_given_up_is_ignored() -> None:
    world = World()
    world.base()
    world.submit("r1")
    late = world.running["b0"]
    world.lose()
    world.outcomes.clear()
    world.base()
    world.done()
    assert world.outcomes["r1"].n_attempts == 2
    world.submit("r2")
    world.dispatcher.batch_failed("b0", {late.jobs[0].request_id: "late"}, is_retryable=True, done={})
    assert world.runs() == {"b0": ["r2"]}
    assert not world.dispatcher.is_idle("b0")


def test_cancelling_ends_a_waiting_job_and_asks_the_replica_of_a_running_one_to_stop() -> None:
    world = World()
    world.base()
    world.submit("r1")
    world.submit("r2")
    assert world.dispatcher.cancel("r2")
    assert world.dispatcher.cancel("r1")
    assert not world.dispatcher.cancel("r1")
    assert not world.dispatcher.cancel("unknown")
    assert {outcome.code for outcome in world.outcomes.values()} == {"cancelled"}
    assert world.cancelled == [("b0", "r1")]
    world.fail(reason="cancelled", is_retryable=False)
    assert world.dispatcher.is_idle("b0")


# draining


def test_a_draining_replica_finishes_its_job_and_gets_no_other() -> None:
    world = World()
    world.base()
    world.submit("r1")
    world.dispatcher.base_draining("b0")
    world.submit("r2")
    assert not world.dispatcher.is_idle("b0")
    world.done()
    assert world.dispatcher.is_idle("b0")
    assert world.runs() == {}
    world.base("b1")
    assert world.runs() == {"b1": ["r2"]}


def test_after_admission_stops_jobs_are_rejected_and_those_inside_end() -> None:
    world = World()
    world.base()
    world.submit("r1")
    world.submit("r2")
    world.dispatcher.stop_admitting("shutting down")
    world.submit("r3")
    assert (world.outcomes["r3"].code, world.outcomes["r3"].reason) == ("not_admitting", "shutting down")
    world.done()
    world.done()
    assert world.statuses() == {"rejected": 1, "done": 2}


def test_another_allocation_ends_waiting_jobs_that_nobody_could_serve_any_more() -> None:
    pool = Pool("base", "base", 1, "cpu", base_model_ids=("a", "b"))
    world = World(pools=(pool,))
    world.base()
    for name, checkpoint in (("r0", "a"), ("r1", "a"), ("r2", "b")):
        world.submit(name, base_model_id=checkpoint)
    world.dispatcher.set_allocation((Pool("base", "base", 1, "cpu", base_model_ids=("b",)),), Policies())
    assert (world.outcomes["r1"].status, world.outcomes["r1"].code) == ("failed", "unservable")
    world.done()
    assert world.runs() == {"b0": ["r2"]}


# ControlNet workers


def test_controlnets_go_to_attached_workers_that_host_them_the_least_loaded_first() -> None:
    world = World()
    for base in ("b0", "b1", "b2"):
        world.base(base)
    world.controlnet("c0", ("canny", "depth"), ("b0", "b1"))
    world.controlnet("c1", ("canny",), ("b0", "b1"))
    world.submit("r1", controls=("depth",))
    assert world.started[-1].controlnet_workers == ({"depth": "c0"},)
    world.submit("r2", controls=("canny",))
    assert world.started[-1].controlnet_workers == ({"canny": "c1"},)
    world.submit("r3", controls=("canny",))  # b2 reaches no worker
    assert world.dispatcher.snapshot().n_waiting == 1
    world.dispatcher.attached("b2", "c0")
    assert world.runs()["b2"] == ["r3"]
    assert not world.dispatcher.is_idle("c0")
    world.done("b0")
    world.done("b2")
    assert world.dispatcher.is_idle("c0")
    assert not world.dispatcher.is_idle("c1")


def test_among_equally_loaded_workers_one_that_holds_the_controlnet_is_chosen() -> None:
    world = World()
    world.base()
    world.controlnet("c0")
    world.controlnet("c1", resident=("canny",))
    world.submit("r1", controls=("canny",))
    assert world.started[-1].controlnet_workers == ({"canny": "c1"},)


def test_each_half_of_a_guided_job_has_a_worker_of_its_own_where_there_are_two_and_shares_one_where_not() -> None:
    world = World()
    world.base(topology="decoupled_cfg2")
    world.controlnet("c0")
    world.submit("r1", controls=("canny", "depth"))
    assert world.started[-1].controlnet_workers == ({"canny": "c0", "depth": "c0"},) * 2
    world.done()
    world.controlnet("c1")
    world.submit("r2", controls=("canny", "depth"))
    assert world.started[-1].controlnet_workers == (
        {"canny": "c0", "depth": "c0"},
        {"canny": "c1", "depth": "c1"},
    )
    world.submit("r3", controls=("canny",), guidance_scale=1.0)  # the first rank works alone
    world.done()
    assert world.started[-1].controlnet_workers == ({"canny": "c0"},) * 2


def test_a_draining_or_lost_or_detached_controlnet_worker_gets_nothing_and_plain_jobs_are_not_held_up() -> None:
    world = World()
    world.base()
    world.controlnet("c0")
    world.controlnet("c1")
    world.controlnet("c2")
    world.dispatcher.controlnet_draining("c0")
    world.dispatcher.controlnet_down("c1", "killed")
    world.dispatcher.detached("b0", "c2")
    world.submit("r1", controls=("canny",))
    world.submit("r2")
    assert world.runs() == {"b0": ["r2"]}
    world.done()
    world.controlnet("c1")
    assert world.started[-1].controlnet_workers == ({"canny": "c1"},)


def test_what_runs_in_process_needs_no_controlnet_worker_and_waits_for_its_loras_before_the_first_step() -> None:
    world = World()
    world.base(topology="colocated", controlnet_ids=("canny",))
    world.submit("r1", controls=("canny",), loras=("l",))
    start = world.started[-1]
    assert start.controlnet_workers == ({},)
    assert start.patch_by_step == 0


def test_batches_that_share_a_controlnet_worker_at_the_same_time_say_so_and_others_do_not() -> None:
    pools = [Pool("base", "base", 2, "any", topology="decoupled", controlnet_ids=())]
    pools += [Pool(name, "controlnet", 1, "any", controlnet_ids=(name,)) for name in ("a", "b")]
    world = World(pools=pools)
    for name in ("b0", "b1"):
        world.base(name)
    world.controlnet("c0", ids=["a"], bases=["b0", "b1"])
    world.controlnet("c1", ids=["b"], bases=["b0", "b1"])
    world.submit("first", controls=["a"])
    world.submit("beside it", controls=["b"])
    world.done("b1")
    world.submit("later", controls=["a"])
    world.done("b0")
    world.submit("after it", controls=["b"])
    for worker in ("b0", "b1"):
        world.done(worker)
    had_company = {name: outcome.had_company for name, outcome in world.outcomes.items()}
    assert had_company == {"first": True, "beside it": False, "later": True, "after it": False}
