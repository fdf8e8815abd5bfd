"""LoRAs on their way to running jobs, and the host tier that holds them; time and workers are made up."""

from __future__ import annotations

from engine.allocation import GIB, Policies, Pool
from engine.serving.dispatcher import DispatchLimits
from tests.engine.serving.fakes import World


def test_denoising_starts_while_a_lora_is_fetched_once_for_all_who_want_it() -> None:
    world = World()
    world.base("b0")
    world.base("b1")
    world.submit("r1", loras=("l",))
    world.submit("r2", loras=("l", "l"))
    assert world.fetches == ["l"]
    assert [start.lora_paths for start in world.started] == [{"l": None}] * 2
    assert world.started[0].patch_by_step == 10
    world.dispatcher.lora_fetched("l", "/host/l", 100)
    assert world.ready == [("b0", "l", "/host/l"), ("b1", "l", "/host/l")]
    world.done("b0")
    world.done("b1")
    world.submit("r3", loras=("l",))
    assert world.started[-1].lora_paths == {"l": "/host/l"}
    world.done("b0")
    assert [world.outcomes[name].n_lora_misses for name in ("r1", "r2", "r3")] == [1, 1, 0]
    snapshot = world.dispatcher.snapshot()
    assert (snapshot.n_lora_hits, snapshot.n_lora_misses, snapshot.lora_cache_bytes) == (1, 2, 100)


def test_the_patch_lands_before_the_last_step_of_a_short_job() -> None:
    world = World()
    world.base()
    world.submit("r1", loras=("l",), n_steps=4)
    assert world.started[-1].patch_by_step == 3


def test_the_host_tier_drops_what_was_used_longest_ago_but_nothing_that_a_job_uses() -> None:
    world = World(lora_cache_bytes=250)
    world.base("b0")
    world.base("b1")
    for name in ("a", "b"):
        world.submit(f"uses-{name}", loras=(name,))
        world.dispatcher.lora_fetched(name, f"/host/{name}", 100)
    world.done("b1")  # b is free, a is in use
    world.submit("uses-c", loras=("c",))
    world.dispatcher.lora_fetched("c", "/host/c", 100)
    assert world.dropped == ["b"]
    world.done("b1")
    world.submit("uses-d", loras=("d",))
    world.dispatcher.lora_fetched("d", "/host/d", 240)  # beside a there is no room: it stays while it is used
    assert world.dropped == ["b", "c"]
    assert world.dispatcher.snapshot().lora_cache_bytes == 340
    world.done("b1")
    assert world.dropped == ["b", "c", "d"]


def test_the_host_tier_drops_what_was_used_least_often_if_the_policy_says_so() -> None:
    world = World(Policies(lora_cache_policy="lfu"), lora_cache_bytes=200)
    world.base()
    for number, name in enumerate(["often", "often", "once", "new"]):
        world.submit(f"r{number}", loras=(name,))
        if name in world.fetches:
            world.dispatcher.lora_fetched(name, f"/host/{name}", 100)
        world.done()
    assert world.dropped == ["once"]


def test_the_host_tier_drops_what_was_not_used_for_its_time_if_the_policy_says_so() -> None:
    world = World(Policies(lora_cache_policy="ttl", lora_cache_ttl_s=10.0))
    world.base()
    world.submit("r1", loras=("l",))
    world.dispatcher.lora_fetched("l", "/host/l", 100)
    world.at(15.0)
    assert world.dropped == []  # it is in use
    world.done()
    assert world.dropped == ["l"]
    world.submit("r2", loras=("l",))
    world.dispatcher.lora_fetched("l", "/host/l", 100)
    world.done()
    assert world.at(20.0) == 25.0
    world.at(25.0)
    assert world.dropped == ["l", "l"]


def test_replicas_share_one_host_tier_as_large_as_the_host_allows() -> None:
    world = World(Policies(lora_cache_gib=2.0), (Pool("base", "base", 3, "cpu"),))
    assert world.dispatcher.loras.capacity_bytes == 6 * GIB
    world.dispatcher.limit_lora_cache(5 * GIB)
    world.dispatcher.set_allocation((Pool("base", "base", 1, "cpu"),), Policies(lora_cache_gib=2.0))
    assert world.dispatcher.loras.capacity_bytes == 2 * GIB
    world.dispatcher.set_allocation((Pool("base", "base", 9, "cpu"),), Policies(lora_cache_gib=2.0))
    assert world.dispatcher.loras.capacity_bytes == 5 * GIB


