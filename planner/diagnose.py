"""Diagnosis of the present service: where its time and money go, and which single change would help most.

Every change is simulated twice over: on the present number of GPUs (what users would feel) and with the fewest GPUs that keep
the promise (what it would cost). Nothing is searched that ``diffplan plan`` searches better.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import joblib
import numpy as np
import pandas as pd

from engine.allocation import Allocation
from planner.attribution import Attribution, attribute
from planner.candidates import fewest_base_replicas, screen_base_replicas, shapes_of
from planner.cost import cost_of
from planner.diagnose_changes import Change, NotTried, changes_of, resized
from planner.diagnose_question import Present, PresentFleet, TraceDefaults, load_present, load_question, read_log
from planner.fast import NotModelledError, prepare, simulate_fast
from planner.fast.metrics import summarise_fast
from planner.plan_run import scenario_price
from planner.prices import Price
from planner.replication import Run, run_allocation, warmup_of
from planner.simulator.allocated import gpu_hours
from planner.traffic import stream_seed
from traces.problems import one_problem

GPUS_TRIED_FACTOR: Final = 4
"""The fewest GPUs are looked for up to this many times the present fleet (at least 16 more)."""
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Figures:
    """What one fleet delivers."""

    n_gpus: int
    latency_p50_s: float
    latency_p95_s: float
    latency_p99_s: float
    add_on_latency_p95_s: float
    plain_latency_p95_s: float
    slo_attainment_ratio: float
    cost_usd_per_month: float
    cost_usd_per_1000_images: float
    is_saturated: bool


@dataclass(frozen=True, slots=True)
class Effect:
    """What one change does."""

    key: str
    words: str
    kind: Literal["single", "combined", "fleet"]
    at_present_size: Figures
    fewest_gpus: int | None
    """That keep the promise with this change; None if none of those tried does."""
    saving_usd_per_month: float | None
    """Against the fewest GPUs of the service as it is: what the change itself is worth. Negative: it costs."""
    p95_gain_s: float
    """Present p95 − p95 with the change, on the present number of GPUs; positive is faster."""
    note: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Diagnosis:
    """Everything that is printed."""

    present: Present
    fleet: Allocation
    price: Price
    figures: Figures
    """As simulated."""
    measured: Figures | None
    """From the log, if there is one."""
    attribution: Attribution
    cost_micro_usd: int
    """A month of the present fleet."""
    fewest_gpus: int | None
    """That keep the promise with the service as it is."""
    effects: tuple[Effect, ...]
    not_tried: tuple[NotTried, ...]
    assumptions: tuple[str, ...]

    @property
    def spare_gpus(self) -> int:
        """GPUs that could go today without breaking the promise."""
        return max(0, self.fleet.n_gpus - self.fewest_gpus) if self.fewest_gpus is not None else 0


def diagnose(
    question: str,
    fleet: PresentFleet,
    defaults: TraceDefaults,
    log: Path | None = None,
    *,
    jobs: int = 1,
    progress: Progress = lambda text: None,
) -> Diagnosis:
    """Diagnoses a scenario's or a trace's present service.

    Args:
        question: a scenario, or a trace.
        log: request records of what really happened; attribution and present figures then come from it.
        jobs: processes; the result does not depend on it.

    Raises:
        InputError: an input cannot be used, or no stock fleet of any size keeps the promise and none was named.
    """
    scenario, folder, assumptions = load_question(question, defaults)
    present, allocation = load_present(scenario, folder, fleet, assumptions)
    price = scenario_price(scenario, folder, present.inputs)
    fewest: int | None = None
    if allocation is None:
        allocation, fewest = _sized(present)
        present = replace(
            present,
            assumptions=(*present.assumptions, f"You did not say how many GPUs you have (--replicas): {allocation.n_gpus} are taken, the fewest that keep the promise."),
        )  # fmt: skip
    progress(f"{len(present.workload)} requests on {allocation.n_gpus} GPUs as {present.topology}")
    now = Change("now", "as it is", "single", present.service, resized(allocation), len(allocation.pools))
    run = _simulate(present, now, allocation)
    figures = figures_of(present, allocation, run, price)
    measured, records = None, run.result.requests
    allocated_s = _replica_seconds(allocation, run)
    if log is not None:
        records = read_log(log, present.workload)
        measured = _measured_figures(present, allocation, records, price)
        end_s = max(float(records["end_s"].max()), present.workload.duration_s)
        allocated_s = end_s * sum(pool.n_replicas for pool in allocation.pools)
    found = attribute(present.workload, records, present.weights, allocated_s)
    if fewest is None:
        fewest = fewest_gpus(present, now, allocation.n_gpus)
    changes, not_tried = changes_of(present, allocation)
    progress(f"trying {len(changes)} changes, one at a time")
    tasks = (joblib.delayed(effect_of)(present, allocation, change, figures, fewest, price) for change in changes)
    effects = tuple(joblib.Parallel(n_jobs=jobs)(tasks))
    return Diagnosis(
        present, allocation, price, figures, measured, found, round(figures.cost_usd_per_month * 1e6), fewest, effects,
        tuple(not_tried), present.assumptions,
    )  # fmt: skip


def effect_of(
    present: Present, fleet: Allocation, change: Change, figures: Figures, fewest: int | None, price: Price
) -> Effect:
    """Simulates one change at the present size, and finds its fewest GPUs."""
    n = fleet.n_gpus
    attained = _attainment(present, change)
    altered = max(change.allocations(n), key=attained)
    run = _simulate(present, change, altered)
    at_present = figures_of(present, altered, run, price)
    per_gpu = cost_of(1, 0.0, price.price_usd_per_gpu_hour, present.scenario.prices.hours_per_month).cost_usd_per_month
    saving: float | None
    if change.kind == "fleet":
        needed, saving = fewest, (n - altered.n_gpus) * per_gpu
    else:
        # what changes nothing on the present fleet is not sized again
        is_same = replace(at_present, cost_usd_per_1000_images=figures.cost_usd_per_1000_images) == figures
        needed = fewest if is_same else fewest_gpus(present, change, n)
        saving = None if needed is None or fewest is None else (fewest - needed) * per_gpu
    gain_s = figures.latency_p95_s - at_present.latency_p95_s
    return Effect(change.key, change.words, change.kind, at_present, needed, saving, gain_s, change.note)


def fewest_gpus(present: Present, change: Change, present_gpus: int) -> int | None:
    """The fewest GPUs that keep the promise in one run, by bisection; None if none of those tried does.

    More GPUs are taken to be no worse, which holds in order of arrival and nearly so elsewhere.
    """
    slo = present.scenario.slo
    table = change.service
    if float((table.alone_s <= slo.latency_s).mean()) < slo.attainment_ratio and table.batch is None:
        return None  # too slow on an idle system
    bound = fewest_base_replicas(present.workload, table, slo.latency_s, slo.attainment_ratio)
    low = max(change.gpus_min, bound)
    high_max = max(GPUS_TRIED_FACTOR * present_gpus, present_gpus + 16)

    attained = _attainment(present, change)

    def holds(n: int) -> bool:
        return any(attained(allocation) >= slo.attainment_ratio for allocation in change.allocations(n))

    start = screen_base_replicas(present.workload, table.alone_s, slo.latency_s, slo.attainment_ratio, low)
    good = max(low, min(start, high_max))
    bad = low - 1
    while not holds(good):
        bad = good
        if good >= high_max:
            return None
        good = min(high_max, max(good + 1, math.ceil(good * 1.3)))
    while good - bad > 1:
        middle = (good + bad) // 2
        if holds(middle):
            good = middle
        else:
            bad = middle
    return good


def _attainment(present: Present, change: Change) -> Callable[[Allocation], float]:
    """Allocation to the share of requests in time: by the compiled tier, or by SimPy where only that models the service."""
    scenario = present.scenario
    prepared = None

    def by_simpy(allocation: Allocation) -> float:
        return _simulate(present, change, allocation).metrics.slo_attainment_ratio

    def at(allocation: Allocation) -> float:
        nonlocal prepared
        services = {pool.name: change.service for pool in allocation.pools_of("base")}
        seed = stream_seed(scenario.simulation.seed, "world")
        try:
            prepared = prepared if prepared is not None else prepare(present.workload, [change.service])
            run = simulate_fast(
                prepared, allocation, services, present.inputs.sizes, present.inputs.facts,
                world=scenario.world.world(seed),
            )  # fmt: skip
        except NotModelledError:
            return by_simpy(allocation)
        warmup_s = warmup_of(scenario, present.workload)
        return summarise_fast(run, scenario.slo.latency_s, warmup_s=warmup_s).slo_attainment_ratio

    return at


def figures_of(present: Present, fleet: Allocation, run: Run, price: Price) -> Figures:
    """A run's figures, priced as if the whole month looked like it."""
    metrics = run.metrics
    cost = cost_of(
        fleet.n_gpus, run.in_slo_images_per_s, price.price_usd_per_gpu_hour, present.scenario.prices.hours_per_month
    )
    return Figures(
        fleet.n_gpus, metrics.latency_p50_s, metrics.latency_p95_s, metrics.latency_p99_s, metrics.add_on_latency_p95_s,
        metrics.plain_latency_p95_s, metrics.slo_attainment_ratio, cost.cost_usd_per_month, 1000 * cost.cost_usd_per_image,
        metrics.is_saturated,
    )  # fmt: skip


