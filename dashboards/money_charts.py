"""Figures about money, each with the sentence that says the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import plotly.graph_objects as go

from dashboards.charts import COSTS, SAVES, TOTAL
from dashboards.elements import plain_layout
from dashboards.words import say, translated
from planner.explain import usd
from planner.money.roi import Priced, Returns, Roi
from planner.money.shares import Share
from planner.plan_record import PhaseRow

LINES: Final = (
    ("gpu", "#0072B2", ""), ("unused", "#56B4E9", "/"), ("storage", "#009E73", "."), ("operation", "#E69F00", "\\"),
)  # fmt: skip
"""Line of the cost, its colour, and its hatching, so that neither stands alone."""
SHARES_MAX: Final = 14
SHARE_NAME_MAX: Final = 28
HEIGHT_PX: Final = 340


def steps_to(roi: Roi) -> tuple[Priced, ...]:
    """The priced topologies from the first to the recommendation; those after it are no step on the way."""
    found: list[Priced] = []
    for row in roi.waterfall:
        found.append(row)
        if row.is_recommended:
            break
    return tuple(found)


def full_cost_steps(roi: Roi) -> go.Figure:
    """Full monthly cost from the first priced topology, step by step, to the recommendation."""
    steps = steps_to(roi)
    labels, measures, values, texts = (
        [steps[0].topology],
        ["absolute"],
        [steps[0].cost.total_usd],
        [usd(steps[0].cost.total_usd)],
    )
    for step in steps[1:]:
        more = 0.0 - (step.saving_usd_per_month or 0.0)  # never minus zero
        labels.append(step.topology)
        measures.append("relative")
        values.append(more)
        texts.append(f"+{usd(more)}" if more > 0 else usd(more))
    labels.append(say("roi.recommended"))
    measures.append("total")
    values.append(steps[-1].cost.total_usd)
    texts.append(usd(steps[-1].cost.total_usd))
    figure = go.Figure(
        go.Waterfall(
            x=[label.replace("_", "<br>") for label in labels], y=values, measure=measures, text=texts, textposition="outside",
            increasing={"marker": {"color": COSTS}}, decreasing={"marker": {"color": SAVES}}, totals={"marker": {"color": TOTAL}},
            connector={"line": {"width": 1, "color": TOTAL}}, cliponaxis=False, hoverinfo="skip",
        )
    )  # fmt: skip
    figure.update_xaxes(tickangle=0)
    figure.update_yaxes(
        title=say("roi.usd_month"), tickprefix="$", range=[0, 1.12 * max(step.cost.total_usd for step in steps)]
    )
    return plain_layout(figure, HEIGHT_PX)


def full_cost_steps_words(roi: Roi) -> str:
    """The steps for people who cannot see them."""
    return say(
        "roi.steps.words", steps=", ".join(f"{step.topology} {usd(step.cost.total_usd)}" for step in steps_to(roi))
    )


def cost_lines(roi: Roi) -> go.Figure:
    """The lines of every topology's full cost, stacked."""
    figure = go.Figure()
    names = [row.topology for row in roi.waterfall]
    for line, colour, pattern in LINES:
        values = [line_usd(row, line) for row in roi.waterfall]
        if any(values):
            figure.add_bar(
                y=names, x=values, orientation="h", name=say(f"roi.line.{line}"), marker={"color": colour, "pattern": {"shape": pattern}},
                hovertemplate=f"%{{y}}<br>{say(f'roi.line.{line}')} $%{{x:,.0f}}<extra></extra>",
            )  # fmt: skip
    most = max(row.cost.total_usd for row in roi.waterfall)
    for row in roi.waterfall:
        figure.add_annotation(
            x=row.cost.total_usd,
            y=row.topology,
            text=usd(row.cost.total_usd),
            showarrow=False,
            xanchor="left",
            xshift=4,
        )
    figure.update_layout(barmode="stack")
    figure.update_xaxes(title=say("roi.usd_month"), tickprefix="$", range=[0, 1.22 * most], nticks=5)
    figure.update_yaxes(autorange="reversed", automargin=True)
    return plain_layout(figure, 150 + 44 * len(names))


