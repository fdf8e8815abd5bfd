"""The charts of a report as plain figures in per cent or pixels; drawn by the template without any script."""

from __future__ import annotations

import math
from typing import Final

from planner.explain import gpus_words, usd
from planner.money.roi import Roi
from planner.money.tables import FACTOR_WORDS
from planner.plan_record import Estimate, PhaseRow, PlanRecord, TopologyRow
from planner.report_blocks import Bar, Bars, Point, Rack, Racks, Scatter, Shade, Tick
from planner.report_words import money_words, seconds_words
from planner.waterfall import holds_more

QUANTILES: Final = ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640.0, 340.0, 64.0, 46.0, 26.0, 18.0
SQUARES_MAX: Final = 64
"""GPUs of a pool that are drawn; what is beyond is a number."""
SHAPES: Final = {
    "diffusers": "M-6,-6H6V6H-6Z",
    "diffusers_tuned": "M0,-8L7,6H-7Z",
    "colocated": "M-7,0A7,7 0 1 1 7,0A7,7 0 1 1 -7,0Z",
    "decoupled": "M0,-8L8,0L0,8L-8,0Z",
    "decoupled_cfg2": "M0,-8L2.3,-3L8,-2.5L3.6,1.2L5,7L0,3.8L-5,7L-3.6,1.2L-8,-2.5L-2.3,-3Z",
}


def saving_bars(plan: PlanRecord) -> Bars | None:
    """The waterfall from the first priced topology to the recommendation; None if fewer than two rows have a price."""
    if plan.waterfall is None:
        return None
    priced = [step for step in plan.waterfall.steps if step.cost_usd_per_month is not None]
    if len(priced) < 2:
        return None
    costs = [step.cost_usd_per_month or 0.0 for step in priced]
    scale = 100 / (max(costs) or 1.0)
    bars = [Bar(priced[0].topology, usd(costs[0]), 0.0, round(costs[0] * scale, 2), "other")]
    for step, before, after in zip(priced[1:], costs[:-1], costs[1:], strict=True):
        if step is priced[-1] and after == before:
            continue
        label = step.topology if step is not priced[-1] else f"to {plan.recommended}"
        words = (
            f"saves {usd(before - after)}"
            if after < before
            else f"costs {usd(after - before)} more"
            if after > before
            else "costs the same"
        )
        words += " (see note)" if holds_more(step.note) else ""  # part of it belongs to rows without a price
        left, width = min(before, after) * scale, abs(after - before) * scale
        shade: Shade = "saves" if after < before else "costs" if after > before else "other"
        bars.append(Bar(label, words, round(left, 2), round(width, 2), shade))
    bars.append(Bar(f"{plan.recommended} (recommended)", usd(costs[-1]), 0.0, round(costs[-1] * scale, 2), "chosen"))
    return Bars("Cost of the GPUs, USD a month, step by step", tuple(bars))


def cost_bars(plan: PlanRecord) -> Bars | None:
    """Monthly cost of every topology that has one; None if fewer than two have."""
    priced = [row for row in plan.topologies if row.cost_usd_per_month is not None]
    if len(priced) < 2:
        return None
    most = max(row.cost_usd_per_month or 0.0 for row in priced) or 1.0
    bars = tuple(
        Bar(
            row.topology, f"{usd(row.cost_usd_per_month)} · {gpus_words(row.n_gpus)}" + ("" if row.verdict == "meets_slo" else " · misses"),
            0.0, round(100 * (row.cost_usd_per_month or 0.0) / most, 2), "chosen" if row.topology == plan.recommended else "other",
        )
        for row in priced
    )  # fmt: skip
    return Bars("Cost of the GPUs, USD a month, by topology", bars)


def phase_bars(roadmap: tuple[PhaseRow, ...]) -> Bars | None:
    """Monthly cost of the GPUs in each phase; None without phases."""
    priced = [phase for phase in roadmap if phase.cost_usd_per_month is not None and phase.is_worthwhile]
    if not priced:
        return None
    most = max(phase.cost_usd_per_month or 0.0 for phase in priced) or 1.0
    bars = tuple(
        Bar(
            f"{phase.number}. {phase.name}", f"{usd(phase.cost_usd_per_month)} · {gpus_words(phase.n_gpus_today + phase.n_gpus_new)}",
            0.0, round(100 * (phase.cost_usd_per_month or 0.0) / most, 2), "chosen" if phase is priced[-1] else "other",
        )
        for phase in priced
    )  # fmt: skip
    return Bars("Cost of the GPUs, USD a month, by phase", bars)


