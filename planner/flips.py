"""Flip points: how far traffic, prices or one calibrated law may move, all else as planned, before another topology is cheaper.

Estimates from the confirmed sizes, not new simulations: they say what is worth a plan of its own. A size scales with the work
that a law's change causes (recomputed request by request); with traffic it follows square-root staffing (Halfin, Whitt 1981);
a topology drops out where the promised share of requests would take longer than the promise on an idle system.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from calibrate.profile import LatencyProfile
from engine.allocation import Topology
from planner.confirmation import Contender
from planner.plan_record import FlipPoint
from planner.replication import Inputs, load_inputs, service_table
from planner.scenario import Scenario
from planner.traffic import build_traffic, busiest_stretch, stream_seed
from traces.problems import InputError

TRAFFIC: Final = "traffic"
WORKERS_PRICE: Final = "price of ControlNet workers' GPUs against the others'"
LAW_RANGE: Final = (0.5, 2.0)
TRAFFIC_RANGE: Final = (0.1, 10.0)
PRICE_RANGE: Final = (0.1, 10.0)
TRAFFIC_STEP: Final = 1.05
STEADY_STEPS: Final = 3
"""A flip counts if it lasts this many steps: sizes are whole, so the order of near equals changes back and forth."""
BISECTIONS: Final = 7
GAP_GPUS: Final = 0.5
SAMPLE_MAX: Final = 4_000
"""Requests of the busiest stretch on which work is recomputed; a share of work needs no more."""
Sizes = dict[Topology, float]
"""GPUs of each topology; infinite where it cannot keep the promise."""


@dataclass(frozen=True, slots=True)
class Rival:
    """A confirmed topology."""

    topology: Topology
    n_base: int
    n_controlnet: float
    """Of another price than the bases': as many as cost the same at the bases'."""
    load_gpus: float
    """GPUs that its work keeps busy in the busiest hour."""

    @property
    def n_gpus(self) -> float:
        """All its GPUs."""
        return self.n_base + self.n_controlnet


def flip_points(
    scenario: Scenario,
    folder: Path,
    rivals: Sequence[Rival],
    laws_of: Mapping[Topology, Sequence[str]],
    winner: Topology,
) -> tuple[FlipPoint, ...]:
    """Flip points of a plan, those of traffic and price first, then laws by name; none if only one topology is confirmed.

    Args:
        laws_of: the laws that each topology's service times were predicted with.
    """
    if len(rivals) < 2:
        return ()
    rows = [*_traffic_flips(rivals, winner), *_price_flips(rivals, winner)]
    inputs = load_inputs(scenario, folder)
    workload = build_traffic(scenario, folder).workload
    part = busiest_stretch(workload, min(SAMPLE_MAX, len(workload)))
    seed = stream_seed(scenario.simulation.seed, "flips")

    def work_of(changed: Inputs, topology: Topology) -> float:
        try:
            table = service_table(scenario, changed, part, topology, draw=None, noise_seed=seed)
        except InputError:
            return math.inf
        floor_s = float(np.quantile(table.alone_s, scenario.slo.attainment_ratio, method="inverted_cdf"))
        return float((table.alone_s + table.controlnet_work_s).sum()) if floor_s <= scenario.slo.latency_s else math.inf

    before = {rival.topology: work_of(inputs, rival.topology) for rival in rivals}
    for name in sorted({law for rival in rivals for law in laws_of[rival.topology]}):

        def sizes_at(factor: float, name: str = name) -> Sizes:
            changed = with_law_scaled(inputs, name, factor)
            sizes: Sizes = {}
            for rival in rivals:
                own = before[rival.topology]
                is_moved = math.isfinite(own) and name in laws_of[rival.topology]
                ratio = work_of(changed, rival.topology) / own if is_moved else 1.0
                sizes[rival.topology] = rival.n_gpus * ratio if math.isfinite(own) else math.inf
            return sizes

        rows += _law_flips(name, sizes_at, winner)
    return tuple(rows)


def with_law_scaled(inputs: Inputs, name: str, factor: float) -> Inputs:
    """The inputs with one law's seconds multiplied, on every kind of GPU that has it."""
    workers = inputs.workers
    if workers is not None:
        workers = replace(workers, profile=_scaled(workers.profile, name, factor))
    return replace(inputs, profile=_scaled(inputs.profile, name, factor), workers=workers)


