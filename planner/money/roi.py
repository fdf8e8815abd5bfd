"""Return on a plan: full cost of every topology, the change from today as an investment, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from engine.allocation import TOPOLOGIES
from planner.attribution import Attribution
from planner.money.assumptions import Assumptions
from planner.money.evidence import Evidence, LoadRange, attribution_of, load_range, model_traffic, read_evidence
from planner.money.lines import CostLines, Fleet, ModelTraffic, cost_lines, migration_usd, price_usd_per_gpu_hour
from planner.money.returns import (
    Bought,
    Change,
    Side,
    Spread,
    Swing,
    break_even_traffic,
    buy,
    investment_usd,
    monte_carlo,
    neutral,
    npv_usd,
    payback_months,
    savings_usd,
    slack_ratio,
    tornado,
)
from planner.money.shares import Shares, divide
from planner.money.value import ValueLines, is_valued, value_lines
from planner.plan_record import PlanRecord, TopologyRow
from planner.waterfall import BASELINES, against_words
from traces.problems import one_problem

PARTS: Final = tuple(topology for topology, _ in BASELINES)
"""Rows whose part of a saving would be in the next row's, were they left out without a word."""


@dataclass(frozen=True, slots=True)
class Priced:
    """One topology in full."""

    topology: str
    n_gpus: int
    cost: CostLines
    value: ValueLines | None
    is_recommended: bool
    saving_usd_per_month: float | None
    """Against the priced row before it; None in the first."""
    against: str = ""
    """What it is compared with, and whose part is in its saving too (``planner.waterfall.against_words``)."""


@dataclass(frozen=True, slots=True)
class Returns:
    """The change from today's fleet to the recommendation."""

    today_topology: str
    today_gpus: int
    today_cost: CostLines
    saving_usd_per_month: float
    investment_usd: float
    npv_usd: float
    payback_months: float | None
    break_even_traffic_ratio: float | None
    tornado: tuple[Swing, ...]
    spread: Spread
    cumulative_usd: tuple[float, ...]
    """Undiscounted savings less the one-time cost, after 0, 1, … months; payback is where they reach zero."""

    @property
    def pays(self) -> bool:
        """Whether the change is more likely to pay than not; what the decision sentence and the roadmap go by."""
        return self.spread.saving_p95_usd_per_month > 0 and self.spread.probability_npv_positive >= 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Roi:
    """Everything that ``diffplan roi`` writes."""

    plan: PlanRecord
    assumptions: Assumptions
    evidence: Evidence | None
    price_usd_per_gpu_hour: float
    models: ModelTraffic | None
    waterfall: tuple[Priced, ...]
    returns: Returns | None
    bought: tuple[tuple[str, Bought], ...]
    load_ranges: tuple[tuple[str, LoadRange], ...]
    shares: Shares | None
    notes: tuple[str, ...]
    """What is left out, and why."""


@dataclass(frozen=True, slots=True, eq=False)
class Ground:
    """What a return rests on and no assumption changes: read once, asked with many assumptions."""

    plan: PlanRecord
    evidence: Evidence | None
    why_not: str
    """Why there is no evidence; empty if there is."""
    models: ModelTraffic | None
    attribution: Attribution | None


def read_ground(path: Path) -> Ground:
    """Reads a plan and what lies beside it; raises :class:`InputError` if it cannot be read or recommends nothing."""
    plan, evidence, why_not = read_evidence(path)
    if plan.recommended is None:
        raise one_problem(str(path), "recommends nothing, so it has no return", "a plan that recommends an allocation")
    if evidence is None:
        return Ground(plan, None, why_not, None, None)
    return ground_on(evidence)


def ground_on(evidence: Evidence) -> Ground:
    """What the return of a plan rests on, all of it at hand."""
    return Ground(evidence.plan, evidence, "", model_traffic(evidence), attribution_of(evidence))


def make_roi(path: Path, assumptions: Assumptions) -> Roi:
    """Works a plan's return out; nothing is simulated.

    Raises:
        InputError: the plan cannot be read or recommends nothing, or today's topology did not compete in it.
    """
    return roi_on(read_ground(path), assumptions)


