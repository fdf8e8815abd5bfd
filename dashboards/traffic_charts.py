"""Figures of the page Traffic: arrivals over time, add-ons per request, popularity, loads against cache size, and where time goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import plotly.graph_objects as go

from dashboards.elements import plain_layout
from dashboards.words import say
from traces.character import AddOns, Description, Rates

KINDS: Final = ("checkpoints", "controlnets", "loras")
COLOURS: Final = {"checkpoints": "#E69F00", "controlnets": "#0072B2", "loras": "#009E73"}
SYMBOLS: Final = {"checkpoints": "triangle-up", "controlnets": "diamond", "loras": "circle"}
DASHES: Final = {"checkpoints": "dot", "controlnets": "solid", "loras": "dash"}
LATENCY: Final = "#0072B2"
MONEY: Final = "#E69F00"
STAGES_SHOWN_RATIO: Final = 0.001
"""Stages that take less than this of both time and money have no bar."""


def add_ons_of(found: Description, kind: str) -> AddOns:
    """What a description says about one of ``KINDS``."""
    return {"checkpoints": found.checkpoints, "controlnets": found.controlnets, "loras": found.loras}[kind]


def arrivals(rates: Rates) -> go.Figure:
    """Requests a slot over the hours of the trace, with the mean."""
    hours = [slot * rates.slot_s / 3600 for slot in range(len(rates.slot_counts))]
    unit = say("traffic.slot.hour" if rates.slot_s >= 3600 else "traffic.slot.minute")
    figure = go.Figure(
        go.Scatter(
            x=hours, y=list(rates.slot_counts), mode="lines", line={"shape": "hv", "width": 1.5, "color": COLOURS["controlnets"]}, fill="tozeroy",
            hovertemplate="%{x:.2f} h: %{y}<extra></extra>", showlegend=False,
        )
    )  # fmt: skip
    figure.add_trace(
        go.Scatter(
            x=[0, len(hours) * rates.slot_s / 3600], y=[rates.slot_mean] * 2, mode="lines", line={"dash": "dash", "width": 2, "color": "#D55E00"},
            name=say("traffic.mean", value=f"{rates.slot_mean:.3g}"), showlegend=True, hoverinfo="skip",
        )
    )  # fmt: skip
    figure.update_xaxes(title=say("traffic.hours"))
    figure.update_yaxes(title=say("traffic.per_slot", slot=unit), rangemode="tozero")
    return plain_layout(figure, 320)


def arrivals_words(rates: Rates) -> str:
    """The chart for people who cannot see it."""
    busiest = max(range(len(rates.slot_counts)), key=lambda slot: (rates.slot_counts[slot], -slot))
    return say(
        "traffic.arrivals.words", n=len(rates.slot_counts), slot=say("traffic.slot.hour" if rates.slot_s >= 3600 else "traffic.slot.minute"),
        mean=f"{rates.slot_mean:.3g}", most=rates.slot_max, at=f"{busiest * rates.slot_s / 3600:.3g}",
    )  # fmt: skip


def per_request(found: Description) -> go.Figure:
    """Share of requests by their number of ControlNets and LoRAs."""
    figure = go.Figure()
    for kind in KINDS[1:]:
        shares = add_ons_of(found, kind).per_request
        numbers = sorted(shares)
        figure.add_trace(
            go.Bar(
                x=[str(number) for number in numbers], y=[100 * shares[number] for number in numbers], name=say(f"traffic.{kind}"),
                marker={"color": COLOURS[kind], "pattern": {"shape": "" if kind == "controlnets" else "/"}},
                text=[f"{100 * shares[number]:.3g} %" for number in numbers], textposition="outside", cliponaxis=False, hoverinfo="skip",
            )
        )  # fmt: skip
    figure.update_xaxes(title=say("traffic.number"), type="category", categoryorder="category ascending")
    figure.update_yaxes(title=say("traffic.share_of_requests"), rangemode="tozero", ticksuffix=" %")
    # a phone has no room for all figures; they are in the words
    figure.update_layout(barmode="group", uniformtext={"mode": "hide", "minsize": 9})
    return plain_layout(figure, 320)


def per_request_words(found: Description) -> str:
    """The chart for people who cannot see it."""
    parts = []
    for kind in KINDS[1:]:
        shares = add_ons_of(found, kind).per_request
        listed = ", ".join(f"{number}: {share:.1%}" for number, share in sorted(shares.items()))
        parts.append(f"{say(f'traffic.{kind}')} – {listed}")
    return say("traffic.per_request.words", parts="; ".join(parts))


def popularity(found: Description) -> go.Figure:
    """Share of all uses that go to the k most used ones."""
    lines = {kind: add_ons_of(found, kind).popularity.top_shares for kind in KINDS}
    figure = _lines({kind: (list(top), [100 * share for share in top.values()]) for kind, top in lines.items() if top})
    figure.update_xaxes(title=say("traffic.most_used"), type="log", dtick=1)
    figure.update_yaxes(title=say("traffic.share_of_uses"), range=[0, 105], ticksuffix=" %")
    return plain_layout(figure, 320)


def popularity_words(found: Description) -> str:
    """The chart for people who cannot see it."""
    parts = []
    for kind in KINDS:
        top = add_ons_of(found, kind).popularity
        if top.n_distinct:
            listed = ", ".join(f"{k}: {share:.0%}" for k, share in top.top_shares.items())
            parts.append(f"{say(f'traffic.{kind}')} ({top.n_distinct}) – {listed}")
    return say("traffic.popularity.words", parts="; ".join(parts))


def cache_curve(found: Description) -> go.Figure:
    """Loads per request against the places of an LRU cache on each instance."""
    curves = {kind: add_ons_of(found, kind).loads for kind in KINDS}
    figure = _lines(
        {kind: (list(c.cache_sizes), list(c.loads_per_request)) for kind, c in curves.items() if c.cache_sizes}
    )  # fmt: skip
    figure.update_xaxes(title=say("traffic.cache_places"), type="log", dtick=1)
    figure.update_yaxes(title=say("traffic.loads_per_request"), rangemode="tozero")
    return plain_layout(figure, 320)


def cache_curve_words(found: Description) -> str:
    """The chart for people who cannot see it."""
    parts = []
    for kind in KINDS:
        curve = add_ons_of(found, kind).loads
        if curve.cache_sizes:
            pairs = zip(curve.cache_sizes, curve.loads_per_request, strict=True)
            parts.append(f"{say(f'traffic.{kind}')} – {', '.join(f'{size}: {loads:.3g}' for size, loads in pairs)}")
    return say("traffic.cache_curve.words", n=found.n_instances, parts="; ".join(parts))


def stages(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Where time and money go: two bars a stage, shares of latency and of GPU time."""
    shown = shown_stages(rows)
    names = [say(f"spent.{row['stage']}") for row in shown]
    figure = go.Figure()
    for key, colour, pattern, total in (
        ("latency_ns", LATENCY, "", _total(rows, "latency_ns")),
        ("gpu_ns", MONEY, "/", _total(rows, "gpu_ns")),
    ):
        values = [100 * int(row[key]) / total for row in shown]
        figure.add_trace(
            go.Bar(
                y=names, x=values, orientation="h", name=say(f"traffic.of_{key}"), marker={"color": colour, "pattern": {"shape": pattern}},
                text=[f"{value:.1f} %" if value else "" for value in values], textposition="outside", cliponaxis=False, hoverinfo="skip",
            )
        )  # fmt: skip
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(ticksuffix=" %", rangemode="tozero")
    figure.update_layout(barmode="group")
    return plain_layout(figure, 120 + 52 * len(shown))