def _scaled(profile: LatencyProfile, name: str, factor: float) -> LatencyProfile:
    if name not in profile.laws:
        return profile
    law = profile.laws[name]
    slower = replace(law, parameters={key: factor * value for key, value in law.parameters.items()})
    return replace(profile, laws={**profile.laws, name: slower})


def rival_of(contender: Contender) -> Rival:
    """A confirmed contender's size and load."""
    allocation = contender.allocation
    base = sum(pool.n_gpus for pool in allocation.pools_of("base"))
    ratio = contender.search.shape.worker_price_ratio if contender.search.shape else 1.0
    workers = allocation.n_gpus - base
    return Rival(
        contender.search.topology,
        base,
        workers if ratio == 1.0 else ratio * workers,
        min(contender.search.peak_hour_load_gpus, allocation.n_gpus),
    )


def _cheapest(sizes: Sizes, winner: Topology) -> Topology:
    """The topology with fewest GPUs; the winner unless another has fewer by half a GPU: fleets are whole, estimates are not."""
    best = min(sizes, key=lambda name: (sizes[name], name))
    return best if sizes[best] <= sizes[winner] - GAP_GPUS else winner


def _law_flips(name: str, sizes_at: Callable[[float], Sizes], winner: Topology) -> list[FlipPoint]:
    found = []
    for end in LAW_RANGE:
        if _cheapest(sizes_at(end), winner) == winner:
            continue
        same, other = 0.0, math.log(end)
        for _ in range(BISECTIONS):
            middle = 0.5 * (same + other)
            if _cheapest(sizes_at(math.exp(middle)), winner) == winner:
                same = middle
            else:
                other = middle
        then = _cheapest(sizes_at(math.exp(other)), winner)
        found.append(
            _flip(name, math.exp(other), then, LAW_RANGE, "work recomputed with the law scaled; not simulated")
        )
    return found


def _traffic_flips(rivals: Sequence[Rival], winner: Topology) -> list[FlipPoint]:
    how = "square-root staffing from the confirmed sizes; not simulated"

    def sizes_at(factor: float) -> Sizes:
        return {
            one.topology: math.ceil(factor * one.load_gpus + (one.n_gpus - one.load_gpus) * math.sqrt(factor) - 1e-9)
            for one in rivals
        }

    found = []
    for end in TRAFFIC_RANGE:
        n_steps = math.ceil(abs(math.log(end)) / math.log(TRAFFIC_STEP))
        factors = [TRAFFIC_STEP ** (step if end > 1 else -step) for step in range(1, n_steps + 1)]
        cheapest = [_cheapest(sizes_at(factor), winner) for factor in factors]
        for k, factor in enumerate(factors):
            lasting = set(cheapest[k : k + STEADY_STEPS])
            if lasting == {cheapest[k]} and cheapest[k] != winner:
                found.append(_flip(TRAFFIC, factor, cheapest[k], TRAFFIC_RANGE, how))
                break
    return found or [_flip(TRAFFIC, None, None, TRAFFIC_RANGE, how)]


def _price_flips(rivals: Sequence[Rival], winner: Topology) -> list[FlipPoint]:
    """A price of all GPUs moves every cost alike; only ControlNet workers on other GPUs than the bases can change the order."""
    what = WORKERS_PRICE
    how = "exact for the confirmed sizes, if such GPUs are as fast; all GPUs' price together changes no order"
    own = next(one for one in rivals if one.topology == winner)
    crossings: list[tuple[float, Topology]] = []
    for other in rivals:
        if other.n_controlnet == own.n_controlnet:
            continue
        ratio = (own.n_base - other.n_base) / (other.n_controlnet - own.n_controlnet)
        if PRICE_RANGE[0] <= ratio <= PRICE_RANGE[1]:
            crossings.append((ratio, other.topology))
    if not any(one.n_controlnet for one in rivals):
        return []
    found = []
    for below in (True, False):
        side = [item for item in crossings if (item[0] < 1) == below]
        if side:
            ratio, topology = max(side) if below else min(side)
            found.append(_flip(what, ratio, topology, PRICE_RANGE, how))
    return found or [_flip(what, None, None, PRICE_RANGE, how)]


def _flip(what: str, factor: float | None, then: Topology | None, looked: tuple[float, float], how: str) -> FlipPoint:
    return FlipPoint(
        what=what, winner_until=None if factor is None else round(factor, 4), then=then, looked_from=looked[0],
        looked_to=looked[1], how=how,
    )  # fmt: skip
