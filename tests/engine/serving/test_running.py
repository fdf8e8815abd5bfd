"""What the ranks of a pair report becomes one result."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from engine.serving.job import ControlUse, Job, StageSeconds
from engine.serving.ports import Start
from engine.serving.running import RunningBatch

JOB = Job("a", prompt="a fox", controls=(ControlUse("canny"),))


def report(n_misses: int) -> dict[str, Any]:
    item = {
        "stages": dataclasses.asdict(StageSeconds()), "lora_patch_step": None, "is_switch": False,
        "n_controlnet_misses": n_misses, "n_images": 0,
    }  # fmt: skip
    return {"type": "batch_done", "results": {"a": item}, "failures": {}}


@pytest.mark.parametrize(("workers", "n_misses"), [(("c0", "c0"), 1), (("c0", "c1"), 3)])
def test_loads_that_the_other_half_met_count_unless_both_met_the_same(workers: tuple[str, str], n_misses: int) -> None:
    start = Start("pair-0", (JOB,), 1, tuple({"canny": worker} for worker in workers), {}, 0)
    batch = RunningBatch(1, start, 2, 0.0)
    assert batch.report(1, report(2), ()) is None
    end = batch.report(0, report(1), ())
    assert end is not None
    assert end.results["a"].n_controlnet_misses == n_misses
