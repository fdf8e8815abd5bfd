"""When nothing meets a scenario: what binds, and the nearest plan that would be feasible; never taken as the answer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from engine.allocation import Allocation, to_json
from planner.candidates import Misfit
from planner.confirmation import Contender, Pace, confirm_all, search_all
from planner.cost import cost_of
from planner.explain import PART_WORDS
from planner.plan_record import Infeasible
from planner.prices import Price
from planner.scenario import Scenario
from planner.search import QUEUE, one_more

GPUS_FACTOR: Final = 16
"""How far past ``search.gpus_max`` the nearest plan is looked for."""
RELAXED_MARGIN: Final = 1.10
"""The nearest feasible promise is searched 10 % above the bare service time: at the bare time itself nobody may ever wait."""


def nearest_feasible(
    scenario: Scenario, folder: Path, contenders: Sequence[Contender], price: Price, pace: Pace
) -> Infeasible:
    """Says what binds and looks for the nearest plan: more GPUs first, then a longer latency, then another device."""
    countable = [contender for contender in contenders if contender.search.misfit is None]
    if countable:
        return _with_more_gpus(scenario, folder, countable, price, pace)
    misfits = [(c.search.topology, c.search.misfit) for c in contenders if c.search.misfit is not None]
    slow = [(topology, item) for topology, item in misfits if item.attainable_latency_s is not None]
    if not slow:
        item: Misfit = misfits[0][1]
        return _infeasible(item.binds, item.why, item.nearest)
    topology, item = min(slow, key=lambda pair: pair[1].attainable_latency_s or 0.0)
    latency_s = round((item.attainable_latency_s or 0.0) * RELAXED_MARGIN, 2)
    relaxed = scenario.model_copy(update={"slo": scenario.slo.model_copy(update={"latency_s": latency_s})})
    pace.progress(f"no topology is fast enough even when idle; looking for the nearest plan, with {latency_s:g} s")
    found = search_all(relaxed, folder, [topology], pace)
    confirm_all(relaxed, folder, found, pace)
    allocation = found[0].allocation if found[0].is_confirmed else None
    if allocation is None:
        return _infeasible(item.binds, item.why, f"{item.nearest}, with {topology}")
    nearest = (
        f"slo.latency_s of {latency_s:g} s, which {allocation.n_gpus} GPUs as {topology} keep ({item.nearest} at all)"
    )
    return _infeasible(item.binds, item.why, nearest, allocation, scenario, price)


def _held_up(scenario: Scenario, countable: Sequence[Contender], price: Price) -> Infeasible | None:
    """If more GPUs are of no use because late requests wait for loads or sharing: that, and the latency that was kept."""
    seen = [(c.search.topology, shape, one) for c in countable for shape, one in c.search.looked_at]
    if not seen or any(contender.counts is not None for contender in countable):
        return None
    topology, shape, best = max(seen, key=lambda item: (item[2].attainment_ratio, -item[2].n_gpus))
    if best.lost_to == QUEUE or not math.isfinite(best.latency_at_target_s):
        return None
    words = PART_WORDS[best.lost_to]
    why = (
        f"more GPUs do not help: with {best.n_gpus} as {topology} {best.attainment_ratio:.2%} of the requests are in time, "
        f"and late ones lose most time {words}"
    )
    latency_s = math.ceil(100 * best.latency_at_target_s) / 100
    nearest = (
        f"slo.latency_s of {latency_s:g} s, which {best.n_gpus} GPUs as {topology} kept in the search; or a longer "
        "simulation.warmup_s, if these are the first loads into empty caches"
    )
    return _infeasible(words, why, nearest, shape.allocation(best.counts), scenario, price)


def _with_more_gpus(
    scenario: Scenario, folder: Path, countable: Sequence[Contender], price: Price, pace: Pace
) -> Infeasible:
    held_up = _held_up(scenario, countable, price)
    if held_up is not None:
        return held_up
    gpus_max = scenario.search.gpus_max
    stopped = [c for c in countable if c.counts is None or sum(one_more(c.counts, (1.0,) * len(c.counts))) > gpus_max]
    if not stopped:
        why = "; ".join(
            f"{c.search.topology} was enlarged to {c.allocation.n_gpus} GPUs and its interval still reaches under the target"
            for c in countable
        )
        return _infeasible("slo.attainment_ratio", why, "a lower slo.attainment_ratio, or more simulation.replications")
    limits = scenario.search.model_copy(update={"gpus_max": GPUS_FACTOR * gpus_max})
    larger = scenario.model_copy(update={"search": limits})
    pace.progress(f"nothing within {gpus_max} GPUs; looking for the nearest plan with more")
    found = search_all(larger, folder, [contender.search.topology for contender in stopped], pace)
    confirm_all(larger, folder, found, pace)
    why = f"no allocation of up to {gpus_max} GPUs meets the SLO"
    good = [contender for contender in found if contender.is_confirmed]
    if not good:
        return _infeasible("search.gpus_max", why, f"none was found within {GPUS_FACTOR * gpus_max} GPUs")
    best = min(good, key=lambda contender: contender.allocation.n_gpus)
    allocation = best.allocation
    nearest = f"search.gpus_max of {allocation.n_gpus}, as {best.search.topology}"
    return _infeasible("search.gpus_max", why, nearest, allocation, scenario, price)


def _infeasible(
    binds: str,
    why: str,
    nearest: str,
    allocation: Allocation | None = None,
    scenario: Scenario | None = None,
    price: Price | None = None,
) -> Infeasible:
    cost_usd = None
    if allocation is not None and scenario is not None and price is not None:
        hours = scenario.prices.hours_per_month
        cost_usd = cost_of(allocation.n_gpus, 0.0, price.price_usd_per_gpu_hour, hours).cost_usd_per_month
    return Infeasible(
        binds=binds,
        why=why,
        nearest=nearest,
        nearest_allocation=plain_allocation(allocation) if allocation is not None else None,
        nearest_n_gpus=allocation.n_gpus if allocation is not None else None,
        nearest_cost_usd_per_month=cost_usd,
    )


def plain_allocation(allocation: Allocation) -> dict[str, Any]:
    """The allocation as decoded JSON."""
    plain: dict[str, Any] = json.loads(to_json(allocation))
    return plain
