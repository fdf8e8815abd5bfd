"""From seeds to replays that can be compared: the workloads are drawn, played on real processes, and read back."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from calibrate.measurement import read_measurements
from calibrate.profile_file import to_json
from planner.validation.engine_run import read_engine_run
from tests.simulation_builders import constant_profile
from traces.reader import read_trace

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
QUICK = {
    "text_encode": 1e-3, "vae_decode": 1e-3, "request_overhead": 2e-2, "unet_step": 4e-3, "controlnet_step": 2e-3, "lora_attach": 1e-3,
    "lora_detach": 1e-3, "lora_fetch": 2e-2,
}  # fmt: skip


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    path.write_text(to_json(constant_profile(**QUICK)), encoding="utf-8")
    return path


def test_workloads_have_the_load_of_their_name_and_the_same_bytes_each_time(profile: Path, tmp_path: Path) -> None:
    drawing = script("validation_workloads")
    for out in ("one", "two"):
        drawing.main(["--profile", str(profile), "--out", str(tmp_path / out)])
    rows = json.loads((tmp_path / "one" / "workloads.json").read_text())["workloads"]
    assert len([row for row in rows if row["topology"] == "colocated"]) >= 8
    assert sum(row["share_with_30_steps"] == 1.0 for row in rows) >= 4
    for row in rows:
        file = f"{row['name']}.parquet"
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
        assert row["n_requests"] >= 200 or row["topology"] == "decoupled"
        # the last arrival ends the window; to a microsecond
        assert row["mean_service_s"] * row["n_requests"] / row["duration_s"] == pytest.approx(row["load"], rel=1e-3)
        trace = read_trace(tmp_path / "one" / file)
        gaps = np.diff(trace.requests["arrival_s"].to_numpy())
        # the cv of 199 gamma gaps is within a third of its own: its relative error is near sqrt(1 + 2 cv²)/sqrt(2n) < 0.16
        assert float(gaps.std() / gaps.mean()) == pytest.approx(row["cv"], rel=0.45)


def test_what_is_played_can_be_read_and_begins_with_the_same_caches_each_time(profile: Path, tmp_path: Path) -> None:
    workloads, out = tmp_path / "workloads", tmp_path / "played"
    script("validation_workloads").main([
        "--profile", str(profile), "--out", str(workloads), "--only", "w3,w4", "--requests", "20", "--size-scale", "0.125",
        "--steps-max", "3",
    ])  # fmt: skip
    code = script("validation").main([
        "--workloads", str(workloads), "--out", str(out), "--model", "featherweight", "--gpu-kind", "test", "--warm-px", "64",
        "--again", "w3", "--limit-s", "100", "--probes", "1", "--pack", str(tmp_path / "packed.tgz"),
    ])  # fmt: skip
    assert code == 0
    first = read_engine_run(out / "w3-light-bursty-few-steps-loras")
    second = read_engine_run(out / "again" / "w3-light-bursty-few-steps-loras")
    other = read_engine_run(out / "w4-70-bursty-large-controlnets")
    assert first.workload_key == second.workload_key != other.workload_key
    for run in (first, second, other):
        assert set(run.log.requests["status"]) == {"done"}
        assert set(run.start.workers["base-0"].controlnet_ids) == {"canny", "depth", "pose"}
    used = {name for names in first.trace.requests["lora_ids"] for name in names}
    again = {name for names in second.trace.requests["lora_ids"] for name in names}
    assert used.isdisjoint(again)  # so that the second replay finds as cold a tier as the first
    assert first.log.requests["n_lora_misses"].tolist() == second.log.requests["n_lora_misses"].tolist()
    assert set(first.lora_bytes) >= used
    facts = json.loads((out / "facts.json").read_text())
    assert (len(facts["played"]), facts["left_out"]) == (3, [])
    assert (tmp_path / "packed.tgz").stat().st_size > 0
    assert not list(out.glob("**/records-*.jsonl"))
    probes = json.loads((out / "probes.json").read_text())
    assert all(len(row["denoise_s"]) == 1 for row in probes)
    rows_file = tmp_path / "probes.parquet"
    script("validation_probes").main([str(out), "--gpu-kind", "test", "--out", str(rows_file)])
    rows = read_measurements(rows_file).rows
    assert {row.quantity for row in rows} >= {"serving.latency", "serving.text", "serving.denoise", "serving.overhead"}
    for latency in (row for row in rows if row.quantity == "serving.latency"):
        parts_s = sum(
            row.value_s for row in rows if row.features == latency.features and row.quantity != "serving.latency"
        )
        assert parts_s == pytest.approx(latency.value_s, rel=1e-9)  # stages and overhead fill the latency


def test_workloads_are_played_in_the_order_asked_for_the_second_replay_after_the_first() -> None:
    player = script("validation")
    folder = BENCHMARKS.parent / "examples" / "validation"
    names = [(play.name[:2], play.number) for play in player.plays_of(folder, ["w8", "w1", "w6"], ["w1"], "colocated")]
    assert names == [("w8", 0), ("w1", 0), ("w1", 1), ("w6", 0)]
    assert len(player.plays_of(folder, [], [], "colocated")) == 8


def test_what_does_not_fit_into_the_time_is_left_out_and_named(profile: Path, tmp_path: Path) -> None:
    workloads, out = tmp_path / "workloads", tmp_path / "played"
    script("validation_workloads").main([
        "--profile", str(profile), "--out", str(workloads), "--only", "w6", "--requests", "20", "--size-scale", "0.125"
    ])  # fmt: skip
    code = script("validation").main([
        "--workloads", str(workloads), "--out", str(out), "--model", "featherweight", "--gpu-kind", "test", "--warm-px", "64",
        "--limit-s", "13",
    ])  # fmt: skip
    assert code == 1
    assert json.loads((out / "facts.json").read_text())["left_out"] == ["w6-90-steady-many-images (1)"]
