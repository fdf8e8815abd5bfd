"""Plotly figures of a plan. Colours are told apart by people who see red and green alike, and never carry meaning alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import plotly.graph_objects as go

from dashboards.elements import plain_layout
from dashboards.words import say
from planner.explain import usd
from planner.plan_record import Estimate, PlanRecord, TopologyRow, WaterfallRecord

# Okabe and Ito's palette, without the yellow that white paper swallows and the black that a dark page does
COLOURS: Final = {
    "diffusers": "#CC79A7",
    "diffusers_tuned": "#E69F00",
    "colocated": "#009E73",
    "decoupled": "#0072B2",
    "decoupled_cfg2": "#56B4E9",
}
SYMBOLS: Final = {
    "diffusers": "square",
    "diffusers_tuned": "triangle-up",
    "colocated": "circle",
    "decoupled": "diamond",
    "decoupled_cfg2": "star",
}
SAVES: Final = "#0072B2"
COSTS: Final = "#D55E00"
TOTAL: Final = "#8A8A8A"
QUANTILES: Final = ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))


def promised_quantile(attainment_ratio: float) -> tuple[str, str]:
    """Short and long name of the recorded percentile that lies closest to the promised share."""
    _, short = min(QUANTILES, key=lambda item: abs(item[0] - attainment_ratio))
    return short, say(f"quantile.{short}")


def latency_of(row: TopologyRow, short: str) -> Estimate:
    """The row's percentile by its short name."""
    return {"p50": row.latency_p50_s, "p95": row.latency_p95_s, "p99": row.latency_p99_s}[short]


def drawn_rows(plan: PlanRecord) -> list[TopologyRow]:
    """The topologies that have a point in the chart: those with an allocation that served something."""
    short, _ = promised_quantile(plan.slo_attainment_ratio)
    return [
        row
        for row in plan.topologies
        if latency_of(row, short).mean is not None and row.cost_usd_per_1000_images.mean is not None
    ]


def cost_against_latency(plan: PlanRecord) -> go.Figure:
    """One point a topology with intervals both ways, and the promise as a line; hollow points miss it."""
    short, long = promised_quantile(plan.slo_attainment_ratio)
    figure = go.Figure()
    for row in drawn_rows(plan):
        latency, cost = latency_of(row, short), row.cost_usd_per_1000_images
        colour = COLOURS[row.topology]
        keeps = row.verdict == "meets_slo"
        symbol = SYMBOLS[row.topology] + ("" if keeps else "-open")
        words = f"{row.topology}{'' if keeps else say('chart.misses')}"
        figure.add_trace(
            go.Scatter(
                x=[latency.mean], y=[cost.mean], name=say("chart.gpus", name=words, n=row.n_gpus), mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 18 if row.topology == plan.recommended else 13, "line": {"width": 2, "color": colour}},
                error_x=_error(latency, colour), error_y=_error(cost, colour),
                hovertemplate=f"{words}<br>{short} %{{x:.2f}} s<br>$%{{y:.2f}} / 1000<extra></extra>",
            )
        )  # fmt: skip
    figure.add_vline(x=plan.slo_latency_s, line={"dash": "dash", "width": 2, "color": COSTS})
    figure.add_annotation(
        text=say("chart.promise", latency=f"{plan.slo_latency_s:g}"), x=plan.slo_latency_s, y=1, yref="paper", yanchor="bottom", xanchor="right",
        showarrow=False, font={"color": COSTS},
    )  # fmt: skip
    figure.update_xaxes(title=say("chart.latency_axis", quantile=long), rangemode="tozero", zeroline=False)
    figure.update_yaxes(title=say("chart.usd_1000"), rangemode="tozero", tickprefix="$", zeroline=False)
    return plain_layout(figure)


def cost_against_latency_words(plan: PlanRecord) -> str:
    """The chart for people who cannot see it."""
    short, long = promised_quantile(plan.slo_attainment_ratio)
    points = [
        say(
            "chart.point_words", name=row.topology, latency=f"{latency_of(row, short).mean:.2f}", cost=f"{row.cost_usd_per_1000_images.mean:.2f}"
        )
        for row in drawn_rows(plan)
    ]  # fmt: skip
    return say(
        "chart.cost_against_latency.words", quantile=long.lower(), points="; ".join(points), promise=f"{plan.slo_latency_s:g}"
    )  # fmt: skip


def waterfall(record: WaterfallRecord) -> go.Figure:
    """Monthly cost from the first topology that keeps the promise, step by step, to the recommendation."""
    priced = [step for step in record.steps if step.cost_usd_per_month is not None]
    bars: list[tuple[str, str, float]] = []
    for index, step in enumerate(priced):
        cost_usd, more_usd = step.cost_usd_per_month or 0.0, -(step.saving_usd_per_month or 0.0)
        if index == 0:
            bars.append((step.topology, "absolute", cost_usd))
        elif step is not priced[-1]:
            bars.append((step.topology, "relative", more_usd))
        else:
            if more_usd:  # the recommendation is none of the steps before
                bars.append((say("chart.last_step"), "relative", more_usd))
            bars.append((step.topology, "total", cost_usd))
    texts = [_signed(value) if measure == "relative" else usd(value) for _, measure, value in bars]
    figure = go.Figure(
        go.Waterfall(
            x=[_tick(name) for name, _, _ in bars], y=[value for _, _, value in bars],
            measure=[measure for _, measure, _ in bars], text=texts, textposition="outside",
            increasing={"marker": {"color": COSTS}}, decreasing={"marker": {"color": SAVES}}, totals={"marker": {"color": TOTAL}},
            connector={"line": {"width": 1, "color": TOTAL}}, cliponaxis=False, hoverinfo="skip",
        )
    )  # fmt: skip
    figure.update_xaxes(tickangle=0)  # slanted labels are cut off on a phone
    figure.update_yaxes(title=say("chart.usd_month"), tickprefix="$", rangemode="tozero")
    return plain_layout(figure)


def waterfall_words(record: WaterfallRecord) -> str:
    """The chart for people who cannot see it."""
    parts = [
        f"{step.topology} {usd(step.cost_usd_per_month)}"
        for step in record.steps
        if step.cost_usd_per_month is not None
    ]
    return say("chart.waterfall.words", steps=", ".join(parts), saved=usd(record.saving_usd_per_month))


def unpriced_steps(record: WaterfallRecord) -> Sequence[tuple[str, str]]:
    """Topology and reason of the steps that have no bar."""
    return [(step.topology, step.note) for step in record.steps if step.cost_usd_per_month is None]


def _tick(name: str) -> str:
    """A label that stands upright under its bar on a phone."""
    return say("chart.recommendation") if name == "recommendation" else name.replace("_", "<br>")


def _signed(value_usd: float) -> str:
    return f"+{usd(value_usd)}" if value_usd > 0 else usd(value_usd)


def _error(estimate: Estimate, colour: str) -> dict[str, object] | None:
    if estimate.low is None or estimate.high is None or estimate.mean is None:
        return None
    # a t-interval may reach below zero, where neither seconds nor dollars are
    minus = estimate.mean - max(0.0, estimate.low)
    return {
        "type": "data", "symmetric": False, "array": [estimate.high - estimate.mean], "arrayminus": [minus], "color": colour, "thickness": 1.5,
        "width": 5,
    }  # fmt: skip
