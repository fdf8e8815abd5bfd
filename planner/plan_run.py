"""From a scenario to a plan: search every topology, confirm each one's best over repetitions, decide, price, explain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import joblib

from engine.allocation import Allocation, Topology
from engine.policies.autoscale_settings import Autoscale
from planner import __version__
from planner.addon_placement import busiest_controlnets, place_otherwise, words_of_stretch
from planner.addon_rows import add_ons_record
from planner.agreement import RELATIVE_MAX, Agreement, check_allocation, check_run
from planner.autoscaled import candidates_of, decide, screen_tasks, why_not
from planner.checkpoint_placement import busiest_checkpoints, checkpoints_record, place_checkpoint
from planner.confirmation import Contender, Pace, Progress, searched, start_search
from planner.decision_record import (
    AddOnsRecord,
    AutoscalingRecord,
    CheckpointsRecord,
    PlacedRow,
    PurchasingRecord,
    SettingsRecord,
)
from planner.evaluation import repetition_bench
from planner.evidence import alternative_rows, selection_record, traffic_record
from planner.explain import limited_by, note_lines, plan_sentence
from planner.flip_check import check_nearest
from planner.flips import WORKERS_PRICE, flip_points, rival_of
from planner.kind_rows import (
    NOT_ON_TWO_KINDS,
    assumed_sentence,
)
from planner.kinds import lenses_of
from planner.nearest import nearest_feasible, plain_allocation
from planner.plan_fleet import FleetFound, cheapest_row, of_one_kind, of_several_kinds
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
from planner.prices import Price
from planner.purchasing import purchasing_record
from planner.replication import Inputs, Run, repeat_allocation
from planner.replication import scenario_price as scenario_price
from planner.run_store import RunStore
from planner.scenario import Scenario, scenario_sha256
from planner.traffic import Traffic, build_traffic, source_trace, variation_of
from planner.variations import settings_record, variations_of
from planner.variations import tasks as variation_tasks
from planner.waterfall import build_waterfall


@dataclass(frozen=True, slots=True, eq=False)
class PlanResult:
    """A plan with the logs behind it."""

    record: PlanRecord
    allocation: Allocation | None
    run: Run | None
    """The recommendation's first repetition."""
    price: Price
    scenario: Scenario | None = None
    """The question seen from the recommended GPU kind, which the plan's files go by; None: as it was asked."""


