"""A request's body, read and parsed within limits: sizes are checked before bytes are taken, structure before it is built."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from aiohttp import web

from engine.frontdoor.refusal import RequestRefusedError
from engine.frontdoor.settings import MIB, Limits

PARSED_ON_THE_LOOP_BYTES: Final = 256 * 1024
"""Smaller bodies take well under a millisecond to parse; larger ones are parsed on a thread so that others go on."""


class BodyBudget:
    """Bytes that all requests together may hold. One event loop, so a plain counter."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.held_bytes = 0

    @asynccontextmanager
    async def body(self, request: web.Request) -> AsyncIterator[object]:
        """The decoded JSON of a request; its bytes count as held until the block ends.

        Raises:
            RequestRefusedError: 408 too slow, 411 without a length, 413 too long, 415 not JSON or compressed, 400 not JSON, 429 too much
                held already.
        """
        n_bytes = self._announced_bytes(request)
        if self.held_bytes + n_bytes > self._limits.bodies_bytes_max:
            raise RequestRefusedError(
                429, "overloaded", "The server holds as many requests as its memory allows. Try again later.",
                retry_after_s=2.0,
            )  # fmt: skip
        self.held_bytes += n_bytes
        try:
            content = await self._read(request, n_bytes)
            if len(content) <= PARSED_ON_THE_LOOP_BYTES:
                yield parse(content, self._limits)
            else:
                yield await asyncio.to_thread(parse, content, self._limits)
        finally:
            self.held_bytes -= n_bytes

    def _announced_bytes(self, request: web.Request) -> int:
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise RequestRefusedError(415, "compressed_body", "Compressed bodies are not read. Send the JSON as it is.")
        if request.content_type != "application/json":
            raise RequestRefusedError(
                415,
                "not_json",
                f"got Content-Type {request.content_type!r:.100}, needs application/json. Set the header.",
            )
        n_bytes = request.content_length
        if n_bytes is None:
            raise RequestRefusedError(
                411, "length_required", "The body has no Content-Length. Send one; chunked bodies are not read."
            )
        if n_bytes > self._limits.body_bytes_max:
            raise RequestRefusedError(413, "body_too_large",
                          f"The body has {n_bytes} bytes, needs at most {self._limits.body_bytes_max} "
                          f"({self._limits.body_bytes_max // MIB} MiB). Send smaller control images.")  # fmt: skip
        return n_bytes

    async def _read(self, request: web.Request, n_bytes: int) -> bytes:
        if not n_bytes:
            return b""
        try:
            async with asyncio.timeout(self._limits.body_read_s):
                return await request.content.readexactly(n_bytes)
        except TimeoutError:
            raise RequestRefusedError(
                408, "body_too_slow", f"The body did not arrive within {self._limits.body_read_s:g} s. Send it again."
            ) from None
        except asyncio.IncompleteReadError:
            raise RequestRefusedError(
                400, "body_truncated", "The body ended before its Content-Length. Send it again."
            ) from None


def parse(content: bytes, limits: Limits) -> object:
    """Strict JSON: UTF-8, finite numbers, every key once, few enough values that it cannot exhaust memory or the stack.

    Raises:
        RequestRefusedError: 400.
    """
    if content.count(b"{") + content.count(b"[") > limits.json_openings_max:
        raise RequestRefusedError(
            400, "too_nested", f"The body has more than {limits.json_openings_max} brackets. Simplify it."
        )
    try:
        return json.loads(
            content.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_once
        )
    except RecursionError:
        raise RequestRefusedError(400, "too_nested", "The body is nested too deeply. Simplify it.") from None
    except UnicodeDecodeError as error:
        raise RequestRefusedError(
            400, "not_utf8", f"The body is not UTF-8 at byte {error.start}. Encode it as UTF-8."
        ) from None
    except ValueError as error:
        raise RequestRefusedError(400, "not_json", f"The body is not JSON: {error!s:.200}. Repair it.") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that JSON knows")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} appears twice")
    return table
