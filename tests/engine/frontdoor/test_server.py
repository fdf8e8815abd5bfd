"""The server's life and the operators' socket."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from engine.frontdoor.admin import Reload
from engine.frontdoor.admin_client import AdminClient
from engine.frontdoor.catalogue_access import CatalogueAccess
from engine.frontdoor.request_log import JsonLog
from engine.frontdoor.server import Server, ServerOptions
from engine.frontdoor.service import FrontConfig
from engine.frontdoor.settings import Defaults
from tests.engine.frontdoor.conftest import catalogue, run
from tests.engine.frontdoor.dispatcher_engine import DispatcherEngine
from traces.problems import InputError


@dataclass
class Running:
    server: Server
    url: str
    admin: AdminClient
    ended: asyncio.Task[bool]


@asynccontextmanager
async def running(engine: DispatcherEngine, folder: Path, **more: Any) -> AsyncIterator[Running]:
    """A whole server, signals included, until it has ended."""
    address: asyncio.Future[tuple[str, int]] = asyncio.get_running_loop().create_future()
    options = ServerOptions(port=0, admin=folder / "run" / "admin.sock", drain_s=20.0)
    server = Server(
        {"main": engine}, CatalogueAccess(catalogue()), JsonLog(io.StringIO()),
        FrontConfig(defaults=Defaults(64, 64, 2, 5.0, 20.0), default_model="tiny"), options,
        ready=lambda host, port: address.set_result((host, port)), **more,
    )  # fmt: skip
    ended = asyncio.create_task(server.run())
    try:
        await asyncio.wait({ended, address}, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            ended.result()
        host, port = address.result()
        yield Running(server, f"http://{host}:{port}", AdminClient(folder / "run" / "admin.sock"), ended)
    finally:
        if not ended.done():
            server.stop("the test is over", 1.0)
            server.stop("now", 0.0)
            await ended


async def ask(url: str, **fields: Any) -> tuple[int, Any]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/images/generations", json={"prompt": "a", "size": "64x64", **fields}) as answer,
    ):
        return answer.status, await answer.json()


def test_sigterm_lets_admitted_requests_end_and_admits_no_more(tmp_path: Path) -> None:
    async def test() -> None:
        engine = DispatcherEngine(service_s=0.3)
        async with running(engine, tmp_path) as one:
            asks = [asyncio.create_task(ask(one.url)) for _ in range(2)]  # one runs, one waits
            while len(engine.jobs) < 2:
                await asyncio.sleep(0.005)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.05)
            status, answer = await ask(one.url)
            assert (status, answer["error"]["code"]) == (503, "draining")
            assert [(await done)[0] for done in asks] == [200, 200]
            assert await asyncio.wait_for(one.ended, 10)
        assert not (tmp_path / "run" / "admin.sock").exists()

    run(test())


def test_a_second_signal_does_not_wait_and_open_requests_are_still_answered(tmp_path: Path) -> None:
    async def test() -> None:
        engine = DispatcherEngine(service_s=30)
        async with running(engine, tmp_path) as one:
            waiting = asyncio.create_task(ask(one.url))
            while not engine.jobs:
                await asyncio.sleep(0.005)
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(0.05)
            assert not await asyncio.wait_for(one.ended, 10)
            status, answer = await asyncio.wait_for(waiting, 10)
            assert (status, answer["error"]["code"]) == (503, "not_admitting")

    run(test())


def test_operators_apply_look_split_and_drain_through_a_socket_of_their_own(tmp_path: Path) -> None:
    async def test() -> None:
        engine = DispatcherEngine()
        async with running(engine, tmp_path) as one:
            socket_mode = stat.S_IMODE((tmp_path / "run" / "admin.sock").stat().st_mode)
            assert (socket_mode, stat.S_IMODE((tmp_path / "run").stat().st_mode)) == (0o600, 0o700)
            status = await one.admin.call("GET", "/admin/status")
            assert status["engines"]["main"]["workers"][0]["worker_id"] == "base-0"
            assert status["engines"]["main"]["status"] == "healthy"

            allocation = {
                "schema_version": 1,
                "pools": [{"name": "base", "role": "base", "n_replicas": 2, "gpu_kind": "cpu"}],
            }
            done = await one.admin.call("POST", "/admin/apply", {"allocation": allocation})
            assert done == {"engine": "main", "started": []}
            assert engine.applied[0].pools[0].n_replicas == 2
            with pytest.raises(InputError, match="got no base pool"):
                await one.admin.call("POST", "/admin/apply", {"allocation": {"schema_version": 1, "pools": []}})
            with pytest.raises(InputError, match="got 'b', needs one of"):
                await one.admin.call("POST", "/admin/apply", {"allocation": allocation, "engine": "b"})
            with pytest.raises(InputError, match="'path' is not a known field"):
                await one.admin.call("POST", "/admin/apply", {"path": "/etc/passwd"})

            sides = {"salt": "", "variants": [{"name": "x", "share": 1.0, "engine": "main", "add_ons": {}}]}
            assert await one.admin.call("PUT", "/admin/split", sides) == sides
            assert await one.admin.call("GET", "/admin/split") == sides
            assert (await ask(one.url))[1]["diffplan"]["variant"] == "x"
            with pytest.raises(InputError, match="add up to"):
                await one.admin.call("PUT", "/admin/split", {"variants": [{"name": "x", "share": 0.5}]})
            assert await one.admin.call("GET", "/admin/split") == sides

            assert (await one.admin.call("POST", "/admin/drain", {"timeout_s": 5}))["draining"]
            assert await asyncio.wait_for(one.ended, 10)

    run(test())


def test_reload_takes_a_new_catalogue_to_the_engine_and_a_broken_one_changes_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        files = {"catalogue": catalogue()}

        def read() -> Any:
            if files["catalogue"] is None:
                raise InputError([])  # type: ignore[arg-type]
            return files["catalogue"]

        engine = DispatcherEngine()
        async with running(engine, tmp_path, reload=Reload(catalogue=read)) as one:
            done = await one.admin.call("POST", "/admin/reload")
            assert done["catalogue_entries"] == len(catalogue().entries)
            assert done["engines"] == {"main": {"admitted": len(catalogue().entries)}}
            assert engine.admitted == [catalogue()]

    run(test())


def test_a_second_server_on_the_same_socket_is_refused_and_a_dead_ones_is_replaced(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(DispatcherEngine(), tmp_path):
            with pytest.raises(InputError, match="another engine listens there"):
                async with running(DispatcherEngine(), tmp_path):
                    pass
        import socket

        dead = socket.socket(socket.AF_UNIX)
        dead.bind(str(tmp_path / "run" / "admin.sock"))
        dead.close()
        async with running(DispatcherEngine(), tmp_path) as one:
            assert (await one.admin.call("GET", "/health"))["status"] == "healthy"

    run(test())


def test_an_admin_call_without_an_engine_is_a_sentence(tmp_path: Path) -> None:
    async def test() -> None:
        with pytest.raises(InputError, match="no engine listens"):
            await AdminClient(tmp_path / "none.sock").call("GET", "/admin/status")

    run(test())


@pytest.mark.parametrize(("host", "is_refused"), [("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True),  # noqa: S104
                                                  ("10.1.2.3", True), ("example.org", True)])  # fmt: skip
def test_other_machines_are_served_only_with_tokens_or_by_saying_so(host: str, is_refused: bool) -> None:
    from engine.frontdoor.server import check_exposure

    check_exposure(ServerOptions(host=host), has_tokens=True)
    check_exposure(ServerOptions(host=host, is_open_allowed=True), has_tokens=False)
    if is_refused:
        with pytest.raises(InputError, match="--tenants"):
            check_exposure(ServerOptions(host=host), has_tokens=False)
    else:
        check_exposure(ServerOptions(host=host), has_tokens=False)


def test_without_tokens_only_calls_under_a_local_name_are_answered(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(DispatcherEngine(), tmp_path) as one, aiohttp.ClientSession() as session:
            port = one.url.rpartition(":")[2]
            for host, status in (("localhost", 200), (f"127.0.0.1:{port}", 200), (f"[::1]:{port}", 200),
                                 (f"evil.example:{port}", 403), ("127.0.0.1.evil.example", 403), ("[", 403)):  # fmt: skip
                async with session.get(f"{one.url}/health", headers={"Host": host}) as answer:
                    assert answer.status == status, host

    run(test())


def test_a_port_that_is_taken_is_a_sentence(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(DispatcherEngine(), tmp_path) as one:
            port = int(one.url.rpartition(":")[2])
            server = Server({"main": DispatcherEngine()}, CatalogueAccess(catalogue()), JsonLog(io.StringIO()), FrontConfig(),
                            ServerOptions(port=port))  # fmt: skip
            with pytest.raises(InputError, match=r"cannot listen on 127\.0\.0\.1"):
                await server.run()

    run(test())


def test_the_log_outlives_a_stream_that_fails() -> None:
    log = JsonLog(io.StringIO())
    log.write({"a": "line\nbreak\x1b[31m\ud800"})
    text = log._stream.getvalue()  # type: ignore[attr-defined]
    assert text.count("\n") == 1
    assert json.loads(text) == {"a": "line\nbreak\x1b[31m\ud800"}
    closed = io.StringIO()
    closed.close()
    lost = JsonLog(closed)
    lost.write({})
    assert lost.n_lost == 1
