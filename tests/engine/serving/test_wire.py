"""Frames between the front and its workers: what goes in comes out, what is malformed or too large is refused before it is read."""

from __future__ import annotations

import asyncio
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.serving import wire
from engine.serving.wire import LENGTHS, BlockingWire, WireClosedError, WireFormatError

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


def decoded(data: bytes) -> wire.Frame:
    async def read() -> wire.Frame:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await wire.read_frame(reader)

    return asyncio.run(read())


@given(value=JSON, blobs=st.lists(st.binary(max_size=50), max_size=5))
def test_a_frame_comes_out_as_it_went_in_on_both_sides(value: object, blobs: list[bytes]) -> None:
    message = {"type": "t", "value": value}
    assert decoded(b"".join(wire.pack(message, blobs))) == (message, tuple(blobs))
    one, other = socket.socketpair()
    with one, other:
        BlockingWire(one).send(message, blobs)
        assert BlockingWire(other).receive() == (message, tuple(blobs))


@given(data=st.binary(max_size=100))
def test_any_bytes_are_a_frame_a_closed_channel_or_a_format_error(data: bytes) -> None:
    try:
        message, _ = decoded(data)
    except (WireClosedError, WireFormatError):
        return
    assert isinstance(message["type"], str)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (LENGTHS.pack(wire.HEADER_BYTES_MAX + 1, 0), "are allowed"),
        (LENGTHS.pack(2, wire.PAYLOAD_BYTES_MAX + 1), "are allowed"),
        (LENGTHS.pack(2, 0) + b"{}", "without a type"),
        (LENGTHS.pack(2, 0) + b"[]", "without a type"),
        (LENGTHS.pack(2, 0) + b"{]", "not JSON"),
        (LENGTHS.pack(24, 1) + b'{"type":"t","blobs":[2]}' + b"x", "do not add up"),
        (LENGTHS.pack(25, 1) + b'{"type":"t","blobs":[-1]}' + b"x", "do not add up"),
        (LENGTHS.pack(26, 1) + b'{"type":"t","blobs":["1"]}' + b"x", "do not add up"),
        (LENGTHS.pack(12, 1) + b'{"type":"t"}' + b"x", "do not add up"),
    ],
)
def test_malformed_frames_are_refused(data: bytes, complaint: str) -> None:
    with pytest.raises(WireFormatError, match=complaint):
        decoded(data)


def test_what_cannot_be_json_is_not_sent() -> None:
    for value in (float("nan"), float("inf"), b"bytes", {1, 2}):
        with pytest.raises(WireFormatError, match="'t' cannot be sent"):
            wire.pack({"type": "t", "value": value})


def test_the_end_of_a_channel_is_a_closed_channel_also_in_the_middle_of_a_frame() -> None:
    whole = b"".join(wire.pack({"type": "t"}, [b"12345"]))
    for n_bytes in (0, 5, 15, len(whole) - 1):
        with pytest.raises(WireClosedError):
            decoded(whole[:n_bytes])
        one, other = socket.socketpair()
        with other:
            one.sendall(whole[:n_bytes])
            one.close()
            with pytest.raises(WireClosedError):
                BlockingWire(other).receive()
