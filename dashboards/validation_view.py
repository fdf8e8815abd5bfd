"""The end-to-end validation of a profile as the page Accuracy shows it: the verdict, the charts, every quantile, every run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import pandas as pd
import streamlit as st

from dashboards import validation_charts as charts
from dashboards.elements import draw_chart, draw_table
from dashboards.plain_text import NONE, escaped
from dashboards.words import say

STAGES: Final = {
    "queue_wait_s": "stage.queue", "switch_s": "stage.switch", "controlnet_load_s": "stage.controlnet_load", "lora_wait_s": "stage.lora",
    "text_s": "stage.text", "denoise_s": "stage.denoise", "decode_s": "stage.decode",
}  # fmt: skip
"""Stages as the report names them, to words."""
LOADS: Final = {"light": "accuracy.load.light", "past saturation": "accuracy.load.past"}
"""Loads as the report names them, to words; the others are shares."""


def draw_validation(found: Mapping[str, Any] | None, profile_id: str) -> None:
    """Engine replays against simulations of the same traffic, or that there are none yet.

    Args:
        found: what ``diffplan validate`` wrote, if it is there.
        profile_id: of the profile at hand; the page says when the validation is of another one.
    """
    st.subheader(say("accuracy.validation"), anchor=False)
    st.caption(say("accuracy.validation.note"))
    gaps = charts.gaps_of(found) if found is not None else []
    if found is None or not gaps:
        st.warning(say("accuracy.not_validated"), icon=":material/pending:")
        return
    validated = str(found.get("profile_id") or found.get("profile", {}).get("profile_id", ""))
    if validated != profile_id:
        st.warning(escaped(say("accuracy.validation.other", validated=validated, own=profile_id)), icon=":material/history:")  # fmt: skip
    runs = found["runs"]
    n_bad = sum(not run.get("holds", False) for run in runs)
    if n_bad:
        st.error(say("accuracy.validation.misses", n=n_bad, of=len(runs)), icon=":material/warning:")
    else:
        st.success(say("accuracy.validation.holds", n=len(runs)), icon=":material/check_circle:")
    words = charts.validation_words(gaps)
    left, right = st.columns([2, 3])
    with left:
        draw_chart(charts.measured_against_simulated(gaps), words, "validation_scatter", shows_words=False)
    with right:
        draw_chart(charts.validation(gaps), words, "validation", shows_words=False)
    st.caption(say("accuracy.validation.marks"))
    load = {
        say("accuracy.load"): st.column_config.TextColumn(width="medium")
    }  # "past saturation" comes late and would be cut
    draw_table(runs_table(runs), say("accuracy.runs"), "validation-runs.csv", is_wide=True, column_config=load)
    draw_table(quantiles_table(gaps), say("accuracy.validation"), "validation.csv", is_wide=True)


def runs_table(runs: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a run: load, verdict, how busy the pools were, and the stage that carries most of the gap of the mean."""
    carriers = [str((run.get("carried_by") or {}).get("mean") or "") for run in runs]
    loads = [str(run.get("band", NONE)) for run in runs]
    return pd.DataFrame({
        say("accuracy.run"): [run["name"] for run in runs],
        say("accuracy.load"): [say(LOADS[load]) if load in LOADS else load for load in loads],
        say("plan.requests"): [run.get("n_requests") for run in runs],
        say("accuracy.verdict"): [_verdict(run.get("holds")) for run in runs],
        say("accuracy.busy"): [
            "; ".join(f"{pool} {pair['measured']:.1%} → {pair['simulated']:.1%}" for pool, pair in run.get("busy", {}).items()) for run in runs
        ],
        say("accuracy.saturated"): [_saturated(run.get("saturated", {})) for run in runs],
        say("accuracy.carried"): [say(STAGES[name]) if name in STAGES else name or NONE for name in carriers],
    })  # fmt: skip


def quantiles_table(gaps: list[charts.QuantileGap]) -> pd.DataFrame:
    """One row a run and quantile."""
    return pd.DataFrame({
        say("accuracy.run"): [gap.run for gap in gaps],
        say("accuracy.quantile"): [gap.quantile for gap in gaps],
        say("accuracy.measured_s"): [round(gap.measured_s, 3) for gap in gaps],
        say("accuracy.simulated_s"): [round(gap.simulated_s, 3) for gap in gaps],
        say("accuracy.gap"): [f"{gap.gap_ratio:+.1%}" for gap in gaps],
        say("accuracy.interval"): [
            f"{gap.low:+.1%} – {gap.high:+.1%}" if gap.low is not None and gap.high is not None else NONE for gap in gaps
        ],
        say("accuracy.allowed"): [NONE if gap.allowed is None else f"±{gap.allowed:.1%}" for gap in gaps],
        say("accuracy.verdict"): [_verdict(gap.holds) for gap in gaps],
        say("accuracy.floor"): [NONE if gap.floor_ratio is None else f"{gap.floor_ratio:+.1%}" for gap in gaps],
    })  # fmt: skip


def _verdict(holds: bool | None) -> str:
    return NONE if holds is None else say("accuracy.kept" if holds else "accuracy.missed")


def _saturated(pair: Mapping[str, Any]) -> str:
    """Measured → simulated verdict."""
    both = [pair.get(side) for side in ("measured", "simulated")]
    return " → ".join(NONE if one is None else say("accuracy.yes" if one else "accuracy.no") for one in both)
