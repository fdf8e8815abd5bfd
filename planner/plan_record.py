"""The plan: what is recommended, on which evidence, for how much, and the ids that reproduce it. Plain JSON, read back strictly.

Nothing in it depends on the day, the machine or the number of processes: the same inputs give the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ValidationError

from engine.allocation import Allocation, Topology
from planner.decision_record import (
    AddOnsRecord,
    AutoscalingRecord,
    CheckpointsRecord,
    PurchasingRecord,
    SettingsRecord,
)
from planner.kind_record import KindsRecord
from planner.record_types import Estimate as Estimate
from planner.record_types import Number as Number
from planner.record_types import Record as _Record
from traces.problems import InputError, Problem, one_problem

SCHEMA_VERSION: Final = 1
FILE_BYTES_MAX: Final = 64 * 2**20
Verdict = Literal["meets_slo", "misses_slo", "infeasible"]


class PoolRow(_Record):
    """One pool of an allocation, and how busy it was."""

    name: str
    role: Literal["base", "controlnet"]
    n_replicas: int
    n_gpus: int
    hosts: tuple[str, ...]
    """ControlNets it hosts; ``*`` is whatever is asked for."""
    busy_ratio: Number
    loading_ratio: Number


class TopologyRow(_Record):
    """The best allocation found for one topology."""

    topology: Topology
    verdict: Verdict
    why: str
    """One sentence: what the verdict rests on."""
    shape: str
    pools: tuple[PoolRow, ...]
    n_gpus: int | None
    mean_load_gpus: Number
    """GPUs that the bare work keeps busy on average."""
    peak_hour_load_gpus: Number
    """The same in the busiest hour."""
    cost_usd_per_month: Number
    cost_usd_per_1000_images: Estimate
    in_slo_images_per_s: Estimate
    slo_attainment_ratio: Estimate
    latency_p50_s: Estimate
    latency_p95_s: Estimate
    latency_p99_s: Estimate
    plain_latency_p50_s: Estimate
    plain_latency_p99_s: Estimate
    """Requests without add-ons, which must not pay for those with."""
    queue_wait_mean_s: Estimate
    rejected_ratio: Number
    limited_by: str
    grades: dict[str, str]
    """Law to how well it is known: measured, interpolated, extrapolated or assumed."""


class AlternativeRow(_Record):
    """Another allocation whose cost is close, as seen in the search (one run, fitted profile)."""

    topology: Topology
    pools: dict[str, int]
    n_gpus: int
    cost_usd_per_month: float
    slo_attainment_ratio: float
    meets_slo_in_search: bool


class DoubtRow(_Record):
    """An allocation that was repeated to settle the choice: the choice itself, or a cheaper one."""

    topology: Topology
    pools: dict[str, int]
    n_gpus: int
    cost_usd_per_month: float
    slo_attainment_ratio: Estimate
    n_repetitions: int
    probability_meets_slo: float


class SelectionRecord(_Record):
    """How sure the choice is."""

    probability_of_correct_selection: float
    """Lower bound on the probability that the choice meets the promise and no cheaper allocation that came near does."""
    chosen: DoubtRow
    cheaper: tuple[DoubtRow, ...]
    """Cheaper allocations that came near and do not hold."""
    runner_up_topology: Topology | None
    runner_up_gap_usd_per_month: Number
    """What the next best topology costs more."""
    checked_by: str
    """Which runs of the compiled tier the SimPy model confirmed, in words."""


class FlipPoint(_Record):
    """How far one thing may move, all else as planned, before another topology is cheaper."""

    what: str
    """``traffic``, ``price of ControlNet workers' GPUs``, or a law of the profile."""
    winner_until: Number
    """Factor at which the ranking changes; null if it does not within ``looked_from..looked_to``."""
    then: Topology | None
    """What is cheaper beyond it."""
    looked_from: float
    looked_to: float
    how: str
    """What the figure rests on."""
    simulated: str = ""
    """What a search just beyond the point found, for the nearest one; empty for the others, which are estimates."""
    is_confirmed: bool | None = None
    """Whether that search agrees; null where there was none."""
    then_kinds: str = ""
    """The GPU kinds of what is cheaper beyond it, in words; empty: the recommended one's."""


class StepRow(_Record):
    """One row of the saving waterfall."""

    topology: str
    what: str
    n_gpus: int | None
    cost_usd_per_month: Number
    saving_usd_per_month: Number
    note: str


class WaterfallRecord(_Record):
    """Where the saving comes from."""

    steps: tuple[StepRow, ...]
    baseline: str
    saving_usd_per_month: float
    saving_ratio: float


class Infeasible(_Record):
    """Why nothing is recommended."""

    binds: str
    why: str
    nearest: str
    """The nearest feasible plan, in words."""
    nearest_allocation: dict[str, Any] | None
    nearest_n_gpus: int | None
    nearest_cost_usd_per_month: Number


class TrafficRecord(_Record):
    """The traffic before and after scaling and cutting."""

    trace: str
    source: str
    scale_factor: float
    shift_law: str
    n_requests_before: int
    n_requests: int
    duration_s: float
    mean_per_s_before: float
    mean_per_s: float
    interarrival_cv_before: Number
    interarrival_cv: Number
    peak_to_mean_before: float
    peak_to_mean: float
    notes: tuple[str, ...]


class AbTestRow(_Record):
    """The smallest test on live traffic that would detect what a phase promises."""

    figure: str
    """What is compared: ``mean latency`` or ``share in time``."""
    promised_difference: float
    """New less old, seconds or share; for a phase that promises no difference, how much worse it may at most be."""
    is_no_worse_test: bool
    """Whether the test is for not being worse by more than that, rather than for a difference."""
    share_ratio: float
    """Of the requests that go to the new fleet."""
    duration_h: float
    n_requests_new: int
    n_requests_old: int
    significance: float
    power: float
    design_effect: float
    """Requests that carry as much information as one independent request: latencies in a queue resemble their neighbours."""


