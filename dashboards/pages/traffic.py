"""The page Traffic: what arrives, how it bunches, which add-ons it asks for, what a cache would hold, and where time goes today."""

from __future__ import annotations

from typing import Any, Final

import pandas as pd
import streamlit as st

from dashboards import link, plan_job
from dashboards import traffic_charts as charts
from dashboards.elements import draw_chart, draw_csv, draw_problem, draw_table
from dashboards.here import Here
from dashboards.plain_text import escaped, rounded
from dashboards.planning import store, with_progress
from dashboards.words import say, translated
from planner.scenario import Scenario
from traces.character import Description, describe
from traces.problems import InputError, one_problem
from traces.scaling import busiest_window, scale_traffic, window
from traces.trace import Trace

VIEWS: Final = ("recorded", "planned")
PLANNED_MAX: Final = 500_000
"""Requests after scaling that are described in the server; more are left to ``diffplan plan``, whose plan has their figures."""
INSTANCES_MAX: Final = 1000
GPUS_MAX: Final = 2000
ADD_ONS_SHOWN: Final = 15


def draw(here: Here) -> None:
    """The whole page below the frame."""
    if here.trace is None or here.asked is None:
        return
    scenario = here.asked.scenario
    view, n_instances = _ask()
    try:
        with st.spinner(say("traffic.describing"), show_time=True):
            key = plan_job.plan_key(scenario, here.asked.folder)
            found = described(f"{key} {view}", n_instances, here.trace, scenario if view == "planned" else None)
    except InputError as error:
        draw_problem(say("traffic.cannot"), str(error))
    else:
        _draw_rates(found)
        _draw_add_ons(found)
        _draw_mix(found)
        _draw_source(found, here.trace)
    _draw_today(here)


def _ask() -> tuple[str, int]:
    left, right = st.columns(2, vertical_alignment="bottom")
    if "traffic_view" not in st.session_state:
        st.session_state["traffic_view"] = link.choice("view", VIEWS) or VIEWS[0]
    if "traffic_instances" not in st.session_state:
        st.session_state["traffic_instances"] = int(link.number("instances", 1, INSTANCES_MAX) or 1)
    view = left.segmented_control(
        say("traffic.view"), VIEWS, format_func=lambda name: say(f"traffic.view.{name}"), key="traffic_view", required=True, persist_state="session",
        help=say("traffic.view.help"),
    )  # fmt: skip
    n = right.number_input(
        say("traffic.instances"), 1, INSTANCES_MAX, step=1, key="traffic_instances", persist_state="session", help=say("traffic.instances.help")
    )  # fmt: skip
    link.put(view=str(view), instances=n)
    return str(view), int(n)


@st.cache_data(max_entries=8, show_spinner=False)
def described(key: str, n_instances: int, _trace: Trace, _scenario: Scenario | None) -> Description:
    """The character of a trace, or of what a scenario makes of it.

    Raises:
        InputError: there is nothing to describe, or too much.
    """
    trace = _trace
    if _scenario is not None:
        traffic = _scenario.traffic
        n = round(len(trace) * traffic.scale_factor)
        if n > PLANNED_MAX:
            raise one_problem(
                "Traffic", f"has {n:,} requests after scaling", f"at most {PLANNED_MAX:,} to be described here",
                "Look at the trace as recorded; the plan says how scaling changes rate and burstiness",
            )  # fmt: skip
        trace = scale_traffic(trace, traffic.scale_factor, traffic.shift_law, traffic.seed)
        if traffic.window is not None:
            trace = window(trace, traffic.window.start_h * 3600, traffic.window.end_h * 3600)
        elif traffic.busiest is not None:
            trace = window(trace, *busiest_window(trace, traffic.busiest.length_h * 3600))
    return describe(trace, n_instances)


def _draw_rates(found: Description) -> None:
    rates = found.rates
    st.subheader(say("traffic.arrivals"), anchor=False)
    figures = (
        (say("plan.requests"), f"{rates.n_requests:,}", say("traffic.requests.help", hours=rounded(rates.duration_s / 3600))),
        (say("traffic.rate"), rounded(rates.mean_per_s), say("traffic.rate.help")),
        (say("traffic.peak"), rounded(rates.peak_to_mean), say("traffic.peak.help")),
        ("CV", rounded(rates.interarrival_cv), say("traffic.cv.help")),
        (say("traffic.dispersion"), rounded(rates.dispersion), say("traffic.dispersion.help")),
    )  # fmt: skip
    for column, (label, value, words) in zip(st.columns(5), figures, strict=True):
        column.metric(label, value, help=words)
    draw_chart(charts.arrivals(rates), charts.arrivals_words(rates), "arrivals")
    start_h = [slot * rates.slot_s / 3600 for slot in range(len(rates.slot_counts))]
    draw_csv(pd.DataFrame({"start_h": start_h, "requests": list(rates.slot_counts)}), "arrivals.csv")


def _draw_add_ons(found: Description) -> None:
    st.subheader(say("traffic.add_ons"), anchor=False)
    st.caption(say("traffic.counted"))
    left, right = st.columns(2)
    with left:
        st.markdown(f"**{say('traffic.per_request')}**")
        draw_chart(charts.per_request(found), charts.per_request_words(found), "per_request")
    with right:
        st.markdown(f"**{say('traffic.popularity')}**")
        draw_chart(charts.popularity(found), charts.popularity_words(found), "popularity")
    st.subheader(say("traffic.cache_curve"), anchor=False)
    st.caption(say("traffic.cache_curve.note", n=found.n_instances))
    st.caption(escaped(translated(found.instance_rule)))
    draw_chart(charts.cache_curve(found), charts.cache_curve_words(found), "cache_curve")
    rows = [
        {"kind": kind, "cache_places": size, "loads_per_request": loads}
        for kind in charts.KINDS
        for curve in (charts.add_ons_of(found, kind).loads,)
        for size, loads in zip(curve.cache_sizes, curve.loads_per_request, strict=True)
    ]
    draw_csv(pd.DataFrame(rows, columns=["kind", "cache_places", "loads_per_request"]), "cache-curve.csv")
    if found.checkpoint_switch_share is not None:
        st.text(say("traffic.switches", share=f"{found.checkpoint_switch_share:.0%}"))


