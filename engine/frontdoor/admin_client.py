"""Calls a running engine's admin socket: what ``diffplan engine apply`` and ``status`` do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final

import aiohttp

from traces.problems import one_problem

CALL_S: Final = 3600.0
"""Applying an allocation may load checkpoints on many workers; the engine has bounds of its own."""
CONNECT_S: Final = 5.0


class AdminClient:
    """One running engine, by its socket."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The decoded answer.

        Raises:
            InputError: no engine listens there, or it refuses; with its words.
        """
        timeout = aiohttp.ClientTimeout(total=CALL_S, connect=CONNECT_S)
        try:
            async with (
                aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(self._socket)), timeout=timeout) as session,
                session.request(method, f"http://engine{path}", json=body) as answer,
            ):
                plain = await answer.json()
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise one_problem(
                str(self._socket), f"no engine listens or answers there ({type(error).__name__})",
                "the admin socket of a running engine", "Start one with: diffplan engine serve, or name its socket with --admin",
            ) from None  # fmt: skip
        if "error" in plain:
            raise one_problem("engine", str(plain["error"]["message"]))
        return dict(plain)


def call(socket: Path, method: str, path: str, body: Any = None) -> dict[str, Any]:
    """:meth:`AdminClient.call` for callers without an event loop."""
    return asyncio.run(AdminClient(socket).call(method, path, body))
