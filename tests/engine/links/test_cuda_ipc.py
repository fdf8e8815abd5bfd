"""A killed process must not hold up those that waited for its bytes: its event may never come."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

pytest.importorskip("torch")

from engine.links.cuda_ipc import wait_while_peer_lives
from engine.links.host_memory import HostMemoryLine
from engine.links.protocol import LineLostError


class Event:
    """Comes after it was asked for so often; never, if that is None."""

    def __init__(self, n_asked: int | None) -> None:
        self.n_left = n_asked

    def query(self) -> bool:
        if self.n_left is None:
            return False
        self.n_left -= 1
        return self.n_left < 0


class BrokenEvent:
    def query(self) -> bool:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.fixture
def ends() -> Iterator[tuple[HostMemoryLine, HostMemoryLine]]:
    first, second = socket.socketpair()
    lines = HostMemoryLine(first, "pair", "controlnets", 10.0), HostMemoryLine(second, "pair", "base-0", 10.0)
    yield lines
    for line in lines:
        line.close()


def test_bytes_of_a_base_that_lives_are_waited_for(ends: tuple[HostMemoryLine, HostMemoryLine]) -> None:
    event = Event(5)
    wait_while_peer_lives(event, ends[1], 10.0)
    assert event.n_left == -1


def test_a_base_that_dies_is_noticed_though_messages_of_it_are_unheard(
    ends: tuple[HostMemoryLine, HostMemoryLine],
) -> None:
    base, worker = ends
    base.tell({"type": "step", "step": 3})
    base.close()
    with pytest.raises(LineLostError, match="base-0 went before"):
        wait_while_peer_lives(Event(None), worker, 60.0)


def test_waiting_is_bounded_and_a_broken_event_is_a_lost_line(ends: tuple[HostMemoryLine, HostMemoryLine]) -> None:
    with pytest.raises(LineLostError, match=r"did not come within 0\.01 s"):
        wait_while_peer_lives(Event(None), ends[1], 0.01)
    with pytest.raises(LineLostError, match="cannot be asked: CUDA error"):
        wait_while_peer_lives(BrokenEvent(), ends[1], 10.0)
