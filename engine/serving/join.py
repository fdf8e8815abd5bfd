"""Where workers of other hosts join: they show a token and a rank, as ``torchrun`` sets it, and wait to be given a role.

The channel is plain TCP: the token keeps strangers out, it does not hide what is said. Use it on a private network.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
import sys
from collections.abc import Mapping
from typing import Any, Final

from engine.serving.wire import WireClosedError, WireFormatError, read_frame
from traces.problems import one_problem

TOKEN_CHARACTERS_MIN: Final = 16
HELLO_S: Final = 10.0
HELLO_BYTES_MAX: Final = 4096
N_WAITING_MAX: Final = 1024
N_GREETING_MAX: Final = 64
"""Connections that have not shown their token yet."""
VERSION: Final = 1

Joined = tuple[asyncio.StreamReader, asyncio.StreamWriter, Mapping[str, Any]]


def remote_rank(device: str) -> int | None:
    """``RANK`` of the worker that a device ``@N`` stands for; None for a device of this host."""
    return int(device[1:]) if device.startswith("@") and device[1:].isdecimal() else None


class JoinDesk:
    """Accepts joining workers and keeps them until a replica takes them; a later one of the same rank replaces an earlier."""

    def __init__(self, address: str, token: str) -> None:
        self._address = address
        self._token = token
        self._server: asyncio.Server | None = None
        self._waiting: dict[int, Joined] = {}
        self._arrived = asyncio.Condition()
        self._n_greeting = 0
        self.port = 0

    async def open(self) -> None:
        """Starts to listen, if there is an address. Raises :class:`InputError`."""
        if not self._address:
            return
        if len(self._token) < TOKEN_CHARACTERS_MIN:
            raise one_problem(
                "join token",
                f"has {len(self._token)} characters",
                f"{TOKEN_CHARACTERS_MIN} or more",
                "Use a longer one.",
            )
        host, _, port = self._address.rpartition(":")
        try:
            self._server = await asyncio.start_server(self._greet, host, int(port))
        except (OSError, ValueError) as error:
            raise one_problem(
                "join address", f"got {self._address!r}: {error}", "HOST:PORT", "Choose another."
            ) from None
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stops listening; who still waits is sent away."""
        if self._server is not None:
            self._server.close()
        for _, writer, _ in self._waiting.values():
            writer.transport.abort()
        self._waiting.clear()

    async def take(self, rank: int, timeout_s: float, given_up: asyncio.Event) -> Joined:
        """The worker that joined, or joins, with this rank.

        Raises:
            TimeoutError: none did in time, or the waiting was given up.
        """
        giving_up = asyncio.create_task(given_up.wait())
        coming = asyncio.create_task(self._wait_for(rank))
        try:
            await asyncio.wait({giving_up, coming}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if coming.done() and not coming.cancelled():
                return coming.result()
        finally:
            giving_up.cancel()
            coming.cancel()
        raise TimeoutError(f"no worker joined with RANK={rank} within {timeout_s:g} s")

    async def _wait_for(self, rank: int) -> Joined:
        async with self._arrived:
            while True:
                await self._arrived.wait_for(lambda: rank in self._waiting)
                joined = self._waiting.pop(rank)
                if not joined[0].at_eof() and not joined[1].is_closing():
                    return joined

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        if self._n_greeting >= N_GREETING_MAX:
            writer.transport.abort()
            return
        self._n_greeting += 1
        try:
            hello, _ = await asyncio.wait_for(read_frame(reader, HELLO_BYTES_MAX, 0), HELLO_S)
            rank = self._checked_rank(hello)
        except (TimeoutError, WireFormatError, WireClosedError) as error:
            sys.stderr.write(f"a worker from {peer} was not let in: {error or 'no hello in time'}\n")
            writer.transport.abort()
            return
        finally:
            self._n_greeting -= 1
        connection = writer.get_extra_info("socket")
        if connection is not None:  # a host that vanishes while its worker waits here is noticed by the kernel
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with self._arrived:
            earlier = self._waiting.pop(rank, None)
            if earlier is not None:
                with contextlib.suppress(OSError):
                    earlier[1].transport.abort()
            self._waiting[rank] = (reader, writer, hello)
            self._arrived.notify_all()

    def _checked_rank(self, hello: Mapping[str, Any]) -> int:
        if not hmac.compare_digest(str(hello.get("token", "")).encode(), self._token.encode()):
            raise WireFormatError("wrong token")
        if hello["type"] != "join" or hello.get("version") != VERSION:
            raise WireFormatError(
                f"got {hello['type']!r} of version {hello.get('version')!r}, needs 'join' of version {VERSION}"
            )
        rank = hello.get("rank")
        numbers = (rank, hello.get("local_rank"), hello.get("pid"))
        if not all(type(value) is int and value >= 0 for value in numbers) or not isinstance(hello.get("host"), str):
            raise WireFormatError("got a rank, local_rank, pid or host of the wrong type")
        if len(self._waiting) >= N_WAITING_MAX and rank not in self._waiting:
            raise WireFormatError(f"{N_WAITING_MAX} workers wait already")
        return int(str(rank))