class PhaseRow(_Record):
    """One step of the way from today's fleet to the recommendation and beyond."""

    number: int
    name: Literal["measure", "carve out", "parallelise and tune", "autoscale"]
    is_worthwhile: bool
    what: str
    """What is done; why not, if it is not worthwhile."""
    topology: Topology | None
    allocation: dict[str, Any] | None
    """What the new fleet runs in this phase; None if nothing new runs."""
    n_gpus_new: int
    n_gpus_today: int
    """GPUs that go on as they run today."""
    cost_usd_per_month: Number
    """GPUs of both."""
    latency_p50_s: Estimate
    latency_p95_s: Estimate
    slo_attainment_ratio: Estimate
    watch: tuple[str, ...]
    gate: str
    """What must hold before the next phase."""
    roll_back: str
    """When to go back, and how."""
    test: AbTestRow | None


class Ids(_Record):
    """What reproduces the plan."""

    scenario_name: str
    scenario_sha256: str
    trace_digest: str
    profile_name: str
    profile_id: str
    profile_gpu_kind: str
    profile_raw_sha256: str
    price_table_id: str
    price_as_of: str
    price_source: str
    price_usd_per_gpu_hour: float
    purchase: str
    hours_per_month: float
    seed: int
    diffplan_version: str


class PlanRecord(_Record):
    """One plan."""

    schema_version: Literal[1] = 1
    verdict: Literal["recommended", "infeasible"]
    sentence: str
    """The answer in plain words."""
    recommended: Topology | None
    slo_latency_s: float
    slo_attainment_ratio: float
    confidence: float
    n_replications: int
    allocation: dict[str, Any] | None
    topologies: tuple[TopologyRow, ...]
    runner_up: str
    """The next best topology and its price gap; empty if there is none."""
    alternatives: tuple[AlternativeRow, ...]
    limited_by: str
    waterfall: WaterfallRecord | None
    infeasible: Infeasible | None
    traffic: TrafficRecord
    ids: Ids
    notes: tuple[str, ...]
    """What the numbers leave out or take for granted."""
    selection: SelectionRecord | None = None
    """None in an infeasible plan, and in plans written before there was one."""
    flip_points: tuple[FlipPoint, ...] = ()
    autoscaling: AutoscalingRecord | None = None
    """Fixed or scaling by itself; None in an infeasible plan, and in plans written before there was one."""
    add_ons: AddOnsRecord | None = None
    """Likewise; None also where the traffic has no add-ons."""
    settings: SettingsRecord | None = None
    """Likewise: other caches, links, batches and GPU kinds, one at a time."""
    checkpoints: CheckpointsRecord | None = None
    """Likewise; None also where there is one checkpoint, or one GPU."""
    purchasing: PurchasingRecord | None = None
    """Likewise: on demand, reserved and spot."""
    kinds: KindsRecord | None = None
    """The GPU kinds against each other; None where the scenario has one at hand. All else is about the recommended one."""
    roadmap: tuple[PhaseRow, ...] = ()
    """The phases of the introduction; empty until ``diffplan roi --into-plan`` writes them."""

    def row(self, topology: str) -> TopologyRow:
        """The row of a topology; raises KeyError if it did not compete."""
        for row in self.topologies:
            if row.topology == topology:
                return row
        raise KeyError(topology)


def paid_gpus(plan: PlanRecord, allocation: Allocation) -> float:
    """GPUs of an allocation at the plan's price: those of another kind and price count as many as cost the same."""
    if plan.kinds is None or len({pool.gpu_kind for pool in allocation.pools}) == 1:
        return allocation.n_gpus
    usd = sum(pool.n_gpus * plan.kinds.price_of(pool.gpu_kind) for pool in allocation.pools)
    return usd / plan.ids.price_usd_per_gpu_hour


def to_json(plan: PlanRecord) -> str:
    """Canonical JSON with a final newline."""
    plain = plan.model_dump(mode="json")
    if not plan.roadmap:  # so that plans without one keep their bytes
        del plain["roadmap"]
    for name in ("checkpoints", "purchasing", "kinds"):
        if plain[name] is None:
            del plain[name]
    for flip in plain["flip_points"]:
        if not flip["then_kinds"]:
            del flip["then_kinds"]
    return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_plan(path: Path) -> PlanRecord:
    """Reads ``plan.json``, or the folder that holds one; raises :class:`InputError` with every problem found."""
    path = path / "plan.json" if path.is_dir() else path
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise one_problem(str(path), f"is {path.stat().st_size} bytes", f"at most {FILE_BYTES_MAX}")
        plan = PlanRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise one_problem(
            str(path), f"cannot be read: {error}", "a plan.json, or the folder it is in", "Check the path"
        ) from None
    except ValidationError as error:
        problems = []
        for item in error.errors(include_url=False):
            field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"]).lstrip(".")
            problems.append(Problem(f"{path} {field}".rstrip(), item["msg"], "a plan written by 'diffplan plan'"))
        raise InputError(problems) from None
    competed = [row.topology for row in plan.topologies]
    if plan.recommended is not None and plan.recommended not in competed:
        raise one_problem(
            f"{path} recommended",
            f"got {plan.recommended!r}, which has no row in 'topologies'",
            "a plan written by 'diffplan plan'",
        )
    return plan


class InfeasibleError(Exception):
    """No allocation meets the scenario. Carries the plan that says what binds; the command exits with 3."""

    def __init__(self, plan: PlanRecord) -> None:
        super().__init__(plan.sentence)
        self.plan = plan