def cost_lines_words(roi: Roi) -> str:
    """The lines for people who cannot see them."""
    parts = []
    for row in roi.waterfall:
        lines = ", ".join(f"{say(f'roi.line.{line}')} {usd(line_usd(row, line))}" for line, _, _ in LINES)
        parts.append(f"{row.topology} {usd(row.cost.total_usd)} ({lines})")
    return say("roi.lines.words", rows="; ".join(parts))


def short_usd(value_usd: float) -> str:
    """``$71,540``, and from a million ``$1.01 M``: a metric has room for few letters."""
    return usd(value_usd) if abs(value_usd) < 1e6 else f"{'−' if value_usd < 0 else ''}${abs(value_usd) / 1e6:,.2f} M"


def line_usd(row: Priced, line: str) -> float:
    """One line of a row's cost, USD a month; the four lines sum to its total."""
    cost = row.cost
    return {
        "gpu": cost.gpu_usd, "unused": cost.unused_host_gpu_usd, "storage": cost.storage_usd + cost.egress_usd, "operation": cost.operation_usd,
    }[line]  # fmt: skip


def payback(returns: Returns) -> go.Figure:
    """Savings less the one-time cost, added up month by month; it is paid back where the line meets zero."""
    figure = go.Figure()
    months = list(range(len(returns.cumulative_usd)))
    figure.add_scatter(
        x=months, y=list(returns.cumulative_usd), mode="lines", line={"color": SAVES, "width": 3}, name=say("roi.payback.line"), showlegend=False,
        hovertemplate=f"{say('roi.month')} %{{x}}<br>$%{{y:,.0f}}<extra></extra>",
    )  # fmt: skip
    figure.add_hline(y=0, line={"color": TOTAL, "width": 1})
    if returns.payback_months is not None:
        figure.add_vline(x=returns.payback_months, line={"dash": "dash", "color": COSTS, "width": 2})
        figure.add_annotation(
            x=returns.payback_months, y=1, yref="paper", yanchor="bottom", xanchor="left", showarrow=False, font={"color": COSTS},
            text=say("roi.payback.at", months=f"{returns.payback_months:.1f}"),
        )  # fmt: skip
    figure.update_xaxes(title=say("roi.month"), rangemode="tozero", zeroline=False)
    figure.update_yaxes(title=say("roi.payback.axis"), tickformat="$~s", zeroline=False)
    return plain_layout(figure, HEIGHT_PX)


def payback_words(returns: Returns) -> str:
    """The payback for people who cannot see it."""
    back = (
        say("roi.payback.never")
        if returns.payback_months is None
        else say("roi.payback.at", months=f"{returns.payback_months:.1f}")
    )
    return say(
        "roi.payback.words", once=usd(returns.investment_usd), back=back, months=len(returns.cumulative_usd) - 1, end=usd(returns.cumulative_usd[-1])
    )  # fmt: skip


def tornado(returns: Returns) -> go.Figure:
    """Net present value with one input at a time at its ends, the widest swing on top; hatched is the higher input."""
    swings = returns.tornado
    names = [say(f"roi.factor.{swing.factor}") for swing in swings]
    figure = go.Figure()
    for end, colour, pattern in (("low", SAVES, ""), ("high", COSTS, "/")):
        values = [swing.npv_at_low_usd if end == "low" else swing.npv_at_high_usd for swing in swings]
        factors = [swing.low if end == "low" else swing.high for swing in swings]
        figure.add_bar(
            y=names, x=[value - returns.npv_usd for value in values], base=returns.npv_usd, orientation="h", name=say(f"roi.tornado.{end}"),
            marker={"color": colour, "pattern": {"shape": pattern}}, customdata=[[f"{f:.3g}", usd(v)] for f, v in zip(factors, values, strict=True)],
            hovertemplate="%{y} ×%{customdata[0]}<br>%{customdata[1]}<extra></extra>",
        )  # fmt: skip
    figure.add_vline(x=returns.npv_usd, line={"color": TOTAL, "width": 2})
    figure.update_layout(barmode="overlay")
    figure.update_xaxes(title=say("roi.npv_axis"), tickformat="$~s", zeroline=True, nticks=5)
    figure.update_yaxes(autorange="reversed", automargin=True)
    return plain_layout(figure, 150 + 40 * len(swings))


