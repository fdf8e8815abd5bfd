"""Plans of the shipped samples and of the real log, made once and looked at by many tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from planner.plan_files import write_plan
from planner.plan_run import make_plan
from planner.scenario import Scenario, load_scenario

ROOT = Path(__file__).resolve().parents[2]
GENTD26 = ROOT.parent / "shared" / "traces" / "gentd26"


def _planned(scenario: Scenario, folder: Path, out: Path) -> Path:
    write_plan(make_plan(scenario, folder, jobs=1), scenario, folder, out)
    return out


@pytest.fixture(scope="session")
def katz_a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Service A: the shipped scenario ``small``."""
    scenario, folder = load_scenario("sample:small")
    return _planned(scenario, folder, tmp_path_factory.mktemp("katz_a") / "plan")


@pytest.fixture(scope="session")
def katz_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Service B under a promise that only separate ControlNet workers keep, a quarter of its traffic for a quarter of an hour."""
    scenario, folder = load_scenario("sample:provider_fast")
    window = {"start_h": 0.0, "end_h": 0.25}
    plain = scenario.model_dump()
    plain["traffic"] |= {"scale_factor": 1.0, "window": window}
    plain["simulation"] |= {"replications": 3}
    return _planned(Scenario.model_validate(plain), folder, tmp_path_factory.mktemp("katz_b") / "plan")


@pytest.fixture(scope="session")
def gentd26(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A week of the real log, two repetitions; only for tests that are marked ``real_traces``. docs/decisions.md has all of it."""
    from traces.importers.gentd26 import import_gentd26
    from traces.writer import write_trace

    folder = tmp_path_factory.mktemp("gentd26")
    write_trace(import_gentd26(GENTD26), folder / "gentd26.parquet")
    shutil.copy(ROOT / "examples" / "gentd26.yaml", folder)
    scenario, here = load_scenario(str(folder / "gentd26.yaml"))
    plain = scenario.model_dump()
    plain["traffic"] |= {"window": {"start_h": 168.0, "end_h": 336.0}}
    plain["simulation"] |= {"replications": 2}
    return _planned(Scenario.model_validate(plain), here, folder / "plan")
