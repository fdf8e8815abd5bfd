"""The host does not run away from the device: what comes while an image is made is heeded within two steps."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

from engine.serving.job import Job
from engine.workers.pace import Pace
from tests.engine.workers import rig


class Device:
    """Works through its queue only when somebody waits for it."""

    def __init__(self) -> None:
        self.n_queued = 0
        self.n_done = 0
        self.n_behind: list[int] = []
        """How many steps were not done, after each that was queued."""

    def mark(self) -> Mark:
        self.n_queued += 1
        self.n_behind.append(self.n_queued - self.n_done)
        return Mark(self, self.n_queued)


class Mark:
    def __init__(self, device: Device, place: int) -> None:
        self._device = device
        self._place = place

    def synchronize(self) -> None:
        self._device.n_done = max(self._device.n_done, self._place)


def test_one_step_runs_and_one_is_behind_it_never_more_and_never_none() -> None:
    device = Device()
    painter = rig.painter_of()
    painter._pace = Pace(device.mark)
    rig.paint(painter, [Job("a", prompt="a fox", n_steps=6, width_px=64, height_px=64, seed=1)])
    assert device.n_behind == [1, 2, 2, 2, 2, 2]


def test_a_request_does_not_wait_for_steps_of_one_that_was_given_up() -> None:
    device = Device()
    pace = Pace(device.mark)
    for _ in range(2):
        pace.wait()
        pace.queued()
    pace.forget()
    pace.wait()
    assert device.n_done == 0
