"""What the engine adds to its settings by itself."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from engine.serving.settings import EngineSettings, with_cpu_threads


def test_workers_on_a_cpu_share_its_cores_unless_somebody_has_said_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    tiny = EngineSettings(Path("run"), environment={"A": "b"})
    assert with_cpu_threads(tiny, 3).environment == {"A": "b", "OMP_NUM_THREADS": "2"}
    assert with_cpu_threads(tiny, 20).environment["OMP_NUM_THREADS"] == "1"
    said = replace(tiny, environment={"OMP_NUM_THREADS": "5"})
    assert with_cpu_threads(said, 3) is said
    on_gpus = replace(tiny, devices=("cuda:0", "cuda:1"))
    assert with_cpu_threads(on_gpus, 2) is on_gpus
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert with_cpu_threads(tiny, 3) is tiny
