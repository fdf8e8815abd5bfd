"""The search over GPU kinds: what cannot win by its bare work is dropped first, then what the search finds too dear, the rest confirmed.

Every fleet that is confirmed is sized, repeated and doubted as in a plan of its kind alone, on the same arrivals.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import joblib
import numpy as np

from engine.allocation import Topology
from planner.candidates import Misfit, fewest_base_replicas, misfit
from planner.confirmation import Contender, Pace, confirm_all
from planner.explain import gpus_words, usd
from planner.kinds import Lens
from planner.replication import Inputs, load_inputs, service_table
from planner.scenario import Scenario
from planner.service import ServiceTable
from planner.settling import Settled, settle
from planner.topology_search import search_topology
from planner.traffic import build_traffic, stream_seed
from planner.workload import Workload

SIDE_BY_SIDE: Final = 2
"""Searches between two looks at the best so far; a constant, so that no result depends on the number of processes."""
SAME_COST_RATIO: Final = 0.005
"""Fleets whose cost differs by less cost the same, as plans see it."""


@dataclass(frozen=True, slots=True)
class Bound:
    """The fewest GPUs that one topology's work can be done with, by the fitted profile."""

    n_base: int
    n_workers: int
    misfit: Misfit | None


@dataclass(slots=True)
class Unit:
    """One topology on one kind, or pair of kinds, on its way through the search."""

    lens: Lens
    topology: Topology
    bound: Bound
    contender: Contender | None = None
    is_repeated: bool = False
    """Whether it went through the confirmation; otherwise the search's one run is all there is."""
    limit_usd: float = math.inf
    """USD a month up to which the confirmation enlarged it: over that it could not have won."""
    why: str = ""
    """Why it was not looked at further."""

    @property
    def bound_usd(self) -> float:
        """USD a month that it costs at the least; infinite where no number of GPUs will do."""
        if self.bound.misfit is not None:
            return math.inf
        ratio = self.lens.inputs.workers.price_ratio if self.lens.inputs.workers else 1.0
        return self._usd(self.bound.n_base + ratio * self.bound.n_workers)

    @property
    def cost_usd(self) -> float:
        """USD a month of the fleet found; infinite where none was."""
        if self.contender is None or self.contender.counts is None:
            return math.inf
        return self._usd(self.contender.cost)

    def _usd(self, gpus: float) -> float:
        return gpus * self.lens.price.price_usd_per_gpu_hour * self.lens.scenario.prices.hours_per_month


@dataclass(slots=True)
class KindSearch:
    """Everything that was found."""

    units: list[Unit]
    settled: dict[int, Settled | None] = field(default_factory=dict)
    """Place of a unit to what speaks for its fleet."""

    def of(self, lens: Lens) -> list[Unit]:
        """The units of one lens, in the order of its topologies."""
        return [unit for unit in self.units if unit.lens is lens]

    def confirmed(self) -> list[Unit]:
        """Those that keep the promise over all repetitions."""
        return [unit for unit in self.units if unit.contender is not None and unit.contender.is_confirmed]

    def limit_usd(self) -> float:
        """USD a month over which a fleet cannot be cheaper per image in time than the best so far."""
        found = [
            unit.cost_usd / float(np.mean([one.metrics.slo_attainment_ratio for one in unit.contender.confirmations]))
            for unit in self.confirmed()
            if unit.contender is not None
        ]
        return min(found, default=math.inf) * (1 + SAME_COST_RATIO)


def search_kinds(lenses: Sequence[Lens], folder: Path, n_requests: int, pace: Pace) -> KindSearch:
    """Searches fleets of one kind, then of two, those whose work is cheapest first; each is measured by the best before it."""
    tasks = (joblib.delayed(bounds_of)(lens.scenario, folder, lens.topologies) for lens in lenses)
    found = KindSearch([])
    for lens, bounds in zip(lenses, pace.run(tasks), strict=True):
        found.units += [Unit(lens, name, bound) for name, bound in zip(lens.topologies, bounds, strict=True)]
    for is_apart in (False, True):
        places = [place for place, unit in enumerate(found.units) if (unit.lens.inputs.workers is not None) == is_apart]
        waiting = sorted(places, key=lambda place: (found.units[place].bound_usd, place))
        while waiting:
            first = found.units[waiting[0]].lens
            batch = [place for place in waiting[:SIDE_BY_SIDE] if is_apart or found.units[place].lens is first]
            waiting = waiting[len(batch) :]
            able = [place for place in batch if _may_win_by_bound(found.units[place], found.limit_usd())]
            _search([found.units[place] for place in able], folder, pace)
            for place in sorted(able, key=lambda place: (found.units[place].cost_usd, place)):
                if _may_win_by_search(found.units[place], found.limit_usd()):
                    found.settled[place] = _confirm(found.units[place], found.limit_usd(), folder, n_requests, pace)
    return found