def _simulate(present: Present, change: Change, allocation: Allocation) -> Run:
    return run_allocation(present.scenario, present.inputs, present.workload, allocation, change.service)


def _sized(present: Present) -> tuple[Allocation, int]:
    """The fewest GPUs of the present topology that keep the promise."""
    scenario, inputs = present.scenario, present.inputs
    shape = shapes_of(
        scenario, present.topology, present.workload, present.service, inputs.sizes, inputs.facts, inputs.gpu_kind
    )[0]
    first = shape.allocation((1,) * (1 + len(shape.controlnet_pools)))
    now = Change("now", "as it is", "single", present.service, resized(first), first.n_gpus)
    fewest = fewest_gpus(present, now, scenario.search.gpus_max)
    if fewest is None:
        raise one_problem(
            "--replicas", f"is missing, and no fleet of {present.topology} up to {scenario.search.gpus_max} GPUs keeps the promise",
            "the number of replicas that serve today", "Give --topology and --replicas, or --allocation",
        )  # fmt: skip
    return max(resized(first)(fewest), key=_attainment(present, now)), fewest


def _replica_seconds(fleet: Allocation, run: Run) -> float:
    """Seconds that replicas were there, busy or not."""
    if any(pool.autoscale is not None for pool in fleet.pools):
        return 3600.0 * sum(gpu_hours(run.result.workers, 0.0, run.result.horizon_s).values())
    return run.result.horizon_s * sum(pool.n_replicas for pool in fleet.pools)


