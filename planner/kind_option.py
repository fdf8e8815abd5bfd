"""``--also-kind`` of ``diffplan plan``: GPU kinds beside those that a scenario names itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from planner.profile_choice import absolute_reference
from planner.scenario import Gpu, OtherKind, Scenario
from traces.problems import InputError, Problem

FORM: Final = "KIND=PROFILE or KIND=PROFILE@USD, such as nvidia-l40s='h200 as l40s'@1.10"


def with_other_kinds(scenario: Scenario, asked: Sequence[str]) -> Scenario:
    """The scenario with further ``gpu.others``; files start from the folder that the command runs in.

    Raises:
        InputError: with every one that is not of the form ``KIND=PROFILE[@USD]``, or names a kind that is there already.
    """
    others, problems = list(scenario.gpu.others), list[Problem]()
    for text in asked:
        kind, _, rest = text.partition("=")
        profile, _, price = rest.rpartition("@") if "@" in rest else (rest, "", "")
        if not kind.strip() or not profile.strip():
            problems.append(Problem("--also-kind", f"got {text!r:.200}", FORM))
            continue
        try:
            usd = float(price) if price else None
            others.append(
                OtherKind(
                    kind=kind.strip(), profile=absolute_reference(profile.strip(), Path()), price_usd_per_gpu_hour=usd
                )
            )
        except (ValidationError, ValueError):
            problems.append(Problem("--also-kind", f"got {text!r:.200}", f"{FORM}; USD above 0 and up to 10,000"))
    kinds = [other.kind for other in others] + ([scenario.gpu.kind] if scenario.gpu.kind else [])
    problems += [
        Problem("--also-kind", f"names {kind} twice", "each GPU kind once, those of the scenario included")
        for kind in sorted({kind for kind in kinds if kinds.count(kind) > 1})
    ]
    if problems:
        raise InputError(problems)
    gpu: Gpu = scenario.gpu.model_copy(update={"others": tuple(others)})
    return scenario.model_copy(update={"gpu": gpu})