def complete(found: KindSearch, lens: Lens, folder: Path, n_requests: int, pace: Pace) -> Settled | None:
    """Searches and confirms what was dropped of one kind, so that its table and its saving have every topology.

    Returns:
        What speaks for the best of its fleets.
    """
    units = found.of(lens)
    missing = [unit for unit in units if not unit.is_repeated or not math.isinf(unit.limit_usd)]
    _search([unit for unit in missing if unit.contender is None], folder, pace)
    again = [unit for unit in missing if unit.contender is not None and not unit.contender.is_confirmed]
    for unit in missing:
        unit.is_repeated, unit.why, unit.limit_usd = True, "", math.inf
        if unit.contender is not None:
            unit.contender.cost_max = math.inf
    confirm_all(lens.scenario, folder, _contenders(again), pace)
    return settle(lens.scenario, folder, _contenders(units), n_requests, pace)


def probability_over_kinds(found: KindSearch, winner: Unit, settled: Settled) -> float:
    """The probability of correct selection, less what fleets of other kinds take of it that are cheaper and came near."""
    meets = []
    for place, own in found.settled.items():
        unit = found.units[place]
        if own is None or unit.lens is winner.lens:
            continue
        for doubt in (own.chosen, *own.cheaper):
            shape = doubt.contender.search.shape
            if shape is not None and unit.lens.usd_per_month(shape, doubt.counts) < winner.cost_usd:
                meets.append(settled.probability_of(doubt, unit.lens.scenario.slo.attainment_ratio))
    return max(0.0, settled.probability - math.fsum(meets))


def bounds_of(scenario: Scenario, folder: Path, topologies: Sequence[Topology]) -> tuple[Bound, ...]:
    """The least work of each topology, or why it cannot be: nothing is simulated."""
    inputs, workload = load_inputs(scenario, folder), build_traffic(scenario, folder).workload
    return tuple(_bound(scenario, inputs, workload, name) for name in topologies)


def _bound(scenario: Scenario, inputs: Inputs, workload: Workload, topology: Topology) -> Bound:
    seed = stream_seed(scenario.simulation.seed, "search noise")
    service = service_table(scenario, inputs, workload, topology, draw=None, noise_seed=seed)
    workers = inputs.workers if topology == "decoupled" else None
    problem = misfit(topology, workload, service, inputs.sizes, inputs.facts, scenario, workers)
    low = fewest_base_replicas(workload, service, scenario.slo.latency_s, scenario.slo.attainment_ratio)
    return Bound(low, _fewest_workers(scenario, workload, service), problem)


def _fewest_workers(scenario: Scenario, workload: Workload, service: ServiceTable) -> int:
    """As ``fewest_base_replicas``: the requests in time bring at least the lightest of the ControlNet work."""
    if not service.is_remote.any():
        return 0
    n_in_time = math.floor(scenario.slo.attainment_ratio * len(workload))
    work_s = float(np.sort(service.controlnet_work_s)[:n_in_time].sum())
    span_s = float(workload.arrival_s[-1] - workload.arrival_s[0]) + scenario.slo.latency_s
    return max(1, math.ceil(work_s / span_s - 1e-9))


def _search(units: Sequence[Unit], folder: Path, pace: Pace) -> None:
    """Sizes units of any lenses side by side."""
    tasks = (joblib.delayed(search_topology)(unit.lens.scenario, folder, unit.topology, pace.store) for unit in units)
    for unit, one in zip(units, pace.run(tasks), strict=True):
        unit.contender = Contender(one, one.counts)
        size = gpus_words(unit.contender.allocation.n_gpus) if one.counts is not None else "cannot keep the promise"
        pace.progress(f"searched {unit.topology} on {unit.lens.name}: {size}")


def _confirm(unit: Unit, limit_usd: float, folder: Path, n_requests: int, pace: Pace) -> Settled | None:
    """Repeats a unit, and enlarges it as far as it could still win."""
    contenders, scenario = _contenders([unit]), unit.lens.scenario
    unit.is_repeated, unit.limit_usd = True, limit_usd
    for contender in contenders:
        contender.cost_max = limit_usd / (unit.lens.price.price_usd_per_gpu_hour * scenario.prices.hours_per_month)
    confirm_all(scenario, folder, contenders, pace)
    if any(one.counts is not None and not one.is_confirmed and math.isfinite(one.cost_max) for one in contenders):
        unit.why = f"more GPUs would cost over the {usd(limit_usd)} a month at which it could still win"
    return settle(scenario, folder, contenders, n_requests, pace)


def _contenders(units: Iterable[Unit]) -> list[Contender]:
    return [unit.contender for unit in units if unit.contender is not None]


def _may_win_by_bound(unit: Unit, limit_usd: float) -> bool:
    if math.isinf(unit.bound_usd) or unit.bound_usd <= limit_usd:
        return True
    unit.why = f"its work alone costs {usd(unit.bound_usd)} a month or more, over the {usd(limit_usd)} at which it could still win"
    return False


def _may_win_by_search(unit: Unit, limit_usd: float) -> bool:
    if math.isinf(unit.cost_usd) or unit.cost_usd <= limit_usd:
        return True
    unit.why = (
        f"the smallest fleet that the search found costs {usd(unit.cost_usd)} a month, over the {usd(limit_usd)} at which it could "
        "still win; not repeated"
    )
    return False