def tornado_words(returns: Returns) -> str:
    """The swings for people who cannot see them."""
    parts = [
        f"{say(f'roi.factor.{s.factor}')} ×{s.low:.3g} {usd(s.npv_at_low_usd)}, ×{s.high:.3g} {usd(s.npv_at_high_usd)}" for s in returns.tornado
    ]  # fmt: skip
    return say("roi.tornado.words", npv=usd(returns.npv_usd), parts="; ".join(parts))


def share_name(share: Share) -> str:
    """What a row of a division is for, in the session's language where it is ours to name."""
    if share.kind in {"controlnet", "checkpoint", "tenant"}:
        return share.name or say("roi.nameless")
    return translated(share.name) if share.kind in {"line", "lora group"} else say(f"roi.share.{share.kind}")


def grouped(rows: Sequence[Share]) -> list[tuple[str, int]]:
    """Name and cents of the largest rows, the smaller ones as one; sums to what the rows sum to."""
    ranked = sorted(rows, key=lambda row: (-row.cost_cents, row.kind, row.name))
    found = [(share_name(row), row.cost_cents) for row in ranked[:SHARES_MAX]]
    rest = sum(row.cost_cents for row in ranked[SHARES_MAX:])
    return [*found, (say("roi.share.rest", n=len(ranked) - SHARES_MAX), rest)] if len(ranked) > SHARES_MAX else found


def shares(rows: Sequence[Share]) -> go.Figure:
    """Who the cost is for, the largest part on top."""
    parts = grouped(rows)
    figure = go.Figure(
        go.Bar(
            y=[f"{index + 1}. {_short(name)}" for index, (name, _) in enumerate(parts)], x=[cents / 100 for _, cents in parts], orientation="h",
            marker={"color": SAVES}, text=[f"${cents / 100:,.2f}" for _, cents in parts], textposition="outside", cliponaxis=False, hoverinfo="skip",
        )
    )  # fmt: skip
    most = max(cents for _, cents in parts) / 100 or 1.0
    figure.update_xaxes(title=say("roi.usd_month"), tickprefix="$", range=[0, 1.3 * most], nticks=5)
    figure.update_yaxes(autorange="reversed", automargin=True)
    return plain_layout(figure, 110 + 28 * len(parts))


def _short(name: str) -> str:
    """A name that leaves room for its bar on a phone; the table below has all of it."""
    return name if len(name) <= SHARE_NAME_MAX else f"{name[: SHARE_NAME_MAX - 1]}…"


def shares_words(rows: Sequence[Share]) -> str:
    """The division for people who cannot see it."""
    total = sum(row.cost_cents for row in rows)
    parts = ", ".join(f"{name} ${cents / 100:,.2f}" for name, cents in grouped(rows))
    return say("roi.shares.words", total=f"${total / 100:,.2f}", parts=parts)


def phases(rows: Sequence[PhaseRow]) -> go.Figure:
    """GPUs of each phase: as today, and new."""
    names = [f"{row.number}. {say(f'roi.phase.{row.name.split()[0]}')}" for row in rows]
    figure = go.Figure()
    for line, values, colour, pattern in (
        ("today", [row.n_gpus_today for row in rows], TOTAL, ""),
        ("new", [row.n_gpus_new for row in rows], SAVES, "/"),
    ):
        figure.add_bar(
            y=names, x=values, orientation="h", name=say(f"roi.phase_gpus.{line}"), marker={"color": colour, "pattern": {"shape": pattern}},
            text=[str(value) if value else "" for value in values], textposition="auto", hoverinfo="skip",
        )  # fmt: skip
    figure.update_layout(barmode="stack")
    figure.update_xaxes(title=say("roi.gpus"), rangemode="tozero")
    figure.update_yaxes(autorange="reversed", automargin=True)
    return plain_layout(figure, 150 + 40 * len(names))


def phases_words(rows: Sequence[PhaseRow]) -> str:
    """The phases for people who cannot see them."""
    parts = [
        say("roi.phases.one", n=row.number, name=say(f"roi.phase.{row.name.split()[0]}"), today=row.n_gpus_today, new=row.n_gpus_new, cost=usd(row.cost_usd_per_month))
        for row in rows
    ]  # fmt: skip
    return say("roi.phases.words", parts=" ".join(parts))
