"""Framed messages between the front process and its workers: JSON and bytes, capped in size, nothing pickled.

A frame is a 4-byte header length, an 8-byte payload length (both big-endian), a JSON object, and the payload: the blobs one
after the other, their lengths in the object's ``blobs``.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final

LENGTHS: Final = struct.Struct(">IQ")
HEADER_BYTES_MAX: Final = 8 * 2**20
PAYLOAD_BYTES_MAX: Final = 512 * 2**20
N_BLOBS_MAX: Final = 4096

Frame = tuple[dict[str, Any], tuple[bytes, ...]]


class WireClosedError(Exception):
    """The other side has closed the channel, or is gone."""


class WireFormatError(Exception):
    """What came is not a frame of this protocol, or is larger than allowed."""


def pack(message: Mapping[str, Any], blobs: Sequence[bytes] = ()) -> list[bytes]:
    """Encodes a frame as parts to be written in order; raises :class:`WireFormatError` if it is larger than allowed."""
    plain = dict(message)
    if blobs:
        plain["blobs"] = [len(blob) for blob in blobs]
    try:
        header = json.dumps(plain, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise WireFormatError(f"message {plain.get('type')!r} cannot be sent: {error}") from None
    n_payload = sum(len(blob) for blob in blobs)
    check_lengths(len(header), n_payload)
    return [LENGTHS.pack(len(header), n_payload) + header, *blobs]


def check_lengths(
    n_header: int, n_payload: int, header_bytes_max: int = HEADER_BYTES_MAX, payload_bytes_max: int = PAYLOAD_BYTES_MAX
) -> None:
    """Raises :class:`WireFormatError` for lengths outside the caps, before anything is allocated."""
    if not 2 <= n_header <= header_bytes_max or n_payload > payload_bytes_max:
        raise WireFormatError(
            f"got a frame of {n_header} + {n_payload} bytes, at most {header_bytes_max} + {payload_bytes_max} are allowed"
        )


def unpack(header: bytes, payload: bytes) -> Frame:
    """Decodes a frame; raises :class:`WireFormatError`."""
    try:
        message = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise WireFormatError(f"got a header that is not JSON: {error}") from None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise WireFormatError("got a header without a type")
    lengths = message.pop("blobs", [])
    is_natural = isinstance(lengths, list) and all(type(n) is int and n >= 0 for n in lengths)
    if not is_natural or len(lengths) > N_BLOBS_MAX or sum(lengths) != len(payload):
        raise WireFormatError(f"got blob lengths that do not add up to the payload of {len(payload)} bytes")
    blobs, at = [], 0
    for length in lengths:
        blobs.append(payload[at : at + length])
        at += length
    return message, tuple(blobs)


async def read_frame(
    reader: asyncio.StreamReader,
    header_bytes_max: int = HEADER_BYTES_MAX,
    payload_bytes_max: int = PAYLOAD_BYTES_MAX,
) -> Frame:
    """The next frame; raises :class:`WireClosedError` at the end and :class:`WireFormatError`."""
    try:
        n_header, n_payload = LENGTHS.unpack(await reader.readexactly(LENGTHS.size))
        check_lengths(n_header, n_payload, header_bytes_max, payload_bytes_max)
        header = await reader.readexactly(n_header)
        return unpack(header, await reader.readexactly(n_payload) if n_payload else b"")
    except (asyncio.IncompleteReadError, OSError) as error:
        raise WireClosedError(f"the channel has ended: {error}") from None


class BlockingWire:
    """The worker's side: one thread receives, any thread sends."""

    def __init__(self, connection: socket.socket, send_timeout_s: float = 60.0) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        connection.settimeout(None)
        # Bounds every send without bounding receives, which wait for work: SO_SNDTIMEO instead of settimeout.
        seconds = int(send_timeout_s)
        timeval = struct.pack("ll", seconds, int((send_timeout_s - seconds) * 1e6))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)

    def send(self, message: Mapping[str, Any], blobs: Sequence[bytes] = ()) -> None:
        """Sends a frame; raises :class:`WireClosedError` if it cannot be delivered in time."""
        parts = pack(message, blobs)
        try:
            with self._sending:
                for part in parts:
                    self._connection.sendall(part)
        except OSError as error:
            raise WireClosedError(f"the channel has ended: {error}") from None

    def receive(self) -> Frame:
        """The next frame, waited for without limit; raises :class:`WireClosedError` and :class:`WireFormatError`."""
        n_header, n_payload = LENGTHS.unpack(self._read(LENGTHS.size))
        check_lengths(n_header, n_payload)
        header = self._read(n_header)
        return unpack(header, self._read(n_payload) if n_payload else b"")

    def _read(self, n_bytes: int) -> bytes:
        data = bytearray(n_bytes)
        view, at = memoryview(data), 0
        while at < n_bytes:
            try:
                n_read = self._connection.recv_into(view[at:])
            except OSError as error:
                raise WireClosedError(f"the channel has ended: {error}") from None
            if n_read == 0:
                raise WireClosedError("the channel has ended")
            at += n_read
        return bytes(data)
