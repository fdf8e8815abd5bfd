"""The plan of the visitor's question: found if it is known, made when asked for, with progress and a way to stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import streamlit as st

from dashboards import plan_job
from dashboards.elements import draw_empty, draw_problem
from dashboards.here import Here
from dashboards.plan_job import BrokenError, Plan, RefusedError, Store
from dashboards.words import say, translated
from planner.scenario import Scenario, to_yaml

LAST: Final = "_last_plan"
T = TypeVar("T")


@st.cache_resource(show_spinner=False)
def store() -> Store:
    """The plans of this server."""
    return Store()


def known_plan(here: Here) -> Plan | None:
    """The plan of exactly this question, if the server still has it."""
    if here.asked is None:
        return None
    found = store().get(plan_job.plan_key(here.asked.scenario, here.asked.folder))
    if found is not None:
        st.session_state[LAST] = found
    return found


def ask_plan(here: Here) -> Plan | None:
    """Draws the button, and while it computes what is being done; gives the plan to show.

    That is the plan of this question; or, said above it, the plan of the question before the visitor's last change; or None,
    with a sentence that says what to do.
    """
    if here.asked is None:
        return None  # what is wrong with the question stands above
    plan = known_plan(here)
    is_pressed = st.button(
        say("plan.make" if plan is None else "plan.made"), type="primary" if plan is None else "secondary", key="plan", disabled=plan is not None,
        icon=":material/play_arrow:" if plan is None else ":material/check:", help=None if plan is None else say("plan.made.help"),
    )  # fmt: skip
    if plan is None and is_pressed:
        plan = compute_plan(here.asked.scenario, here.asked.folder, here.settings.jobs)
        if plan is None:
            return None
        st.session_state[LAST] = plan
    if plan is not None:
        return plan
    if LAST in st.session_state:
        st.info(say("plan.is_old"), icon=":material/history:")
        last: Plan = st.session_state[LAST]
        return last
    draw_empty(say("plan.press"))
    return None


def compute_plan(scenario: Scenario, folder: Path, jobs: int) -> Plan | None:
    """Makes the plan of a question, shows progress and a Stop button meanwhile; None, with what went wrong, if there is no plan."""
    key = plan_job.plan_key(scenario, folder)
    return with_progress(scenario, lambda waiting: plan_job.compute(store(), key, scenario, folder, jobs, waiting))


def with_progress(scenario: Scenario, compute: Callable[[plan_job.Waiting], T]) -> T | None:
    """Computes outside the server and shows meanwhile what is being done; None, with what went wrong, if nothing comes of it."""
    place = st.empty()
    with place.status(say("plan.planning"), expanded=True):
        doing, clock = st.empty(), st.empty()
        st.button(say("plan.stop"), key="stop", help=say("plan.stop.help"))
        said: dict[str, Any] = {}

        def waiting(text: str, elapsed_s: float) -> None:
            # every write is a point where Streamlit may end this run, because of the button, a change or a closed page
            if said.get("text") != text:
                doing.text(translated(text))
                said["text"] = text
            clock.text(say("plan.clock", s=f"{elapsed_s:.0f}"))

        try:
            found = compute(waiting)
        except RefusedError as error:
            place.empty()
            draw_problem(say("plan.refused"), str(error))
            return None
        except BrokenError as error:
            place.empty()
            draw_problem(say("plan.broken"), str(error))
            st.download_button(
                "scenario.yaml", to_yaml(scenario), "scenario.yaml", "application/yaml", on_click="ignore"
            )
            return None
    place.empty()
    return found