def roi_on(ground: Ground, assumptions: Assumptions) -> Roi:
    """The return under these assumptions.

    Raises:
        InputError: today's topology did not compete in the plan, or its fleet has two GPU kinds.
    """
    plan, evidence, models = ground.plan, ground.evidence, ground.models
    if plan.kinds is not None and plan.kinds.is_mixed:
        raise one_problem(
            "plan", f"recommends a fleet on two GPU kinds ({plan.kinds.base_gpu_kind} and {plan.kinds.worker_gpu_kind})",
            "a fleet of one kind: a return is worked out with one price", "Plan without gpu.others; the plan itself prices both kinds",
        )  # fmt: skip
    notes = []
    if evidence is None:
        notes.append(f"Storage, egress and the division of the cost are left out: {ground.why_not}.")
    waterfall = _waterfall(plan, assumptions, models)
    new = next(row for row in waterfall if row.is_recommended)
    ranges = _load_ranges(plan, assumptions)
    returns = _returns(plan, assumptions, models, new, dict(ranges), notes)
    shares = divide(ground.attribution, new.cost) if ground.attribution is not None else None
    if models is not None:
        notes.append(
            "Loads that the records count are priced as if each came from the store: an upper bound. All topologies are taken to "
            "fetch as much as the recommendation."
        )
    if not is_valued(assumptions.value):
        notes.append("Lower latency earns nothing here: the value curves are off (assumptions: value).")
    return Roi(
        plan, assumptions, evidence, price_usd_per_gpu_hour(plan.ids, assumptions), models, waterfall, returns,
        _bought(plan, assumptions, plan.row(new.topology), notes), ranges, shares, tuple(notes),
    )  # fmt: skip


def _fleet(row: TopologyRow, n_gpus: int | None = None) -> Fleet:
    return Fleet(row.topology, n_gpus if n_gpus is not None else row.n_gpus or 0, max(1, len(row.pools)))


def _value(plan: PlanRecord, row: TopologyRow, assumptions: Assumptions) -> ValueLines | None:
    if not is_valued(assumptions.value):
        return None
    return value_lines(row, assumptions.value, plan.ids.hours_per_month)


def _waterfall(plan: PlanRecord, assumptions: Assumptions, models: ModelTraffic | None) -> tuple[Priced, ...]:
    """Stock, tuned, our engine, decoupled: those that keep the promise, so that no gain is credited to a later row."""
    found: list[Priced] = []
    skipped: list[str] = []
    rows = {row.topology: row for row in plan.topologies}
    for topology in TOPOLOGIES:  # the waterfall's order, whatever the scenario's
        row = rows.get(topology)
        if row is None or row.verdict != "meets_slo" or row.n_gpus is None:
            skipped += [topology] if topology in PARTS else []
            continue
        cost = cost_lines(_fleet(row), plan.ids, assumptions, models)
        saving = found[-1].cost.total_usd - cost.total_usd if found else None
        against = against_words(found[-1].topology, skipped) if found else ""
        is_new = topology == plan.recommended
        found.append(Priced(topology, row.n_gpus, cost, _value(plan, row, assumptions), is_new, saving, against))
        skipped = []
    return tuple(found)


