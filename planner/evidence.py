"""The evidence of a plan as records: one row a topology, close alternatives, traffic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from planner.candidates import Counts, Shape
from planner.confirmation import Contender
from planner.cost import cost_of
from planner.plan_record import (
    AlternativeRow,
    DoubtRow,
    Estimate,
    PoolRow,
    SelectionRecord,
    TopologyRow,
    TrafficRecord,
)
from planner.prices import Price
from planner.scenario import Scenario
from planner.search import Evaluation
from planner.settling import Doubt, Settled
from planner.statistics import Interval, intervals, t_interval
from planner.traffic import Traffic

CLOSE_COST_RATIO: Final = 1.10
OTHER_KIND_COST_RATIO: Final = 1.25
"""Another topology or shape is worth knowing of at a larger distance than one replica more or less of the same."""
ALTERNATIVES_OF_A_KIND_MAX: Final = 2
ALTERNATIVES_MAX: Final = 6


def topology_row(scenario: Scenario, contender: Contender, price: Price) -> TopologyRow:
    """What the repetitions say about a topology's best allocation, or why it has none."""
    found = contender.search
    grades = {law: str(grade) for law, grade in sorted(found.grades.items())}
    none = Estimate.of(None)
    if contender.counts is None or found.shape is None:
        why = (
            found.misfit.why
            if found.misfit
            else f"no allocation of up to {scenario.search.gpus_max} GPUs meets the SLO"
        )
        binds = found.misfit.binds if found.misfit else "search.gpus_max"
        return TopologyRow(
            topology=found.topology, verdict="infeasible", why=f"{binds}: {why}", shape="", pools=(), n_gpus=None,
            mean_load_gpus=found.mean_load_gpus, peak_hour_load_gpus=found.peak_hour_load_gpus, cost_usd_per_month=None, cost_usd_per_1000_images=none,
            in_slo_images_per_s=none, slo_attainment_ratio=none, latency_p50_s=none, latency_p95_s=none, latency_p99_s=none,
            plain_latency_p50_s=none, plain_latency_p99_s=none, queue_wait_mean_s=none, rejected_ratio=None, limited_by=binds,
            grades=grades,
        )  # fmt: skip
    level = scenario.slo.confidence
    figures = intervals([c.metrics for c in contender.confirmations], level)
    images = t_interval([c.in_slo_images_per_s for c in contender.confirmations], level)
    n_gpus = contender.allocation.n_gpus
    n_paid = contender.cost
    hours = scenario.prices.hours_per_month
    per_1000 = [
        1000 * cost_of(n_paid, c.in_slo_images_per_s, price.price_usd_per_gpu_hour, hours).cost_usd_per_image
        for c in contender.confirmations
        if c.in_slo_images_per_s > 0
    ]
    # total cost over all in-SLO images of the repetitions; the interval is that of the repetitions' own ratios
    pooled = 1000 * cost_of(n_paid, images.mean, price.price_usd_per_gpu_hour, hours).cost_usd_per_image
    around = t_interval(per_1000, level) if per_1000 else None
    attained = figures["slo_attainment_ratio"]
    target = scenario.slo.attainment_ratio
    why = f"attainment {attained.mean:.2%}, interval from {attained.low:.2%}, {'meets' if contender.is_confirmed else 'under'} {target:.2%}"
    runs = [c.metrics for c in contender.confirmations]

    def estimate(name: str) -> Estimate:
        return Estimate.of(figures.get(name))

    return TopologyRow(
        topology=found.topology,
        verdict="meets_slo" if contender.is_confirmed else "misses_slo",
        why=why,
        shape=found.shape.name,
        pools=tuple(
            PoolRow(
                name=pool.name, role=pool.role, n_replicas=pool.n_replicas, n_gpus=pool.n_gpus, hosts=pool.controlnet_ids,
                busy_ratio=_mean(figures.get(f"busy_ratio.{pool.name}")),
                loading_ratio=_mean(figures.get(f"loading_ratio.{pool.name}")),
            )
            for pool in contender.allocation.pools
        ),
        n_gpus=n_gpus,
        mean_load_gpus=found.mean_load_gpus, peak_hour_load_gpus=found.peak_hour_load_gpus,
        cost_usd_per_month=cost_of(n_paid, 0.0, price.price_usd_per_gpu_hour, hours).cost_usd_per_month,
        cost_usd_per_1000_images=Estimate(mean=pooled, low=around.low if around else None, high=around.high if around else None),
        in_slo_images_per_s=Estimate.of(images),
        slo_attainment_ratio=_as_share(attained),
        latency_p50_s=estimate("latency_p50_s"),
        latency_p95_s=estimate("latency_p95_s"),
        latency_p99_s=estimate("latency_p99_s"),
        plain_latency_p50_s=estimate("plain_latency_p50_s"),
        plain_latency_p99_s=estimate("plain_latency_p99_s"),
        queue_wait_mean_s=estimate("queue_wait_mean_s"),
        rejected_ratio=sum(run.n_rejected for run in runs) / max(1, sum(run.n_offered for run in runs)),
        limited_by="",
        grades=grades,
    )  # fmt: skip


def _mean(interval: Interval | None) -> float | None:
    return interval.mean if interval is not None else None