def _draw_mix(found: Description) -> None:
    with st.expander(say("traffic.mix")):
        for column, name in zip(st.columns(3), ("images", "steps", "size"), strict=True):
            mix = getattr(found, f"{name}_mix")
            frame = pd.DataFrame({
                say(f"traffic.mix.{name}"): [escaped(str(key)) for key in mix], say("traffic.share"): [f"{share:.1%}" for share in mix.values()]
            })  # fmt: skip
            column.table(frame, hide_index=True, alt=say(f"traffic.mix.{name}"))


def _draw_source(found: Description, trace: Trace) -> None:
    with st.expander(say("traffic.source")):
        st.text(translated(trace.provenance.source))
        lines = [
            f"{translated(what)}: {n:,}"
            for what, n in (*trace.provenance.defaults.items(), *trace.provenance.left_out.items())
        ]
        notes = found.provenance.get("notes", ())
        st.text("\n".join([*lines, *(f"• {translated(note)}" for note in notes)]) or say("traffic.source.nothing"))


def _draw_today(here: Here) -> None:
    """Where time goes in the service as it runs today, by a diagnosis that is made when asked for."""
    asked = here.asked
    assert asked is not None  # noqa: S101  draw has looked
    st.subheader(say("traffic.today"), anchor=False)
    st.caption(say("traffic.today.note"))
    topologies = list(asked.scenario.topologies)
    if st.session_state.get("traffic_today") not in topologies:
        st.session_state["traffic_today"] = link.choice("today", topologies) or topologies[0]
    if "traffic_gpus" not in st.session_state:
        st.session_state["traffic_gpus"] = int(link.number("gpus", 0, GPUS_MAX) or 0)
    first, second = st.columns(2)
    topology = first.selectbox(
        say("traffic.topology"),
        topologies,
        key="traffic_today",
        persist_state="session",
        help=say("traffic.topology.help"),
    )
    is_apart = topology == "decoupled"
    n_gpus = second.number_input(
        say("traffic.gpus"), 0, GPUS_MAX, step=1, key="traffic_gpus", persist_state="session", disabled=is_apart,
        help=say("traffic.gpus.apart" if is_apart else "traffic.gpus.help"),
    )  # fmt: skip
    link.put(today=topology, gpus=n_gpus)
    n = 0 if is_apart else int(n_gpus)
    key = f"{plan_job.plan_key(asked.scenario, asked.folder)} {topology} {n}"
    if st.button(say("traffic.diagnose"), key="diagnose", icon=":material/troubleshoot:"):
        found = with_progress(
            asked.scenario,
            lambda waiting: plan_job.compute_diagnosis(
                store(), asked.scenario, asked.folder, topology, n, here.settings.jobs, waiting
            ),
        )
        if found is not None:
            st.session_state["_diagnosis"] = (key, found)
    if "_diagnosis" in st.session_state:
        made_for, found = st.session_state["_diagnosis"]
        if made_for != key:
            st.info(say("traffic.diagnosis_is_old"), icon=":material/history:")
        _draw_diagnosis(found)


def _draw_diagnosis(found: dict[str, Any]) -> None:
    st.text("\n".join(map(translated, found["sentences"])))
    rows = found["by_stage"]
    draw_chart(charts.stages(rows), charts.stages_words(rows), "stages")
    draw_csv(pd.DataFrame(rows), "by-stage.csv")
    st.markdown(f"**{say('traffic.changes')}**")
    changes = pd.DataFrame({
        say("traffic.change"): [translated(row["words"]) for row in found["changes"]],
        "p95 (s)": [_round(row["at_present_size"]["latency_p95_s"]) for row in found["changes"]],
        say("traffic.gain"): [_round(row["p95_gain_s"]) for row in found["changes"]],
        say("traffic.fewest"): [row["fewest_gpus"] for row in found["changes"]],
        say("traffic.saves"): [_round(row["saving_usd_per_month"], 0) for row in found["changes"]],
    })  # fmt: skip
    draw_table(changes, say("traffic.changes"), "changes.csv", is_wide=True)
    add_ons = [row for row in found["by_add_on"] if row["kind"] in ("controlnet", "lora")]
    if add_ons:
        st.markdown(f"**{say('traffic.by_add_on')}**")
        gpu_ns = max(1, sum(int(row["gpu_ns"]) for row in found["by_add_on"]))
        frame = pd.DataFrame({
            say("traffic.kind"): [row["kind"] for row in add_ons],
            "id": [row["id"] for row in add_ons],
            say("plan.requests"): [row["n_requests"] for row in add_ons],
            say("traffic.of_gpu_ns"): [round(100 * row["gpu_ns"] / gpu_ns, 2) for row in add_ons],
            say("chart.usd_month"): [round(row["cost_micro_usd"] / 1e6, 2) for row in add_ons],
        })  # fmt: skip
        st.dataframe(frame.head(ADD_ONS_SHOWN), hide_index=True, alt=say("traffic.by_add_on"))
        draw_csv(frame, "by-add-on.csv")
    st.text("\n".join(f"• {translated(line)}" for line in (*found["assumptions"], *found["notes"])))


def _round(value: float | None, decimals: int = 2) -> float | None:
    return None if value is None else round(value, decimals)
