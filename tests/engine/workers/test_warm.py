"""A worker that was told its usual shapes has captured them before it is ready: no request of such a shape pays for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.control_stack import ShapeKey
from engine.graphs import Part, Recorder
from engine.serving.job import ControlUse, Job
from engine.workers.sdxl_controlnets import make_control_host
from tests.engine.workers.rig import attached, cfg_pair, no_progress, paint, paint_both, painter_of, setup_of

WARM = ("32x32:1", "32x32:2:unguided")


def job_of(n_images: int = 1, guidance: float = 5.0, size_px: int = 32, *controlnets: str) -> Job:
    controls = tuple(ControlUse(name, 0.8) for name in controlnets)
    return Job(
        "r", prompt="a fox", negative_prompt="blur", n_steps=1, n_images=n_images, width_px=size_px, height_px=size_px,
        guidance_scale=guidance, controls=controls,
    )  # fmt: skip


@pytest.fixture
def n_captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts everything that is captured from now on."""
    counts = [0]
    record = Recorder.record

    def counted(self: Recorder, run: Callable[[], object]) -> Part:
        counts[0] += 1
        return record(self, run)

    monkeypatch.setattr(Recorder, "record", counted)
    return counts


def test_requests_of_the_warm_shapes_capture_nothing_and_others_do(n_captures: list[int]) -> None:
    painter = painter_of(warm=WARM, controlnet_ids=("a",))
    assert painter.resident()["shapes"] == list(WARM)
    n_before = n_captures[0]
    for job in (job_of(), job_of(2, 1.0), job_of(1, 5.0, 32, "a"), job_of(2, 1.0, 32, "a")):
        paint(painter, [job])
    assert n_captures[0] == n_before
    paint(painter, [job_of(2)])
    assert n_captures[0] > n_before
    assert painter.resident()["shapes"] == [*WARM, "32x32:2"]


def test_a_base_and_a_controlnet_worker_that_are_warm_capture_nothing_together(n_captures: list[int]) -> None:
    painter = painter_of(warm=WARM, topology="decoupled", controlnet_ids=())
    host = make_control_host(setup_of("controlnet", warm=WARM, controlnet_ids=("a", "b")), no_progress)
    keys = [ShapeKey(1, True, 32, 32), ShapeKey(2, False, 32, 32)]
    assert all(host._stack.is_prepared(key, ["a", "b"]) for key in keys)
    half = make_control_host(
        setup_of("controlnet", warm=WARM, controlnet_ids=("a",), topology="decoupled_cfg2"), no_progress
    )
    assert half._stack.is_prepared(ShapeKey(1, False, 32, 32), ["a"])
    with attached(painter, ["c"]) as rig:
        n_before = n_captures[0]
        paint(painter, [job_of()], rig.pairs)
        assert n_captures[0] == n_before
        paint(painter, [job_of(1, 5.0, 32, "c")], rig.pairs)
    assert n_captures[0] - n_before == 4, "more than the stages of the ControlNet, on a worker that was not told"


def test_both_ranks_of_a_pair_are_warm_for_their_halves(n_captures: list[int]) -> None:
    ranks = cfg_pair(warm=WARM)
    n_before = n_captures[0]
    paint_both(ranks, [job_of()])
    assert n_captures[0] == n_before
    assert ranks[0].resident()["shapes"] == list(WARM)
    assert ranks[1].resident()["shapes"] == ["32x32:1"]
