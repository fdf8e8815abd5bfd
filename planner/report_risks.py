"""What could make a plan wrong, read off its own figures: each risk with the number that shows it and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from planner.explain import gpus_words, usd
from planner.money.roi import Roi
from planner.plan_record import PlanRecord, SelectionRecord, TopologyRow
from planner.report_words import by_grade, doubt_rows, probability_words, share_words

SURE_MIN: Final = 0.95
DAY_H: Final = 24.0
NEAR_FACTOR: Final = 1.5
"""A ranking that changes within this factor of what was planned for is near."""
FULL_RATIO: Final = 0.7
"""Share of the GPUs that the busiest hour's bare work may fill before queues, not work, decide."""


@dataclass(frozen=True, slots=True)
class Risk:
    """One way in which the plan may be wrong."""

    what: str
    shown_by: str
    """The figure behind it."""
    do: str


def headroom_words(row: TopologyRow) -> str:
    """How much of the fleet the work itself fills; the rest is for bursts, queues and the promise."""
    if (
        row.n_gpus is None
        or row.mean_load_gpus is None
        or row.peak_hour_load_gpus is None
        or row.peak_hour_load_gpus <= 0
    ):
        return ""
    spare = row.n_gpus / row.peak_hour_load_gpus - 1
    peak = f" and {row.peak_hour_load_gpus:.3g} in the busiest hour"
    if row.peak_hour_load_gpus <= row.mean_load_gpus * 1.001:  # traffic of an hour or less, or as level as one
        peak = "; no hour is busier than the others"
    return (
        f"The bare work keeps {row.mean_load_gpus:.3g} of {gpus_words(row.n_gpus)} busy on average{peak}: work alone would fill the fleet at "
        f"{spare:+.0%} traffic. Queues break the promise before that."
    )


def risks(plan: PlanRecord, roi: Roi | None) -> tuple[Risk, ...]:
    """The risks that this plan's figures show, those about the choice first; empty for a plan that recommends nothing."""
    if plan.recommended is None:
        return ()
    row = plan.row(plan.recommended)
    return (*_of_choice(plan), *_of_saving(roi), *_of_traffic(plan, row), *_of_numbers(plan, row))


def _of_choice(plan: PlanRecord) -> list[Risk]:
    found = []
    chosen = plan.selection
    if chosen is not None and chosen.probability_of_correct_selection < SURE_MIN:
        found.append(_other_allocation(plan, chosen))
    for flip in plan.flip_points:
        if flip.winner_until is None or not 1 / NEAR_FACTOR <= flip.winner_until <= NEAR_FACTOR:
            continue
        found.append(
            Risk(
                f"{flip.then or 'Another topology'} becomes cheaper if {flip.what} changes.",
                f"At ×{flip.winner_until:.2g} of what was planned for ({flip.simulated or flip.how}).",
                "Watch it, and plan again for that value before buying for long.",
            )
        )
    return found


def _other_allocation(plan: PlanRecord, selection: SelectionRecord) -> Risk:
    """What is unsure about the choice: whether a cheaper fleet would do, or whether the recommended one does."""
    own = selection.chosen
    nearest = max(doubt_rows(plan)[1:], key=lambda item: item[1].probability_meets_slo, default=None)
    if nearest is None or 1 - own.probability_meets_slo > nearest[1].probability_meets_slo:
        return Risk(
            "The recommended fleet may miss the promise.",
            f"It keeps it with probability {probability_words(own.probability_meets_slo)}, after {own.n_repetitions} repetitions.",
            "Simulate more repetitions (simulation.replications), or take one GPU more.",
        )
    words, row = nearest
    return Risk(
        "A cheaper fleet may keep the promise too.",
        f"{words}, {usd(own.cost_usd_per_month - row.cost_usd_per_month)} a month less, keeps it with probability "
        f"{probability_words(row.probability_meets_slo)} after {row.n_repetitions} repetitions.",
        "Simulate more repetitions (simulation.replications), or begin with the recommended fleet and take GPUs away while the promise holds.",
    )


def _of_saving(roi: Roi | None) -> list[Risk]:
    if roi is None or roi.returns is None:
        return []
    spread = roi.returns.spread
    if spread.saving_p05_usd_per_month > 0 and spread.probability_npv_positive > SURE_MIN:
        return []
    return [
        Risk(
            "The change may not pay.",
            f"The saving a month lies between {usd(spread.saving_p05_usd_per_month)} and {usd(spread.saving_p95_usd_per_month)} in 90 % of the "
            f"draws; the net present value between {usd(spread.npv_p05_usd)} and {usd(spread.npv_p95_usd)}.",
            "Replace the guesses among the assumptions that move it most (tornado) by your own figures.",
        )
    ]


def _of_traffic(plan: PlanRecord, row: TopologyRow) -> list[Risk]:
    found = []
    hours = plan.traffic.duration_s / 3600
    if hours < DAY_H:
        found.append(
            Risk(
                "A month is priced as if all of it looked like the traffic that was planned for.",
                f"That is {hours:.3g} h: nights, weekends and growth are not in it.",
                "Log a week and plan again; the months' cost may be lower, its peak higher.",
            )
        )
    low = row.slo_attainment_ratio.low
    if low is not None and low < plan.slo_attainment_ratio:
        found.append(
            Risk(
                "The promise is kept with little to spare.",
                f"In time: {share_words(row.slo_attainment_ratio)}, promised {100 * plan.slo_attainment_ratio:g} %.",
                "Plan with a stricter promise if breaking it is expensive.",
            )
        )
    if row.n_gpus and row.peak_hour_load_gpus and row.peak_hour_load_gpus > FULL_RATIO * row.n_gpus:
        found.append(
            Risk(
                "Little headroom in the busiest hour.",
                headroom_words(row),
                "Reorder in time, or autoscale where GPUs start fast enough.",
            )
        )
    return found


def _of_numbers(plan: PlanRecord, row: TopologyRow) -> list[Risk]:
    found = []
    for grade, said in (
        ("extrapolated", "lie outside the box in which they were measured"),
        ("assumed", "were not measured"),
    ):
        laws = by_grade(row.grades, (grade,))
        if laws:
            found.append(
                Risk(
                    f"{len(laws)} of the {len(row.grades)} latency laws behind the recommendation {said}.",
                    ", ".join(laws),
                    "Calibrate on your own GPUs, then plan again.",
                )
            )
    n_services = len(row.pools)
    if n_services > 1:
        found.append(
            Risk(
                "More services to run: a ControlNet pool that fails holds up every request that needs it.",
                f"{n_services} pools: {', '.join(pool.name for pool in row.pools)}; failures are not simulated in this plan.",
                "Operating cost is counted in the full cost; keep today's fleet up until the gate of each phase.",
            )
        )
    return found
