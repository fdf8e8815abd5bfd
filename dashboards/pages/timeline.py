"""The page Time line: the recommended fleet's first repetition over time, and one request's life."""

from __future__ import annotations

from typing import Final

import pandas as pd
import streamlit as st

from dashboards import link
from dashboards import timeline_charts as charts
from dashboards.elements import draw_chart, draw_empty, draw_grades, draw_table
from dashboards.here import Here
from dashboards.plain_text import escaped, percent
from dashboards.plan_folder import plan_digest, records_of
from dashboards.plan_job import Plan
from dashboards.planning import ask_plan
from dashboards.words import say, translated
from planner.run_series import RunSeries, life_of, run_series, slowest

WINDOW: Final = "tl_window"
REQUEST: Final = "tl_request"
OTHER: Final = "tl_other"
SLOTS: Final = 120
SLOWEST: Final = 100


def draw(here: Here) -> None:
    """The whole page below the frame."""
    plan = ask_plan(here)
    if plan is None:
        return
    if plan.record.recommended is None:
        draw_empty(say("timeline.none"))
        if "plan" in here.pages:
            st.page_link(here.pages["plan"])
        return
    tables = _records(plan_digest(plan), plan)
    if tables is None:
        draw_empty(say("timeline.too_long"))
        return
    requests, workers = tables
    draw_grades(plan.record.row(plan.record.recommended).grades.values(), say("roi.grades"))
    _draw_run(plan, requests, workers)
    _draw_life(plan, requests)


@st.cache_resource(max_entries=2, show_spinner=False)
def _records(digest: str, _plan: Plan) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """A plan's records; nobody changes them, so the sessions share them."""
    return records_of(_plan)


@st.cache_data(max_entries=8, show_spinner=False)
def _series(
    digest: str, _requests: pd.DataFrame, _workers: pd.DataFrame, promise_s: float, begin_s: float, end_s: float
) -> RunSeries:
    return run_series(_requests, _workers, promise_s, n_slots=SLOTS, begin_s=begin_s, end_s=end_s)


def _draw_run(plan: Plan, requests: pd.DataFrame, workers: pd.DataFrame) -> None:
    end_s = float(max(requests["end_s"].max(), requests["arrival_s"].max()))
    first, last = _ask_window()
    begin_s, until_s = first / 100 * end_s, last / 100 * end_s
    series = _series(plan_digest(plan), requests, workers, plan.record.slo_latency_s, begin_s, until_s)
    st.caption(
        say(
            "timeline.slot", slot=charts.moment(series.slot_s), begin=charts.moment(begin_s), end=charts.moment(until_s), whole=charts.moment(end_s)
        )
    )  # fmt: skip
    for name, figure, words in (
        ("queue", charts.queue(series), charts.queue_words(series)),
        ("demand", charts.demand(series), charts.demand_words(series)),
        ("busy", charts.busy(series), charts.busy_words(series)),
    ):
        st.subheader(
            {"queue": say("timeline.queue"), "demand": say("timeline.demand"), "busy": say("timeline.busy")}[name],
            anchor=False,
        )
        draw_chart(figure, words, f"timeline_{name}")


def _ask_window() -> tuple[int, int]:
    """The part of the run to be shown, in per cent; never empty."""
    if WINDOW not in st.session_state:
        low, high = link.number("from", 0, 99), link.number("to", 1, 100)
        start, end = int(low or 0), int(high if high is not None else 100)
        st.session_state[WINDOW] = (start, end) if start < end else (0, 100)
    window: tuple[int, int] = st.slider(
        say("timeline.window"), 0, 100, key=WINDOW, help=say("timeline.window.help"), persist_state="session"
    )  # type: ignore[assignment]  # two ends, because the state holds two
    first, last = window
    if first == last:  # both ends on one spot: the hundredth around it
        first, last = (first, last + 1) if last < 100 else (first - 1, last)
    link.put(**{"from": float(first), "to": float(last)})
    return first, last


def _draw_life(plan: Plan, requests: pd.DataFrame) -> None:
    st.subheader(say("timeline.life"), anchor=False)
    ranked = slowest(requests, SLOWEST)
    latency_of = dict(ranked)
    columns = st.columns([3, 2])
    with columns[1]:
        if OTHER not in st.session_state:
            st.session_state[OTHER] = link.text("request") or ""
        other = st.text_input(
            say("timeline.life.other"),
            key=OTHER,
            max_chars=200,
            help=say("timeline.life.other.help"),
            persist_state="session",
        )
    with columns[0]:
        if st.session_state.get(REQUEST) not in latency_of:
            st.session_state[REQUEST] = ranked[0][0] if ranked else None
        chosen = st.selectbox(
            say("timeline.life.choose"), list(latency_of), key=REQUEST, persist_state="session",
            format_func=lambda name: f"{name} · {latency_of[name]:.2f} s" if name in latency_of else str(name),
        )  # fmt: skip
    name = other.strip() or chosen
    if name is None:
        return
    link.put(request=name)
    one = life_of(requests, name)
    if one is None:
        draw_empty(say("timeline.life.unknown"))
        return
    if one.latency_s is None:
        st.text(say("timeline.life.not_done", status=one.status, reason=translated(one.reason)))
        return
    draw_chart(charts.life(one, plan.record.slo_latency_s), charts.life_words(one), "timeline_life", shows_words=False)
    about = one.about
    st.text(
        say(
            "timeline.life.about", worker=one.worker_id, topology=about["topology"], images=about["n_images"], steps=about["n_steps"],
            controlnets=about["n_controlnets"], loras=about["n_loras"], at=charts.moment(one.arrival_s),
        )
    )  # fmt: skip
    table = pd.DataFrame({
        say("timeline.stage"): [escaped(say(f"stage.{stage.name}")) for stage in one.stages],
        say("timeline.seconds"): [f"{stage.duration_s:.3f}" for stage in one.stages],
        say("timeline.share"): [percent(stage.duration_s / one.latency_s, 1) for stage in one.stages],
    })  # fmt: skip
    draw_table(table, say("timeline.life.alt"), "request.csv", is_wide=True)
