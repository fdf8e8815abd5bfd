"""Eight fault schedules on the tiny SDXL: the same processes, lines and supervision with a real network inside."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
from pathlib import Path

import numpy as np
import pytest

from engine.serving.engine import Engine
from engine.serving.job import ControlUse, Job, LoraUse
from engine.serving.settings import Bounds, EngineSettings
from tests.faults import rig

pytest.importorskip("diffusers")

BOUNDS = Bounds(
    heartbeat_s=0.25,
    silence_s=6.0,
    hello_s=120.0,
    load_s=120.0,
    step_s=60.0,
    decode_s=60.0,
    ready_s=240.0,
    line_s=20.0,
    lora_wait_s=30.0,
    backoff_first_s=0.02,
    backoff_max_s=0.1,
)
POLICIES = rig.Policies(lora_patch_by_step=0)
"""LoRAs in before the first step: images do not depend on when a fetch ends."""
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}


def jobs_of(schedule: int) -> list[Job]:
    rng = np.random.default_rng([7, schedule])
    return [
        rig.job(
            f"s{schedule}j{k}",
            int(rng.integers(2**31)),
            n_steps=3,
            width_px=64,
            height_px=64,
            controls=tuple(ControlUse(f"c{c}") for c in range(int(rng.integers(3)))),
            loras=tuple(LoraUse(f"l{c}", 0.5) for c in range(int(rng.integers(2)))),
        )
        for k in range(3)
    ]


@pytest.mark.parametrize(
    ("plan", "faults"),
    [
        (
            rig.allocation(decoupled=1, controlnets=1, policies=POLICIES),
            [("base-0", "kill"), ("cn-0", "kill"), ("loaders-0", "kill"), ("base-0", "stop"), ("cn-0", "term")],
        ),
        (
            rig.allocation(pairs=1, controlnets=1, policies=POLICIES),
            [("pair-0.0", "kill"), ("pair-0.1", "kill"), ("cn-0", "kill")],
        ),
    ],
    ids=["decoupled", "decoupled_cfg2"],
)
def test_images_are_those_of_an_undisturbed_run(
    plan: rig.Allocation, faults: list[tuple[str, str]], tmp_path: Path
) -> None:
    async def test() -> None:
        settings = EngineSettings(
            run_dir=tmp_path, model="tiny", bounds=BOUNDS, environment={"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        )
        made = Engine(plan, settings)
        try:
            await made.start()
            expected = {}
            for schedule in range(len(faults)):
                for job in jobs_of(schedule):
                    outcome = await made.submit(job)
                    assert outcome.status == "done", outcome
                    assert outcome.result is not None
                    expected[job.request_id] = outcome.result.images
            for schedule, (target, kind) in enumerate(faults):
                await _one_schedule(made, schedule, target, SIGNALS[kind], expected)
            rig.check_books(made)
        finally:
            await made.stop()

    rig.run(test, limit_s=300.0)


async def _one_schedule(
    made: Engine, schedule: int, target: str, number: signal.Signals, expected: dict[str, tuple[bytes, ...]]
) -> None:
    # Other names than in the undisturbed run: nothing may depend on them.
    jobs = [dataclasses.replace(job, request_id=f"{job.request_id} again") for job in jobs_of(schedule)]
    running = [asyncio.create_task(made.submit(job)) for job in jobs]
    await asyncio.sleep(float(np.random.default_rng([8, schedule]).uniform(0.1, 0.6)))
    worker_id, _, rank = target.partition(".")
    if made.replicas[worker_id].is_ready:
        rig.send_signal(made, worker_id, number, int(rank or 0))
    for job, outcome in zip(jobs, await asyncio.gather(*running), strict=True):
        assert outcome.status == "done", outcome
        assert outcome.result is not None
        assert outcome.result.images == expected[job.request_id.removesuffix(" again")], f"{job.request_id} differs"
