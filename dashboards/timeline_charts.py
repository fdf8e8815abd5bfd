"""Figures of a run over time, each with the sentence that says the same. Line styles and words tell lines apart, not colour alone."""

from __future__ import annotations

from typing import Final

import numpy as np
import plotly.graph_objects as go

from dashboards.charts import COSTS, SAVES, TOTAL
from dashboards.elements import plain_layout
from dashboards.plain_text import percent, rounded
from dashboards.words import say
from planner.run_series import Life, RunSeries

HEIGHT_PX: Final = 300
POOL_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
POOL_DASHES: Final = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
STAGE_COLOURS: Final = {
    "queue": TOTAL, "switch": "#CC79A7", "controlnet_load": "#E69F00", "lora": "#56B4E9", "text": "#009E73", "denoise": "#0072B2",
    "sharing": "#D55E00", "decode": "#009E73", "other": TOTAL,
}  # fmt: skip
UNITS: Final = (("d", 86_400.0, 3 * 86_400.0), ("h", 3600.0, 2 * 3600.0), ("min", 60.0, 180.0), ("s", 1.0, 0.0))
"""Unit, its seconds, and the length from which on a span is shown in it."""


def unit_of(length_s: float) -> tuple[str, float]:
    """The unit in which a span of this length is read easily, and its seconds."""
    return next((unit, seconds) for unit, seconds, least_s in UNITS if length_s >= least_s)


def moment(at_s: float) -> str:
    """``12.5 min``."""
    unit, seconds = unit_of(at_s)
    return say(f"timeline.unit.{unit}", value=rounded(at_s / seconds))


def queue(series: RunSeries) -> go.Figure:
    """Waiting requests: the mean of each slot as an area, the most at once as a line."""
    figure, x = _figure(series)
    figure.add_scatter(
        x=x, y=series.waiting_mean, name=say("timeline.queue.mean"), mode="lines", line={"color": SAVES, "width": 2, "shape": "hvh"}, fill="tozeroy"
    )  # fmt: skip
    figure.add_scatter(
        x=x, y=series.waiting_max, name=say("timeline.queue.most"), mode="lines", line={"color": COSTS, "width": 1.5, "dash": "dot", "shape": "hvh"}
    )  # fmt: skip
    figure.update_yaxes(title=say("timeline.queue.axis"), rangemode="tozero")
    return _laid_out(figure)


def queue_words(series: RunSeries) -> str:
    """The queue for people who cannot see it."""
    at = int(np.argmax(series.waiting_max))
    n = series.arrivals_per_s * series.slot_s
    late = float(np.nansum(series.late_ratio * n) / n.sum()) if n.sum() else None
    return say(
        "timeline.queue.words", mean=rounded(float(series.waiting_mean.mean())), most=f"{series.waiting_max[at]:.0f}",
        at=moment(float(series.middle_s[at])), late=percent(late, 2),
    )  # fmt: skip


def busy(series: RunSeries) -> go.Figure:
    """Busy share of each pool, and what it spends on loading models where that is anything."""
    figure, x = _figure(series)
    for index, pool in enumerate(series.pools):
        colour, dash = POOL_COLOURS[index % len(POOL_COLOURS)], POOL_DASHES[index % len(POOL_DASHES)]
        figure.add_scatter(
            x=x, y=100 * pool.busy_ratio, name=pool.pool, mode="lines", line={"color": colour, "dash": dash, "width": 2, "shape": "hvh"}
        )  # fmt: skip
        if pool.loading_ratio.max() > 0.01:
            figure.add_scatter(
                x=x, y=100 * pool.loading_ratio, name=say("timeline.busy.loading", pool=pool.pool), mode="lines",
                line={"color": colour, "dash": "dot", "width": 1, "shape": "hvh"},
            )  # fmt: skip
    figure.update_yaxes(title=say("timeline.busy.axis"), range=[0, 103], ticksuffix=" %")
    return _laid_out(figure)


