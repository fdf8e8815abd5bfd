"""The serving path under the clock: real processes of the engine, on the tiny model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from calibrate.extent import Extent, tiny_extent
from calibrate.points import change_tasks, client_tasks, serving_tasks
from calibrate.rig import Timed, build_rig
from calibrate.setups import setups

EXTENT = tiny_extent(width_px=32, height_px=32, n_steps=2, n_controlnets=1, lora_ranks=(4,), held_out_lora_ranks=())


def _by_quantity(timed: list[Timed]) -> dict[str, Timed]:
    return {item.quantity: item for item in timed}


def test_jobs_switches_and_drains_are_timed_through_the_engines_processes(tmp_path: Path) -> None:
    job = serving_tasks(EXTENT)[0][0]
    switch, drain = change_tasks(EXTENT)
    rig = build_rig(next(setup for setup in setups(EXTENT, str(tmp_path)) if setup.name == "serving"))
    try:
        timed = _by_quantity(rig.run("jobs", job.features, 2))
        switched = _by_quantity(rig.run(switch.method, switch.features, 2))
        drained = _by_quantity(rig.run(drain.method, drain.features, 1))
    finally:
        rig.close()
    assert {
        "engine.worker_start",
        "serving.first_latency",
        "serving.latency",
        "serving.text",
        "serving.overhead",
    } <= set(timed)
    assert "serving.switch" not in timed
    stages = ("text", "denoise", "decode", "overhead")
    for index, latency_s in enumerate(timed["serving.latency"].values_s):
        parts_s = sum(timed[f"serving.{stage}"].values_s[index] for stage in stages)
        assert parts_s == pytest.approx(latency_s, rel=1e-6)  # stages and what is left of them: nothing is lost
    assert len(switched["serving.switch"].values_s) == 2  # every job found the other checkpoint
    assert switched["serving.latency"].features.variant == "switch"
    assert set(drained) == {"engine.worker_attach", "engine.worker_drain"}
    assert min(drained["engine.worker_drain"].values_s) > 0


def test_clients_share_one_controlnet_worker(tmp_path: Path) -> None:
    task = next(task for task in client_tasks(EXTENT) if task.features.variant == "clients2")
    rig = build_rig(next(setup for setup in setups(EXTENT, str(tmp_path)) if setup.name == "clients"))
    try:
        timed = _by_quantity(rig.run(task.method, task.features, 1))
    finally:
        rig.close()
    assert len(timed["serving.latency"].values_s) == 2  # one job of each client
    assert timed["serving.latency"].features == task.features


def test_clients_are_as_many_as_have_a_gpu_beside_the_controlnet_worker() -> None:
    def variants(extent: Extent) -> set[tuple[str, int]]:
        return {(task.features.variant, task.features.n_controlnets) for task in client_tasks(extent)}

    assert variants(Extent()) == set()
    assert variants(Extent(n_gpus=2)) == {("clients1", 1), ("clients1", 3)}
    assert variants(Extent(n_gpus=4)) == {
        ("clients1", 1), ("clients1", 3), ("clients2", 1), ("clients2", 3), ("clients3", 1), ("clients3", 3),
        ("clients2_unequal", 3), ("clients3_unequal", 3),
    }  # fmt: skip
    setup = next(setup for setup in setups(Extent(n_gpus=4), "") if setup.name == "clients")
    assert setup.n_sharing == 3
    assert variants(dataclasses.replace(EXTENT, n_controlnets=0)) == set()