def _returns(
    plan: PlanRecord,
    assumptions: Assumptions,
    models: ModelTraffic | None,
    new: Priced,
    ranges: dict[str, LoadRange],
    notes: list[str],
) -> Returns | None:
    today = assumptions.today
    baseline = today.topology or (plan.waterfall.baseline if plan.waterfall and plan.waterfall.baseline else None)
    rows = {row.topology: row for row in plan.topologies}
    if baseline is None or baseline not in rows:
        if today.topology is not None:
            raise one_problem(
                "assumptions today.topology", f"got {today.topology}", f"one that competed: {', '.join(rows)}"
            )
        notes.append("No other topology is priced, so there is no saving to state (assumptions: today).")
        return None
    row = rows[baseline]
    keeps = row.verdict == "meets_slo"
    n_gpus = today.n_gpus or (row.n_gpus if keeps else None)
    if n_gpus is None:
        notes.append(
            f"No fleet of {row.topology} keeps the promise, so there is no saving to state; give today.n_gpus if you run one."
        )
        return None
    if not keeps:
        notes.append(
            f"Today's {row.topology} does not keep the promise with any number of GPUs: part of what the plan costs buys that."
        )
    if today.n_gpus is None:
        notes.append(
            f"Today's fleet is not given: the fewest GPUs of {row.topology} that keep the promise stand for it (assumptions: today)."
        )
    fleet = _fleet(row, n_gpus)
    today_cost = cost_lines(fleet, plan.ids, assumptions, models)
    old_value = _value(plan, row, assumptions) if n_gpus == row.n_gpus else None
    if is_valued(assumptions.value) and old_value is None:
        notes.append("The latency of today's fleet is not in the plan, so the value of lower latency is left out.")
    new_value = new.value if old_value is not None else None
    change = Change(
        _side(today_cost, fleet, old_value, row), _side(new.cost, _fleet(plan.row(new.topology)), new_value, plan.row(new.topology)),
        0.0 if row.topology == new.topology else migration_usd(row.topology, new.topology, assumptions),
        0.0 if row.topology == new.topology else assumptions.migration.double_running_months,
        assumptions.horizon,
    )  # fmt: skip
    unsure = assumptions.uncertainty
    factors = {
        "traffic": unsure.traffic_ratio,
        "gpu_price": unsure.gpu_price_ratio,
        "operation": unsure.operation_ratio,
        "migration": unsure.migration_ratio,
        "gpu_time_new": (ranges[new.topology].low, ranges[new.topology].high),
    }
    if today.n_gpus is None:  # a fleet that is counted has no error
        factors["gpu_time_today"] = (ranges[row.topology].low, ranges[row.topology].high)
    one = neutral()
    cumulative = np.cumsum([-float(investment_usd(change, one)), *map(float, savings_usd(change, one))])
    return Returns(
        row.topology, n_gpus, today_cost, float(savings_usd(change, one)[0]), float(investment_usd(change, one)),
        float(npv_usd(change, one)), payback_months(change, one), break_even_traffic(change),
        tuple(tornado(change, factors)), monte_carlo(change, factors, unsure.n_draws, plan.ids.seed),
        tuple(cumulative.tolist()),
    )  # fmt: skip


def _side(cost: CostLines, fleet: Fleet, value: ValueLines | None, row: TopologyRow) -> Side:
    gpu_usd = cost.gpu_usd + cost.unused_host_gpu_usd
    return Side(
        fleet.n_gpus, fleet.n_services, gpu_usd / fleet.n_gpus, cost.operation_usd, cost.storage_usd,
        cost.egress_usd - (value.total_usd if value is not None else 0.0),
        slack_ratio(fleet.n_gpus, fleet.n_services, row.peak_hour_load_gpus),
    )  # fmt: skip


def _load_ranges(plan: PlanRecord, assumptions: Assumptions) -> tuple[tuple[str, LoadRange], ...]:
    unchecked = assumptions.uncertainty.unchecked_load_ratio
    return tuple((row.topology, load_range(plan.ids.profile_name, row.topology, unchecked)) for row in plan.topologies)


def _bought(
    plan: PlanRecord, assumptions: Assumptions, row: TopologyRow, notes: list[str]
) -> tuple[tuple[str, Bought], ...]:
    """All GPUs, and those beyond the mean load: the peak's."""
    own = assumptions.ownership
    if own.gpu_purchase_usd is None or own.hosting_usd_per_gpu_month is None:
        notes.append("Buying GPUs is not priced: give ownership.gpu_purchase_usd and hosting_usd_per_gpu_month.")
        return ()
    notes.append(
        "Buying is compared with renting the same GPUs all hours of the month. A fleet that scales by itself rents those beyond the mean "
        "load for fewer hours: buy them only if those are more than 'cheaper than renting above' says."
    )
    n_gpus = row.n_gpus or 0
    at_peak = max(0, n_gpus - max(1, round((row.mean_load_gpus or 0.0) + 0.5)))
    price = price_usd_per_gpu_hour(plan.ids, assumptions)
    return tuple(
        (
            words,
            buy(
                n, own.gpu_purchase_usd, own.hosting_usd_per_gpu_month, own.life_months, own.resale_ratio, price,
                plan.ids.hours_per_month, assumptions.horizon.discount_ratio_per_year,
            ),
        )
        for words, n in (("all GPUs", n_gpus), ("GPUs beyond the mean load", at_peak))
        if n
    )  # fmt: skip