def busy_words(series: RunSeries) -> str:
    """The pools for people who cannot see them."""
    pools = [
        say("timeline.busy.pool", pool=pool.pool, mean=percent(float(pool.busy_ratio.mean())), most=percent(float(pool.busy_ratio.max())))
        for pool in series.pools
    ]  # fmt: skip
    return say("timeline.busy.words", pools="; ".join(pools))


def base_replicas(series: RunSeries) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Base replicas that are there, a slot."""
    there: np.ndarray[tuple[int], np.dtype[np.float64]] = np.zeros(len(series.middle_s))
    for pool in series.pools:
        if pool.role == "base":
            there = there + pool.replicas
    return there


def demand(series: RunSeries) -> go.Figure:
    """Base replicas that the arrivals of each slot ask for, against those that are there."""
    figure, x = _figure(series)
    figure.add_scatter(
        x=x, y=series.demand_replicas, name=say("timeline.demand.asked"), mode="lines", line={"color": SAVES, "width": 2, "shape": "hvh"}, fill="tozeroy"
    )  # fmt: skip
    figure.add_scatter(
        x=x, y=base_replicas(series), name=say("timeline.demand.there"), mode="lines", line={"color": COSTS, "width": 2, "dash": "dash", "shape": "hvh"}
    )  # fmt: skip
    figure.update_yaxes(title=say("timeline.demand.axis"), rangemode="tozero")
    return _laid_out(figure)


def demand_words(series: RunSeries) -> str:
    """Demand for people who cannot see it."""
    there = base_replicas(series)
    return say(
        "timeline.demand.words", mean=rounded(float(series.demand_replicas.mean())), most=rounded(float(series.demand_replicas.max())),
        there=rounded(float(there.mean())), share=percent(float((series.demand_replicas > there).mean())),
    )  # fmt: skip


def life(one: Life, promise_s: float) -> go.Figure:
    """The stages of a request, each a bar that begins where the one before ended; the promise as a line."""
    figure = go.Figure()
    names = [say(f"stage.{stage.name}") for stage in one.stages]
    figure.add_bar(
        y=names, x=[stage.duration_s for stage in one.stages], base=[stage.begin_s for stage in one.stages], orientation="h",
        marker={"color": [STAGE_COLOURS[stage.name] for stage in one.stages]}, text=[f"{stage.duration_s:.2f} s" for stage in one.stages],
        textposition="outside", cliponaxis=False, hoverinfo="skip", showlegend=False,
    )  # fmt: skip
    figure.add_vline(x=promise_s, line={"dash": "dash", "width": 2, "color": COSTS})
    figure.add_annotation(
        text=say("timeline.life.promise", latency=f"{promise_s:g}"), x=promise_s, y=1, yref="paper", yanchor="bottom", xanchor="right",
        showarrow=False, font={"color": COSTS},
    )  # fmt: skip
    longest = max(promise_s, one.latency_s or 0.0)
    figure.update_xaxes(
        title=say("timeline.life.axis"), range=[0, 1.15 * longest], zeroline=False
    )  # room for the words of the last bar
    figure.update_yaxes(autorange="reversed", automargin=True)
    return plain_layout(figure, 120 + 36 * max(3, len(names)))


def life_words(one: Life) -> str:
    """A request's stages in a sentence."""
    stages = [f"{say(f'stage.{stage.name}')} {stage.duration_s:.2f}" for stage in one.stages]
    return say(
        "timeline.life.words", name=one.request_id, latency=f"{one.latency_s or 0.0:.2f}", stages=", ".join(stages)
    )


def _laid_out(figure: go.Figure) -> go.Figure:
    plain_layout(figure, HEIGHT_PX)
    figure.update_layout(legend_y=-0.34)  # below the title of the axis, which a low chart puts nearer
    return figure


def _figure(series: RunSeries) -> tuple[go.Figure, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    unit, seconds = unit_of(series.begin_s + series.slot_s * len(series.middle_s))
    figure = go.Figure()
    figure.update_xaxes(title=say(f"timeline.time.{unit}"), zeroline=False)
    figure.update_layout(hovermode="x unified")
    return figure, series.middle_s / seconds