def make_plan(
    scenario: Scenario,
    folder: Path,
    *,
    jobs: int = 2,
    backend: str = "loky",
    progress: Progress = lambda text: None,
    store: Path | None = None,
) -> PlanResult:
    """Answers a scenario. An infeasible one is an answer too: its record says what binds.

    Args:
        folder: where the scenario's relative paths start.
        jobs: processes; the result depends on neither this nor the backend.
        store: a run store: what it holds is not simulated again, what is simulated goes into it at once. The result does not
            depend on it.

    Raises:
        InputError: something the scenario names cannot be used, or the store cannot.
    """
    if store is not None:
        RunStore(store).close()  # said before minutes of work, not after
    pace = Pace(jobs, backend, progress, store)
    lenses = lenses_of(scenario, folder)
    question = scenario
    if len(lenses) == 1:
        searching = start_search(
            scenario, folder, scenario.topologies, pace
        )  # the others read the trace meanwhile, too
    traffic = build_traffic(scenario, folder)
    hours = traffic.workload.duration_s / 3600
    n_requests = len(traffic.workload)
    if len(lenses) == 1:
        progress(f"{n_requests} requests over {hours:.2f} h; searching {len(scenario.topologies)} topologies")
        found = of_one_kind(
            scenario, folder, lenses[0], searched(searching, scenario.topologies, pace), n_requests, pace
        )
    else:
        n_kinds = sum(lens.inputs.workers is None for lens in lenses)
        progress(f"{n_requests} requests over {hours:.2f} h; searching {n_kinds} GPU kinds")
        found = of_several_kinds(scenario, folder, lenses, n_requests, pace)
    scenario, inputs, price = found.lens.scenario, found.lens.inputs, found.lens.price
    contenders, rows, settled = found.contenders, found.rows, found.settled
    winner = cheapest_row(rows.values())
    if winner is None or settled is None:
        infeasible = nearest_feasible(scenario, folder, contenders, price, pace)
        record = _record(question, folder, found, traffic, tuple(rows.values()), infeasible=infeasible)
        return PlanResult(record, None, None, price, found.asked)
    chosen = next(contender for contender in contenders if contender.search.topology == winner.topology)
    pace.progress("checking the winner and the runner-up with the SimPy model")
    topology, allocation = chosen.search.topology, chosen.allocation
    load = chosen.search.mean_load_gpus
    is_mixed = inputs.workers is not None
    fixed_why = NOT_ON_TWO_KINDS[1] if is_mixed else why_not(scenario, allocation, load, n_requests)
    settings = [] if fixed_why else candidates_of(scenario, allocation, load, n_requests)
    shape, counts = chosen.search.shape, chosen.counts
    assert shape is not None  # noqa: S101  a chosen contender has both
    assert counts is not None  # noqa: S101
    others = [] if is_mixed else variations_of(scenario, folder, topology, traffic.workload)
    names = [] if is_mixed else busiest_controlnets(scenario, folder, chosen.search.shape)
    checkpoints = [] if is_mixed else busiest_checkpoints(scenario, folder, shape, allocation.n_gpus)
    aside = _start_aside(
        scenario,
        folder,
        contenders,
        chosen,
        settings,
        names,
        price,
        pace,
        [
            *variation_tasks(others, folder, topology, shape, counts, pace.store),
            *(
                joblib.delayed(place_checkpoint)(
                    scenario, folder, shape, name, price.price_usd_per_gpu_hour, pace.store
                )
                for name in checkpoints
            ),
        ],
    )
    run = _first_run(scenario, folder, inputs, chosen)
    winner_check = check_run(repetition_bench(scenario, folder, topology, 0), allocation, run)
    runner_up_check, flips, *rest = aside
    flips = check_nearest(scenario, folder, flips, topology, n_requests, pace)
    placed, rest = dict(zip(names, rest, strict=False)), rest[len(names) :]
    screened, rest = rest[: len(settings)], rest[len(settings) :]
    varied, split = rest[: len(others)], rest[len(others) :]
    add_ons = None if is_mixed else _add_ons(scenario, folder, inputs, chosen, run, price, placed)
    autoscaling = decide(
        scenario, folder, topology, allocation, price.price_usd_per_gpu_hour, list(zip(settings, screened, strict=True)),
        fixed_why, pace,
    )  # fmt: skip
    if is_mixed:
        # the kinds' own prices say it better
        flips = tuple(flip for flip in flips if not flip.what.startswith(WORKERS_PRICE))
        autoscaling = autoscaling.model_copy(update={"fixed_cost_usd_per_month": winner.cost_usd_per_month})
    said = limited_by(scenario, chosen.allocation, run, chosen.search, chosen.counts or ())
    winner = winner.model_copy(update={"limited_by": said})
    rows[winner.topology] = winner
    purchasing = None if is_mixed else purchasing_record(scenario, folder, price, allocation, autoscaling)
    record = _record(
        question, folder, found, traffic, tuple(rows.values()), winner=winner, chosen=chosen,
        alternatives=alternative_rows(scenario, contenders, chosen, price),
        selection=selection_record(
            scenario, settled, winner, tuple(rows.values()), price, _checked_by(winner_check, runner_up_check)
        ),
        flips=(*flips, *found.flips),
        autoscaling=autoscaling, add_ons=add_ons, purchasing=purchasing,
        checkpoints=checkpoints_record(split, words_of_stretch(n_requests)),
        settings=settings_record(scenario, folder, others, varied, price, n_requests) if others else None,
    )  # fmt: skip
    return PlanResult(record, chosen.allocation, run, price, found.asked)


