"""What the person who starts the dashboard decides; travels to the page's script in one environment variable."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from calibrate.profile_file import shipped_profiles
from planner.scenario import shipped_scenarios
from traces.problems import InputError, Problem

VARIABLE: Final = "DIFFPLAN_DASHBOARD"
UPLOAD: Final = "upload"
"""The choice that stands for a file of the visitor's own."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Files of this machine offered beside the shipped ones, and how many processes a plan may use."""

    scenarios: tuple[Path, ...] = ()
    profiles: tuple[Path, ...] = ()
    jobs: int = 2

    def scenario_files(self) -> dict[str, Path]:
        """Name to file of every scenario on offer; raises :class:`InputError` where names clash or a file is missing."""
        return _offered(shipped_scenarios(), self.scenarios, "--scenario")

    def profile_files(self) -> dict[str, Path]:
        """Name to file of every profile on offer; raises like :meth:`scenario_files`. May be empty."""
        return _offered(shipped_profiles(), self.profiles, "--profile")

    def check(self) -> None:
        """Raises :class:`InputError` with what is wrong with any of the files."""
        problems: list[Problem] = []
        for offered in (self.scenario_files, self.profile_files):
            try:
                offered()
            except InputError as error:
                problems += error.problems
        if problems:
            raise InputError(problems)

    def to_variable(self) -> str:
        """The value of the environment variable."""
        plain = {
            "scenarios": [str(p) for p in self.scenarios],
            "profiles": [str(p) for p in self.profiles],
            "jobs": self.jobs,
        }
        return json.dumps(plain)


def from_environment(environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings that :mod:`dashboards.cli` left, or the defaults if the page was started without it."""
    if VARIABLE not in environment:
        return Settings()
    plain = json.loads(environment[VARIABLE])
    return Settings(tuple(map(Path, plain["scenarios"])), tuple(map(Path, plain["profiles"])), int(plain["jobs"]))


def _offered(shipped: Mapping[str, Path], own: Iterable[Path], option: str) -> dict[str, Path]:
    offered, problems = dict(shipped), []
    for path in own:
        if not path.is_file():
            problems.append(Problem(f"{option} {path}", "is not a file", "a readable file", "Check the path"))
        elif path.name in offered or path.name == UPLOAD:
            problems.append(
                Problem(
                    f"{option} {path}", f"has the name {path.name!r} like another one", "each name once", "Rename it"
                )
            )
        else:
            offered[path.name] = path.resolve()
    if problems:
        raise InputError(problems)
    return offered
