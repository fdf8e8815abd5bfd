"""How far the host runs ahead of a device that works through a queue.

Launching a step takes a millisecond, running it thirty: without a limit all steps of a request are queued before the first is
done, and a cancellation, a deadline or a LoRA that has come meanwhile is heeded only after the last of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

import torch

STEPS_AHEAD: Final = 2
"""The one that runs and one behind it, so that the device never waits for the host."""


class Mark(Protocol):
    """A point in the device's queue."""

    def synchronize(self) -> None:
        """Returns when the device has reached it."""


class Pace:
    """Marks the end of every step and waits for old ones. For one request at a time."""

    def __init__(self, mark: Callable[[], Mark], n_ahead: int = STEPS_AHEAD) -> None:
        self._mark = mark
        self._n_ahead = n_ahead
        self._queued: deque[Mark] = deque()

    def wait(self) -> None:
        """Before a step is queued: returns when fewer than ``n_ahead`` are."""
        while len(self._queued) >= self._n_ahead:
            self._queued.popleft().synchronize()

    def queued(self) -> None:
        """After a step was queued."""
        self._queued.append(self._mark())

    def forget(self) -> None:
        """The request is over, well or not."""
        self._queued.clear()


class _Reached:
    """On a CPU a step that was asked for is done."""

    def synchronize(self) -> None: ...


def pace_on(device: str) -> Pace:
    """For the current stream of a GPU, waiting asleep; on a CPU nothing is ever waited for."""
    if not device.startswith("cuda"):
        return Pace(_Reached)

    def mark() -> Mark:
        with torch.cuda.device(device):
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record()
        return event

    return Pace(mark)
