"""The page Plan: asks for the plan of the question and shows it."""

from __future__ import annotations

from dashboards import results
from dashboards.here import Here
from dashboards.planning import ask_plan


def draw(here: Here) -> None:
    """The whole page below the frame."""
    plan = ask_plan(here)
    if plan is not None:
        results.draw(plan)
