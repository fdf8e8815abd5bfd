"""What every test may use."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

# Triton reads this when it is first imported; where there is no GPU, as in CI, its kernels run under the interpreter.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def provisional_profile_path() -> Path:
    """A hand-written profile with every law, so that planner tests do not move when the measured one is refitted."""
    return ROOT / "tests" / "data" / "provisional_profile.json"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    traces = ROOT.parent / "shared" / "traces"
    for item in items:
        if item.get_closest_marker("real_traces") and not traces.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"the real traces are not redistributed and not at {traces}"))
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()
