"""The page Start: what this is, a sample in one click, and what has been measured."""

from __future__ import annotations

from typing import Final

import pandas as pd
import streamlit as st

from calibrate.profile import LatencyProfile
from dashboards.elements import draw_empty
from dashboards.evidence import Check, checks_of, usual_size
from dashboards.here import Here
from dashboards.plain_text import NONE, escaped
from dashboards.words import say
from planner.scenario import load_scenario, shipped_scenarios

STEPS: Final = ("traffic", "plan", "what_if", "roi", "export")
"""The way through the pages for somebody who is new."""


def draw(here: Here) -> None:
    """The whole page below the frame."""
    st.markdown(say("start.what"))
    _draw_samples()
    _draw_steps(here)
    st.subheader(say("start.measured"), anchor=False)
    if here.asked is None:
        draw_empty(say("start.no_profile"))
    else:
        _draw_measured(here.asked.profile, here.asked.scenario.profile.name)


def _draw_samples() -> None:
    st.subheader(say("start.samples"), anchor=False)
    names = list(shipped_scenarios())
    for column, name in zip(st.columns(len(names)), names, strict=True):
        scenario, _ = load_scenario(f"sample:{name}")
        with column.container(border=True, height="stretch"):
            st.markdown(f"**{escaped(name)}**")
            key = f"start.sample.{name}"
            st.caption(
                say(key) + " " + say("start.promise", share=f"{100 * scenario.slo.attainment_ratio:g}", latency=f"{scenario.slo.latency_s:g}")
            )  # fmt: skip
            st.button(
                say("start.load"), key=f"load_{name}", icon=":material/play_arrow:", on_click=_choose, args=(name,)
            )
    if st.session_state.get("_loaded") in names and st.session_state.get("scenario") == st.session_state["_loaded"]:
        st.success(say("start.loaded", name=escaped(st.session_state["_loaded"])), icon=":material/check:")


def _choose(name: str) -> None:
    st.session_state["scenario"] = st.session_state["_loaded"] = name


def _draw_steps(here: Here) -> None:
    st.subheader(say("start.next"), anchor=False)
    for name in STEPS:
        if name in here.pages:
            left, right = st.columns([1, 4], vertical_alignment="center")
            left.page_link(here.pages[name])
            right.caption(say(f"start.step.{name}"))


def _draw_measured(profile: LatencyProfile, name: str) -> None:
    laws = profile.laws.values()
    n_measured = sum(law.status == "measured" for law in laws)
    n_repetitions = sum(law.n_repetitions for law in laws if law.status == "measured")
    checks = checks_of(name)
    held_out = [check for check in checks if check.is_held_out]
    columns = st.columns(4)
    columns[0].metric(say("start.gpu"), escaped(profile.gpu_kind))
    columns[1].metric(say("start.laws"), f"{n_measured} / {len(profile.laws)}", help=say("start.laws.help"))
    columns[2].metric(say("start.repetitions"), f"{n_repetitions:,}", help=say("start.repetitions.help"))
    columns[3].metric(
        say("start.held_out"),
        f"{sum(abs(check.gap_ratio) for check in held_out) / len(held_out):.1%}" if held_out else "–",
        help=say("start.held_out.help", n=len(held_out)),
    )
    if checks:
        st.table(_whole_images(checks), alt=say("start.images.alt"))
        usual = usual_size(checks)
        st.caption(say("start.images.note") + (f" {usual}." if usual else ""))


def _whole_images(checks: list[Check]) -> pd.DataFrame:
    """Measured seconds by add-ons and topology, at the usual size, where no LoRA was fused by hand."""
    usual = usual_size(checks)
    cells: dict[str, dict[str, str]] = {}
    for check in checks:
        if not check.variant and check.n_loras <= 1 and check.size == usual:
            row = say("start.image", controlnets=check.n_controlnets, loras=check.n_loras)
            cells.setdefault(escaped(check.topology), {})[row] = f"{check.measured_s:.2f} s"
    frame = pd.DataFrame(cells)
    return frame.reindex(sorted(frame.index)).fillna(NONE)
