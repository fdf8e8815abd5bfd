"""Listening sockets with bounds: how many connections, and how long one may take to say what it wants."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import socket
import stat
from pathlib import Path
from typing import Final

from aiohttp import web

from engine.frontdoor.refusal import RequestRefusedError
from engine.frontdoor.settings import Limits
from traces.problems import one_problem

SWEEP_S: Final = 1.0
BACKLOG: Final = 512
ANSWERED_MAX: Final = 256
"""Turned-away connections that are being told so; more are closed without a word."""
ANSWERED_S: Final = 2.0


class Listener:
    """Serves an application on one address until it is closed."""

    def __init__(self, app: web.Application, limits: Limits) -> None:
        self._limits = limits
        self._runner = web.AppRunner(
            app, handler_cancellation=True, keepalive_timeout=limits.keepalive_s, access_log=None, shutdown_timeout=5.0
        )
        app.middlewares.insert(0, self._mark_begun)
        self._server: asyncio.Server | None = None
        self._path: Path | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._since_s: dict[web.RequestHandler, float] = {}
        """Connections without a whole request head so far, and since when."""
        self._refused: set[asyncio.BaseTransport] = set()
        self.n_refused = 0
        """Connections turned away because there were too many."""

    async def open_tcp(self, host: str, port: int) -> tuple[str, int]:
        """Listens; the address that it got (port 0 takes a free one).

        Raises:
            InputError: the address cannot be had.
        """
        loop = asyncio.get_running_loop()
        await self._runner.setup()
        try:
            self._server = await loop.create_server(self._connection, host, port, backlog=BACKLOG)
        except OSError as error:
            raise one_problem(
                "--listen",
                f"cannot listen on {host}:{port}: {error.strerror or error}",
                "a free address",
                "Choose another.",
            ) from None
        self._sweeper = asyncio.create_task(self._sweep())
        address = self._server.sockets[0].getsockname()
        return address[0], address[1]

    async def open_unix(self, path: Path) -> None:
        """Listens on a Unix socket that only this user reaches (mode 0600). A dead server's socket is replaced.

        Raises:
            InputError: the folder is not usable, or another server listens there.
        """
        await self._runner.setup()
        try:
            _make_way(path)
            bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            bound.bind(str(path))
            path.chmod(0o600)  # before it listens, so that nobody is ever let in by a wider mode
            self._path = path
            self._server = await asyncio.get_running_loop().create_unix_server(
                self._connection, sock=bound, backlog=BACKLOG
            )
        except OSError as error:
            raise one_problem(str(path), f"cannot be listened on: {error.strerror or error}", "a path in a folder of yours",
                              "Choose another with --admin.") from None  # fmt: skip
        self._sweeper = asyncio.create_task(self._sweep())

    async def stop_accepting(self) -> None:
        """Refuses new connections; open ones go on."""
        if self._server is not None:
            self._server.close()

    async def close(self) -> None:
        """Ends everything, within about ``shutdown_timeout``."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper
        await self.stop_accepting()
        for transport in list(self._refused):
            transport.close()
        await self._runner.cleanup()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    @property
    def n_connections(self) -> int:
        """Open connections."""
        server = self._runner.server
        return len(server.connections) if server is not None else 0

    def _connection(self) -> asyncio.BaseProtocol:
        server = self._runner.server
        if server is None or len(server.connections) >= self._limits.connections_max:
            self.n_refused += 1
            return _Refused(self._refused)
        handler = server()
        self._since_s[handler] = asyncio.get_running_loop().time()
        return handler

    @web.middleware
    async def _mark_begun(self, request: web.Request, handler: object) -> web.StreamResponse:
        self._since_s.pop(request.protocol, None)
        return await handler(request)  # type: ignore[operator, no-any-return]

    async def _sweep(self) -> None:
        """Closes connections that have sent no whole request head in time; aiohttp has no limit for a first one."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(SWEEP_S, self._limits.header_read_s))
            for handler, since_s in list(self._since_s.items()):
                if loop.time() - since_s > self._limits.header_read_s:
                    del self._since_s[handler]
                    if handler.transport is not None:
                        handler.transport.close()


class _Refused(asyncio.Protocol):
    """A connection too many: gets its answer, and is closed when the client has read it or after a while.

    What the client sends is taken and dropped: closing on unread bytes would take the answer from it again.
    """

    def __init__(self, refused: set[asyncio.BaseTransport]) -> None:
        self._refused = refused
        self._transport: asyncio.Transport | None = None
        self._end: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101  (create_server makes no others)
        self._transport = transport
        if len(self._refused) >= ANSWERED_MAX:
            transport.abort()
            return
        self._refused.add(transport)
        transport.write(_too_many())
        transport.write_eof()
        self._end = asyncio.get_running_loop().call_later(ANSWERED_S, transport.abort)

    def connection_lost(self, error: Exception | None) -> None:
        if self._end is not None:
            self._end.cancel()
        if self._transport is not None:
            self._refused.discard(self._transport)


def _too_many() -> bytes:
    refusal = RequestRefusedError(503, "too_many_connections", "The server has all connections that it takes. Try again later.",
                                  retry_after_s=2.0)  # fmt: skip
    body = json.dumps(refusal.body()).encode()
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **refusal.headers(),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 503 Service Unavailable\r\n{head}\r\n".encode() + body


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; a name counts only if it is ``localhost``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _make_way(path: Path) -> None:
    """Makes the folder (mode 0700) and removes the socket of a server that is gone."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError(f"{path} exists and is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError("another engine listens there")