def stages_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """The chart for people who cannot see it."""
    latency, gpu = _total(rows, "latency_ns"), _total(rows, "gpu_ns")
    listed = []
    for row in shown_stages(rows):
        name = say(f"spent.{row['stage']}")
        listed.append(f"{name}: {int(row['latency_ns']) / latency:.1%}, {int(row['gpu_ns']) / gpu:.1%}")
    return say("traffic.stages.words", parts="; ".join(listed))


def shown_stages(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Stages that take some of the time or of the money."""
    latency, gpu = _total(rows, "latency_ns"), _total(rows, "gpu_ns")
    return [
        row
        for row in rows
        if max(int(row["latency_ns"]) / latency, int(row["gpu_ns"]) / gpu) >= STAGES_SHOWN_RATIO
    ]  # fmt: skip


def _total(rows: Sequence[Mapping[str, Any]], key: str) -> int:
    return max(1, sum(int(row[key]) for row in rows))


def _lines(points: Mapping[str, tuple[list[int], list[float]]]) -> go.Figure:
    figure = go.Figure()
    for kind, (x, y) in points.items():
        figure.add_trace(
            go.Scatter(
                x=x, y=y, mode="lines+markers", name=say(f"traffic.{kind}"), line={"color": COLOURS[kind], "dash": DASHES[kind]},
                marker={"symbol": SYMBOLS[kind], "size": 9}, hovertemplate="%{x}: %{y:.3g}<extra></extra>",
            )
        )  # fmt: skip
    return figure