def _measured_figures(present: Present, fleet: Allocation, records: pd.DataFrame, price: Price) -> Figures:
    scenario = present.scenario
    arrived = records[records["arrival_s"] >= warmup_of(scenario, present.workload)]
    is_done = (arrived["status"] == "done").to_numpy(dtype=np.bool_)
    latency_s = arrived["latency_s"].to_numpy(dtype=np.float64, na_value=np.nan)
    has_add_ons = (arrived["n_controlnets"] + arrived["n_loras"]).to_numpy(dtype=np.int64) > 0
    in_time = is_done & (latency_s <= scenario.slo.latency_s)
    images = float(arrived["n_images"].to_numpy(dtype=np.float64)[in_time].sum())
    span_s = present.workload.duration_s - warmup_of(scenario, present.workload)
    cost = cost_of(fleet.n_gpus, images / span_s, price.price_usd_per_gpu_hour, scenario.prices.hours_per_month)

    def at(level: float, rows: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> float:
        return float(np.quantile(latency_s[rows], level)) if rows.any() else math.nan

    return Figures(
        fleet.n_gpus, at(0.5, is_done), at(0.95, is_done), at(0.99, is_done), at(0.95, is_done & has_add_ons),
        at(0.95, is_done & ~has_add_ons), float(in_time.mean()) if len(in_time) else 1.0, cost.cost_usd_per_month,
        1000 * cost.cost_usd_per_image, False,
    )  # fmt: skip
