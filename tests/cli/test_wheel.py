"""From a built wheel in an empty folder: everything the planner needs travels with it, and it never needs torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# a sitecustomize that lets Python find none of the GPU packages, and none of this checkout
BLOCKER = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"torch", "diffusers", "transformers", "peft", "triton", "safetensors", "streamlit"}}:
            raise ModuleNotFoundError(f"blocked by the test: {{name}}", name=name)
sys.meta_path.insert(0, Blocked())
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "").lower()]
sys.path[:] = [entry for entry in sys.path if entry != {str(ROOT)!r}]
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel. Building needs the build backend: installed, or to be had from an index."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--quiet", "--wheel-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0 and "hatchling" in done.stderr:
        pytest.skip(f"the build backend cannot be had here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's packages and nothing else of ours."""
    site = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (site / "sitecustomize.py").write_text(BLOCKER, encoding="utf-8")
    return site


def run(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    code = "from planner.cli import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def test_the_wheel_carries_profiles_prices_samples_scenarios_and_templates(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for folder, suffix in (
        ("planner/prices/", ".json"),
        ("planner/scenarios/", ".yaml"),
        ("planner/templates/", ".j2"),
        ("traces/samples/", ".parquet"),
        ("calibrate/profiles/", ".json"),
    ):
        in_tree = {f"{folder}{path.name}" for path in (ROOT / folder).glob(f"*{suffix}")}
        assert in_tree <= set(names)
        assert in_tree or folder == "calibrate/profiles/", f"nothing to ship in {folder}"
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "examples/"))]


def test_the_installed_package_is_not_the_checkout(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    code = "import planner, traces, engine, calibrate; print(planner.__file__, traces.__file__, engine.__file__, calibrate.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(installed)) == 4


def test_a_plan_is_made_in_an_empty_folder_without_torch(installed: Path, tmp_path: Path) -> None:
    profile = ROOT / "tests" / "data" / "provisional_profile.json"
    (tmp_path / "s.yaml").write_text(
        "name: small\ntraffic:\n  trace: sample:katz_b_hour\n  window: {start_h: 0, end_h: 0.05}\n"
        f"slo:\n  latency_s: 20\n  attainment_ratio: 0.95\nprofile:\n  name: {profile}\n"
        "search:\n  dedicated_controlnets_max: 0\nsimulation:\n  replications: 2\n  warmup_s: 30\n",
        encoding="utf-8",
    )
    done = run(installed, tmp_path, "plan", "s.yaml", "--out", "out", "--jobs", "2", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["verdict"] == "recommended"
    assert record["ids"]["price_usd_per_gpu_hour"] == 3.5
    done = run(installed, tmp_path, "simulate", "s.yaml", "--allocation", "out/allocation.json", "--out", "sim")
    assert done.returncode == 0, done.stderr
    done = run(installed, tmp_path, "compare", "out", "out/plan.json")
    assert done.returncode == 0, done.stderr
    assert "small" in done.stdout


def test_a_trace_is_described_without_torch(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "trace", "describe", "sample:katz_a_hour", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


def test_a_shipped_scenario_is_found_from_anywhere(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "plan", "sample:nothing", "--out", "out")
    assert done.returncode == 2
    assert "sample:provider" in done.stderr
