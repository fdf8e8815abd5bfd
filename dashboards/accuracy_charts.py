"""Figures of the page Accuracy: measured against composed, what is left over, and where the question lies in the measured box."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import plotly.graph_objects as go

from calibrate.profile import Law
from dashboards.charts import COLOURS, SYMBOLS
from dashboards.elements import plain_layout
from dashboards.evidence import Check, usual_size
from dashboards.words import say

MEASURED: Final = "#0072B2"
ASKED: Final = "#D55E00"


@dataclass(frozen=True, slots=True)
class Range:
    """Where one feature was measured for some laws, and where the question asks for it."""

    feature: str
    stack: str
    n_laws: int
    low: float
    high: float
    asked_low: float
    asked_high: float

    @property
    def is_inside(self) -> bool:
        """Whether everything that is asked for was measured or lies between."""
        return self.low * (1 - 1e-9) <= self.asked_low and self.asked_high <= self.high * (1 + 1e-9)


def ranges_of(laws: Mapping[str, Law], asked: Mapping[str, tuple[float, float]]) -> list[Range]:
    """For each stack and feature of the question the box that all its measured laws share."""
    found = []
    for stack in dict.fromkeys(name.partition(".")[0] for name in laws):
        for feature, (asked_low, asked_high) in asked.items():
            boxes = [
                law.domain[feature]
                for name, law in laws.items()
                if name.startswith(f"{stack}.") and feature in law.domain
            ]
            if boxes:
                low, high = max(box[0] for box in boxes), min(box[1] for box in boxes)
                found.append(Range(feature, stack, len(boxes), low, high, asked_low, asked_high))
    return found


def whole_images(checks: Sequence[Check]) -> go.Figure:
    """Composed against timed seconds of whole images; hollow points gave a stack its overhead, so they fit by construction."""
    figure = go.Figure()
    top = 1.08 * max(max(check.measured_s, check.predicted_s) for check in checks)
    figure.add_trace(
        go.Scatter(
            x=[0, top],
            y=[0, top],
            mode="lines",
            line={"dash": "dash", "color": "#8A8A8A"},
            name=say("accuracy.equal"),
            hoverinfo="skip",
        )
    )
    for topology in dict.fromkeys(check.topology for check in checks):
        mine = [check for check in checks if check.topology == topology]
        figure.add_trace(
            go.Scatter(
                x=[check.measured_s for check in mine], y=[check.predicted_s for check in mine], mode="markers", name=topology,
                marker={
                    "size": 11, "color": COLOURS.get(topology, MEASURED), "line": {"width": 2, "color": COLOURS.get(topology, MEASURED)},
                    "symbol": [SYMBOLS.get(topology, "circle") + ("" if check.is_held_out else "-open") for check in mine],
                },
                text=[image_words(check) for check in mine], hovertemplate="%{text}<br>%{x:.2f} s → %{y:.2f} s<extra></extra>",
            )
        )  # fmt: skip
    figure.update_xaxes(title=say("accuracy.timed_s"), range=[0, top])
    figure.update_yaxes(title=say("accuracy.composed_s"), range=[0, top])
    return plain_layout(figure, 420)


def residuals(checks: Sequence[Check]) -> go.Figure:
    """Gap of each held-out kind of image, worst first."""
    held_out = sorted((check for check in checks if check.is_held_out), key=lambda check: -abs(check.gap_ratio))
    usual = usual_size(checks)
    figure = go.Figure(
        go.Bar(
            # numbered, for rows of one name would fall on each other
            y=[f"{number}. {_short(check, usual)}" for number, check in enumerate(held_out, 1)], x=[100 * check.gap_ratio for check in held_out], orientation="h",
            marker={"color": [ASKED if check.gap_ratio > 0 else MEASURED for check in held_out]}, cliponaxis=False,
            text=[f"{100 * check.gap_ratio:+.1f} %" for check in held_out], textposition="outside", hoverinfo="skip",
        )
    )  # fmt: skip
    largest = 1.6 * max((abs(100 * check.gap_ratio) for check in held_out), default=1.0)
    figure.update_xaxes(title=say("accuracy.gap"), ticksuffix=" %", range=[-largest, largest], nticks=4, tickangle=0)
    figure.update_yaxes(autorange="reversed", automargin=True, tickfont={"size": 11})
    return plain_layout(figure, 110 + 26 * len(held_out))


def residuals_words(checks: Sequence[Check]) -> str:
    """Both charts for people who cannot see them."""
    held_out = [check for check in checks if check.is_held_out]
    listed = "; ".join(f"{check.topology}, {image_words(check)}: {check.gap_ratio:+.1%}" for check in held_out)
    return say("accuracy.residuals.words", n=len(held_out), parts=listed)


def image_words(check: Check) -> str:
    """``2 ControlNets, 1 LoRA, fused``."""
    words = say("start.image", controlnets=check.n_controlnets, loras=check.n_loras)
    return ", ".join(part for part in (words, check.variant, check.size) if part)


def _short(check: Check, usual: str) -> str:
    """``colocated 2C 1L``, and the size where it is not the usual one; a phone has room for no more."""
    size = "" if check.size == usual else check.size
    return " ".join(
        part for part in (f"{check.topology} {check.n_controlnets}C {check.n_loras}L", check.variant, size) if part
    )


def between(low: float, high: float) -> str:
    """``1 – 16``, or ``1``."""
    return f"{low:.4g}" if low == high else f"{low:.4g} – {high:.4g}"


def box(ranges: Sequence[Range]) -> go.Figure:
    """The measured range of each stack's features as a thick bar, the question's as a thin one over it; both as shares of the larger end."""
    names = [f"{item.stack}: {say(f'feature.{item.feature}')}" for item in ranges]
    figure = go.Figure()
    for label, colour, width, ends in (
        (say("accuracy.measured_range"), MEASURED, 14, [(item.low, item.high) for item in ranges]),
        (say("accuracy.asked_range"), ASKED, 7, [(item.asked_low, item.asked_high) for item in ranges]),
    ):
        xs: list[float | None] = []
        ys: list[str | None] = []
        for name, item, (low, high) in zip(names, ranges, ends, strict=True):
            whole = max(item.high, item.asked_high)
            xs += [low / whole, high / whole, None]
            ys += [name, name, None]
        figure.add_trace(
            go.Scatter(
                x=xs, y=ys, mode="lines+markers", name=label, line={"color": colour, "width": width}, marker={"size": width, "symbol": "circle"},
                hoverinfo="skip",
            )
        )  # fmt: skip
    figure.update_xaxes(showticklabels=False, range=[-0.02, 1.05], zeroline=False)
    figure.update_yaxes(autorange="reversed", automargin=True)
    return plain_layout(figure, 140 + 34 * len(ranges))


def box_words(ranges: Sequence[Range]) -> str:
    """The chart for people who cannot see it."""
    listed = "; ".join(
        say(
            "accuracy.box.one", stack=item.stack, feature=say(f"feature.{item.feature}"), low=f"{item.low:.4g}", high=f"{item.high:.4g}",
            asked_low=f"{item.asked_low:.4g}", asked_high=f"{item.asked_high:.4g}",
            verdict=say("accuracy.inside" if item.is_inside else "accuracy.outside"),
        )
        for item in ranges
    )  # fmt: skip
    return say("accuracy.box.words", parts=listed)
