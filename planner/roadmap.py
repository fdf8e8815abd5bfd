"""The way from today's fleet to the recommendation in phases that can each be stopped: what runs, what it costs, what to watch.

Measure; carve out the add-ons that pay most; parallelise and tune (everything on the recommendation); autoscale. A phase that does
not pay stays in the list, with the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from engine.allocation import Allocation, Topology, allocation_from_plain, to_json
from planner.explain import gpus_words
from planner.money.evidence import Evidence
from planner.plan_record import AbTestRow, Estimate, PhaseRow, PlanRecord
from planner.power import POWER, SHARES, SIGNIFICANCE, Group, detectable, group_of
from planner.roadmap_runs import Fleets, Seen, choose_group, estimates, everything, hosting_only, only, together
from planner.traffic import build_traffic

NO_DIFFERENCE: Final = 0.05
"""A mean latency within 5 % promises nothing that users feel: then the test is that the share in time gets no worse."""
MARGIN_MIN: Final = 0.01
Progress = Callable[[str], None]
_NONE: Final = Estimate(mean=None, low=None, high=None)


def make_roadmap(
    evidence: Evidence,
    today_topology: Topology,
    today_gpus: int,
    progress: Progress = lambda text: None,
    *,
    pays: bool = True,
) -> tuple[PhaseRow, ...]:
    """Sizes and simulates each phase; the result depends on the plan's inputs, today's fleet and ``pays`` only.

    Args:
        pays: whether the whole change is more likely to pay than not (``planner.money.roi.Returns.pays``). If not, it is worthwhile only
            where today's fleet breaks the promise.
    """
    plan = evidence.plan
    assert plan.recommended is not None  # noqa: S101 - there is no evidence without a recommendation
    per_gpu = plan.ids.price_usd_per_gpu_hour * plan.ids.hours_per_month
    progress(f"phase 1: {gpus_words(today_gpus)} of {today_topology} as they are")
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
    third = _whole(evidence, first, before, pays=pays)
    progress("phase 4: autoscaling")
    return first, second, third, _autoscale(evidence, today_topology, third)


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
        why = f"Serving {group.words} apart ({share}) would need {gpus_words(n_gpus)}, today's fleet has {first.n_gpus_today}."
        return _skipped(2, "carve out", why, first)
    seen_new, seen_old = apart.run(new), others.run(old)
    masks = [
        group.mask(build_traffic(scenario, evidence.folder, repetition).workload) for repetition in range(len(before))
    ]
    return PhaseRow(
        number=2, name="carve out", is_worthwhile=True,
        what=f"Serve {group.words} ({share}) by {topology} on {gpus_words(new.n_gpus)}; the rest stays on {old.n_gpus} of today's.",
        topology=topology, allocation=_plain(new), n_gpus_new=new.n_gpus, n_gpus_today=old.n_gpus,
        cost_usd_per_month=n_gpus * per_gpu, **_figures(plan, together(seen_new, seen_old)),
        watch=_watch(plan, topology), gate=_gate(plan), roll_back=_roll_back(plan),
        test=_test(plan, only(before, masks)[0], seen_new[0], new, whole.duration_s, group.request_ratio * len(whole)),
    )  # fmt: skip


def _keeps(phase: PhaseRow, plan: PlanRecord) -> bool:
    return (phase.slo_attainment_ratio.mean or 0.0) >= plan.slo_attainment_ratio


def _whole(evidence: Evidence, first: PhaseRow, before: Sequence[Seen], *, pays: bool) -> PhaseRow:
    plan = evidence.plan
    assert plan.recommended is not None  # noqa: S101 - as above
    row = plan.row(plan.recommended)
    allocation = evidence.allocation
    seen = Fleets(evidence, plan.recommended, everything, 1).run(allocation)
    is_same = first.n_gpus_today == allocation.n_gpus
    saves = allocation.n_gpus < first.n_gpus_today
    faster = (row.latency_p95_s.mean or 0.0) < (first.latency_p95_s.mean or math.inf) * (1 - NO_DIFFERENCE)
    broken = not _keeps(first, plan)
    worthwhile = (saves and pays) or broken
    what = f"Serve everything by {plan.recommended} on {gpus_words(allocation.n_gpus)}."
    if not worthwhile:
        why = (
            "as many GPUs as today"
            if is_same
            else f"{gpus_words(allocation.n_gpus)}, today's fleet has {first.n_gpus_today}"
        )
        felt = " It is faster; whether that is worth the effort, only a value curve can say." if faster else ""
        saved = "no money is saved" if not saves else "what that saves does not pay for the change within the horizon"
        what = f"Serving everything by {plan.recommended} takes {why}: {saved}.{felt}"
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


def _autoscale(evidence: Evidence, today_topology: Topology, third: PhaseRow) -> PhaseRow:
    """What the plan itself found about scaling by demand; simulated again for its percentiles and its test."""
    plan = evidence.plan
    assert plan.recommended is not None  # noqa: S101 - as above
    if any(pool.autoscale is not None for pool in evidence.allocation.pools):
        return _skipped(4, "autoscale", "The recommendation scales by itself already.", third)
    found = plan.autoscaling
    if found is None:
        return _skipped(
            4, "autoscale", "The plan does not say whether scaling pays. Plan again with this version.", third
        )
    if found.chosen is None or found.allocation is None:
        return _skipped(4, "autoscale", found.why, third)
    if not third.is_worthwhile and today_topology != plan.recommended:
        without = f"{found.why} But that is {plan.recommended}, and phase 3 does not pay; {today_topology} scaling by itself is not simulated."
        return _skipped(4, "autoscale", without, third)
    chosen, allocation = found.chosen, allocation_from_plain(found.allocation, "autoscaling.allocation")
    seen = Fleets(evidence, plan.recommended, everything, chosen.n_repetitions).run(allocation)
    fixed = Fleets(evidence, plan.recommended, everything, 1).run(evidence.allocation)
    base = evidence.allocation.pools_of("base")[0]
    return PhaseRow(
        number=4, name="autoscale", is_worthwhile=True, what=found.why, topology=plan.recommended, allocation=found.allocation,
        n_gpus_new=evidence.allocation.n_gpus, n_gpus_today=0, cost_usd_per_month=chosen.cost_usd_per_month,
        **_figures(plan, seen),
        watch=("replicas against demand", "seconds from the decision to the first image of a new replica", *_watch(plan, plan.recommended)),
        gate=_gate(plan), roll_back=f"Fix the base pool at {base.n_replicas} replicas: diffplan engine apply with phase 3's allocation.",
        test=_test(
            plan, fixed[0], seen[0], evidence.allocation, evidence.workload.duration_s, len(evidence.workload), promises_less_cost=True
        ),
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
    plan: PlanRecord,
    old: Seen,
    new: Seen,
    allocation: Allocation,
    duration_s: float,
    n_requests: float,
    *,
    promises_less_cost: bool = False,
) -> AbTestRow | None:
    """Of the mean latency where a difference is promised, else that the share in time gets no worse."""
    per_h = n_requests / duration_s * 3600
    smallest = len(allocation.pools) / allocation.n_gpus  # a test needs whole GPUs: one a pool
    shares = [share for share in SHARES if share >= smallest] or [SHARES[-1]]
    a, b = group_of(old.latency_s[np.isfinite(old.latency_s)]), group_of(new.latency_s[np.isfinite(new.latency_s)])
    difference, figure, one_sided = b.mean - a.mean, "mean latency", False
    if promises_less_cost or abs(difference) < NO_DIFFERENCE * a.mean:
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
