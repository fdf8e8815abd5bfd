"""The map of GPUs: hosts as rows, GPUs as squares; the shade says how busy, the letters which worker."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import plotly.graph_objects as go

from dashboards.elements import plain_layout
from dashboards.gpu_layout import Layout, PlacedGpu
from dashboards.plain_text import percent
from dashboards.words import say

HOSTS_MAX: Final = 40
ROW_PX: Final = 46
LETTERS: Final = {"base": "B", "controlnet": "C"}
SHADES: Final = ((0.0, "#eef4fa"), (0.5, "#56B4E9"), (1.0, "#0b4f80"))
"""One hue from light to dark: how busy reads the same to every eye and on paper."""
DARK_FROM: Final = 0.75
"""Busy share from which the square is dark enough for light letters."""


def short_name(gpu: PlacedGpu) -> str:
    """``B12``, ``C0-3`` where several workers share the GPU."""
    numbers = [worker.rpartition("-")[2] for worker in gpu.workers]
    letter = LETTERS.get(gpu.role, gpu.role[:1].upper())
    return f"{letter}{numbers[0]}" if len(numbers) == 1 else f"{letter}{numbers[0]}-{numbers[-1]}"


def gpu_map(layout: Layout) -> go.Figure:
    """The first ``HOSTS_MAX`` hosts; ControlNet workers have a thick frame, unused GPUs are empty."""
    hosts = layout.hosts[:HOSTS_MAX]
    figure = go.Figure()
    for row, host in enumerate(hosts):
        for column in range(layout.gpus_per_host):
            used = column < len(host)
            gpu = host[column] if used else None
            figure.add_shape(
                type="rect", x0=column - 0.46, x1=column + 0.46, y0=row - 0.44, y1=row + 0.44, layer="below",
                fillcolor=_shade(gpu.busy_ratio) if gpu is not None else "rgba(0,0,0,0)",
                line={"width": 3 if gpu is not None and gpu.role == "controlnet" else 1, "color": "#D55E00" if gpu is not None and gpu.role == "controlnet" else "#8A8A8A", "dash": "solid" if used else "dot"},
            )  # fmt: skip
    cells = [(column, row, gpu) for row, host in enumerate(hosts) for column, gpu in enumerate(host)]
    figure.add_scatter(
        x=[column for column, _, _ in cells], y=[row for _, row, _ in cells], mode="text", showlegend=False,
        text=[f"<b>{short_name(gpu)}</b><br>{percent(gpu.busy_ratio)}" for _, _, gpu in cells],
        textfont={"size": 11, "color": ["#ffffff" if (gpu.busy_ratio or 0.0) >= DARK_FROM else "#10202c" for _, _, gpu in cells]},
        customdata=[[", ".join(gpu.workers), percent(gpu.busy_ratio), percent(gpu.loading_ratio, 1)] for _, _, gpu in cells],
        hovertemplate=f"%{{customdata[0]}}<br>{say('allocation.busy')} %{{customdata[1]}}<br>{say('allocation.loading')} %{{customdata[2]}}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(
        tickvals=list(range(layout.gpus_per_host)), ticktext=[f"{n}" for n in range(layout.gpus_per_host)], side="top", showgrid=False,
        range=[-0.55, layout.gpus_per_host - 0.45], zeroline=False, title=say("allocation.gpu_of_host"), fixedrange=True,
    )  # fmt: skip
    figure.update_yaxes(
        tickvals=list(range(len(hosts))), ticktext=[say("allocation.host", n=row + 1) for row in range(len(hosts))], showgrid=False, zeroline=False,
        range=[len(hosts) - 0.5, -0.5], automargin=True, fixedrange=True,
    )  # fmt: skip
    plain_layout(figure, 90 + ROW_PX * len(hosts))
    figure.update_layout(plot_bgcolor="rgba(0,0,0,0)", margin={"l": 10, "r": 10, "t": 60, "b": 10})
    return figure


def gpu_map_words(layout: Layout) -> str:
    """The map for people who cannot see it."""
    parts = []
    for index, host in enumerate(layout.hosts[:HOSTS_MAX], start=1):
        gpus = ", ".join(f"{'+'.join(gpu.workers)} {percent(gpu.busy_ratio)}" for gpu in host)
        parts.append(say("allocation.host_words", n=index, gpus=gpus))
    return say("allocation.words", n_hosts=len(layout.hosts), hosts=" ".join(parts))


def _shade(busy_ratio: float | None) -> str:
    """The colour of a square, mixed between the two nearest of ``SHADES``."""
    if busy_ratio is None:
        return "#d0d4d8"
    at = min(1.0, max(0.0, busy_ratio))
    for (low, first), (high, last) in pairwise(SHADES):
        if at <= high:
            part = (at - low) / (high - low)
            mixed = [round(int(first[i : i + 2], 16) * (1 - part) + int(last[i : i + 2], 16) * part) for i in (1, 3, 5)]
            return f"#{mixed[0]:02x}{mixed[1]:02x}{mixed[2]:02x}"
    raise AssertionError(at)  # the last shade ends at 1
