"""One tiny plan, made once and looked at by many tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from planner.plan_files import write_plan
from planner.plan_run import PlanResult, make_plan
from planner.scenario import Scenario, load_scenario


def _load(name: str) -> ModuleType:
    # importlib mode gives test folders no package: load the builder by its path
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class TinyPlan:
    scenario: Scenario
    folder: Path
    result: PlanResult
    out: Path


@pytest.fixture(scope="session")
def write_scenario() -> Callable[..., Path]:
    """Writes a tiny scenario and its trace into a folder."""
    return _load("planning").write_scenario  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def tiny_plan(tmp_path_factory: pytest.TempPathFactory, write_scenario: Callable[..., Path]) -> TinyPlan:
    """The plan of the tiny scenario, in this process, with its files."""
    folder = tmp_path_factory.mktemp("tiny")
    scenario, here = load_scenario(str(write_scenario(folder)))
    result = make_plan(scenario, here, jobs=1)
    out = folder / "out"
    write_plan(result, scenario, here, out)
    return TinyPlan(scenario, here, result, out)
