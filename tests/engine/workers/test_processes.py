"""The same pictures from real processes: an engine with the tiny model against a painter of this process."""

from __future__ import annotations

import asyncio
from pathlib import Path

from engine.allocation import Allocation, Policies, Pool
from engine.serving.engine import Engine
from engine.serving.job import ControlUse, Job, LoraUse, Outcome
from engine.serving.settings import EngineSettings
from engine.workers.loader import Loader
from engine.workers.painter import LoadedLora
from tests.engine.workers.rig import painter_of

LIMIT_S = 180.0


def test_a_decoupled_engine_of_processes_paints_the_bytes_that_a_painter_paints(tmp_path: Path) -> None:
    job = Job(
        "r",
        prompt="a red fox",
        n_steps=3,
        width_px=32,
        height_px=32,
        seed=3,
        controls=(ControlUse("a", 0.7), ControlUse("b", 0.9, 0.2, 0.8)),
        loras=(LoraUse("l1", 0.8),),
    )
    pools = (
        Pool("base", "base", 1, "cpu", topology="decoupled", controlnet_ids=()),
        Pool("nets", "controlnet", 1, "cpu", topology="decoupled", controlnet_ids=("a", "b")),
    )
    allocation = Allocation(pools, policies=Policies(lora_patch_by_step=0))

    async def run() -> Outcome:
        engine = Engine(allocation, EngineSettings(tmp_path / "run", environment={"OMP_NUM_THREADS": "1"}))
        await engine.start()
        try:
            return await engine.submit(job)
        finally:
            await engine.stop()

    outcome = asyncio.run(asyncio.wait_for(run(), LIMIT_S))
    assert outcome.status == "done", outcome.reason
    assert outcome.result is not None
    assert outcome.result.lora_patch_step == 0
    painter = painter_of()
    lora = LoadedLora("l1", str(Loader(tmp_path, "tiny", "F32").fetch("l1", {})))
    painter.activate("default")
    painter.begin([job], {})
    painter.patch([(lora, 0.8)])
    for i in range(job.n_steps):
        painter.step(i)
    assert painter.finish(wants_images=True) == [list(outcome.result.images)]
