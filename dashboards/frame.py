"""The frame around all pages: navigation, language, the question at the side, and what is wrong with it."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any, Final

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from dashboards import choices, link, plan_job, settings, words
from dashboards.choices import Choices, UnansweredError
from dashboards.elements import draw_problem
from dashboards.here import Here
from dashboards.plain_text import escaped, rounded
from dashboards.words import problem_words, say, translated
from planner.scenario import SAMPLE_PREFIX, resolve
from traces.problems import InputError
from traces.reader import read_trace
from traces.trace import Trace

PAGES: Final = {
    "start": ":material/home:",
    "traffic": ":material/ssid_chart:",
    "plan": ":material/task_alt:",
    "what_if": ":material/tune:",
    "timeline": ":material/timeline:",
    "allocation": ":material/memory:",
    "roi": ":material/payments:",
    "accuracy": ":material/straighten:",
    "export": ":material/download:",
}
"""Pages in order, each with its icon. Page ``x`` is ``dashboards.pages.x.draw(here)``; its words begin with ``x.``."""
LINE_OF_QUESTION: Final = re.compile(r"^question:\d+ ", re.MULTILINE)
"""Where in the question's text a fault is: a text that the visitor, who moved a field, never saw."""
FIRST: Final = "start"
WITHOUT_QUESTION: Final = (FIRST,)
"""Pages on which the question is not repeated above."""


def show() -> None:
    """Draws one page for one visitor, once."""
    # an icon of the page's own: a browser would fetch that of the menu from another machine
    st.set_page_config(
        page_title="diffplan", page_icon="📐", layout="wide", initial_sidebar_state="auto", menu_items={}
    )
    link.begin()
    with st.sidebar:
        words.ask()
    here: list[Here] = []

    def drawer(name: str) -> Callable[[], Any]:
        # loaded when first looked at, so that the first page comes soon
        return lambda: importlib.import_module(f"dashboards.pages.{name}").draw(here[0])

    pages = {
        name: st.Page(
            drawer(name),
            title=say(f"{name}.nav"),
            icon=icon,
            url_path=name if name != FIRST else "",
            default=name == FIRST,
        )
        for name, icon in PAGES.items()
    }
    # the first page is served at the root only: its own name is a second, hidden address of it
    named = st.Page(drawer(FIRST), title=say(f"{FIRST}.nav"), icon=PAGES[FIRST], url_path=FIRST, visibility="hidden")
    current = st.navigation([*pages.values(), named], expanded=True)
    name = next((name for name, page in pages.items() if page is current or page == current), FIRST)
    st.title(say(f"{name}.title"), anchor=False)
    st.caption(say(f"{name}.lead"))
    above = st.empty()
    asked, trace = _asked(name)
    _draw_ignored(above)  # only now is it known what of the link could be used for the question …
    n_ignored = len(link.ignored())
    here.append(Here(settings.from_environment(), asked, trace, pages))
    current.run()
    if len(link.ignored()) > n_ignored:  # … and now, for the page
        _draw_ignored(above)
    link.finish()


def _asked(page: str) -> tuple[Choices | None, Trace | None]:
    """The visitor's question and its trace; None, with a sentence, if there is none yet or it cannot be planned."""
    trace = None
    try:
        asked = choices.ask(settings.from_environment())
        trace = trace_of(asked)
        plan_job.check_work(asked.scenario, trace)
    except UnansweredError as error:
        st.info(escaped(problem_words(str(error))), icon=":material/upload_file:")
        return None, trace
    except InputError as error:
        draw_problem(say("frame.cannot_be_planned"), LINE_OF_QUESTION.sub("", str(error)))
        return None, trace
    if page not in WITHOUT_QUESTION:
        _draw_question(asked, trace)
    return asked, trace


def _draw_ignored(place: DeltaGenerator) -> None:
    ignored = link.ignored()
    if ignored:
        with place.container():
            st.warning(say("frame.link_ignored"), icon=":material/link_off:")
            st.text("\n".join(ignored))


def trace_of(asked: Choices) -> Trace:
    """The trace of a question; raises :class:`InputError` if it cannot be read."""
    reference = asked.scenario.traffic.trace
    if reference.startswith(SAMPLE_PREFIX):
        return _read(reference, 0, 0)
    path = resolve(reference, asked.folder)
    try:
        stat = path.stat()
    except OSError:
        return read_trace(path)  # says what is wrong with it
    return _read(str(path), stat.st_mtime_ns, stat.st_size)


@st.cache_resource(max_entries=4, show_spinner=False)
def _read(reference: str, mtime_ns: int, size_bytes: int) -> Trace:
    """A trace, read again when its file changes. Nobody changes it, so the sessions share it."""
    return read_trace(reference)


def _draw_question(asked: Choices, trace: Trace) -> None:
    scenario = asked.scenario
    with st.container(border=True):
        st.text(f"{scenario.name}: {translated(scenario.description)}" if scenario.description else scenario.name)
        cut = ""
        if scenario.traffic.window is not None:
            window = scenario.traffic.window
            cut = say("frame.window", start=f"{window.start_h:g}", end=f"{window.end_h:g}")
        elif scenario.traffic.busiest is not None:
            cut = say("frame.busiest", length=rounded(scenario.traffic.busiest.length_h))
        n, hours = len(trace) * scenario.traffic.scale_factor, trace.duration_s / 3600
        rate = rounded(n / trace.duration_s if trace.duration_s > 0 else None)
        st.caption(
            escaped(
                say(
                    "frame.question", n=rounded(n), hours=rounded(hours), rate=rate, cut=cut, share=f"{100 * scenario.slo.attainment_ratio:g}",
                    latency=f"{scenario.slo.latency_s:g}", model=asked.profile.architecture, gpu=asked.profile.gpu_kind,
                    price=f"{asked.price.price_usd_per_gpu_hour:.2f}", topologies=", ".join(scenario.topologies),
                )
            )
        )  # fmt: skip
        statuses = [law.status for law in asked.profile.laws.values()]
        if statuses and "measured" not in statuses:
            st.warning(say("frame.nothing_measured"))