def _record(
    question: Scenario,
    folder: Path,
    found: FleetFound,
    traffic: Traffic,
    rows: tuple[TopologyRow, ...],
    *,
    winner: TopologyRow | None = None,
    chosen: Contender | None = None,
    alternatives: tuple[AlternativeRow, ...] = (),
    infeasible: Infeasible | None = None,
    selection: SelectionRecord | None = None,
    flips: tuple[FlipPoint, ...] = (),
    autoscaling: AutoscalingRecord | None = None,
    add_ons: AddOnsRecord | None = None,
    settings: SettingsRecord | None = None,
    purchasing: PurchasingRecord | None = None,
    checkpoints: CheckpointsRecord | None = None,
) -> PlanRecord:
    scenario, inputs = found.asked, found.lens.inputs
    waterfall = _waterfall(rows, winner) if winner is not None else None
    said = [
        plan_sentence(scenario, winner, rows, waterfall, infeasible),
        found.kinds.sentence if found.kinds is not None else "",
        assumed_sentence(found.lens.assumed_kinds),
    ]
    notes = note_lines(scenario, inputs, traffic, variation_of(scenario, source_trace(scenario, folder).duration_s))
    return PlanRecord(
        verdict="recommended" if winner is not None else "infeasible",
        sentence=" ".join(part for part in said if part),
        recommended=winner.topology if winner is not None else None,
        slo_latency_s=scenario.slo.latency_s,
        slo_attainment_ratio=scenario.slo.attainment_ratio,
        confidence=scenario.slo.confidence,
        n_replications=scenario.simulation.replications,
        allocation=plain_allocation(chosen.allocation) if chosen is not None else None,
        topologies=rows,
        runner_up=found.runner_up,
        alternatives=alternatives,
        limited_by=winner.limited_by if winner is not None else (infeasible.binds if infeasible else ""),
        waterfall=waterfall,
        infeasible=infeasible,
        traffic=traffic_record(scenario, traffic),
        ids=_ids(question, found, traffic),
        notes=(*notes, *(found.kinds.not_looked_at if found.kinds is not None else ())),
        selection=selection,
        flip_points=flips,
        autoscaling=autoscaling,
        add_ons=add_ons,
        settings=settings,
        purchasing=purchasing,
        checkpoints=checkpoints,
        kinds=found.kinds,
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


def _first_run(scenario: Scenario, folder: Path, inputs: Inputs, chosen: Contender) -> Run:
    workload = build_traffic(scenario, folder, 0).workload
    return repeat_allocation(scenario, inputs, workload, chosen.search.topology, chosen.allocation, 0)


def _start_aside(
    scenario: Scenario,
    folder: Path,
    contenders: Sequence[Contender],
    chosen: Contender,
    settings: Sequence[Autoscale],
    names: Sequence[str],
    price: Price,
    pace: Pace,
    more: Sequence[Any],
) -> Iterator[Any]:
    """What other processes do while the SimPy model runs the winner.

    They check the runner-up, find flip points, place each of the ControlNets ``names`` otherwise, try autoscalers, and do ``more``.
    """
    confirmed = [one for one in contenders if one.is_confirmed]
    second = min((one for one in confirmed if one is not chosen), key=lambda one: one.cost, default=None)
    laws_of = {one.search.topology: tuple(one.search.grades) for one in confirmed}
    return pace.run([
        joblib.delayed(_check_runner_up)(
            scenario, folder, second.search.topology if second else None, second.allocation if second else None
        ),
        joblib.delayed(flip_points)(
            scenario, folder, [rival_of(one) for one in confirmed], laws_of, chosen.search.topology
        ),
        *(
            joblib.delayed(place_otherwise)(scenario, folder, chosen.search.shape, name, price.price_usd_per_gpu_hour, pace.store)
            for name in names
        ),
        *screen_tasks(scenario, folder, chosen.search.topology, chosen.allocation, settings, pace.store),
        *more,
    ])  # fmt: skip


def _add_ons(
    scenario: Scenario,
    folder: Path,
    inputs: Inputs,
    chosen: Contender,
    run: Run,
    price: Price,
    placed: dict[str, tuple[PlacedRow, ...]],
) -> AddOnsRecord | None:
    shape = chosen.search.shape
    assert shape is not None  # noqa: S101  a chosen contender has one
    bench = repetition_bench(scenario, folder, chosen.search.topology, 0)
    return add_ons_record(scenario, inputs, bench.workload, bench.service, shape, chosen.allocation, run, price, placed)


def _check_runner_up(
    scenario: Scenario, folder: Path, topology: Topology | None, allocation: Allocation | None
) -> Agreement | None:
    """Raises if the tiers disagree, which no plan survives; None if there is none, or only the SimPy model can run it."""
    if topology is None or allocation is None:
        return None
    return check_allocation(repetition_bench(scenario, folder, topology, 0), allocation)


def _checked_by(winner: Agreement | None, runner_up: Agreement | None) -> str:
    if winner is None:
        return "every run is the SimPy model's"
    said = f"winner ({winner.n_requests} requests)"
    said += f" and runner-up ({runner_up.n_requests} requests)" if runner_up is not None else ""
    return f"{said}: the SimPy model gives the same times to {RELATIVE_MAX:g}"


def _ids(question: Scenario, found: FleetFound, traffic: Traffic) -> Ids:
    scenario, inputs, price = found.asked, found.lens.inputs, found.lens.price
    return Ids(
        scenario_name=question.name,
        scenario_sha256=scenario_sha256(question),
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
