"""Figures of an end-to-end validation: measured against simulated quantiles, and the gap of each beside what is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import plotly.graph_objects as go

from dashboards.elements import plain_layout
from dashboards.words import say
from planner.validation.bounds import GAP_MAX

LOOKS: Final = {"p50": ("#0072B2", "", "circle"), "p95": ("#E69F00", "/", "square"), "p99": ("#009E73", "x", "diamond")}
"""Quantile to colour, pattern of its bar, symbol of its point."""
ALLOWED: Final = "#D55E00"


@dataclass(frozen=True, slots=True)
class QuantileGap:
    """Measured and simulated latency of one run at one quantile."""

    run: str
    quantile: str
    measured_s: float
    simulated_s: float
    gap_ratio: float
    low: float | None
    high: float | None
    floor_ratio: float | None
    """The engine's second replay against its first, if there was one."""
    allowed: float | None
    """Largest size of the gap; None where the load sets none, as past saturation."""
    holds: bool | None


def gaps_of(found: Mapping[str, Any]) -> list[QuantileGap]:
    """Every drawn quantile of every run of a validation report, whole or short, that has both numbers."""
    gaps = []
    for run in found.get("runs", ()):
        for quantile in LOOKS:
            gap = run.get("latency_s", {}).get(quantile, {})
            if gap.get("measured") and gap.get("simulated") is not None and gap.get("gap_ratio") is not None:
                allowed = _allowed(str(run.get("band", "")), quantile, gap.get("floor_ratio"))
                holds = None if allowed is None else abs(gap["gap_ratio"]) <= allowed
                gaps.append(
                    QuantileGap(
                        str(run["name"]), quantile, gap["measured"], gap["simulated"], gap["gap_ratio"], gap.get("gap_low"), gap.get("gap_high"),
                        gap.get("floor_ratio"), allowed, holds,
                    )
                )  # fmt: skip
    return gaps


def _allowed(band: str, quantile: str, floor_ratio: float | None) -> float | None:
    """The bound of this load, or the engine's gap to itself where that is larger; None where the load sets no bound."""
    bound = {str(name): limits for name, limits in GAP_MAX.items()}.get(band, {}).get(quantile)
    return None if bound is None else max(bound, abs(floor_ratio or 0.0))


def short_names(runs: Sequence[str]) -> dict[str, str]:
    """Names as far as the first hyphen where that tells the runs apart, for there is little room under a bar; else whole."""
    short = {run: run.partition("-")[0] for run in runs}
    return short if len(set(short.values())) == len(short) else {run: run for run in runs}


def measured_against_simulated(gaps: Sequence[QuantileGap]) -> go.Figure:
    """Both on logarithmic axes: on the dashed line they are equal."""
    ends = [value for gap in gaps for value in (gap.measured_s, gap.simulated_s) if value > 0]
    low, high = min(ends, default=0.1) / 1.5, max(ends, default=1.0) * 1.5
    figure = go.Figure(
        go.Scatter(
            x=[low, high], y=[low, high], mode="lines", line={"dash": "dash", "color": "#8A8A8A"}, name=say("accuracy.equal"), hoverinfo="skip"
        )
    )  # fmt: skip
    for quantile, (colour, _, symbol) in LOOKS.items():
        mine = [gap for gap in gaps if gap.quantile == quantile]
        figure.add_trace(
            go.Scatter(
                x=[gap.measured_s for gap in mine], y=[gap.simulated_s for gap in mine], mode="markers", name=quantile,
                marker={"size": 10, "color": colour, "symbol": symbol}, text=[gap.run for gap in mine],
                hovertemplate="%{text}<br>%{x:.3g} s → %{y:.3g} s<extra></extra>",
            )
        )  # fmt: skip
    figure.update_xaxes(title=say("accuracy.measured_s"), type="log", dtick=1)
    figure.update_yaxes(title=say("accuracy.simulated_s"), type="log", dtick=1)
    return plain_layout(figure, 400)


def validation(gaps: Sequence[QuantileGap]) -> go.Figure:
    """(Simulated − measured) / measured, a group of bars a run, with bootstrap intervals and marks at what is allowed."""
    figure = go.Figure()
    names = short_names(list(dict.fromkeys(gap.run for gap in gaps)))
    for quantile, (colour, pattern, _) in LOOKS.items():
        mine = [gap for gap in gaps if gap.quantile == quantile]
        figure.add_trace(
            go.Bar(
                x=[names[gap.run] for gap in mine], y=[100 * gap.gap_ratio for gap in mine], name=quantile, offsetgroup=quantile,
                marker={"color": colour, "pattern": {"shape": pattern}},
                error_y={
                    "type": "data", "symmetric": False, "thickness": 1.5, "width": 2, "color": "#8A8A8A",
                    "array": [100 * ((gap.high if gap.high is not None else gap.gap_ratio) - gap.gap_ratio) for gap in mine],
                    "arrayminus": [100 * (gap.gap_ratio - (gap.low if gap.low is not None else gap.gap_ratio)) for gap in mine],
                },
                text=[gap.run for gap in mine], textposition="none", hovertemplate="%{text}<br>%{y:.1f} %<extra></extra>",
            )
        )  # fmt: skip
        bound = [gap for gap in mine if gap.allowed is not None]
        figure.add_trace(
            go.Scatter(
                x=[names[gap.run] for gap in bound for _ in (0, 1)], y=[sign * 100 * (gap.allowed or 0.0) for gap in bound for sign in (-1, 1)],
                mode="markers", name=say("accuracy.allowed"), offsetgroup=quantile, legendgroup="allowed", showlegend=quantile == "p50",
                marker={"symbol": "line-ew", "size": 10, "line": {"width": 2, "color": ALLOWED}}, hoverinfo="skip",
            )
        )  # fmt: skip
    figure.update_xaxes(type="category")
    figure.update_yaxes(title=say("accuracy.validation.axis"), ticksuffix=" %", zeroline=True)
    figure.update_layout(barmode="group", scattermode="group")
    return plain_layout(figure, 400)


def validation_words(gaps: Sequence[QuantileGap]) -> str:
    """Both charts for people who cannot see them."""
    listed = "; ".join(
        f"{gap.run} {gap.quantile}: {gap.measured_s:.2f} s, {gap.simulated_s:.2f} s ({gap.gap_ratio:+.1%})"
        for gap in gaps
    )
    return say("accuracy.validation.words", parts=listed)
