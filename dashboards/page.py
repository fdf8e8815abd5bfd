"""The page: question at the side, answer in the middle, and what is shown while there is none."""

from __future__ import annotations

from typing import Any, Final

import streamlit as st

from dashboards import choices, plan_job, results, settings
from dashboards.choices import Choices, UnansweredError
from dashboards.plain_text import escaped, rounded
from dashboards.plan_job import BrokenError, Plan, RefusedError, Store
from planner.scenario import SAMPLE_PREFIX, resolve, to_yaml
from traces.problems import InputError
from traces.reader import read_trace
from traces.trace import Trace

TITLE: Final = "diffplan"
_LAST: Final = "_last_plan"


def show() -> None:
    """Draws the page for one visitor, once."""
    st.set_page_config(page_title=TITLE, layout="wide", initial_sidebar_state="auto", menu_items={})
    st.title("Which GPUs should run what?", anchor=False)
    st.caption(
        "Simulates a text-to-image service on measured latencies and recommends the cheapest allocation that keeps the promise."
    )
    above = st.container()
    asked = _asked()
    with above:  # only now is it known what of the link could be used
        _draw_ignored()
    if asked is not None:
        plan = _answer(asked)
        if plan is not None:
            results.draw(plan)


def _asked() -> Choices | None:
    """The visitor's question, drawn; None, with a sentence, if there is none yet or it cannot be planned."""
    try:
        asked = choices.ask(settings.from_environment())
        trace = _trace_of(asked)
        plan_job.check_work(asked.scenario, trace)
    except UnansweredError as error:
        st.info(escaped(str(error)), icon=":material/upload_file:")
        return None
    except InputError as error:
        draw_problem("This question cannot be planned yet.", str(error))
        return None
    _draw_question(asked, trace)
    return asked


def draw_problem(title: str, sentences: str) -> None:
    """What is wrong; the sentences may quote a visitor's file, so they are shown as they are."""
    with st.container(border=True):
        st.error(title, icon=":material/error:")
        st.text(sentences)


def _draw_ignored() -> None:
    ignored = st.session_state.get("_link_ignored")
    if ignored:
        st.warning("This link says something that cannot be used and was left out:", icon=":material/link_off:")
        st.text("\n".join(ignored))


def _trace_of(asked: Choices) -> Trace:
    reference = asked.scenario.traffic.trace
    if reference.startswith(SAMPLE_PREFIX):
        return _read(reference, 0, 0)
    path = resolve(reference, asked.folder)
    try:
        stat = path.stat()
    except OSError:
        return read_trace(path)  # says what is wrong with it
    return _read(str(path), stat.st_mtime_ns, stat.st_size)


@st.cache_resource(max_entries=4, show_spinner="Reading the trace…")
def _read(reference: str, mtime_ns: int, size_bytes: int) -> Trace:
    """A trace, read again when its file changes. Nobody changes it, so the sessions share it."""
    return read_trace(reference)


@st.cache_resource(show_spinner=False)
def _store() -> Store:
    return Store()


def _draw_question(asked: Choices, trace: Trace) -> None:
    scenario = asked.scenario
    with st.container(border=True):
        st.text(f"{scenario.name}: {scenario.description}" if scenario.description else scenario.name)
        cut = ""
        if scenario.traffic.window is not None:
            cut = f", of which hours {scenario.traffic.window.start_h:g} to {scenario.traffic.window.end_h:g} are planned for"
        elif scenario.traffic.busiest is not None:
            cut = f", of which the busiest {rounded(scenario.traffic.busiest.length_h, 'h')} are planned for"
        n, hours = len(trace) * scenario.traffic.scale_factor, trace.duration_s / 3600
        rate = rounded(n / trace.duration_s, "requests per second") if trace.duration_s > 0 else "no duration"
        st.caption(
            escaped(
                f"About {rounded(n)} requests over {rounded(hours, 'h')} ({rate}){cut}; {100 * scenario.slo.attainment_ratio:g} % of them promised within "
                f"{scenario.slo.latency_s:g} s; {asked.profile.architecture} on {asked.profile.gpu_kind} at "
                f"${asked.price.price_usd_per_gpu_hour:.2f} per GPU-hour; {', '.join(scenario.topologies)} compete."
            )
        )  # fmt: skip
        statuses = [law.status for law in asked.profile.laws.values()]
        if statuses and "measured" not in statuses:
            st.warning(
                "Nothing in this profile was measured: every latency in it is assumed, and so is every result below."
            )


def _answer(asked: Choices) -> Plan | None:
    """The plan of the question if it is known or the button was pressed; otherwise says what to do."""
    store, state = _store(), st.session_state
    key = plan_job.plan_key(asked.scenario, asked.folder)
    is_pressed = st.button("Plan", type="primary", icon=":material/play_arrow:", key="plan")
    known = store.get(key)
    if known is None and is_pressed:
        try:
            known = _compute(store, key, asked, settings.from_environment().jobs)
        except RefusedError as error:
            draw_problem("This question cannot be planned.", str(error))
            return None
        except BrokenError as error:
            draw_problem("The plan could not be made.", str(error))
            results.draw_files({"scenario.yaml": to_yaml(asked.scenario).encode()})
            return None
    if known is not None:
        state[_LAST] = known
        return known
    if _LAST in state:
        st.info(
            "The plan below answers the question before your change. Press Plan for the new one.",
            icon=":material/history:",
        )
        last: Plan = state[_LAST]
        return last
    st.info(
        "Press Plan: every topology is sized by simulation, then checked over several repetitions. A large service can take minutes."
    )
    return None


def _compute(store: Store, key: str, asked: Choices, jobs: int) -> Plan:
    place = st.empty()
    with place.status("Planning…", expanded=True):
        doing, clock = st.empty(), st.empty()
        st.button("Stop", key="stop", help="Any change of the question stops the computation as well.")
        said: dict[str, Any] = {}

        def waiting(text: str, elapsed_s: float) -> None:
            # every write is a point where Streamlit may end this run, because of the button, a change or a closed page
            if said.get("text") != text:
                doing.text(text)
                said["text"] = text
            clock.text(f"{elapsed_s:.0f} s")

        try:
            plan = plan_job.compute(store, key, asked.scenario, asked.folder, jobs, waiting)
        except (RefusedError, BrokenError):
            place.empty()
            raise
    place.empty()
    return plan
