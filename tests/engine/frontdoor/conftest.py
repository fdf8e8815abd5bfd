"""A front door on a free loopback port, called as clients call it."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest

from engine.catalogue import Catalogue, catalogue_from_plain
from engine.frontdoor.app import make_app
from engine.frontdoor.catalogue_access import CatalogueAccess
from engine.frontdoor.listener import Listener
from engine.frontdoor.port import ServingEngine
from engine.frontdoor.request_log import JsonLog
from engine.frontdoor.service import FrontConfig, ImageService
from engine.frontdoor.settings import Defaults, Limits
from engine.frontdoor.split import Split
from engine.frontdoor.tenants import Tenant, TenantDesk
from tests.engine.frontdoor.dispatcher_engine import DispatcherEngine

INK_1, INK_2 = "1" * 64, "2" * 64


def catalogue() -> Catalogue:
    """Two ControlNets, a LoRA in two versions (``ink`` means the first), and one LoRA that is only for acme."""
    entries = [
        {"id": "tiny", "kind": "base", "file": "seed:0"},
        {"id": "canny", "kind": "controlnet", "file": "seed:1"},
        {"id": "depth", "kind": "controlnet", "file": "seed:2"},
        {"id": INK_1, "kind": "lora", "name": "ink", "version": "1", "file": "ink-1.safetensors"},
        {"id": INK_2, "kind": "lora", "name": "ink", "version": "2", "file": "ink-2.safetensors"},
        {
            "id": "3" * 64,
            "kind": "lora",
            "name": "brand",
            "version": "1",
            "file": "brand.safetensors",
            "tenants": ["acme"],
        },
    ]
    return catalogue_from_plain({"schema_version": 2, "entries": entries, "current": {"ink": "1"}}, "catalogue")


@dataclass
class Door:
    """A running front door and what it wrote."""

    service: ImageService
    session: aiohttp.ClientSession
    url: str
    log: io.StringIO
    listener: Listener

    async def ask(self, body: Any = None, *, bearer: str = "", **fields: Any) -> tuple[int, Any, Mapping[str, str]]:
        """Status, decoded body and headers of a request for an image; ``body`` as it is, or a request with these fields."""
        plain = {"prompt": "a lighthouse", "size": "64x64", "steps": 2, **fields}
        content = body if isinstance(body, bytes) else json.dumps(plain if body is None else body).encode()
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {bearer}"} if bearer else {})}
        async with self.session.post(f"{self.url}/v1/images/generations", data=content, headers=headers) as answer:
            return answer.status, await answer.json(), answer.headers

    async def refused(self, body: Any = None, **fields: Any) -> tuple[int, str, str]:
        """Status, code and message of a request that is refused; its error body has exactly OpenAI's four fields."""
        status, answer, _ = await self.ask(body, **fields)
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        return status, answer["error"]["code"], answer["error"]["message"]

    def log_rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]


OpenDoor = Callable[..., AbstractAsyncContextManager[Door]]


@pytest.fixture
def open_door() -> OpenDoor:
    """``async with open_door(engine, …) as door``: serves until the block ends."""

    @asynccontextmanager
    async def opened(
        engine: ServingEngine | Mapping[str, ServingEngine] | None = None,
        *,
        limits: Limits | None = None,
        tenants: tuple[Tenant, ...] | None = None,
        split: Split | None = None,
    ) -> AsyncIterator[Door]:
        engine = engine if engine is not None else DispatcherEngine()
        engines = dict(engine) if isinstance(engine, Mapping) else {"main": engine}
        log = io.StringIO()
        config = FrontConfig(limits or Limits(), Defaults(64, 64, 2, 5.0, 20.0), default_model="tiny")
        numbers = iter(range(1_000_000))
        service = ImageService(
            engines, CatalogueAccess(catalogue()), TenantDesk(tenants), JsonLog(log), config, clock=time.monotonic,
            draw_request_id=lambda: f"img-{next(numbers)}", split=split,
        )  # fmt: skip
        listener = Listener(make_app(service), config.limits)
        for one in engines.values():
            await one.start()
        host, port = await listener.open_tcp("127.0.0.1", 0)
        try:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                yield Door(service, session, f"http://{host}:{port}", log, listener)
        finally:
            for one in engines.values():
                await one.stop()
            await listener.close()

    return opened


def run(test: Awaitable[None]) -> None:
    """Runs an asynchronous test within a bound."""

    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test

    asyncio.run(bounded())


@dataclass
class Clock:
    """Time that a test moves."""

    now_s: float = field(default=0.0)