def _as_share(interval: Interval) -> Estimate:
    """A t-interval of a share may reach past 1, where no share is."""
    return Estimate(mean=interval.mean, low=max(0.0, interval.low), high=min(1.0, interval.high))


def alternative_rows(
    scenario: Scenario, contenders: Sequence[Contender], chosen: Contender, price: Price
) -> tuple[AlternativeRow, ...]:
    """Allocations of the searches that cost about as much as the recommendation, cheapest first, a few of each kind.

    Smaller ones than a topology's confirmed allocation are left out: the confirmation refused them.
    """
    n_best = chosen.cost
    rows: list[tuple[tuple[float, int, Counts], AlternativeRow]] = []
    kinds: Counter[tuple[str, str]] = Counter()
    for order, contender in enumerate(contenders):
        for shape, seen in sorted(contender.search.looked_at, key=lambda item: (item[1].n_gpus, item[1].counts)):
            kind = (shape.topology, shape.name)
            is_same_kind = chosen.search.shape is not None and kind == (
                chosen.search.topology,
                chosen.search.shape.name,
            )
            is_chosen = contender is chosen and seen.counts == chosen.counts and shape is chosen.search.shape
            if (
                is_chosen
                or (contender.counts is not None and shape.cost(seen.counts) < contender.cost)
                or shape.cost(seen.counts) > (CLOSE_COST_RATIO if is_same_kind else OTHER_KIND_COST_RATIO) * n_best
                or seen.attainment_ratio < scenario.slo.attainment_ratio
                or kinds[kind] == ALTERNATIVES_OF_A_KIND_MAX
            ):
                continue
            kinds[kind] += 1
            rows.append(((shape.cost(seen.counts), order, seen.counts), _alternative(scenario, shape, seen, price)))
    return tuple(row for _, row in sorted(rows, key=lambda item: item[0])[:ALTERNATIVES_MAX])


def _alternative(scenario: Scenario, shape: Shape, seen: Evaluation, price: Price) -> AlternativeRow:
    allocation = shape.allocation(seen.counts)
    cost = cost_of(
        shape.cost(seen.counts), seen.in_slo_images_per_s, price.price_usd_per_gpu_hour, scenario.prices.hours_per_month
    )
    return AlternativeRow(
        topology=shape.topology,
        pools={pool.name: pool.n_replicas for pool in allocation.pools},
        n_gpus=seen.n_gpus,
        cost_usd_per_month=cost.cost_usd_per_month,
        slo_attainment_ratio=seen.attainment_ratio,
        meets_slo_in_search=seen.attainment_ratio >= scenario.slo.attainment_ratio,
    )


def traffic_record(scenario: Scenario, traffic: Traffic) -> TrafficRecord:
    """The traffic's figures before and after scaling."""
    before, after = traffic.before, traffic.after
    return TrafficRecord(
        trace=scenario.traffic.trace,
        source=traffic.source,
        scale_factor=scenario.traffic.scale_factor,
        shift_law=scenario.traffic.shift_law,
        n_requests_before=before.n_requests,
        n_requests=after.n_requests,
        duration_s=after.duration_s,
        mean_per_s_before=before.mean_per_s,
        mean_per_s=after.mean_per_s,
        interarrival_cv_before=before.interarrival_cv,
        interarrival_cv=after.interarrival_cv,
        peak_to_mean_before=before.peak_to_mean,
        peak_to_mean=after.peak_to_mean,
        notes=traffic.notes,
    )


def selection_record(
    scenario: Scenario,
    settled: Settled,
    winner: TopologyRow,
    rows: Sequence[TopologyRow],
    price: Price,
    checked_by: str,
) -> SelectionRecord:
    """How sure the choice is, and how far away the next best topology."""
    others = [row for row in rows if row.verdict == "meets_slo" and row.topology != winner.topology]
    second = min(others, key=lambda row: row.cost_usd_per_month or 0.0, default=None)
    gap = None if second is None else (second.cost_usd_per_month or 0.0) - (winner.cost_usd_per_month or 0.0)
    return SelectionRecord(
        probability_of_correct_selection=settled.probability,
        chosen=_doubt_row(scenario, settled, settled.chosen, price),
        cheaper=tuple(_doubt_row(scenario, settled, doubt, price) for doubt in settled.cheaper),
        runner_up_topology=None if second is None else second.topology,
        runner_up_gap_usd_per_month=gap,
        checked_by=checked_by,
    )


def _doubt_row(scenario: Scenario, settled: Settled, doubt: Doubt, price: Price) -> DoubtRow:
    shape = doubt.contender.search.shape
    assert shape is not None  # noqa: S101  only shapes are repeated
    allocation = shape.allocation(doubt.counts)
    slo = scenario.slo
    hours = scenario.prices.hours_per_month
    return DoubtRow(
        topology=shape.topology,
        pools={pool.name: pool.n_replicas for pool in allocation.pools},
        n_gpus=allocation.n_gpus,
        cost_usd_per_month=cost_of(
            shape.cost(doubt.counts), 0.0, price.price_usd_per_gpu_hour, hours
        ).cost_usd_per_month,
        slo_attainment_ratio=_as_share(t_interval(doubt.attained, slo.confidence)),
        n_repetitions=len(doubt.confirmations),
        probability_meets_slo=settled.probability_of(doubt, slo.attainment_ratio),
    )
