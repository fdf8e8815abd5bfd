"""Pair lines: what one side writes the other reads, an end is noticed at once, and garbage is refused, over both transports."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.links.host_memory import HostMemoryLine
from engine.links.protocol import LineLostError
from engine.links.stream import LENGTHS, MESSAGE_BYTES_MAX
from engine.links.tcp import TcpLine, accept, connect

Line = HostMemoryLine | TcpLine
Ends = tuple[Line, Line]


def host_memory() -> Ends:
    one, other = socket.socketpair()
    return HostMemoryLine(one, "p", "cn", 1.0), HostMemoryLine(other, "p", "base", 1.0)


def tcp() -> Ends:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    return TcpLine(one, "p", "cn", 1.0), TcpLine(other, "p", "base", 1.0)


@pytest.fixture(params=[host_memory, tcp], ids=["host_memory", "tcp"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    make: Callable[[], Ends] = request.param
    base, controlnets = make()
    yield base, controlnets
    base.close()
    controlnets.close()


def tell_often(line: Line, n_times: int, filling: str) -> None:
    for _ in range(n_times):
        line.tell({"type": "t", "filling": filling})


def test_pushed_bytes_are_there_when_the_message_after_them_is_heard(ends: Ends) -> None:
    base, controlnets = ends
    base.make_buffers({"x": 1000, "y": 10})
    base.buffer("x")[100:200] = 7
    base.push("x", 100, 200)
    base.tell({"type": "step", "i": 3})
    assert controlnets.hear(1.0) == {"type": "step", "i": 3}
    assert controlnets.buffer("x").sum() == 700
    controlnets.buffer("y")[:] = 5
    controlnets.push("y", 0, 10)
    controlnets.tell({"type": "done"})
    assert base.hear(1.0) == {"type": "done"}
    assert base.buffer("y").tolist() == [5] * 10


def test_a_buffer_grows_and_a_smaller_wish_changes_nothing(ends: Ends) -> None:
    base, controlnets = ends
    base.make_buffers({"x": 10})
    base.make_buffers({"x": 20})
    base.make_buffers({"x": 15})
    base.buffer("x")[:] = 1
    base.push("x", 0, 20)
    base.tell({"type": "t"})
    controlnets.hear(1.0)
    assert controlnets.buffer("x").tolist() == [1] * 20


def test_many_megabytes_pass_while_the_other_side_reads(ends: Ends) -> None:
    base, controlnets = ends
    n_bytes = 20 * 2**20
    base.make_buffers({"x": n_bytes})
    base.buffer("x")[:] = np.arange(n_bytes, dtype=np.uint64).astype(np.uint8)
    heard: list[dict[str, object]] = []
    reader = threading.Thread(target=lambda: heard.append(controlnets.hear(10.0)))
    reader.start()
    base.push("x", 0, n_bytes)
    base.tell({"type": "t"})
    reader.join(10.0)
    assert heard == [{"type": "t"}]
    assert np.array_equal(controlnets.buffer("x"), base.buffer("x"))


def test_the_end_of_the_other_side_is_noticed_by_every_call(ends: Ends) -> None:
    base, controlnets = ends
    controlnets.close()
    with pytest.raises(LineLostError, match="has ended"):
        base.hear(1.0)
    with pytest.raises(LineLostError):
        base.poll()
    with pytest.raises(LineLostError):
        tell_often(base, 10, "")  # TCP notices at the second write


def test_waiting_is_bounded(ends: Ends) -> None:
    base, _ = ends
    with pytest.raises(LineLostError, match=r"nothing came from cn within 0\.05 s"):
        base.hear(0.05)
    with pytest.raises(LineLostError, match="took nothing for 1 s"):
        tell_often(base, 100_000, "x" * 1000)


def test_half_a_message_does_not_hold_anybody_up(ends: Ends) -> None:
    base, controlnets = ends
    frame = base._encode({"type": "t"}, 0)
    base._send(frame[:15])
    assert controlnets.poll() is None
    base._send(frame[15:])
    assert controlnets.hear(1.0) == {"type": "t"}


def test_messages_that_came_together_are_heard_one_by_one(ends: Ends) -> None:
    base, controlnets = ends
    for i in range(3):
        base.tell({"type": "t", "i": i})
    assert controlnets.hear(1.0)["i"] == 0
    assert controlnets.has_heard
    assert [message["i"] for message in (controlnets.poll(), controlnets.poll()) if message] == [1, 2]
    assert controlnets.poll() is None


def test_closing_twice_is_fine_and_a_closed_line_says_so(ends: Ends) -> None:
    base, _ = ends
    base.close()
    base.close()
    with pytest.raises(LineLostError):
        base.tell({"type": "t"})


def test_shared_memory_has_no_name(ends: Ends) -> None:
    base, _ = ends
    before = set(Path("/dev/shm").iterdir())  # noqa: S108
    base.make_buffers({"never-a-name-of-anything": 2**20})
    assert not {path for path in set(Path("/dev/shm").iterdir()) - before if "never-a-name" in path.name}  # noqa: S108


@pytest.mark.parametrize(
    "frame",
    [
        LENGTHS.pack(MESSAGE_BYTES_MAX + 1, 0),
        LENGTHS.pack(1, 0),
        LENGTHS.pack(4, 2**60),
        LENGTHS.pack(4, 0) + b"nope",
        LENGTHS.pack(2, 0) + b"[]",
        LENGTHS.pack(2, 0) + b"{}",
        LENGTHS.pack(12, 5) + b'{"type":"t"}' + b"extra",
        LENGTHS.pack(20, 0) + b'{"type":"line_none"}',
    ],
)
def test_what_is_not_a_message_ends_the_line(ends: Ends, frame: bytes) -> None:
    base, controlnets = ends
    base._send(frame)
    with pytest.raises(LineLostError):
        controlnets.hear(1.0)


@pytest.mark.parametrize(
    "message",
    [
        {"type": "line_buffers"},
        {"type": "line_buffers", "sizes": {"x": -1}},
        {"type": "line_buffers", "sizes": {"x": 2**50}},
        {"type": "line_buffers", "sizes": {str(i): 1 for i in range(300)}},
        {"type": "line_bytes", "name": "none", "start": 0, "stop": 1},
        {"type": "line_bytes", "name": "x", "start": 5, "stop": 50},
    ],
)
def test_buffers_nobody_made_or_bytes_outside_them_end_the_line(ends: Ends, message: dict[str, object]) -> None:
    base, controlnets = ends
    base.make_buffers({"x": 10})
    base._send(base._encode(message, 1 if message["type"] == "line_bytes" else 0) + b"\0")
    with pytest.raises(LineLostError):
        controlnets.hear(1.0)


@given(data=st.binary(max_size=200), kind=st.sampled_from([host_memory, tcp]))
def test_any_bytes_are_a_message_or_a_lost_line_and_nothing_else(data: bytes, kind: Callable[[], Ends]) -> None:
    base, controlnets = kind()
    try:
        base._send(data)
        base.close()
        while True:
            controlnets.hear(1.0)
    except LineLostError:
        pass
    finally:
        base.close()
        controlnets.close()


@pytest.mark.parametrize("token", ["0" * 64, "ab" * 32])
def test_only_who_shows_the_token_of_an_expected_pair_is_accepted(token: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = "{}:{}".format(*listener.getsockname())
        connect(address, "pair", token, 1.0).close()
        with pytest.raises(LineLostError, match="without the token"):
            accept(listener, {"pair": "cd" * 32}, 1.0)
        connect(address, "unknown", "cd" * 32, 1.0).close()
        with pytest.raises(LineLostError, match="without the token"):
            accept(listener, {"pair": "cd" * 32}, 1.0)
        mine = connect(address, "pair", "cd" * 32, 1.0)
        pair_id, connection = accept(listener, {"pair": "cd" * 32}, 1.0)
        assert pair_id == "pair"
        mine.close()
        connection.close()


def test_a_connection_that_says_nothing_is_dropped() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()),
        pytest.raises(LineLostError),
    ):
        accept(listener, {"pair": "cd" * 32}, 0.05)


def test_nobody_listening_is_a_lost_line_with_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = "{}:{}".format(*listener.getsockname())
    with pytest.raises(LineLostError, match=f"cannot connect to {address}"):
        connect(address, "pair", "cd" * 32, 0.5)


def test_messages_are_json_and_not_larger_than_a_mebibyte(ends: Ends) -> None:
    base, _ = ends
    with pytest.raises(LineLostError, match="cannot be sent"):
        base.tell({"type": "t", "value": float("nan")})
    with pytest.raises(LineLostError, match="at most"):
        base.tell({"type": "t", "value": json.dumps("x" * MESSAGE_BYTES_MAX)})
