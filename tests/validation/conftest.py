"""Replay folders that the simulator itself wrote: an engine whose laws are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibrate.profile import LatencyProfile
from calibrate.profile_file import to_json as profile_json
from engine.allocation import Allocation, Policies, to_json
from planner.service import Sizes, build_service
from planner.simulator import ProfileFacts, simulate
from planner.workload import build_workload
from tests.simulation_builders import base_pool, constant_profile, trace_of
from traces.records import REQUEST_RECORD_COLUMNS, WORKER_INTERVAL_COLUMNS
from traces.trace import Trace
from traces.writer import write_table, write_trace

LORA_BYTES = 2**20
N = 60
SERVICE_S = 2.0
"""Of a plain request of 10 steps by the constant profile: 0.5 text, 1.0 steps, 0.5 decoding and the rest."""


def busy_trace(load: float, n: int = N, **columns: Any) -> Trace:
    """Poisson arrivals that load one replica so much, by requests without add-ons."""
    gaps = np.random.default_rng(5).exponential(1.0, n)
    arrival_s = np.cumsum(gaps)
    return trace_of(list(arrival_s * (n * SERVICE_S / load / arrival_s[-1])), n_steps=10, base_model_id="m", **columns)


@pytest.fixture
def profile_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a constant profile; arguments as of :func:`constant_profile`."""

    def write(name: str = "profile.json", **changed_s: float) -> Path:
        path = tmp_path / name
        path.write_text(profile_json(constant_profile(**changed_s)), encoding="utf-8")
        return path

    return write


@pytest.fixture
def engine_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes what an engine with these laws would have left of a replay."""

    def write(
        name: str,
        trace: Trace,
        profile: LatencyProfile | None = None,
        policies: Policies | None = None,
        start: dict[str, Any] | None = None,
        noise_seed: int = 99,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        profile = constant_profile() if profile is None else profile
        allocation = Allocation((base_pool(1, base_model_ids=("m",)),), policies=policies or Policies())
        workload = build_workload(trace)
        sizes = Sizes.from_profile(profile, lora_bytes=LORA_BYTES)
        table = build_service(
            workload, "colocated", profile, sizes, noise_seed=noise_seed, is_store_local=True
        )  # fmt: skip
        log = simulate(workload, allocation, {"base": table}, sizes, ProfileFacts.from_profile(profile))
        names = sorted({name for names in trace.requests["lora_ids"] for name in names})
        state = {
            "schema_version": 1, "workers": {}, "lora_ids": [], "lora_bytes": dict.fromkeys(names, LORA_BYTES), "model": "sdxl",
            **(start or {}),
        }  # fmt: skip
        write_trace(trace, folder / "trace.parquet")
        write_table(log.requests, REQUEST_RECORD_COLUMNS, folder / "requests.parquet")
        write_table(log.workers, WORKER_INTERVAL_COLUMNS, folder / "workers.parquet")
        (folder / "allocation.json").write_text(to_json(allocation), encoding="utf-8")
        (folder / "start.json").write_text(json.dumps(state), encoding="utf-8")
        return folder

    return write
