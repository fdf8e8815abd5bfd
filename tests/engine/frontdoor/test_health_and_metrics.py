"""Health follows the work; metrics are what Prometheus reads, with bounded labels."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from engine.frontdoor.health import DoneWatch, HealthLimits, engine_health, worst
from engine.frontdoor.metrics import ADD_ON_LABELS_MAX, FrontMetrics
from engine.frontdoor.request_log import RequestTrail
from engine.frontdoor.tenants import Tenant, hash_token
from engine.serving.engine_view import EngineView, WorkerView
from engine.serving.job import Job, LoraUse
from engine.serving.ports import DispatchSnapshot
from tests.engine.frontdoor.conftest import Door, OpenDoor, run
from tests.engine.frontdoor.dispatcher_engine import DispatcherEngine


def snapshot(n_waiting: int = 0, n_done: int = 0) -> DispatchSnapshot:
    return DispatchSnapshot(n_waiting, 0, {"base": n_waiting}, 0.0, 0, {"done": n_done}, 0, 3, 1, 10, {})


def view(*workers: WorkerView, wanted: Mapping[str, int] | None = None, **more: Any) -> EngineView:
    return EngineView(workers, snapshot(), wanted if wanted is not None else {"base": 1}, **more)


BASE = WorkerView("base-0", "base", "base", "ready")
NETS = WorkerView("nets-0", "nets", "controlnet", "ready")


def judged(*workers: WorkerView, done_age_s: float = 0.0, **more: Any) -> tuple[str, bool, list[str]]:
    """Status, readiness and all reasons."""
    health = engine_health(view(*workers, **more), done_age_s, HealthLimits(60, 180))
    return (
        health.status,
        health.is_ready,
        [*health.reasons, *(r for pool in health.pools.values() for r in pool.reasons)],
    )


def test_an_allocation_that_runs_whole_is_healthy() -> None:
    assert judged(BASE, NETS, wanted={"base": 1, "nets": 1}) == ("healthy", True, [])


def test_a_part_that_is_missing_degrades_and_is_named() -> None:
    down = WorkerView("nets-0", "nets", "controlnet", "restarting", reason="killed by signal 9")
    assert judged(BASE, down, wanted={"base": 1, "nets": 1}) == (
        "degraded",
        True,
        ["nets-0 is restarting: killed by signal 9"],
    )
    loader = WorkerView("loaders-0", "loaders", "loader", "restarting")
    assert judged(BASE, loader) == ("degraded", True, ["loaders-0 is restarting"])
    assert judged(BASE, wanted={"base": 2}) == ("degraded", True, ["1 of 2 replicas have not been started"])


def test_without_a_base_worker_nothing_works() -> None:
    starting = WorkerView("base-0", "base", "base", "starting")
    assert judged(starting, NETS, wanted={"base": 1, "nets": 1}) == (
        "unhealthy", False, ["no base worker is ready", "base-0 is starting"],
    )  # fmt: skip


def test_a_worker_that_stands_still_while_busy_does_not_count() -> None:
    stuck = WorkerView("base-0", "base", "base", "ready", is_busy=True, progress_age_s=61)
    assert judged(stuck)[:2] == ("unhealthy", False)
    slow = WorkerView("base-0", "base", "base", "ready", is_busy=True, progress_age_s=59)
    assert judged(slow)[:2] == ("healthy", True)


def test_requests_that_wait_while_none_is_done_make_it_unhealthy() -> None:
    watch = DoneWatch()
    seen = [
        watch.look(EngineView((), snapshot(n_waiting, n_done), {}), now_s)
        for n_waiting, n_done, now_s in [
            (0, 0, 0),
            (1, 0, 500),
            (1, 0, 600),
            (1, 1, 650),
            (1, 1, 700),
            (0, 1, 800),
            (1, 1, 801),
        ]
    ]
    assert seen == [0, 0, 100, 0, 50, 0, 0]
    assert judged(BASE, done_age_s=181)[0] == "unhealthy"


def test_a_draining_engine_is_not_ready_though_healthy() -> None:
    assert judged(BASE, is_admitting=False)[:2] == ("healthy", False)


def test_the_worst_of_several_engines_counts() -> None:
    assert worst(["healthy", "degraded"]) == "degraded"
    assert worst([]) == "healthy"


async def get(door: Door, path: str, token: str = "") -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with door.session.get(door.url + path, headers=headers) as answer:
        return answer.status, await (answer.json() if answer.content_type == "application/json" else answer.text())


def test_health_turns_when_the_worker_is_lost_and_turns_back(open_door: OpenDoor) -> None:
    async def test() -> None:
        engine = DispatcherEngine()
        async with open_door(engine) as door:
            assert (await get(door, "/health"))[1]["status"] == "healthy"
            assert (await get(door, "/health/ready")) == (200, {"ready": True})
            engine.down("base-0")
            status, body = await get(door, "/health")
            assert (status, body["status"], body["ready"]) == (503, "unhealthy", False)
            assert "no base worker is ready" in body["engines"]["main"]["reasons"]
            assert (await get(door, "/health/ready"))[0] == 503
            assert (await get(door, "/health/live")) == (200, {"live": True})
            engine.up("base-0")
            assert (await get(door, "/health"))[0] == 200

    run(test())


def test_with_tokens_strangers_learn_the_status_and_no_more(open_door: OpenDoor) -> None:
    async def test() -> None:
        async with open_door(tenants=(Tenant("a", (hash_token("t"),)),)) as door:
            assert (await get(door, "/health"))[1] == {"status": "healthy", "ready": True}
            assert (await get(door, "/metrics"))[0] == 401
            assert "engines" in (await get(door, "/health", "t"))[1]
            assert (await get(door, "/metrics", "t"))[0] == 200

    run(test())


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Name and labels to value."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


def test_metrics_count_what_happened(open_door: OpenDoor) -> None:
    async def test() -> None:
        engine = DispatcherEngine(service_s=0.05)
        async with open_door(engine) as door:
            await door.ask(n=2, loras=[{"id": "ink"}])
            await door.ask(steps=0)
            asks = [asyncio.create_task(door.ask()) for _ in range(3)]
            while len(engine.jobs) < 4:
                await asyncio.sleep(0.005)
            text = (await get(door, "/metrics"))[1]
            await asyncio.gather(*asks)
        found = samples(text)
        main = ("engine", "main")
        worker = (main, ("pool", "base"), ("role", "base"), ("worker", "base-0"))
        assert found["diffplan_http_requests_total", (("code", ""), ("status", "200"), ("variant", "main"))] == 1
        assert (
            found["diffplan_http_requests_total", (("code", "invalid_value"), ("status", "400"), ("variant", ""))] == 1
        )
        assert found["diffplan_images_total", ()] == 2
        assert found["diffplan_queue_depth", (main, ("pool", "base"))] == 2
        assert found["diffplan_jobs_running", (main,)] == 1
        assert found["diffplan_jobs_ended_total", (main, ("status", "done"))] == 1
        assert found["diffplan_lora_cache_misses_total", (main,)] == 1
        assert found["diffplan_worker_busy_seconds_total", worker] == 0.05
        assert found["diffplan_worker_ready", worker] == 1
        assert found["diffplan_engine_health", (main,)] == 2
        assert found["diffplan_add_on_uses_total", (("add_on", "ink@1"), ("kind", "lora"))] == 1
        assert found["diffplan_stage_seconds_count", (("stage", "denoise"), ("status", "done"))] == 1
        assert found["diffplan_stage_seconds_sum", (("stage", "denoise"), ("status", "done"))] == 0.05
        assert found["diffplan_request_seconds_count", (("status", "done"),)] == 1
        assert found["diffplan_request_seconds_count", (("status", "refused"),)] == 1
        assert found["diffplan_http_open_requests", ()] == 3

    run(test())


def test_labels_of_add_ons_are_bounded_by_the_catalogue_and_by_number() -> None:
    metrics = FrontMetrics(dict, dict)
    metrics.know(("lora", f"id-{number}", f"style-{number}") for number in range(200))
    for number in range(200):
        trail = RequestTrail("r", "/", 0.0, job=Job("r", loras=(LoraUse(f"id-{number}"),)))
        metrics.observe(trail, 1.0)
    found = {labels: value for (name, labels), value in samples(metrics.exposition(0, 0).decode()).items()
             if name == "diffplan_add_on_uses_total" and ("kind", "lora") in labels}  # fmt: skip
    assert len(found) == ADD_ON_LABELS_MAX + 1
    assert found[(("add_on", "style-0"), ("kind", "lora"))] == 1
    assert found[(("add_on", "other"), ("kind", "lora"))] == 200 - ADD_ON_LABELS_MAX
