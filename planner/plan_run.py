"""From a scenario to a plan: search every topology, confirm each one's best over repetitions, decide, price, explain."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from engine.allocation import Allocation
from planner import __version__
from planner.agreement import RELATIVE_MAX, check_allocation, check_run
from planner.confirmation import Contender, Pace, Progress, confirm_all, search_all
from planner.evaluation import Bench, repetition_bench
from planner.evidence import alternative_rows, selection_record, topology_row, traffic_record
from planner.explain import limited_by, note_lines, plan_sentence, runner_up_sentence
from planner.flips import flip_points
from planner.nearest import nearest_feasible, plain_allocation
from planner.plan_record import (
    AlternativeRow,
    FlipPoint,
    Ids,
    Infeasible,
    PlanRecord,
    SelectionRecord,
    StepRow,
    TopologyRow,
    WaterfallRecord,
)
from planner.prices import Price, find_price, shipped_tables
from planner.replication import Inputs, Run, load_inputs, repeat_allocation
from planner.scenario import Scenario, resolve, scenario_sha256
from planner.settling import settle
from planner.traffic import Traffic, build_traffic, source_trace, variation_of
from planner.waterfall import build_waterfall

SAME_COST_RATIO: Final = 0.005


@dataclass(frozen=True, slots=True, eq=False)
class PlanResult:
    """A plan with the logs behind it."""

    record: PlanRecord
    allocation: Allocation | None
    run: Run | None
    """The recommendation's first repetition."""
    price: Price


def make_plan(
    scenario: Scenario, folder: Path, *, jobs: int = 2, backend: str = "loky", progress: Progress = lambda text: None
) -> PlanResult:
    """Answers a scenario. An infeasible one is an answer too: its record says what binds.

    Args:
        folder: where the scenario's relative paths start.
        jobs: processes; the result depends on neither this nor the backend.

    Raises:
        InputError: something the scenario names cannot be used.
    """
    pace = Pace(jobs, backend, progress)
    inputs = load_inputs(scenario, folder)
    price = scenario_price(scenario, folder, inputs)
    traffic = build_traffic(scenario, folder)
    hours = traffic.workload.duration_s / 3600
    progress(f"{len(traffic.workload)} requests over {hours:.2f} h; searching {len(scenario.topologies)} topologies")
    contenders = search_all(scenario, folder, scenario.topologies, pace)
    confirm_all(scenario, folder, contenders, pace)
    settled = settle(scenario, folder, contenders, len(traffic.workload), pace)
    rows = {contender.search.topology: topology_row(scenario, contender, price) for contender in contenders}
    winner = _cheapest(rows.values())
    if winner is None or settled is None:
        infeasible = nearest_feasible(scenario, folder, contenders, price, pace)
        record = _record(scenario, folder, inputs, price, traffic, tuple(rows.values()), infeasible=infeasible)
        return PlanResult(record, None, None, price)
    chosen = next(contender for contender in contenders if contender.search.topology == winner.topology)
    run = _first_run(scenario, folder, inputs, chosen)
    pace.progress("checking the winner and the runner-up with the SimPy model")
    checked_by = _check_tiers(scenario, folder, contenders, chosen, run)
    said = limited_by(scenario, chosen.allocation, run, chosen.search, chosen.counts or ())
    winner = winner.model_copy(update={"limited_by": said})
    rows[winner.topology] = winner
    record = _record(
        scenario, folder, inputs, price, traffic, tuple(rows.values()), winner=winner, chosen=chosen,
        alternatives=alternative_rows(scenario, contenders, chosen, price),
        selection=selection_record(scenario, settled, winner, tuple(rows.values()), price, checked_by),
        flips=flip_points(scenario, inputs, traffic.workload, contenders, winner.topology),
    )  # fmt: skip
    return PlanResult(record, chosen.allocation, run, price)


def _record(
    scenario: Scenario,
    folder: Path,
    inputs: Inputs,
    price: Price,
    traffic: Traffic,
    rows: tuple[TopologyRow, ...],
    *,
    winner: TopologyRow | None = None,
    chosen: Contender | None = None,
    alternatives: tuple[AlternativeRow, ...] = (),
    infeasible: Infeasible | None = None,
    selection: SelectionRecord | None = None,
    flips: tuple[FlipPoint, ...] = (),
) -> PlanRecord:
    waterfall = _waterfall(rows, winner) if winner is not None else None
    return PlanRecord(
        verdict="recommended" if winner is not None else "infeasible",
        sentence=plan_sentence(scenario, winner, rows, waterfall, infeasible),
        recommended=winner.topology if winner is not None else None,
        slo_latency_s=scenario.slo.latency_s,
        slo_attainment_ratio=scenario.slo.attainment_ratio,
        confidence=scenario.slo.confidence,
        n_replications=scenario.simulation.replications,
        allocation=plain_allocation(chosen.allocation) if chosen is not None else None,
        topologies=rows,
        runner_up=runner_up_sentence(winner, rows),
        alternatives=alternatives,
        limited_by=winner.limited_by if winner is not None else (infeasible.binds if infeasible else ""),
        waterfall=waterfall,
        infeasible=infeasible,
        traffic=traffic_record(scenario, traffic),
        ids=_ids(scenario, inputs, price, traffic),
        notes=note_lines(scenario, inputs, traffic, variation_of(scenario, source_trace(scenario, folder).duration_s)),
        selection=selection,
        flip_points=flips,
    )


