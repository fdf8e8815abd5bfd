"""The way from today's fleet to the recommendation in phases that can each be stopped: what runs, what it costs, what to watch.

Measure; carve out the add-ons that pay most; parallelise and tune (everything on the recommendation); autoscale. A phase that does
not pay stays in the list, with the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from engine.allocation import Allocation, Topology, to_json
from engine.policies.autoscale_settings import Autoscale
from planner.money.evidence import Evidence
from planner.plan_record import AbTestRow, Estimate, PhaseRow, PlanRecord
from planner.power import POWER, SHARES, SIGNIFICANCE, Group, detectable, group_of
from planner.replication import repetition_service, run_allocation, warmup_of
from planner.roadmap_runs import Fleets, Seen, choose_group, estimates, everything, hosting_only, only, together
from planner.simulator.allocated import gpu_hours
from planner.statistics import t_interval
from planner.traffic import build_traffic

NO_DIFFERENCE: Final = 0.05
"""A mean latency within 5 % promises nothing that users feel: then the test is that the share in time gets no worse."""
MARGIN_MIN: Final = 0.01
PEAK_TO_MEAN_MIN: Final = 1.5
AUTOSCALE_REPETITIONS: Final = 2
AUTOSCALE_REQUESTS_MAX: Final = 150_000
Progress = Callable[[str], None]
_NONE: Final = Estimate(mean=None, low=None, high=None)


def make_roadmap(
    evidence: Evidence, today_topology: Topology, today_gpus: int, progress: Progress = lambda text: None
) -> tuple[PhaseRow, ...]:
    """Sizes and simulates each phase; the result depends on the plan's inputs and today's fleet only."""
    plan = evidence.plan
    assert plan.recommended is not None  # noqa: S101 - there is no evidence without a recommendation
    per_gpu = plan.ids.price_usd_per_gpu_hour * plan.ids.hours_per_month
    progress(f"phase 1: {today_gpus} GPUs of {today_topology} as they are")
    today = Fleets(evidence, today_topology, everything)
    small = today.start()
    fleet = _of_size(today, small, today_gpus)
    before = today.run(fleet)
    first = _measure(plan, fleet, before, per_gpu)
    if today_topology == plan.recommended:
        gone = f"Today's fleet is {today_topology} already."
        second = _skipped(2, "carve out", gone, first)
    else:
        progress("phase 2: sizing a fleet for the add-ons that pay most")
        second = _carve_out(evidence, today, small, before, first, per_gpu)
    third = _whole(evidence, first, before, per_gpu)
    progress("phase 4: autoscaling")
    return first, second, third, _autoscale(evidence, third, per_gpu)


def _of_size(fleets: Fleets, small: Allocation, n_gpus: int) -> Allocation:
    from planner.diagnose_changes import resized

    tried = resized(small)(n_gpus) if n_gpus > small.n_gpus else (small,)
    latency_s = [float(np.mean(np.minimum(fleets.run(item)[0].latency_s, 1e9))) for item in tried]
    return tried[latency_s.index(min(latency_s))]


def _figures(plan: PlanRecord, seen: Sequence[Seen]) -> dict[str, Estimate]:
    p50, p95, attained = estimates(seen, plan.slo_latency_s, plan.confidence)
    return {"latency_p50_s": p50, "latency_p95_s": p95, "slo_attainment_ratio": attained}


def _plain(allocation: Allocation) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(to_json(allocation))
    return plain


def _promise(plan: PlanRecord) -> str:
    return f"{100 * plan.slo_attainment_ratio:g} % of the requests within {plan.slo_latency_s:g} s"


def _measure(plan: PlanRecord, fleet: Allocation, seen: Sequence[Seen], per_gpu: float) -> PhaseRow:
    return PhaseRow(
        number=1, name="measure", is_worthwhile=True,
        what="Change nothing. Log every request of a week, and calibrate on your own GPUs.",
        topology=None, allocation=None, n_gpus_new=0, n_gpus_today=fleet.n_gpus,
        cost_usd_per_month=fleet.n_gpus * per_gpu, **_figures(plan, seen),
        watch=("arrivals an hour and their peak", "steps, images, ControlNets and LoRAs of each request", "p50, p95 and share in time"),
        gate="The simulated p50 and p95 of today's fleet lie within 10 % of the logged ones (diffplan diagnose TRACE --log LOG); else "
        "calibrate again and plan again.",
        roll_back="Nothing to take back.", test=None,
    )  # fmt: skip


def _skipped(number: int, name: Any, why: str, before: PhaseRow) -> PhaseRow:
    return before.model_copy(
        update={
            "number": number, "name": name, "is_worthwhile": False, "what": why, "topology": None, "allocation": None,
            "watch": (), "gate": "None: go on with the next phase.", "roll_back": "Nothing to take back.", "test": None,
        }
    )  # fmt: skip


def _carve_out(
    evidence: Evidence, today: Fleets, small: Allocation, before: Sequence[Seen], first: PhaseRow, per_gpu: float
) -> PhaseRow:
    plan, scenario = evidence.plan, evidence.scenario
    topology = evidence.allocation.pools_of("base")[0].topology
    gain_s = today.gpu_seconds - Fleets(evidence, topology, everything, 1).gpu_seconds
    whole = build_traffic(scenario, evidence.folder, 0).workload
    group = choose_group(whole, gain_s)
    if group is None:
        return _skipped(2, "carve out", "No group of add-ons saves GPU time when it is served apart.", first)
    apart = Fleets(evidence, topology, group.mask)
    start = hosting_only(evidence.allocation, group.names) if group.names else evidence.allocation
    new = apart.fewest(start, scenario.search.gpus_max)
    others = Fleets(evidence, today.topology, lambda workload: ~group.mask(workload))
    old = others.fewest(small, max(first.n_gpus_today, small.n_gpus)) if _keeps(first, plan) else None
    if old is None and not _keeps(first, plan):  # no size of today's fleet keeps the promise: it shrinks with its work
        left = 1 - float(today.gpu_seconds[group.mask(whole)].sum() / today.gpu_seconds.sum())
        old = _of_size(others, small, max(small.n_gpus, math.ceil(left * first.n_gpus_today)))
    if new is None or old is None:
        return _skipped(
            2,
            "carve out",
            f"Serving {group.words} apart cannot keep the promise for both parts with as many GPUs as today.",
            first,
        )
    n_gpus = new.n_gpus + old.n_gpus
    share = (
        f"{group.request_ratio:.0%} of the requests, {group.gain_ratio:.0%} of the GPU time that the whole change saves"
    )
    if n_gpus > first.n_gpus_today:
        why = f"Serving {group.words} apart ({share}) would need {n_gpus} GPUs, today's fleet has {first.n_gpus_today}."
        return _skipped(2, "carve out", why, first)
    seen_new, seen_old = apart.run(new), others.run(old)
    masks = [
        group.mask(build_traffic(scenario, evidence.folder, repetition).workload) for repetition in range(len(before))
    ]
    return PhaseRow(
        number=2, name="carve out", is_worthwhile=True,
        what=f"Serve {group.words} ({share}) by {topology} on {new.n_gpus} GPUs; the rest stays on {old.n_gpus} of today's.",
        topology=topology, allocation=_plain(new), n_gpus_new=new.n_gpus, n_gpus_today=old.n_gpus,
        cost_usd_per_month=n_gpus * per_gpu, **_figures(plan, together(seen_new, seen_old)),
        watch=_watch(plan, topology), gate=_gate(plan), roll_back=_roll_back(plan),
        test=_test(plan, only(before, masks)[0], seen_new[0], new, whole.duration_s, group.request_ratio * len(whole)),
    )  # fmt: skip


def _keeps(phase: PhaseRow, plan: PlanRecord) -> bool:
    return (phase.slo_attainment_ratio.mean or 0.0) >= plan.slo_attainment_ratio


def _whole(evidence: Evidence, first: PhaseRow, before: Sequence[Seen], per_gpu: float) -> PhaseRow:
    plan = evidence.plan
    assert plan.recommended is not None  # noqa: S101 - as above
    row = plan.row(plan.recommended)
    allocation = evidence.allocation
    seen = Fleets(evidence, plan.recommended, everything, 1).run(allocation)
    is_same = first.n_gpus_today == allocation.n_gpus
    saves = allocation.n_gpus < first.n_gpus_today
    faster = (row.latency_p95_s.mean or 0.0) < (first.latency_p95_s.mean or math.inf) * (1 - NO_DIFFERENCE)
    broken = not _keeps(first, plan)
    worthwhile = saves or broken
    what = f"Serve everything by {plan.recommended} on {allocation.n_gpus} GPUs."
    if not worthwhile:
        why = (
            "as many GPUs as today" if is_same else f"{allocation.n_gpus} GPUs, today's fleet has {first.n_gpus_today}"
        )
        felt = " It is faster; whether that is worth the effort, only a value curve can say." if faster else ""
        what = f"Serving everything by {plan.recommended} takes {why}: no money is saved.{felt}"
    return PhaseRow(
        number=3, name="parallelise and tune", is_worthwhile=worthwhile, what=what, topology=plan.recommended,
        allocation=plan.allocation, n_gpus_new=allocation.n_gpus, n_gpus_today=0,
        cost_usd_per_month=row.cost_usd_per_month, latency_p50_s=row.latency_p50_s, latency_p95_s=row.latency_p95_s,
        slo_attainment_ratio=row.slo_attainment_ratio, watch=_watch(plan, plan.recommended), gate=_gate(plan),
        roll_back=_roll_back(plan),
        test=_test(plan, before[0], seen[0], allocation, evidence.workload.duration_s, len(evidence.workload))
        if worthwhile
        else None,
    )  # fmt: skip


def _autoscale(evidence: Evidence, third: PhaseRow, per_gpu: float) -> PhaseRow:
    """Base replicas between the mean load's and the plan's."""
    plan, scenario = evidence.plan, evidence.scenario
    assert plan.recommended is not None  # noqa: S101 - as above
    row = plan.row(plan.recommended)
    base = evidence.allocation.pools_of("base")[0]
    mean, peak = row.mean_load_gpus or 0.0, row.peak_hour_load_gpus or 0.0
    if any(pool.autoscale is not None for pool in evidence.allocation.pools):
        return _skipped(4, "autoscale", "The recommendation scales by itself already.", third)
    if base.n_replicas < 2 or mean <= 0 or peak < PEAK_TO_MEAN_MIN * mean:
        why = (
            f"The busiest hour asks for {peak:.2g} GPUs, the mean for {mean:.2g}, and the base pool has {base.n_replicas}: there is "
            "nothing to switch off, or the traffic planned for is too short to show it."
        )
        return _skipped(4, "autoscale", why, third)
    if len(evidence.workload) > AUTOSCALE_REQUESTS_MAX:
        return _skipped(
            4,
            "autoscale",
            f"Not simulated: more than {AUTOSCALE_REQUESTS_MAX} requests. Cut the window to try it.",
            third,
        )
    low = max(1, min(base.n_replicas - 1, math.ceil(mean)))
    scaled = Autoscale(max_replicas=base.n_replicas, min_replicas=low)
    pools = tuple(
        replace(pool, n_replicas=low, autoscale=scaled) if pool is base else pool for pool in evidence.allocation.pools
    )
    allocation = replace(evidence.allocation, pools=pools)
    seen, gpus = [], []
    for repetition in range(AUTOSCALE_REPETITIONS):
        workload = build_traffic(scenario, evidence.folder, repetition).workload
        service = repetition_service(scenario, evidence.inputs, workload, plan.recommended, repetition)
        run = run_allocation(scenario, evidence.inputs, workload, allocation, service, repetition)
        frame = run.result.requests
        is_done = (frame["status"] == "done").to_numpy(dtype=np.bool_)
        latency_s = np.where(is_done, frame["latency_s"].to_numpy(dtype=np.float64, na_value=np.nan), np.inf)
        counts = frame["arrival_s"].to_numpy(dtype=np.float64) >= warmup_of(scenario, workload)
        seen.append(Seen(np.flatnonzero(counts), latency_s[counts]))
        gpus.append(sum(gpu_hours(run.result.workers, 0.0, workload.duration_s).values()) * 3600 / workload.duration_s)
    mean_gpus = t_interval(gpus).mean
    figures = _figures(plan, seen)
    attained = figures["slo_attainment_ratio"].mean or 0.0
    is_kept = attained >= plan.slo_attainment_ratio
    words = f"between {low} and {base.n_replicas} base replicas, {mean_gpus:.1f} GPUs on average"
    what = f"Scale the base pool {words}."
    if not is_kept:
        what = f"Scaling the base pool {words}, keeps only {attained:.2%} in time: new replicas come too late. Stay with phase 3."
    return PhaseRow(
        number=4, name="autoscale", is_worthwhile=is_kept and mean_gpus < evidence.allocation.n_gpus, what=what,
        topology=plan.recommended, allocation=_plain(allocation), n_gpus_new=evidence.allocation.n_gpus, n_gpus_today=0,
        cost_usd_per_month=mean_gpus * per_gpu, **figures,
        watch=("replicas against demand", "seconds from the decision to the first image of a new replica", *_watch(plan, plan.recommended)),
        gate=_gate(plan), roll_back=f"Fix the base pool at {base.n_replicas} replicas: diffplan engine apply with phase 3's allocation.",
        test=None,
    )  # fmt: skip


def _watch(plan: PlanRecord, topology: str) -> tuple[str, ...]:
    shown = [
        f"share in time (promised: {_promise(plan)})",
        "p95 against the interval above",
        "waiting for a replica",
        "failed and rejected requests",
    ]
    if topology.startswith("decoupled"):
        shown.append("busy ratio of the ControlNet workers and waiting for them")
    return (*shown, "images against a fixed set of seeds")


def _gate(plan: PlanRecord) -> str:
    return f"The test ends without a broken guardrail (diffplan ab LOG_A LOG_B --slo-seconds {plan.slo_latency_s:g}), and the share in time lies in the interval above."


def _roll_back(plan: PlanRecord) -> str:
    return (
        f"Fewer than {100 * plan.slo_attainment_ratio:g} % in time over an hour, more failures than before, or images that differ: send all "
        "requests to today's fleet, which stays up until the gate."
    )


def _test(
    plan: PlanRecord, old: Seen, new: Seen, allocation: Allocation, duration_s: float, n_requests: float
) -> AbTestRow | None:
    """Of the mean latency where a difference is promised, else that the share in time gets no worse."""
    per_h = n_requests / duration_s * 3600
    smallest = len(allocation.pools) / allocation.n_gpus  # a test needs whole GPUs: one a pool
    shares = [share for share in SHARES if share >= smallest] or [SHARES[-1]]
    a, b = group_of(old.latency_s[np.isfinite(old.latency_s)]), group_of(new.latency_s[np.isfinite(new.latency_s)])
    difference, figure, one_sided = b.mean - a.mean, "mean latency", False
    if abs(difference) < NO_DIFFERENCE * a.mean:
        figure, one_sided = "share in time", True
        difference = -max(MARGIN_MIN, (1 - plan.slo_attainment_ratio) / 2)
        a, b = (_ratio_group(plan, seen) for seen in (old, new))
    size = detectable(a, b, difference, per_h, is_one_sided=one_sided, shares=shares)
    if size is None:
        return None
    return AbTestRow(
        figure=figure, promised_difference=difference, is_no_worse_test=one_sided, share_ratio=size.share_ratio,
        duration_h=size.duration_h, n_requests_new=size.n_new, n_requests_old=size.n_old, significance=SIGNIFICANCE, power=POWER,
        design_effect=max(a.design_effect, b.design_effect),
    )  # fmt: skip


def _ratio_group(plan: PlanRecord, seen: Seen) -> Group:
    held = group_of((seen.latency_s <= plan.slo_latency_s).astype(np.float64))
    promised = plan.slo_attainment_ratio * (1 - plan.slo_attainment_ratio)
    return Group(held.mean, max(held.variance, promised), held.design_effect)
