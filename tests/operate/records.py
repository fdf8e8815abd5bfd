"""Plans and live records by hand, for tests of ``observe`` and ``watch``: known laws, so that what should be found is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from planner.files import write_texts
from planner.plan_record import to_json
from tests.export.plans import plan_of, pool
from traces.records import REQUEST_RECORD_COLUMNS
from traces.writer import write_table

RATE_PER_S = 1.0
SLO_S = 20.0


def records(
    seed: int, duration_s: float, *, rate: float = RATE_PER_S, slow: float = 1.0, wait_s: float = 0.0, begin_s: float = 0.0,
    controlnets: float = 0.5, misses: float = 0.2,
) -> pd.DataFrame:  # fmt: skip
    """Poisson arrivals; half of the requests use a ControlNet, which takes longer; each uses one LoRA. Nobody queues."""
    rng = np.random.default_rng(seed)
    n = rng.poisson(rate * duration_s)
    arrival_s = begin_s + np.sort(rng.uniform(0.0, duration_s, n))
    n_controlnets = (rng.uniform(size=n) < controlnets).astype(np.int64)
    noise = rng.lognormal(0.0, 0.01, n) * slow
    denoise_s, decode_s = (2.0 + 0.8 * n_controlnets) * noise, 0.1 * noise
    start_s = arrival_s + wait_s
    end_s = start_s + denoise_s + decode_s
    return pd.DataFrame(
        {
            "request_id": [f"r{seed}-{k}" for k in range(n)], "arrival_s": arrival_s, "status": "done", "topology": "colocated",
            "worker_id": "base-0", "n_controlnets": n_controlnets, "n_loras": 1, "start_s": start_s, "end_s": end_s,
            "queue_wait_s": wait_s, "denoise_s": denoise_s, "denoise_alone_s": denoise_s, "decode_s": decode_s,
            "n_lora_misses": (rng.uniform(size=n) < misses).astype(np.int64), "latency_s": end_s - arrival_s,
        }
    )  # fmt: skip


def write_plan_folder(folder: Path, duration_s: float = 3600.0, seed: int = 1) -> Path:
    """A plan whose simulated run is ``records(seed, …)``."""
    from engine.allocation import Allocation

    folder.mkdir(parents=True, exist_ok=True)
    frame = records(seed, duration_s)
    plan = plan_of(Allocation((pool(n=4),)))
    traffic = plan.traffic.model_copy(
        update={"duration_s": duration_s, "n_requests": len(frame), "mean_per_s": len(frame) / duration_s}
    )
    row = plan.topologies[0]
    latency = frame["latency_s"]
    estimates = {
        f"latency_p{q}_s": row.latency_p50_s.model_copy(
            update=dict.fromkeys(("mean", "low", "high"), float(latency.quantile(q / 100)))
        )
        for q in (50, 95, 99)
    }
    plan = plan.model_copy(
        update={"slo_latency_s": SLO_S, "traffic": traffic, "topologies": (row.model_copy(update=estimates),)}
    )
    write_texts(folder, {"plan.json": to_json(plan)})
    write_table(frame, REQUEST_RECORD_COLUMNS, folder / "requests.parquet")
    return folder


def write_live(folder: Path, *parts: pd.DataFrame) -> Path:
    """Records as ``diffplan observe`` writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_table(pd.concat(parts, ignore_index=True), REQUEST_RECORD_COLUMNS, folder / "requests.parquet")
