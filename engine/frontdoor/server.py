"""The life of a serving process: listen, start the engines, serve until told to stop, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engine.frontdoor.admin import Reload, make_admin_app
from engine.frontdoor.app import make_app
from engine.frontdoor.catalogue_access import CatalogueAccess
from engine.frontdoor.listener import Listener, is_loopback
from engine.frontdoor.port import ServingEngine
from engine.frontdoor.request_log import JsonLog
from engine.frontdoor.service import SERVER_LOG, FrontConfig, ImageService
from engine.frontdoor.settings import Limits
from engine.frontdoor.split import Split
from engine.frontdoor.tenants import Tenant, TenantDesk
from traces.problems import one_problem

WATCH_S: Final = 1.0
DRAIN_S: Final = 120.0
"""How long SIGTERM and SIGINT wait for admitted requests."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where the server listens and what it lets in."""

    host: str = "127.0.0.1"
    port: int = 8188
    admin: Path | None = None
    """Unix socket for operators. None: no admin API."""
    is_open_allowed: bool = False
    """Whether it may listen beyond loopback without tokens."""
    drain_s: float = DRAIN_S


class Server:
    """One front door over running or starting engines.

    Args:
        ready: Called once with the address when requests can be served.
        tenants: None: no tokens.
    """

    def __init__(
        self,
        engines: Mapping[str, ServingEngine],
        access: CatalogueAccess,
        log: JsonLog,
        config: FrontConfig,
        options: ServerOptions,
        *,
        tenants: tuple[Tenant, ...] | None = None,
        split: Split | None = None,
        reload: Reload | None = None,
        ready: Callable[[str, int], None] = lambda host, port: None,
    ) -> None:
        check_exposure(options, has_tokens=tenants is not None)
        self.service = ImageService(
            engines, access, TenantDesk(tenants), log, config, clock=time.monotonic,
            draw_request_id=lambda: f"img-{secrets.token_hex(12)}", split=split,
        )  # fmt: skip
        self._options = options
        self._reload = reload if reload is not None else Reload()
        self._ready = ready
        self._stop_asked = asyncio.Event()
        self._drain_s = options.drain_s
        self._stop_now = asyncio.Event()

    def stop(self, reason: str, drain_s: float) -> None:
        """Admits nothing more and ends once what was admitted has ended, or after ``drain_s``. A second call does not wait."""
        if self._stop_asked.is_set():
            self._stop_now.set()
            return
        self.service.draining_reason = reason
        self._drain_s = drain_s
        self._stop_asked.set()

    async def run(self) -> bool:
        """Serves until it is stopped. True if every admitted request ended by itself.

        Raises:
            InputError: an address cannot be had, or an engine cannot be started.
        """
        limits: Limits = self.service.config.limits
        is_local_only = is_loopback(self._options.host) and not self.service.desk.needs_token
        front = Listener(make_app(self.service, is_local_only=is_local_only), limits)
        admin = Listener(make_admin_app(self.service, self._reload, self.stop), limits)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop, f"stopping ({number.name})", self._options.drain_s)
        watch = asyncio.create_task(self._watch())
        try:
            host, port = await front.open_tcp(self._options.host, self._options.port)
            if self._options.admin is not None:
                await admin.open_unix(self._options.admin)
            if await self._start_engines():
                self._ready(host, port)
                await self._stop_asked.wait()
            return await self._drain()
        finally:
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch
            await front.stop_accepting()
            await asyncio.gather(*(engine.stop() for engine in self.service.engines.values()))
            await front.close()
            await admin.close()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    async def _start_engines(self) -> bool:
        """False if the server was told to stop meanwhile."""
        starting: asyncio.Future[Any] = asyncio.gather(*(engine.start() for engine in self.service.engines.values()))
        asked: asyncio.Future[Any] = asyncio.create_task(self._stop_asked.wait())
        try:
            await asyncio.wait({starting, asked}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                return not self._stop_asked.is_set()
            return False
        finally:
            asked.cancel()
            starting.cancel()  # a start that was given up ends before its workers are stopped; what it raised was raised above
            await asyncio.gather(starting, asked, return_exceptions=True)

    async def _drain(self) -> bool:
        engines = self.service.engines.values()
        drains: asyncio.Future[list[bool]] = asyncio.gather(
            *(engine.drain(self._drain_s) for engine in engines), self._all_answered(self._drain_s)
        )
        now = asyncio.create_task(self._stop_now.wait())
        either: set[asyncio.Future[Any]] = {drains, now}
        await asyncio.wait(either, timeout=self._drain_s + 5.0, return_when=asyncio.FIRST_COMPLETED)
        now.cancel()
        if not drains.done():
            drains.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await drains
            return False
        return all(drains.result())

    async def _all_answered(self, timeout_s: float) -> bool:
        """Waits until no request is open."""
        until_s = time.monotonic() + timeout_s
        while self.service.n_open and time.monotonic() < until_s:
            await asyncio.sleep(0.02)
        return self.service.n_open == 0

    async def _watch(self) -> None:
        """Dates standstills also while nobody asks, and takes the catalogue over when its file has changed."""
        seen = self.service.access.catalogue
        while True:
            try:
                self.service.health()
                if self._reload.live_catalogue is not None:
                    catalogue = await asyncio.to_thread(self._reload.live_catalogue)
                    if catalogue is not seen:
                        await self.service.take_catalogue(catalogue)
                    seen = catalogue
            except Exception:  # looking must never end the service
                SERVER_LOG.exception("looking at the engines failed")
            await asyncio.sleep(WATCH_S)


def check_exposure(options: ServerOptions, *, has_tokens: bool) -> None:
    """Refuses to serve other machines without tokens unless that was said.

    Raises:
        InputError: as said.
    """
    if not is_loopback(options.host) and not has_tokens and not options.is_open_allowed:
        raise one_problem(
            "--listen", f"got {options.host!r}, which other machines reach, and no tokens", "loopback, or --tenants FILE",
            "Add --tenants, or say --open if a proxy in front checks who calls",
        )  # fmt: skip