def _waterfall(rows: Iterable[TopologyRow], winner: TopologyRow) -> WaterfallRecord:
    costs: dict[str, tuple[int, float]] = {}
    missing: dict[str, str] = {}
    for row in rows:
        if row.verdict == "meets_slo" and row.n_gpus is not None and row.cost_usd_per_month is not None:
            costs[row.topology] = (row.n_gpus, row.cost_usd_per_month)
        else:
            missing[row.topology] = row.why
    built = build_waterfall(costs, missing, winner.topology, has_workers=len(winner.pools) > 1)
    return WaterfallRecord(
        steps=tuple(StepRow(**asdict(step)) for step in built.steps),
        baseline=built.baseline,
        saving_usd_per_month=built.saving_usd_per_month,
        saving_ratio=built.saving_ratio,
    )


def scenario_price(scenario: Scenario, folder: Path, inputs: Inputs) -> Price:
    """The price the scenario asks for; raises :class:`InputError` if there is none."""
    wanted = scenario.prices
    path = shipped_tables().get(wanted.table, resolve(wanted.table, folder))
    return find_price(path, inputs.gpu_kind, wanted.purchase, wanted.price_usd_per_gpu_hour)


def _cheapest(rows: Iterable[TopologyRow]) -> TopologyRow | None:
    """Least cost per in-SLO image. Equal cost (within half a per cent, as fleets of equal size differ by luck): the fewest
    pools, then p99 latency within 5 % of the least, then the scenario's order of topologies, plain ones first by default."""
    good = [row for row in rows if row.verdict == "meets_slo" and row.cost_usd_per_1000_images.mean is not None]
    if not good:
        return None
    least = min(row.cost_usd_per_1000_images.mean or 0.0 for row in good)
    close = [row for row in good if (row.cost_usd_per_1000_images.mean or 0.0) <= least * (1 + SAME_COST_RATIO)]
    n_pools = min(len(row.pools) for row in close)
    close = [row for row in close if len(row.pools) == n_pools]
    fastest_s = min(row.latency_p99_s.mean or 0.0 for row in close)
    return next(row for row in close if (row.latency_p99_s.mean or 0.0) <= 1.05 * fastest_s)


def _first_run(scenario: Scenario, folder: Path, inputs: Inputs, chosen: Contender) -> Run:
    workload = build_traffic(scenario, folder, 0).workload
    return repeat_allocation(scenario, inputs, workload, chosen.search.topology, chosen.allocation, 0)


def _check_tiers(scenario: Scenario, folder: Path, contenders: Iterable[Contender], chosen: Contender, run: Run) -> str:
    """Runs the runner-up on the SimPy model too; says what was compared. Raises if the tiers disagree, which no plan survives."""

    def bench(contender: Contender) -> Bench:
        return repetition_bench(scenario, folder, contender.search.topology, 0)

    agreement = check_run(bench(chosen), chosen.allocation, run)
    if agreement is None:
        return "every run is the SimPy model's"
    said = f"winner ({agreement.n_requests} requests)"
    others = [one for one in contenders if one.is_confirmed and one is not chosen]
    second = min(others, key=lambda one: one.allocation.n_gpus, default=None)
    if second is not None:
        other = check_allocation(bench(second), second.allocation)
        said += f" and runner-up ({other.n_requests} requests)" if other is not None else ""
    return f"{said}: the SimPy model gives the same times to {RELATIVE_MAX:g}"


def _ids(scenario: Scenario, inputs: Inputs, price: Price, traffic: Traffic) -> Ids:
    return Ids(
        scenario_name=scenario.name,
        scenario_sha256=scenario_sha256(scenario),
        trace_digest=traffic.digest,
        profile_name=scenario.profile.name,
        profile_id=inputs.profile.profile_id,
        profile_gpu_kind=inputs.profile.gpu_kind,
        profile_raw_sha256=inputs.profile.raw_sha256,
        price_table_id=price.table_id,
        price_as_of=price.as_of,
        price_source=price.source,
        price_usd_per_gpu_hour=price.price_usd_per_gpu_hour,
        purchase=price.purchase,
        hours_per_month=scenario.prices.hours_per_month,
        seed=scenario.simulation.seed,
        diffplan_version=__version__,
    )


def with_seed(scenario: Scenario, seed: int) -> Scenario:
    """The scenario with another simulation seed."""
    return scenario.model_copy(update={"simulation": scenario.simulation.model_copy(update={"seed": seed})})