def test_a_refused_lora_ends_waiting_jobs_rejects_later_ones_and_fails_the_running_one() -> None:
    world = World()
    world.base()
    world.submit("r1", loras=("bad",))
    world.submit("r2", loras=("bad",))
    world.submit("r3", loras=("good",))
    world.dispatcher.lora_refused("bad", "holds NaN", is_final=True)
    assert world.refused == [("b0", "bad")]
    assert (world.outcomes["r2"].status, world.outcomes["r2"].code) == ("failed", "lora_refused")
    world.fail(reason="no LoRA", is_retryable=False)
    assert (world.outcomes["r1"].status, world.outcomes["r1"].code) == ("failed", "lora_refused")
    world.submit("r4", loras=("bad",))
    assert (world.outcomes["r4"].status, world.outcomes["r4"].code) == ("rejected", "lora_refused")
    assert "holds NaN" in world.outcomes["r4"].reason
    assert world.runs() == {"b0": ["r3"]}
    world.dispatcher.lora_pardoned("bad")
    world.submit("r5", loras=("bad",))
    assert "r5" not in world.outcomes


def test_a_fetch_that_failed_for_now_gives_its_job_one_more_attempt() -> None:
    world = World()
    world.base()
    world.submit("r1", loras=("l",))
    world.dispatcher.lora_refused("l", "store is down", is_final=False)
    world.fail(reason="LoRA did not come", is_retryable=False)
    assert world.fetches == ["l", "l"]
    assert world.started[-1].attempt == 2
    world.dispatcher.lora_refused("l", "store is down", is_final=False)
    world.fail(reason="LoRA did not come", is_retryable=False)
    assert world.status("r1") == "failed"
    assert "LoRA l could not be fetched" in world.outcomes["r1"].reason


def test_a_loader_that_never_answers_counts_as_a_failed_fetch() -> None:
    world = World(limits=DispatchLimits(fetch_limit_s=20.0))
    world.base()
    world.submit("r1", loras=("l",))
    assert world.at(0.0) == 20.0
    world.at(20.0)
    assert world.refused == [("b0", "l")]


def test_a_request_whose_lora_is_not_there_lets_as_many_plain_ones_pass_as_the_policy_says() -> None:
    world = World(Policies(overtake_max=2, lora_prefetch_depth=4))
    world.base()
    world.submit("r0")
    world.submit("slow", loras=("l",))
    for number in range(1, 4):
        world.submit(f"r{number}")
    assert world.fetches == ["l"]  # while it waits
    for _ in range(4):
        world.done()
    assert world.order() == ["r0", "r1", "r2", "slow", "r3"]


def test_without_the_policy_nobody_is_passed_and_nothing_is_fetched_before_its_turn() -> None:
    world = World()
    world.base()
    world.submit("r0")
    world.submit("slow", loras=("l",))
    world.submit("r1")
    assert world.fetches == []
    world.done()
    world.done()
    assert world.order() == ["r0", "slow", "r1"]
    assert world.fetches == ["l"]


def test_an_idle_replica_does_not_wait_for_a_lora() -> None:
    world = World(Policies(overtake_max=5))
    world.base()
    world.submit("slow", loras=("l",))
    assert world.runs() == {"b0": ["slow"]}


def test_a_host_tier_that_is_too_small_for_those_in_line_is_not_fetched_into_without_end() -> None:
    world = World(Policies(lora_prefetch_depth=8), lora_cache_bytes=100)
    world.base()
    world.submit("r0")
    world.submit("r1", loras=("a",))
    world.submit("r2", loras=("b",))
    assert world.fetches == ["a", "b"]
    for _ in range(5):
        for name in ("a", "b"):
            world.dispatcher.lora_fetched(name, f"/host/{name}", 100)
        world.dispatcher.tick()
    assert world.fetches == ["a", "b"]
