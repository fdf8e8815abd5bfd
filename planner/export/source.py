"""The plan to be exported, read and judged: an infeasible or stale one leaves only with ``--force``, and then says so everywhere."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibrate.profile import LatencyProfile
from calibrate.profile_file import load_profile, shipped_profiles
from engine.allocation import Allocation, allocation_from_plain
from planner.export.pods_figures import PodsCheck
from planner.export.provenance import Provenance
from planner.export.simulated import SimulatedFigures, read_simulated
from planner.plan_record import FILE_BYTES_MAX, SCHEMA_VERSION, PlanRecord, TopologyRow, paid_gpus, read_plan
from planner.prices import STALE_AFTER_DAYS
from traces.problems import InputError, Problem, one_problem


@dataclass(frozen=True, slots=True)
class Source:
    """One plan that may be exported."""

    plan: PlanRecord
    allocation: Allocation
    """The recommended one; of an infeasible plan the nearest feasible one."""
    cost_usd_per_month: float
    """As the plan states it for this allocation."""
    row: TopologyRow | None
    """What was simulated of the recommended topology; None for an infeasible plan."""
    provenance: Provenance
    simulated: SimulatedFigures | None = None
    """Of the run that the plan keeps beside it; None if there is none."""
    noise_ratio: tuple[float, float] | None = None
    """1 % and 99 % of a request's service time over its median, as calibrated; None if the plan's profile is not at hand."""
    in_place: str = ""
    """What is exported in place of the recommended fleet, as a sentence; empty: that fleet, or the nearest feasible one."""

    @property
    def sentence(self) -> str:
        """What this export is, in a sentence."""
        return self.in_place or self.plan.sentence


def load_source(
    path: Path,
    command: str,
    today: datetime.date,
    *,
    is_forced: bool = False,
    profile: Path | None = None,
    phase: int | None = None,
    is_autoscaled: bool = False,
) -> Source:
    """Reads a plan and decides whether it may be exported.

    Args:
        path: ``plan.json`` or the folder that holds it.
        command: Written into every file.
        today: Decides whether the prices are stale; no file depends on it otherwise.
        is_forced: Export an infeasible or stale plan all the same, with a warning in every file.
        profile: The profile that holds now; None: the shipped one of the plan's name, if there is one.
        phase: Of the plan's roadmap; what its new fleet runs. None: the recommendation.
        is_autoscaled: The plan's variant that scales by itself, in place of the fleet of fixed size.

    Raises:
        InputError: the plan cannot be read, was written by a newer diffplan, contradicts itself, has no such phase, or is
            infeasible or stale and ``is_forced`` is not given.
    """
    refuse_newer_schema(path)
    plan = read_plan(path)
    in_place = ""
    if is_autoscaled:
        allocation_plain, cost_usd_per_month, warnings, in_place = _of_autoscaling(plan, path)
    elif phase is not None:
        allocation_plain, cost_usd_per_month, warnings, in_place = _of_phase(plan, path, phase)
    else:
        allocation_plain, cost_usd_per_month, warnings = _chosen(plan, path)
    is_recommended = plan.recommended is not None and allocation_plain == plan.allocation
    held = _profile_now(plan, profile)
    warnings += _stale(plan, today, held)
    if warnings and not is_forced:
        raise InputError(
            [Problem(str(path), text, "a plan that holds", "Plan again, or export with --force") for text in warnings]
        )
    allocation = allocation_from_plain(allocation_plain, f"{path} allocation")
    _check_price(plan, allocation, cost_usd_per_month, path)
    ids = plan.ids
    provenance = Provenance(
        plan_id=_identity(path),
        scenario_name=ids.scenario_name,
        profile_name=Path(ids.profile_name).name,  # a file's folder is a matter of the machine that planned
        profile_id=ids.profile_id,
        price_table_id=ids.price_table_id,
        price_as_of=ids.price_as_of,
        price_usd_per_gpu_hour=ids.price_usd_per_gpu_hour,
        purchase=ids.purchase,
        command=command,
        diffplan_version=ids.diffplan_version,
        warnings=tuple(f"exported with --force: {text}" for text in warnings),
    )
    row = plan.row(plan.recommended) if plan.recommended is not None and is_recommended else None
    return Source(
        plan, allocation, cost_usd_per_month, row, provenance,
        read_simulated(path) if row is not None else None, _noise(plan, held), in_place,
    )  # fmt: skip


def grown(source: Source, pods: PodsCheck | None, why_unchecked: str) -> tuple[Source, PodsCheck]:
    """The source with the fleet that keeps the promise as exported; as it is, if the plan's own does.

    Raises:
        InputError: the pods were not simulated, or no fleet within reach keeps the promise.
    """
    if pods is None:
        raise one_problem("--grow", why_unchecked or "has nothing to go by", "a plan that can be simulated")
    if pods.is_kept:
        return source, pods
    if pods.proposal is None:
        raise one_problem(
            "--grow", "finds no fleet of up to twice the replicas that keeps the promise as exported", "one that does",
            "Name a balancer in the cluster file, or larger nodes",
        )  # fmt: skip
    found = pods.proposal
    ids = source.plan.ids
    cost = found.figures.mean_gpus * ids.price_usd_per_gpu_hour * ids.hours_per_month
    text = (
        f"grown: {found.figures.mean_gpus:g} GPUs in place of the plan's {pods.exported.mean_gpus:g}, which would not keep the promise "
        "with a queue on each node; expected figures and thresholds are the plan's"
    )
    provenance = dataclasses.replace(source.provenance, warnings=(*source.provenance.warnings, text))
    larger = dataclasses.replace(source, allocation=found.allocation, cost_usd_per_month=cost, provenance=provenance)
    check = dataclasses.replace(
        pods, exported=found.figures, by_lot=None, proposal=None, grown_from=pods.exported.mean_gpus
    )
    return larger, check


def _check_price(plan: PlanRecord, allocation: Allocation, cost_usd_per_month: float, path: Path) -> None:
    """A plan has one price, and its cost is its GPUs at that price, except where GPUs are only paid for while they are needed."""
    kinds = sorted({pool.gpu_kind for pool in allocation.pools})
    priced_kinds = {kind.gpu_kind for kind in plan.kinds.kinds} if plan.kinds is not None else set()
    if len(kinds) > 1 and not priced_kinds >= set(kinds):
        raise one_problem(
            str(path),
            f"uses {len(kinds)} GPU kinds and states one price",
            "one GPU kind",
            "Export a plan for each kind",
        )
    if any(pool.autoscale is not None for pool in allocation.pools):
        return
    priced = paid_gpus(plan, allocation) * plan.ids.price_usd_per_gpu_hour * plan.ids.hours_per_month
    if abs(priced - cost_usd_per_month) > 0.01:  # a cent: both are the same product, rounded differently at most
        raise one_problem(
            str(path),
            f"says {cost_usd_per_month:.2f} USD a month, its {allocation.n_gpus} GPUs cost {priced:.2f}",
            "a plan as 'diffplan plan' wrote it",
            "Plan again",
        )


def _chosen(plan: PlanRecord, path: Path) -> tuple[dict[str, Any], float, list[str]]:
    if plan.verdict == "recommended":
        if plan.allocation is None or plan.recommended is None:
            raise one_problem(f"{path} allocation", "is missing", "the recommended allocation", "Plan again")
        cost = plan.row(plan.recommended).cost_usd_per_month
        if cost is None:
            raise one_problem(f"{path} topologies", "give the recommended one no cost", "a cost", "Plan again")
        return plan.allocation, cost, []
    nearest = plan.infeasible
    if nearest is None or nearest.nearest_allocation is None or nearest.nearest_cost_usd_per_month is None:
        raise one_problem(
            str(path), "is infeasible and names no nearest allocation", "a plan with an allocation",
            "Relax the promise or the limits in the scenario and plan again",
        )  # fmt: skip
    text = f"the plan is infeasible ({nearest.binds}: {nearest.why}); this is the nearest allocation: {nearest.nearest}"
    return nearest.nearest_allocation, nearest.nearest_cost_usd_per_month, [text]


def _of_autoscaling(plan: PlanRecord, path: Path) -> tuple[dict[str, Any], float, list[str], str]:
    """The fleet that scales by itself, with the settings that were simulated, at its simulated GPU-hours."""
    found = plan.autoscaling
    if found is None or found.chosen is None or found.allocation is None or found.chosen.cost_usd_per_month is None:
        why = "is asked of a plan without an autoscaled variant" + (f": {found.why}" if found is not None else "")
        raise one_problem(f"{path} --autoscaled", why, "a plan that has one", "Leave --autoscaled out, or plan again")
    warnings = [] if found.verdict == "autoscale" else [f"the plan does not recommend to autoscale: {found.why}"]
    row, cost_usd_per_month = found.chosen, found.chosen.cost_usd_per_month
    sentence = (
        f"The plan's variant that scales by itself: {row.min_replicas} to {row.max_replicas} base replicas at "
        f"${cost_usd_per_month:,.0f} a month in the mean."
    )
    return found.allocation, cost_usd_per_month, warnings, sentence


def _identity(path: Path) -> str:
    """SHA-256 of the plan as it is in its file, without the roadmap that is written into it later.

    Of the file's values, not of the record: a later diffplan that knows more fields gives the same plan the same id.
    """
    file = path / "plan.json" if path.is_dir() else path
    plain = json.loads(file.read_text(encoding="utf-8"))  # it has just been read as a plan, within its limits
    plain.pop("roadmap", None)
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _of_phase(plan: PlanRecord, path: Path, number: int) -> tuple[dict[str, Any], float, list[str], str]:
    """What the new fleet of a phase runs, at the plan's price; today's fleet goes on beside it and is not exported."""
    found = {phase.number: phase for phase in plan.roadmap}
    where = f"--phase {number}"
    if not found:
        raise one_problem(
            where, f"is asked of {path}, a plan without a roadmap", "a plan that has one",
            "Write one with: diffplan roi PLAN --into-plan",
        )  # fmt: skip
    if number not in found:
        raise one_problem(where, "is not in the roadmap", f"one of {', '.join(map(str, sorted(found)))}")
    phase = found[number]
    if phase.allocation is None:
        raise one_problem(where, f"runs nothing new ({phase.what.rstrip('.')})", "a phase with a new fleet")
    warnings = [] if phase.is_worthwhile else [f"phase {number} of its roadmap is not worthwhile: {phase.what}"]
    per_gpu = plan.ids.price_usd_per_gpu_hour * plan.ids.hours_per_month
    is_scaled = any(pool.get("autoscale") for pool in phase.allocation["pools"])
    cost = phase.cost_usd_per_month if is_scaled else phase.n_gpus_new * per_gpu
    return phase.allocation, cost or 0.0, warnings, f"Phase {number} of the plan's roadmap, {phase.name}: {phase.what}"


def _profile_now(plan: PlanRecord, profile: Path | None) -> LatencyProfile | None:
    """The profile that holds now: the one given, else the shipped one of that name, if there is one."""
    if profile is None and plan.ids.profile_name not in shipped_profiles():
        return None
    return load_profile(plan.ids.profile_name if profile is None else str(profile))


def _stale(plan: PlanRecord, today: datetime.date, held: LatencyProfile | None) -> list[str]:
    found = []
    ids = plan.ids
    if ids.price_as_of:
        try:
            as_of = datetime.date.fromisoformat(ids.price_as_of)
        except ValueError:
            raise one_problem("plan.json ids.price_as_of", f"got {ids.price_as_of!r:.40}", "YYYY-MM-DD") from None
        if (today - as_of).days > STALE_AFTER_DAYS:
            found.append(f"its prices are of {ids.price_as_of}, more than {STALE_AFTER_DAYS} days old")
    if held is not None and held.profile_id != ids.profile_id:
        found.append(
            f"its profile has drifted: planned with {ids.profile_name} {ids.profile_id}, now it is {held.profile_id}"
        )
    return found


def _noise(plan: PlanRecord, held: LatencyProfile | None) -> tuple[float, float] | None:
    if held is None or held.profile_id != plan.ids.profile_id or plan.recommended is None:
        return None
    stack = plan.recommended if plan.recommended in held.noise_ratio_quantiles else "engine"
    levels = held.noise_ratio_quantiles.get(stack)
    return (levels[0], levels[-1]) if levels else None


def refuse_newer_schema(path: Path) -> None:
    """Raises :class:`InputError` with one plain sentence for a plan of a newer schema; any other fault is left to the reader."""
    path = path / "plan.json" if path.is_dir() else path
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            return
        version = json.loads(path.read_text(encoding="utf-8")).get("schema_version")
    except (OSError, ValueError, AttributeError, RecursionError):
        return
    if type(version) is int and version > SCHEMA_VERSION:
        raise one_problem(
            str(path), f"was written by a newer diffplan (plan schema {version})", f"schema {SCHEMA_VERSION} or older",
            "Update diffplan, or plan again with this one",
        )  # fmt: skip
