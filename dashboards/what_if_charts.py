"""The figure of the page What-if: cost against latency of the fleets at hand, the candidate with more and fewer GPUs, the choice marked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from dashboards.charts import COLOURS, COSTS, SYMBOLS
from dashboards.elements import plain_layout
from dashboards.words import say
from planner.what_if import Outcome, Terms

FARTHEST: float = 4.0
"""Points that take longer than this many promises are named beside the chart, so that those that matter are told apart."""


def is_near(one: Outcome, terms: Terms) -> bool:
    """Whether a fleet has a place in the chart."""
    return math.isfinite(one.cost_usd_per_1000_images) and one.latency_p95_s <= FARTHEST * terms.latency_s


def frontier(found: Sequence[Outcome], curve: Sequence[Outcome], candidate: Outcome, terms: Terms) -> go.Figure:
    """95th percentile latency and cost a month; hollow points miss the promise, the ring is the candidate."""
    figure = go.Figure()
    line = sorted((one for one in (*curve, candidate) if is_near(one, terms)), key=lambda one: one.counts)
    if len(line) > 1:
        figure.add_trace(
            go.Scatter(
                x=[one.latency_p95_s for one in line], y=[one.cost_usd_per_month for one in line], mode="lines+markers",
                name=say("what_if.more_or_fewer", name=candidate.topology),
                marker={"symbol": [_symbol(one) for one in line], "size": 7, "color": COLOURS[candidate.topology]},
                line={"color": COLOURS[candidate.topology], "width": 1, "dash": "dot"},
                text=[say("chart.gpus", name=one.topology, n=one.n_gpus) for one in line],
                hovertemplate="%{text}<br>p95 %{x:.2f} s<br>$%{y:,.0f}<extra></extra>",
            )
        )  # fmt: skip
    # the candidate's topology last, so that none that costs and takes the same hides it inside the ring
    for one in sorted(found[:-1], key=lambda one: one.topology == candidate.topology):
        if is_near(one, terms):
            figure.add_trace(
                go.Scatter(
                    x=[one.latency_p95_s], y=[one.cost_usd_per_month], mode="markers", name=say("chart.gpus", name=one.topology, n=one.n_gpus),
                    marker={"symbol": _symbol(one), "size": 13, "color": COLOURS[one.topology], "line": {"width": 2, "color": COLOURS[one.topology]}},
                    hovertemplate=f"{one.topology}<br>p95 %{{x:.2f}} s<br>$%{{y:,.0f}}<extra></extra>",
                )
            )  # fmt: skip
    if is_near(candidate, terms):
        figure.add_trace(
            go.Scatter(
                x=[candidate.latency_p95_s], y=[candidate.cost_usd_per_month], mode="markers",
                name=say("what_if.choice", n=candidate.n_gpus),
                marker={"symbol": "circle-open", "size": 26, "color": COSTS, "line": {"width": 3, "color": COSTS}}, hoverinfo="skip",
            )
        )  # fmt: skip
    figure.add_vline(x=terms.latency_s, line={"dash": "dash", "width": 2, "color": COSTS})
    figure.add_annotation(
        text=say("chart.promise", latency=f"{terms.latency_s:g}"), x=terms.latency_s, y=1, yref="paper", yanchor="bottom", xanchor="right",
        showarrow=False, font={"color": COSTS},
    )  # fmt: skip
    figure.update_xaxes(
        title=say("chart.latency_axis", quantile=say("quantile.p95")), rangemode="tozero", zeroline=False
    )
    figure.update_yaxes(title=say("chart.usd_month"), rangemode="tozero", tickprefix="$", zeroline=False)
    return plain_layout(figure, 420)


def frontier_words(found: Sequence[Outcome], candidate: Outcome, terms: Terms) -> str:
    """The chart for people who cannot see it."""
    points = [
        say(
            "what_if.point_words", name=one.topology, n=one.n_gpus, latency=f"{one.latency_p95_s:.2f}", cost=f"{one.cost_usd_per_month:,.0f}",
            verdict=say("verdict.meets_slo" if one.is_kept else "verdict.misses_slo"),
        )
        for one in found[:-1]
    ]  # fmt: skip
    return say(
        "what_if.frontier.words", points="; ".join(points), name=candidate.topology, n=candidate.n_gpus, latency=f"{candidate.latency_p95_s:.2f}",
        cost=f"{candidate.cost_usd_per_month:,.0f}", promise=f"{terms.latency_s:g}",
    )  # fmt: skip


def _symbol(one: Outcome) -> str:
    return SYMBOLS[one.topology] + ("" if one.is_kept else "-open")
