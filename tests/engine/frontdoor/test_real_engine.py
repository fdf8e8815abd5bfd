"""The whole path over loopback HTTP with real processes: front door, dispatcher, featherweight workers."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp

from engine.allocation import Allocation, Policies, Pool
from engine.catalogue import Catalogue, CatalogueEntry
from engine.frontdoor.admin import Reload
from engine.frontdoor.admin_client import AdminClient
from engine.frontdoor.builtin import DEFAULTS, builtin_catalogue
from engine.frontdoor.catalogue_access import CatalogueAccess
from engine.frontdoor.request_log import JsonLog
from engine.frontdoor.server import Server, ServerOptions
from engine.frontdoor.service import FrontConfig
from engine.serving.engine import Engine
from engine.serving.job import ControlUse, Job, LoraUse
from engine.serving.settings import Bounds, EngineSettings
from engine.workers.featherweight_arithmetic import reference_images
from tests.engine.frontdoor.conftest import run
from tests.engine.frontdoor.dispatcher_engine import png

BOUNDS = Bounds(
    heartbeat_s=0.1, silence_s=1.0, hello_s=30.0, load_s=20.0, step_s=5.0, decode_s=5.0, fetch_s=5.0, ready_s=30.0, line_s=2.0,
    lora_wait_s=8.0, stop_s=3.0, drain_s=10.0, backoff_first_s=0.02, backoff_max_s=0.3, healthy_s=0.5, reattach_s=0.02,
)  # fmt: skip


def allocation(n_bases: int = 1, n_controlnets: int = 1, **policies: Any) -> Allocation:
    base = Pool("base", "base", n_bases, "cpu", topology="decoupled", controlnet_ids=())
    nets = Pool("nets", "controlnet", n_controlnets, "cpu", topology="decoupled", controlnet_ids=("canny", "depth"))
    return Allocation((base, nets), policies=Policies(lora_patch_by_step=3, **policies))


@dataclass
class Service:
    """A running service and its clients."""

    engine: Engine
    server: Server
    session: aiohttp.ClientSession
    url: str
    admin: AdminClient
    catalogue: dict[str, Catalogue]

    async def ask(self, **fields: Any) -> tuple[int, Any, Any]:
        body = {"prompt": "a lighthouse", **fields}
        async with self.session.post(f"{self.url}/v1/images/generations", json=body) as answer:
            return answer.status, await answer.json(), answer.headers

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(self.url + path) as answer:
            return answer.status, await answer.json()

    def pid(self, worker_id: str) -> int:
        return next(worker.pids[0] for worker in self.engine.view().workers if worker.worker_id == worker_id)


@asynccontextmanager
async def service(folder: Path, plan: Allocation, step_s: float = 0.0) -> AsyncIterator[Service]:
    address: asyncio.Future[tuple[str, int]] = asyncio.get_running_loop().create_future()
    files = {"catalogue": builtin_catalogue()}
    settings = EngineSettings(folder / "run", "featherweight", bounds=BOUNDS, options={"step_s": step_s})
    engine = Engine(plan, settings, files["catalogue"])
    server = Server(
        {"main": engine}, CatalogueAccess(files["catalogue"]), JsonLog(io.StringIO()),
        FrontConfig(defaults=DEFAULTS["featherweight"]), ServerOptions(port=0, admin=folder / "admin.sock", drain_s=20.0),
        reload=Reload(catalogue=lambda: files["catalogue"]), ready=lambda *where: address.set_result(where),
    )  # fmt: skip
    ended = asyncio.create_task(server.run())
    await asyncio.wait({ended, address}, return_when=asyncio.FIRST_COMPLETED)
    if ended.done():
        ended.result()
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            host, port = address.result()
            yield Service(engine, server, session, f"http://{host}:{port}", AdminClient(folder / "admin.sock"), files)
    finally:
        server.stop("the test is over", 5.0)
        await ended


async def until(is_so: Any, limit_s: float = 20.0) -> None:
    """Waits until a condition holds, or fails."""
    async with asyncio.timeout(limit_s):
        while not is_so():
            await asyncio.sleep(0.02)


def test_a_request_with_add_ons_gets_exactly_the_image_of_its_job(tmp_path: Path) -> None:
    async def test() -> None:
        async with service(tmp_path, allocation()) as one:
            control = png(64, 64, 5)
            status, answer, _ = await one.ask(
                seed=3, steps=6, n=2, guidance_scale=2.0, loras=[{"id": "ink", "scale": 0.5}],
                controlnets=[{"id": "depth", "image": base64.b64encode(control).decode(), "scale": 0.75, "end": 0.6}],
            )  # fmt: skip
            assert status == 200, answer
            job = Job(
                answer["diffplan"]["request_id"], "default", "a lighthouse", n_images=2, n_steps=6, width_px=64, height_px=64,
                guidance_scale=2.0, controls=(ControlUse("depth", 0.75, 0.0, 0.6, 0),), loras=(LoraUse("ink-1", 0.5),), seed=3,
                deadline_s=120.0, variant="main", blobs=(control,),
            )  # fmt: skip
            expected = reference_images(job, answer["diffplan"]["lora_patch_step"])
            assert [base64.b64decode(item["b64_json"]) for item in answer["data"]] == list(expected)

    run(test())


def test_ten_times_too_much_is_answered_with_images_in_time_or_429(tmp_path: Path) -> None:
    async def test() -> None:
        # 5 steps of 4 ms: one worker does at most 50 a second; 200 in 0.4 s are ten times that.
        async with service(tmp_path, allocation(queue_limit=8), step_s=0.004) as one:
            answers = []

            async def ask(at_s: float) -> None:
                await asyncio.sleep(at_s)
                answers.append(await one.ask(steps=5, deadline_s=10))

            await asyncio.gather(*(ask(number * 0.002) for number in range(200)))
            counts = Counter(status for status, _, _ in answers)
            assert set(counts) == {200, 429}, counts
            assert counts[200] >= 9  # one runs, eight wait: those are never turned away
            assert all("Retry-After" in headers for status, _, headers in answers if status == 429)
            snapshot = one.engine.view().dispatch
            assert (snapshot.n_submitted, snapshot.n_ended["done"]) == (200, counts[200])
            assert (snapshot.n_waiting, snapshot.n_running) == (0, 0)

    run(test())


def test_health_turns_when_a_worker_is_stopped_and_turns_back_when_it_is_replaced(tmp_path: Path) -> None:
    async def test() -> None:
        async with service(tmp_path, allocation()) as one:
            assert (await one.get("/health"))[1]["status"] == "healthy"
            pid = one.pid("base-0")
            os.kill(pid, signal.SIGSTOP)
            await until(lambda: one.engine.view().workers[0].state != "ready")
            status, body = await one.get("/health")
            assert (status, body["status"], body["ready"]) == (503, "unhealthy", False)
            assert "no base worker is ready" in body["engines"]["main"]["reasons"]
            await until(lambda: one.engine.view().workers[0].state == "ready")
            assert (await one.get("/health"))[1]["status"] == "healthy"
            assert one.pid("base-0") != pid
            assert (await one.ask())[0] == 200

    run(test())


def test_a_request_survives_the_death_of_its_worker(tmp_path: Path) -> None:
    async def test() -> None:
        async with service(tmp_path, allocation(), step_s=0.05) as one:
            waiting = asyncio.create_task(one.ask(steps=20))
            await until(lambda: one.engine.view().dispatch.n_running == 1)
            os.kill(one.pid("base-0"), signal.SIGKILL)
            status, answer, _ = await waiting
            assert status == 200, answer
            assert one.engine.view().dispatch.n_retried == 1

    run(test())


def test_deadlines_and_clients_that_go_free_the_worker(tmp_path: Path) -> None:
    async def test() -> None:
        async with service(tmp_path, allocation(), step_s=0.1) as one:
            status, answer, _ = await one.ask(steps=100, deadline_s=0.3)
            assert (status, answer["error"]["code"]) == (504, "deadline")
            gone = asyncio.create_task(one.ask(steps=100))
            await until(lambda: one.engine.view().dispatch.n_running == 1)
            gone.cancel()
            assert (await one.ask(steps=1, deadline_s=5))[0] == 200  # 100 steps of 0.1 s would have taken longer

    run(test())


def test_apply_adds_and_removes_workers_and_the_others_keep_their_processes(tmp_path: Path) -> None:
    async def test() -> None:
        async with service(tmp_path, allocation(), step_s=0.002) as one:
            pids = {name: one.pid(name) for name in ("base-0", "nets-0")}
            stop = asyncio.Event()
            statuses: list[int] = []

            async def keep_asking() -> None:
                while not stop.is_set():
                    statuses.append((await one.ask(steps=4))[0])

            asking = asyncio.create_task(keep_asking())
            from dataclasses import asdict

            for n_bases in (2, 1):
                done = await one.admin.call("POST", "/admin/apply", {"allocation": asdict(allocation(n_bases))})
                assert done["not_ready"] == {}
                assert {name: one.pid(name) for name in pids} == pids
            stop.set()
            await asking
            assert set(statuses) == {200}
            state = await one.admin.call("GET", "/admin/status")
            assert [worker["worker_id"] for worker in state["engines"]["main"]["workers"]] == [
                "base-0",
                "nets-0",
                "loaders-0",
            ]

    run(test())


def test_a_lora_is_admitted_while_serving(tmp_path: Path) -> None:
    async def test() -> None:
        async with service(tmp_path, allocation()) as one:
            assert (await one.ask(loras=[{"id": "new"}]))[0] == 404
            before = one.catalogue["catalogue"]
            entry = CatalogueEntry("new-1", "lora", name="new", version="1", file="seed:9")
            one.catalogue["catalogue"] = replace(before, entries={**before.entries, entry.id: entry})
            done = await one.admin.call("POST", "/admin/reload")
            assert done["engines"]["main"]["admitted"] == ["new-1"]
            assert (await one.ask(loras=[{"id": "new"}]))[0] == 200

    run(test())
