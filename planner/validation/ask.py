"""``diffplan validate``: reads replays, pairs those of one workload, simulates, compares, writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calibrate.profile_file import load_profile
from planner.files import make_folder, write_texts
from planner.validation import report
from planner.validation.comparison import Comparison, compare
from planner.validation.engine_run import EngineRun, read_engine_run
from planner.validation.record import to_json, to_plain
from planner.validation.simulated import SimulationSettings, simulate_run
from traces.problems import InputError, Problem, one_problem


@dataclass(frozen=True, slots=True)
class ValidationQuestion:
    """What is to be validated."""

    runs: tuple[Path, ...]
    profile: str
    against: tuple[Path, ...] = ()
    """Second replays; each belongs to the run with the same workload."""
    settings: SimulationSettings = field(default_factory=SimulationSettings)


@dataclass(frozen=True, slots=True, eq=False)
class Validation:
    """The answer."""

    comparisons: tuple[Comparison, ...]
    plain: dict[str, Any]

    @property
    def holds(self) -> bool:
        """Whether every run is within its bounds."""
        return all(item.holds for item in self.comparisons)


def validate(question: ValidationQuestion, say: Callable[[str], None]) -> Validation:
    """Simulates every run and compares.

    Raises:
        InputError: a run, a second replay or the profile cannot be used, or they do not belong together.
    """
    profile = load_profile(question.profile)
    runs = [read_engine_run(path) for path in question.runs]
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise one_problem("ENGINE_RUN", f"{twice[0]!r} is the name of two folders", "folders with names of their own")
    seconds = _paired(runs, [read_engine_run(path) for path in question.against])
    found = []
    for run, again in zip(runs, seconds, strict=True):
        say(f"{run.name}: {len(run.log.requests)} requests, {run.topology}")
        simulated = simulate_run(run, profile, question.settings)
        found.append(compare(run, simulated, again, question.settings.seed))
    name = Path(question.profile).stem if Path(question.profile).suffix else question.profile
    return Validation(tuple(found), to_plain(found, profile, name, question.settings))


def write_validation(validation: Validation, out: Path) -> list[Path]:
    """``validation.json`` and ``validation.html``; raises :class:`InputError` if the folder cannot be written."""
    make_folder(out)
    page = report.html(validation.comparisons, validation.plain)
    return write_texts(out, {"validation.json": to_json(validation.plain), "validation.html": page})


def _paired(runs: Sequence[EngineRun], others: Sequence[EngineRun]) -> list[EngineRun | None]:
    by_key: dict[str, EngineRun] = {}
    problems = []
    keys = [run.workload_key for run in runs]
    for other in others:
        key = other.workload_key
        if key not in keys:
            problems.append(
                Problem(f"--against {other.name}", "replays none of the runs' workloads", "the same requests at the same times")
            )  # fmt: skip
        elif key in by_key:
            problems.append(
                Problem(f"--against {other.name}", f"replays the same workload as {by_key[key].name}", "one second replay of each")
            )  # fmt: skip
        by_key[key] = other
    for key in sorted({key for key in keys if keys.count(key) > 1 and key in by_key}):
        same = [run.name for run in runs if run.workload_key == key]
        problems.append(
            Problem("ENGINE_RUN", f"{', '.join(same)} replay one workload", "one run of it beside --against")
        )
    if problems:
        raise InputError(problems)
    return [by_key.get(key) for key in keys]
