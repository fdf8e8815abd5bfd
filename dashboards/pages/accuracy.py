"""The page Accuracy: what was measured and what assumed, measured against predicted, and whether the question lies in the measured box."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pandas as pd
import streamlit as st

from calibrate.profile import GRADES, LatencyProfile, Law
from dashboards import accuracy_charts as charts
from dashboards import link
from dashboards.elements import GRADE_COLOURS, GRADE_ICONS, draw_chart, draw_empty, draw_table
from dashboards.evidence import checks_of, report_of, usual_size
from dashboards.here import Here
from dashboards.plain_text import escaped, rounded
from dashboards.validation_view import draw_validation
from dashboards.words import say, translated
from traces.trace import Trace

STACKS: Final = ("engine", "diffusers", "diffusers_tuned", "lora_fetch", "model_fetch")
INTERVAL: Final = (0.025, 0.975)


def draw(here: Here) -> None:
    """The whole page below the frame."""
    if here.asked is None:
        draw_empty(say("start.no_profile"))
        return
    profile, name = here.asked.profile, here.asked.scenario.profile.name
    _draw_legend(profile)
    draw_validation(report_of(name, "validation"), profile.profile_id)
    _draw_whole_images(name)
    _draw_held_out(report_of(name, "heldout"), profile)
    if here.trace is not None:
        _draw_box(profile, here.trace)
    _draw_laws(profile)
    _draw_identity(profile)


def _draw_legend(profile: LatencyProfile) -> None:
    for column, grade in zip(st.columns(4), GRADES, strict=True):
        column.badge(say(f"grade.{grade}"), icon=GRADE_ICONS[grade], color=GRADE_COLOURS[grade])
        column.caption(say(f"accuracy.grade.{grade}"))
    laws = profile.laws.values()
    n_measured = sum(law.status == "measured" for law in laws)
    st.text(say("accuracy.counts", measured=n_measured, assumed=len(profile.laws) - n_measured, draws=profile.n_draws))


def _draw_whole_images(name: str) -> None:
    st.subheader(say("accuracy.images"), anchor=False)
    checks = checks_of(name)
    if not checks:
        draw_empty(say("accuracy.no_images"))
        return
    st.caption(say("accuracy.images.note"))
    words = charts.residuals_words(checks)
    left, right = st.columns([2, 3])
    with left:
        draw_chart(charts.whole_images(checks), words, "whole_images", shows_words=False)
    with right:
        draw_chart(charts.residuals(checks), words, "residuals", shows_words=False)
    usual = usual_size(checks)
    st.caption(say("accuracy.images.short") + (" " + say("accuracy.images.usual", size=usual) if usual else ""))
    table = pd.DataFrame({
        say("plan.topology"): [check.topology for check in checks],
        say("accuracy.image"): [charts.image_words(check) for check in checks],
        say("accuracy.repetitions"): [check.n_repetitions for check in checks],
        say("accuracy.timed_s"): [round(check.measured_s, 3) for check in checks],
        say("accuracy.composed_s"): [round(check.predicted_s, 3) for check in checks],
        say("accuracy.gap"): [f"{check.gap_ratio:+.1%}" for check in checks],
        say("accuracy.held_out"): [say("accuracy.yes" if check.is_held_out else "accuracy.no") for check in checks],
    })  # fmt: skip
    draw_table(table, say("accuracy.images"), "whole-images.csv", is_wide=True)


def _draw_held_out(found: dict[str, Any] | None, profile: LatencyProfile) -> None:
    st.subheader(say("accuracy.sizes"), anchor=False)
    st.caption(say("accuracy.sizes.note"))
    if found is None or found.get("raw_sha256") != profile.raw_sha256 or not found.get("summary"):
        draw_empty(say("accuracy.no_sizes"))
        return
    rows = found["summary"]
    table = pd.DataFrame({
        say("accuracy.law"): [translated(row["name"]) for row in rows],
        say("accuracy.points"): [row["n_points"] for row in rows],
        say("accuracy.mape"): [_percent(row["mape"]) for row in rows],
        say("accuracy.bias"): [_percent(row["bias_ratio"], "+") for row in rows],
        say("accuracy.worst"): [_percent(row["worst_ratio"], "+") for row in rows],
        say("accuracy.coverage"): [_percent(row["coverage_ratio"]) for row in rows],
    })  # fmt: skip
    draw_table(table, say("accuracy.sizes"), "held-out.csv", is_wide=True)


def _percent(ratio: float | None, sign: str = "") -> str:
    return "–" if ratio is None else format(ratio, f"{sign}.1%")


def asked_of(trace: Trace) -> dict[str, tuple[float, float]]:
    """Feature of laws to the range that the requests of a trace ask for."""
    requests = trace.requests
    images = requests["n_images"].to_numpy(dtype=np.float64)
    is_guided = requests["guidance_scale"].to_numpy(dtype=np.float64) > 1.0
    pixels = requests["width_px"].to_numpy(dtype=np.float64) * requests["height_px"].to_numpy(dtype=np.float64)
    found = {"forward_batch": np.where(is_guided, 2 * images, images), "megapixels": pixels / 2**20, "n_images": images}
    return {name: (float(values.min()), float(values.max())) for name, values in found.items()}


def _draw_box(profile: LatencyProfile, trace: Trace) -> None:
    st.subheader(say("accuracy.box"), anchor=False)
    st.caption(say("accuracy.box.note"))
    ranges = charts.ranges_of(profile.laws, asked_of(trace))
    if not ranges:
        draw_empty(say("accuracy.no_box"))
        return
    outside = [item for item in ranges if not item.is_inside]
    if outside:
        parts = ", ".join(f"{item.stack}: {say(f'feature.{item.feature}')}" for item in outside)
        st.warning(escaped(say("accuracy.box.outside", parts=parts)), icon=":material/open_in_full:")
    else:
        st.success(say("accuracy.box.inside"), icon=":material/check_circle:")
    draw_chart(charts.box(ranges), charts.box_words(ranges), "box")
    table = pd.DataFrame({
        say("accuracy.stack"): [item.stack for item in ranges],
        say("accuracy.feature"): [say(f"feature.{item.feature}") for item in ranges],
        say("accuracy.measured_range"): [charts.between(item.low, item.high) for item in ranges],
        say("accuracy.asked_range"): [charts.between(item.asked_low, item.asked_high) for item in ranges],
        say("accuracy.verdict"): [say("accuracy.inside" if item.is_inside else "accuracy.outside") for item in ranges],
    })  # fmt: skip
    draw_table(table, say("accuracy.box"), "box.csv", is_wide=True)


def _draw_laws(profile: LatencyProfile) -> None:
    st.subheader(say("accuracy.laws"), anchor=False)
    st.caption(say("accuracy.laws.note"))
    present = [stack for stack in STACKS if any(name.startswith(f"{stack}.") for name in profile.laws)]
    if st.session_state.get("accuracy_stack") not in present:
        st.session_state["accuracy_stack"] = link.choice("stack", present) or present[0]
    stack = st.segmented_control(
        say("accuracy.stack"), present, key="accuracy_stack", required=True, persist_state="session"
    )
    link.put(stack=str(stack))
    laws = [law for name, law in profile.laws.items() if name.startswith(f"{stack}.")]
    table = pd.DataFrame({
        say("accuracy.law"): [law.name for law in laws],
        say("accuracy.status"): [say(f"grade.{law.status}") for law in laws],
        say("accuracy.form"): [law.form for law in laws],
        say("accuracy.parameters"): [_parameters(law, profile) for law in laws],
        say("accuracy.spread"): [_spread(law) for law in laws],
        say("accuracy.repetitions"): [law.n_repetitions for law in laws],
        say("accuracy.domain"): [", ".join(f"{name} {low:.4g}–{high:.4g}" for name, (low, high) in law.domain.items()) for law in laws],
        say("accuracy.from"): [translated(law.source) for law in laws],
    })  # fmt: skip
    draw_table(table, say("accuracy.laws"), "laws.csv", is_wide=True)


def _parameters(law: Law, profile: LatencyProfile) -> str:
    """Each parameter with the middle 95 % of its joint draws, where it has any."""
    parts = []
    for name, value in law.parameters.items():
        draws = profile.draws.get(f"{law.name}:{name}")
        inside = ""
        if draws:
            low, high = np.quantile(draws, INTERVAL)
            inside = f" [{low:.3g}, {high:.3g}]"
        parts.append(f"{name} {value:.4g}{inside}")
    return "; ".join(parts)


def _spread(law: Law) -> str:
    """Measured over fitted, from the 5th to the 95th percentile of the repetitions."""
    quantiles = law.residual_ratio_quantiles
    return f"{quantiles[1]:.3f} – {quantiles[5]:.3f}" if quantiles else "–"


def _draw_identity(profile: LatencyProfile) -> None:
    with st.expander(say("accuracy.identity")):
        facts = [
            f"{name}: {rounded(fact.value)} ({say(f'grade.{fact.status}')}; {translated(fact.source)})"
            for name, fact in profile.facts.items()
        ]
        head = [
            f"{profile.architecture}, {profile.gpu_kind}, {profile.created}",
            f"profile {profile.profile_id}",
            f"raw sha256 {profile.raw_sha256}",
        ]
        st.text("\n".join([*head, *facts, *(f"• {translated(note)}" for note in profile.notes)]))
