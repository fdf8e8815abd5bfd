"""A trace replayed on real processes: the log that the engine leaves obeys the laws that a simulated one obeys."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from engine.allocation import Policies
from engine.catalogue import Catalogue
from engine.serving.replay import ReplaySettings, plan_replay, replay
from engine.serving.replay_jobs import TraceChoice
from planner.consistency import check_run
from planner.simulator import SimulationResult
from planner.workload import build_workload
from tests.faults.rig import allocation, engine
from traces.frame import checked_frame
from traces.reader import read_table, read_trace
from traces.records import REQUEST_RECORD_COLUMNS, WORKER_INTERVAL_COLUMNS
from traces.trace import Provenance, Trace

N = 60


def drawn_trace() -> Trace:
    rng = np.random.default_rng(5)
    some = lambda letter, most: [  # noqa: E731
        [f"{letter}{k}" for k in rng.choice(4, rng.integers(most + 1), replace=False)] for _ in range(N)
    ]
    frame = pd.DataFrame(
        {
            "request_id": [f"r{k}" for k in range(N)],
            "arrival_s": np.cumsum(rng.exponential(0.03, N)),
            "n_steps": rng.integers(2, 9, N),
            "width_px": 64,
            "height_px": 64,
            "n_images": rng.integers(1, 3, N),
            "guidance_scale": rng.choice([1.0, 5.0], N),
            "controlnet_ids": some("c", 2),
            "lora_ids": some("l", 2),
        }
    )
    return checked_frame(frame, "drawn", Provenance("drawn"))


def test_an_engines_log_joins_with_its_trace_and_obeys_the_laws_of_a_simulation(tmp_path: Path) -> None:
    plan = allocation(decoupled=2, controlnets=1, policies=Policies(lora_patch_by_step=2, forward_batch_max=4))
    settings = ReplaySettings(choice=TraceChoice(), synthesise_add_ons=True, warm_up_shapes_max=4)

    async def played() -> dict[str, Any]:
        async with engine(tmp_path, plan) as made:
            replay_plan = plan_replay(drawn_trace(), Catalogue(), settings)
            await made.admit(replay_plan.add_ons.synthetic)
            return await replay(replay_plan, made, tmp_path / "out", plan.pools, settings)

    summary = asyncio.run(asyncio.wait_for(played(), 60.0))
    assert summary["n_by_status"] == {"done": N}
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    requests = read_table(tmp_path / "out" / "requests.parquet", REQUEST_RECORD_COLUMNS)
    workers = read_table(tmp_path / "out" / "workers.parquet", WORKER_INTERVAL_COLUMNS)
    horizon_s = float(requests["end_s"].max())
    result = SimulationResult(requests, workers, False, 0, horizon_s, horizon_s)
    check_run(result, build_workload(read_trace(tmp_path / "out" / "trace.parquet")), may_batch=True)
    assert set(workers["worker_id"]) == {"base-0", "base-1", "cn-0"}
    # the workers' clocks and the front's are two: of a step of 2 ms and more, every stage is real and the rest is messages
    assert (requests["denoise_s"] >= 0.002 * requests["n_steps"]).all()
    assert (requests["overhead_s"] > -1e-3).all()
    base = workers[workers["role"] == "base"]
    assert base["busy_s"].sum() > 0.9 * requests.groupby(["worker_id", "start_s"])["denoise_s"].max().sum()
    # every LoRA that was used was fetched once and then found
    used = {name for names in drawn_trace().requests["lora_ids"] for name in names}
    assert requests["n_lora_misses"].sum() >= len(used)
