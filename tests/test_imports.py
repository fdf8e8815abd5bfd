"""The promises about what may be imported where, checked by running with the forbidden packages blocked."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"blocked by the test: {{name}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def run_blocked(blocked: set[str], code: str) -> subprocess.CompletedProcess[str]:
    source = BLOCK.format(blocked=sorted(blocked)) + code
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False)


TORCH = {"torch", "diffusers", "transformers", "peft", "triton", "safetensors"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["plan", "--help"],
        ["simulate", "--help"],
        ["compare", "--help"],
        ["export", "--help"],
        ["trace", "--help"],
        ["trace", "describe", "--help"],
    ],
    ids=" ".join,
)
def test_planner_commands_run_without_torch(arguments: list[str]) -> None:
    code = f"import sys; sys.argv = ['diffplan', *{arguments!r}]\nfrom planner.cli import main\nmain()"
    done = run_blocked(TORCH | {"streamlit"}, code)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@pytest.mark.parametrize("package", ["engine", "calibrate"])
def test_the_gpu_host_needs_neither_pydantic_nor_simpy(package: str) -> None:
    code = f"import runpy, sys; sys.argv = ['{package}', '--help']\nrunpy.run_module('{package}', run_name='__main__')"
    done = run_blocked({"pydantic", "simpy", "streamlit", "ruamel", "joblib", "plotly"}, code)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_the_root_command_loads_no_sub_command_for_its_help() -> None:
    code = (
        "import sys; sys.argv = ['diffplan', '--help']\nfrom planner.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "loaded = sorted({'pandas', 'simpy', 'pydantic', 'scipy', 'pyarrow'} & set(sys.modules))\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)"
    )
    done = run_blocked(TORCH, code)
    assert done.returncode == 0, done.stderr


def test_a_missing_extra_is_named_in_the_error() -> None:
    code = "import sys; sys.argv = ['diffplan', 'dashboard', '--help']\nfrom planner.cli import main\nmain()"
    done = run_blocked({"streamlit", "dashboards"}, code)
    assert done.returncode == 2
    assert "pip install 'diffplan[dash]'" in done.stderr
