"""The committed report is what ``diffplan validate`` says of the committed logs by the shipped profile, and its excerpts are its own."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from calibrate.profile_file import shipped_profiles
from planner.validation.ask import ValidationQuestion, validate
from planner.validation.engine_run import read_engine_run
from planner.validation.simulated import SimulationSettings
from traces.reader import read_trace

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "validation"
PLAYED = RESULTS / "played"


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return json.loads((RESULTS / "validation.json").read_text(encoding="utf-8"))


def script() -> ModuleType:
    path = ROOT / "benchmarks" / "validation_table.py"
    spec = importlib.util.spec_from_file_location("benchmark_validation_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_one_run_is_simulated_again_to_the_committed_numbers(report: dict[str, Any]) -> None:
    # one of eight, the one with a second replay, to save time; the whole command is in docs/validation.md
    committed = next(run for run in report["runs"] if run["against"] is not None)
    name = committed["name"]
    done = validate(
        ValidationQuestion((PLAYED / name,), "h200", (PLAYED / "again" / name,), SimulationSettings(**report["settings"])),
        lambda text: None,
    )  # fmt: skip
    assert done.plain["profile"] == report["profile"]
    assert done.plain["bounds"] == report["bounds"]
    found = json.loads(json.dumps(done.plain["runs"][0]))
    assert found.keys() == committed.keys()
    assert _differences(committed, found) == []


def _differences(committed: Any, found: Any, place: str = "") -> list[str]:
    """Where two JSON values differ; numbers may in their last digits, as sums do from one processor to another."""
    if isinstance(committed, dict):
        if not isinstance(found, dict) or committed.keys() != found.keys():
            return [place]
        return [each for key in committed for each in _differences(committed[key], found[key], f"{place}.{key}")]
    if isinstance(committed, list):
        if not isinstance(found, list) or len(committed) != len(found):
            return [place]
        return [each for k, item in enumerate(committed) for each in _differences(item, found[k], f"{place}[{k}]")]
    if isinstance(committed, float) and isinstance(found, int | float):
        return [] if found == pytest.approx(committed, rel=1e-6, abs=1e-9) else [place]
    return [] if committed == found else [place]


def test_every_workload_was_replayed_as_it_is_committed_or_is_named_as_left_out(report: dict[str, Any]) -> None:
    listed = json.loads((ROOT / "examples" / "validation" / "workloads.json").read_text(encoding="utf-8"))["workloads"]
    wanted = [row["name"] for row in listed if row["topology"] == "colocated"]
    facts = json.loads((PLAYED / "facts.json").read_text(encoding="utf-8"))
    left_out = [name.split(" ")[0] for name in facts["left_out"]]
    page = (ROOT / "docs" / "validation.md").read_text(encoding="utf-8")
    assert all(f"`{name.split('-')[0]}` did not fit" in page for name in left_out)
    replayed = [run["name"] for run in report["runs"]]
    assert sorted([*replayed, *left_out]) == sorted(wanted)
    same = ["request_id", "arrival_s", "n_steps", "width_px", "height_px", "n_images", "guidance_scale"]
    for name in replayed:
        offered = read_trace(ROOT / "examples" / "validation" / f"{name}.parquet").requests
        played = read_engine_run(PLAYED / name).trace.requests
        assert played[same].equals(offered[same])
        assert played["controlnet_ids"].map(len).equals(offered["controlnet_ids"].map(len))
        assert played["lora_ids"].map(len).equals(offered["lora_ids"].map(len))


def test_the_page_and_the_file_beside_the_profile_are_excerpts_of_the_report(report: dict[str, Any]) -> None:
    excerpts = script()
    assert excerpts.table(report) in (ROOT / "docs" / "validation.md").read_text(encoding="utf-8")
    beside = json.loads((ROOT / "calibrate" / "profiles" / "h200.validation.json").read_text(encoding="utf-8"))
    assert beside == json.loads(json.dumps(excerpts.short(report)))
    assert [name for name in shipped_profiles() if name.startswith("h200")] == ["h200"]
