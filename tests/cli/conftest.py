"""Runs the root command as a user does, in this process or from an installed wheel."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from planner.cli import main

DATA = Path(__file__).resolve().parents[1] / "data"


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture
def diffplan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """``diffplan(*arguments)`` with its exit code and what it said."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["diffplan", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        code = stop.value.code
        return Ended(code if isinstance(code, int) else 0, said.out, said.err)

    return run


TRACE = "request_id,arrival_s,n_steps\n" + "".join(f"r{row},{row * 2},10\n" for row in range(120))


@pytest.fixture
def question(tmp_path: Path) -> Path:
    """A scenario that plans in a second, with its trace and its profile beside it."""
    (tmp_path / "trace.csv").write_text(TRACE, encoding="utf-8")
    (tmp_path / "profile.json").write_bytes((DATA / "provisional_profile.json").read_bytes())
    path = tmp_path / "scenario.yaml"
    path.write_text(
        "name: tiny\ntraffic:\n  trace: trace.csv\nslo:\n  latency_s: 10\n  attainment_ratio: 0.9\nprofile:\n  name: profile.json\n"
        "simulation:\n  replications: 2\n",
        encoding="utf-8",
    )
    return path
