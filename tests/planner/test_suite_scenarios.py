"""The standard suite's scenarios can be read, and the benchmark makes the traces that they name."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from planner.scenario import load_scenario

ROOT = Path(__file__).resolve().parents[2]
SUITE = sorted((ROOT / "examples" / "suite").glob("*.yaml"))


@pytest.mark.parametrize("path", SUITE, ids=lambda path: path.stem)
def test_every_scenario_of_the_suite_can_be_read_and_its_trace_be_made(path: Path) -> None:
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "plans.py"))
    scenario, _ = load_scenario(str(path))
    assert scenario.name == path.stem
    made = Path(scenario.traffic.trace).stem
    assert made in benchmark["SYNTHETIC"]
    assert f"examples/suite/{path.name}" in benchmark["SUITE"]
    assert made in (ROOT / "examples" / "suite" / "README.md").read_text(encoding="utf-8")