def tornado_bars(roi: Roi) -> Bars | None:
    """Net present value with one input at a time at its ends; None if there is nothing to compare with."""
    if roi.returns is None or not roi.returns.tornado:
        return None
    swings, npv = roi.returns.tornado, roi.returns.npv_usd
    ends = [value for swing in swings for value in (swing.npv_at_low_usd, swing.npv_at_high_usd)]
    low, high = min(npv, *ends), max(npv, *ends)
    span = (high - low) or 1.0
    bars = []
    for swing in swings:
        first, last = sorted((swing.npv_at_low_usd, swing.npv_at_high_usd))
        words = (
            f"×{swing.low:.3g}: {usd(swing.npv_at_low_usd)} · ×{swing.high:.3g}: {usd(swing.npv_at_high_usd)}"
            if swing.width_usd
            else "no effect in this range"
        )
        bars.append(
            Bar(
                FACTOR_WORDS[swing.factor],
                words,
                round(100 * (first - low) / span, 2),
                round(100 * (last - first) / span, 2),
                "chosen",
            )
        )
    title = f"Net present value, from {usd(low)} at the left to {usd(high)} at the right; the line is {usd(npv)}, all inputs as assumed"
    return Bars(title, tuple(bars), round(100 * (npv - low) / span, 2))


def racks(row: TopologyRow) -> Racks:
    """A square a GPU: B computes base models, C ControlNets."""
    found = []
    for pool in row.pools:
        busy = "" if pool.busy_ratio is None else f", {pool.busy_ratio:.0%} busy"
        hosts = (
            "any ControlNet"
            if "*" in pool.hosts
            else f"{len(pool.hosts)} ControlNets"
            if pool.hosts
            else "no ControlNet"
        )
        is_base = pool.role == "base"
        found.append(
            Rack(
                pool.name, f"{pool.n_replicas} replicas on {gpus_words(pool.n_gpus)}, {hosts}{busy}", "B" if is_base else "C",
                min(pool.n_gpus, SQUARES_MAX), max(0, pool.n_gpus - SQUARES_MAX), "chosen" if is_base else "costs",
            )
        )  # fmt: skip
    return Racks(tuple(found))


def promised_quantile(plan: PlanRecord) -> str:
    """The recorded percentile that lies closest to the promised share."""
    return min(QUANTILES, key=lambda item: abs(item[0] - plan.slo_attainment_ratio))[1]


def latency_of(row: TopologyRow, short: str) -> Estimate:
    """The row's percentile by its short name."""
    return {"p50": row.latency_p50_s, "p95": row.latency_p95_s, "p99": row.latency_p99_s}[short]


def cost_against_latency(plan: PlanRecord) -> Scatter | None:
    """Every topology that served something: cost per 1000 images in time against the promised percentile; None if none did."""
    short = promised_quantile(plan)
    rows = [
        row
        for row in plan.topologies
        if latency_of(row, short).mean is not None and row.cost_usd_per_1000_images.mean is not None
    ]
    if not rows:
        return None
    x_max = _above(max(plan.slo_latency_s, *(_high(latency_of(row, short)) for row in rows)))
    y_max = _above(max(_high(row.cost_usd_per_1000_images) for row in rows))

    def x_at(value: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * value / x_max, 1)

    def y_at(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * value / y_max, 1)

    points = []
    for row in rows:
        latency, cost = latency_of(row, short), row.cost_usd_per_1000_images
        keeps = row.verdict == "meets_slo"
        points.append(
            Point(
                row.topology,
                f"{row.topology}: {short} {seconds_words(latency)}, {money_words(cost)} per 1000 images in time, "
                f"{gpus_words(row.n_gpus)}{'' if keeps else ', misses the promise'}",
                x_at(latency.mean or 0.0), y_at(cost.mean or 0.0), x_at(_low(latency)), x_at(_high(latency)), y_at(_low(cost)), y_at(_high(cost)),
                SHAPES[row.topology], "chosen" if row.topology == plan.recommended else "other", not keeps,
            )
        )  # fmt: skip
    return Scatter(
        f"Cost per 1000 images in time against {short} latency; down and left is better, hollow misses the promise",
        WIDTH, HEIGHT, LEFT, HEIGHT - BOTTOM, f"{short} latency (s)", "USD per 1000 images in time",
        tuple(Tick(x_at(value), f"{value:g}") for value in _ticks(x_max)), tuple(Tick(y_at(value), f"${value:g}") for value in _ticks(y_max)),
        tuple(points), x_at(plan.slo_latency_s), f"promise {plan.slo_latency_s:g} s",
    )  # fmt: skip


def _low(estimate: Estimate) -> float:
    mean = estimate.mean or 0.0
    return mean if estimate.low is None else max(0.0, estimate.low)


def _high(estimate: Estimate) -> float:
    mean = estimate.mean or 0.0
    return mean if estimate.high is None else estimate.high


def _step(most: float) -> float:
    """A step of 1, 2 or 5 times a power of ten, four to nine of them up to ``most``."""
    power = 10.0 ** math.floor(math.log10(most / 4))
    return next(power * factor for factor in (1, 2, 5, 10) if most / (power * factor) <= 9)


def _above(most: float) -> float:
    most = most or 1.0
    step = _step(most)
    return step * math.ceil(1.02 * most / step)


def _ticks(most: float) -> list[float]:
    step = _step(most)
    return [round(step * n, 10) for n in range(round(most / step) + 1)]
