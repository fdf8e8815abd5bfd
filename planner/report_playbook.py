"""The playbook (docs/playbook.md) with one plan's answers filled in: what is measured, what to split, in which phases, what to watch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from planner.explain import gpus_words, usd
from planner.money.roi import Roi
from planner.plan_record import PhaseRow, PlanRecord
from planner.report_words import by_grade, seconds_words, share_words

WEEK_H: Final = 168.0
IDLE_RATIO: Final = 0.3
"""Busy share under which a ControlNet pool mostly waits."""


@dataclass(frozen=True, slots=True)
class Chapter:
    """One chapter of the playbook."""

    title: str
    lines: tuple[str, ...]


def playbook(plan: PlanRecord, roi: Roi | None, roadmap: Sequence[PhaseRow]) -> tuple[Chapter, ...]:
    """The five chapters; empty for a plan that recommends nothing."""
    if plan.recommended is None:
        return ()
    return (
        Chapter("Measure before deciding", _measure(plan, roi)),
        Chapter("How finely to split", _split(plan, roi)),
        Chapter("Introduce in phases", _phases(roadmap)),
        Chapter("Monitor", _monitor(plan)),
        Chapter("Roll back", _roll_back(plan, roi)),
    )


def _measure(plan: PlanRecord, roi: Roi | None) -> tuple[str, ...]:
    hours = plan.traffic.duration_s / 3600
    said = f"requests: {plan.traffic.n_requests:,} over {hours:.3g} h were planned for"
    lines = [said if hours >= WEEK_H else f"{said}; log a whole week before deciding"]
    if roi is not None and roi.returns is not None:
        today = roi.returns
        lines.append(
            f"where time goes today: diffplan diagnose TRACE --topology {today.today_topology} --replicas {today.today_gpus}"
        )
    assert plan.recommended is not None  # noqa: S101 - playbook has seen to it
    unsure = by_grade(plan.row(plan.recommended).grades, ("assumed", "extrapolated"))
    of = f"profile {plan.ids.profile_name} of {plan.ids.profile_gpu_kind}"
    lines.append(
        f"latencies: {of}; not measured there: {', '.join(unsure)}. Measure your own GPUs (calibrate run, fit)"
        if unsure
        else f"latencies: {of}, every law of the recommendation measured; check that it holds for your GPUs (calibrate check)"
    )
    lines.append(
        f"promise to measure against: {100 * plan.slo_attainment_ratio:g} % within {plan.slo_latency_s:g} s; decide nothing while the "
        "simulated p50 and p95 of today's fleet lie more than 10 % from the logged ones"
    )
    return tuple(lines)


def _split(plan: PlanRecord, roi: Roi | None) -> tuple[str, ...]:
    lines = []
    by_name = {row.topology: row for row in roi.waterfall} if roi is not None else {}
    apart, same = by_name.get("decoupled"), by_name.get("colocated")
    if apart is not None and same is not None:
        gain = same.cost.total_usd - apart.cost.total_usd
        lines.append(
            f"ControlNets as services of their own: save {usd(gain)} a month against the same engine without them, operation included: split"
            if gain > 0
            else f"ControlNets as services of their own: cost {usd(abs(gain))} a month against the same engine without them, operation included: "
            "do not split for money"
        )
    elif apart is not None:
        lines.append(
            "ControlNets as services of their own: needed, the same engine without them does not keep the promise"
        )
    assert plan.recommended is not None  # noqa: S101 - playbook has seen to it
    workers = [pool for pool in plan.row(plan.recommended).pools if pool.role == "controlnet"]
    for pool in workers:
        if pool.busy_ratio is None:
            continue
        waits = "; it mostly waits, so do not split it further" if pool.busy_ratio < IDLE_RATIO else ""
        lines.append(f"pool {pool.name}: {gpus_words(pool.n_gpus)}, {pool.busy_ratio:.0%} busy{waits}")
    lines.append("LoRAs: no service of their own, they are patched into the base model")
    return tuple(lines)


def _phases(roadmap: Sequence[PhaseRow]) -> tuple[str, ...]:
    if not roadmap:
        return ("not worked out yet: diffplan roi PLAN --into-plan simulates the phases and writes them into the plan",)
    lines = []
    for phase in roadmap:
        if not phase.is_worthwhile:
            lines.append(f"{phase.number}. {phase.name}: leave out. {phase.what}")
            continue
        lines.append(f"{phase.number}. {phase.name}: {phase.what}")
    lines.append(
        "gate, roll-back and the smallest test of each: section Roadmap; judge a test with diffplan ab OLD_LOG NEW_LOG"
    )
    return tuple(lines)


def _monitor(plan: PlanRecord) -> tuple[str, ...]:
    assert plan.recommended is not None  # noqa: S101 - playbook has seen to it
    row = plan.row(plan.recommended)
    lines = [
        f"share in time: planned {share_words(row.slo_attainment_ratio)}, promised {100 * plan.slo_attainment_ratio:g} %",
        f"p95 latency: planned {seconds_words(row.latency_p95_s)}; waiting for a replica: planned mean {seconds_words(row.queue_wait_mean_s)}",
    ]
    busy = [f"{pool.name} {pool.busy_ratio:.0%}" for pool in row.pools if pool.busy_ratio is not None]
    if busy:
        lines.append(f"busy ratio of each pool: planned {', '.join(busy)}")
    slot = "hour" if plan.traffic.duration_s >= 6 * 3600 else "minute"  # as in traces.character
    lines.append(
        f"arrivals: planned {3600 * plan.traffic.mean_per_s:,.0f} an hour, the busiest {slot} {plan.traffic.peak_to_mean:.3g} times the "
        "mean; when traffic leaves this, plan again (diffplan watch)"
    )
    lines.append("failed, rejected and expired requests; images of a fixed set of seeds")
    lines.append(f"what limits the fleet: {plan.limited_by}")
    return tuple(lines)


def _roll_back(plan: PlanRecord, roi: Roi | None) -> tuple[str, ...]:
    kept = "the old fleet"
    if roi is not None and roi.returns is not None:
        kept = f"today's {gpus_words(roi.returns.today_gpus)} of {roi.returns.today_topology}"
    return (
        f"keep {kept} up until the gate of the phase",
        f"go back, without a discussion, when over an hour fewer than {100 * plan.slo_attainment_ratio:g} % are in time, when more "
        "requests fail than before, or when images differ; then look at the logs: diffplan diagnose TRACE --log LOG",
    )
