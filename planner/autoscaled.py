"""Whether the recommended fleet should scale by itself: the same fleet between bounds, on the full simulator, by GPU hours.

The base pool follows the requests that wait and run, as KEDA does it; the largest size is the fixed fleet's, so that the peak is
served as planned. ControlNet pools keep their size. What is taken for granted: a replica starts in ``START_S``, and a GPU that is
given back is not paid for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import joblib

from engine.allocation import Allocation, Topology
from engine.policies.autoscale_settings import Autoscale
from planner.answers import answers_about
from planner.confirmation import Pace
from planner.cost import cost_of, cost_of_hours
from planner.decision_record import AutoscaledRow, AutoscalingRecord
from planner.explain import usd
from planner.nearest import plain_allocation
from planner.record_types import Estimate
from planner.replication import load_inputs, repeat_allocation
from planner.run_store import metrics_of
from planner.scenario import Scenario
from planner.simulator.allocated import gpu_hours, held_ratio
from planner.statistics import Metrics, t_interval
from planner.traffic import build_traffic

START_S: Final = Autoscale(max_replicas=1).start_s
REQUESTS_MAX: Final = 150_000
"""The full simulator takes some 50 µs a request; a setting is tried several times."""
POSSIBLE_SAVING_MIN: Final = 0.25
"""If the work alone keeps more of the fleet busy than this leaves, no setting is tried."""
WORTHWHILE_MIN: Final = 0.05
REPETITIONS_MAX: Final = 3
TARGETS: Final = (1.0, 2.0, 3.0)
COOLDOWNS_S: Final = (300.0, 1800.0, 3600.0)
"""Of a fleet of one replica, which can only be switched off altogether."""
HOUR_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Scaled:
    """One repetition of one setting."""

    metrics: Metrics
    mean_gpus: float
    held_ratio: tuple[float, ...] = ()
    """Share of the time in which at least 1, 2, … GPUs are held."""


def candidates_of(scenario: Scenario, allocation: Allocation, load_gpus: float, n_requests: int) -> list[Autoscale]:
    """The settings worth simulating; none if :func:`why_not` has a reason."""
    if why_not(scenario, allocation, load_gpus, n_requests):
        return []
    n = allocation.pools_of("base")[0].n_replicas
    if n == 1:
        return [Autoscale(max_replicas=1, min_replicas=0, target=1.0, cooldown_s=seconds) for seconds in COOLDOWNS_S]
    low = min(n - 1, max(1, math.ceil(load_gpus / 2)))
    return [Autoscale(max_replicas=n, min_replicas=low, target=target) for target in TARGETS]


def why_not(scenario: Scenario, allocation: Allocation, load_gpus: float, n_requests: int) -> str:
    """Why no setting is simulated; empty if some are."""
    possible = 1.0 - load_gpus / allocation.n_gpus
    if possible < POSSIBLE_SAVING_MIN:
        return (
            f"The work alone keeps {load_gpus:.1f} of {allocation.n_gpus} GPUs busy on average: switching idle ones off could save "
            f"{max(0.0, possible):.0%} at the very most."
        )
    if n_requests > REQUESTS_MAX:
        return f"Not simulated: {n_requests} requests are more than {REQUESTS_MAX}. Cut the window (traffic.busiest) to try it."
    return ""


def with_autoscale(allocation: Allocation, settings: Autoscale) -> Allocation:
    """The allocation with its base pool between the bounds, starting at the lower one."""
    base = allocation.pools_of("base")[0]
    scaled = replace(base, n_replicas=settings.min_replicas, autoscale=settings)
    return replace(allocation, pools=tuple(scaled if pool is base else pool for pool in allocation.pools))


def run_scaled(
    scenario: Scenario,
    folder: Path,
    repetition: int,
    topology: Topology,
    allocation: Allocation,
    settings: Autoscale,
    store: Path | None = None,
) -> Scaled:
    """One repetition: its arrivals, its profile draw, its noise; from the store if it was run before."""
    scaled = with_autoscale(allocation, settings)
    with answers_about(store, scenario, folder, repetition) as known:
        return known.get(
            f"scaled and held {topology}",
            scaled,
            lambda: _run_scaled(scenario, folder, repetition, topology, scaled),
            lambda one: {"metrics": one.metrics.to_plain(), "mean_gpus": one.mean_gpus, "held": list(one.held_ratio)},
            lambda plain: Scaled(metrics_of(plain["metrics"]), plain["mean_gpus"], tuple(plain["held"])),
        )


def _run_scaled(scenario: Scenario, folder: Path, repetition: int, topology: Topology, scaled: Allocation) -> Scaled:
    inputs = load_inputs(scenario, folder)
    workload = build_traffic(scenario, folder, repetition).workload
    run = repeat_allocation(scenario, inputs, workload, topology, scaled, repetition)
    hours = sum(gpu_hours(run.result.workers, 0.0, workload.duration_s).values())
    held = held_ratio(run.result.workers, 0.0, workload.duration_s)
    return Scaled(run.metrics, hours * HOUR_S / workload.duration_s, held)


def screen_tasks(
    scenario: Scenario,
    folder: Path,
    topology: Topology,
    allocation: Allocation,
    settings: Sequence[Autoscale],
    store: Path | None,
) -> list[Any]:
    """The first repetition of every setting, for a process that has time."""
    return [joblib.delayed(run_scaled)(scenario, folder, 0, topology, allocation, one, store) for one in settings]


def decide(
    scenario: Scenario,
    folder: Path,
    topology: Topology,
    allocation: Allocation,
    price_usd_per_gpu_hour: float,
    screened: Sequence[tuple[Autoscale, Scaled]],
    why: str,
    pace: Pace,
) -> AutoscalingRecord:
    """Repeats the cheapest setting that kept the promise, then the next, until one keeps it; says what is saved.

    Args:
        screened: every setting with its first repetition.
        why: why nothing was screened; empty if something was.
    """
    hours = scenario.prices.hours_per_month
    fixed = cost_of(allocation.n_gpus, 0.0, price_usd_per_gpu_hour, hours)
    target = scenario.slo.attainment_ratio
    seen: dict[int, list[Scaled]] = {place: [one] for place, (_, one) in enumerate(screened)}
    chosen: int | None = None
    good = [place for place, (_, one) in enumerate(screened) if one.metrics.slo_attainment_ratio >= target]
    n = min(REPETITIONS_MAX, scenario.simulation.replications)
    for place in sorted(good, key=lambda place: (screened[place][1].mean_gpus, place)):
        if screened[place][1].mean_gpus > (1 - WORTHWHILE_MIN) * allocation.n_gpus:
            break
        pace.progress(f"repeating the fleet that scales by itself: {_words(screened[place][0])}")
        tasks = (
            joblib.delayed(run_scaled)(
                scenario, folder, repetition, topology, allocation, screened[place][0], pace.store
            )
            for repetition in range(1, n)
        )
        seen[place] += list(pace.run(tasks))
        if _keeps(seen[place], scenario):
            chosen = place
            break
    rows = [
        _row(scenario, settings, seen[place], price_usd_per_gpu_hour) for place, (settings, _) in enumerate(screened)
    ]
    own = None if chosen is None else rows[chosen]
    saving = None if own is None else fixed.cost_usd_per_month - (own.cost_usd_per_month or 0.0)
    return AutoscalingRecord(
        verdict="autoscale" if own is not None else "not simulated" if why.startswith("Not simulated") else "fixed",
        why=why or _why(own, saving, rows, allocation, target),
        fixed_gpu_hours_per_month=fixed.gpu_hours_per_month,
        fixed_cost_usd_per_month=fixed.cost_usd_per_month,
        saving_usd_per_month=saving,
        start_s=START_S,
        chosen=own,
        tried=tuple(rows),
        allocation=None if chosen is None else plain_allocation(with_autoscale(allocation, screened[chosen][0])),
        held_ratio=() if chosen is None else _mean_held([one.held_ratio for one in seen[chosen]]),
    )


def _mean_held(held: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(math.fsum(shares) / len(held) for shares in zip_longest(*held, fillvalue=0.0))


def _keeps(seen: Sequence[Scaled], scenario: Scenario) -> bool:
    attained = t_interval([one.metrics.slo_attainment_ratio for one in seen], scenario.slo.confidence)
    low = attained.low if len(seen) > 1 else attained.mean
    return low >= scenario.slo.attainment_ratio


def _row(
    scenario: Scenario, settings: Autoscale, seen: Sequence[Scaled], price_usd_per_gpu_hour: float
) -> AutoscaledRow:
    level = scenario.slo.confidence

    def estimate(values: list[float]) -> Estimate:
        return Estimate.of(t_interval(values, level) if any(map(math.isfinite, values)) else None)

    gpus = t_interval([one.mean_gpus for one in seen], level)
    cost = cost_of_hours(
        settings.max_replicas, gpus.mean, gpus.mean * price_usd_per_gpu_hour, 0.0, scenario.prices.hours_per_month
    )
    attained = t_interval([one.metrics.slo_attainment_ratio for one in seen], level)
    return AutoscaledRow(
        kind=settings.kind,
        min_replicas=settings.min_replicas,
        max_replicas=settings.max_replicas,
        target=settings.target_value,
        cooldown_s=settings.cooldown_s,
        n_repetitions=len(seen),
        mean_gpus=Estimate.of(gpus),
        gpu_hours_per_month=cost.gpu_hours_per_month,
        cost_usd_per_month=cost.cost_usd_per_month,
        # a t-interval of a share may reach past 1, where no share is
        slo_attainment_ratio=Estimate(mean=attained.mean, low=max(0.0, attained.low), high=min(1.0, attained.high))
        if len(seen) > 1
        else Estimate.of(attained),
        latency_p50_s=estimate([one.metrics.latency_p50_s for one in seen]),
        latency_p99_s=estimate([one.metrics.latency_p99_s for one in seen]),
        keeps_promise=_keeps(seen, scenario),
    )


def _why(
    own: AutoscaledRow | None,
    saving_usd: float | None,
    rows: Sequence[AutoscaledRow],
    allocation: Allocation,
    target: float,
) -> str:
    if own is not None:
        bounds = (
            f"switched off after {own.cooldown_s / 60:g} idle minutes"
            if own.min_replicas == 0
            else f"between {own.min_replicas} and {own.max_replicas} base replicas, {own.target:g} requests a replica"
        )
        return (
            f"Scaled by demand ({bounds}) it takes {own.mean_gpus.mean or 0.0:.2g} GPUs on average in place of {allocation.n_gpus} and keeps "
            f"the promise ({own.slo_attainment_ratio.mean or 0.0:.2%} in time): {usd(saving_usd)} a month less where GPUs are paid by the hour."
        )
    best = max(rows, key=lambda row: row.slo_attainment_ratio.mean or 0.0)
    attained = best.slo_attainment_ratio
    if (attained.mean or 0.0) < target:
        return (
            f"Scaled by demand at most {attained.mean or 0.0:.2%} are in time, {target:.2%} are promised: a new replica comes "
            f"{START_S:g} s and its loads after the demand."
        )
    if best.n_repetitions > 1:
        return (
            f"Scaled by demand {attained.mean:.2%} are in time, but its interval begins at {attained.low or 0.0:.2%}, "
            f"under the promised {target:.2%}."
        )
    return f"Scaled by demand it takes {best.mean_gpus.mean or 0.0:.1f} GPUs on average, as good as all {allocation.n_gpus}."


def _words(settings: Autoscale) -> str:
    if settings.min_replicas == 0:
        return f"off after {settings.cooldown_s / 60:g} idle minutes"
    return f"{settings.min_replicas} to {settings.max_replicas} base replicas, {settings.target_value:g} requests each"
