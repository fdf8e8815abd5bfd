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
from planner.confirmation import Contender, Pace, confirm_all, search_all
from planner.explain import gpus_words, usd
from planner.kinds import Lens
from planner.replication import Inputs, load_inputs, service_table
from planner.scenario import Scenario
from planner.service import ServiceTable
from planner.settling import Settled, settle
from planner.topology_search import search_topology
from planner.traffic import build_traffic, stream_seed
from planner.workload import Workload

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
    """Everything that was found; ``settled`` by the lens it is about."""

    units: list[Unit]
    settled: dict[int, Settled | None] = field(default_factory=dict)
    """Place of a lens to what speaks for the choice among its fleets."""

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
    """Searches every kind; the one whose work is cheapest first and whole, since the others are measured by what it costs."""
    tasks = (joblib.delayed(bounds_of)(lens.scenario, folder, lens.topologies) for lens in lenses)
    found = KindSearch([])
    for lens, bounds in zip(lenses, pace.run(tasks), strict=True):
        found.units += [Unit(lens, name, bound) for name, bound in zip(lens.topologies, bounds, strict=True)]
    order = {id(lens): place for place, lens in enumerate(lenses)}

    def least(lens: Lens) -> tuple[float, int]:
        return min((unit.bound_usd for unit in found.of(lens)), default=math.inf), order[id(lens)]

    alone = sorted((lens for lens in lenses if lens.inputs.workers is None), key=least)
    for lens in alone:
        units = found.of(lens)
        able = units if not found.confirmed() else _drop_by_bound(units, found.limit_usd())
        _search(able, folder, pace)
        near = able if not found.confirmed() else _drop_by_search(able, found.limit_usd())
        _confirm(found, lens, order[id(lens)], near, folder, n_requests, pace)
    apart = [unit for lens in lenses if lens.inputs.workers is not None for unit in found.of(lens)]
    able = _drop_by_bound(apart, found.limit_usd())
    _search_apart(able, folder, pace)
    for unit in sorted(able, key=lambda unit: (unit.cost_usd, order[id(unit.lens)])):
        if _drop_by_search([unit], found.limit_usd()):
            _confirm(found, unit.lens, order[id(unit.lens)], [unit], folder, n_requests, pace)
    return found


def complete(found: KindSearch, lens: Lens, place: int, folder: Path, n_requests: int, pace: Pace) -> None:
    """Searches and confirms what was dropped of one kind, so that its table and its saving have every topology."""
    units = found.of(lens)
    missing = [unit for unit in units if not unit.is_repeated]
    if not missing:
        return
    _search([unit for unit in missing if unit.contender is None], folder, pace)
    confirm_all(lens.scenario, folder, _contenders(missing), pace)
    for unit in missing:
        unit.is_repeated, unit.why = True, ""
    found.settled[place] = settle(lens.scenario, folder, _contenders(units), n_requests, pace)


def probability_over_kinds(found: KindSearch, winner: Unit, settled: Settled) -> float:
    """The probability of correct selection, less what fleets of other kinds take of it that are cheaper and came near."""
    meets = []
    for own in found.settled.values():
        if own is None or own is settled:
            continue
        for doubt in (own.chosen, *own.cheaper):
            unit = next((unit for unit in found.units if unit.contender is doubt.contender), None)
            shape = doubt.contender.search.shape
            if unit is None or shape is None or unit.lens.usd_per_month(shape, doubt.counts) >= winner.cost_usd:
                continue
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
    """Sizes the units of one lens."""
    if not units:
        return
    lens = units[0].lens
    pace.progress(f"searching {lens.name}: {', '.join(unit.topology for unit in units)}")
    for unit, contender in zip(
        units, search_all(lens.scenario, folder, [u.topology for u in units], pace), strict=True
    ):
        unit.contender = contender


def _search_apart(units: Sequence[Unit], folder: Path, pace: Pace) -> None:
    """Sizes units of several lenses side by side."""
    if units:
        pace.progress(f"searching decoupled on two kinds: {len(units)} pairs")
    tasks = (joblib.delayed(search_topology)(unit.lens.scenario, folder, unit.topology, pace.store) for unit in units)
    for unit, one in zip(units, pace.run(tasks), strict=True):
        unit.contender = Contender(one, one.counts)
        size = gpus_words(unit.contender.allocation.n_gpus) if one.counts is not None else "cannot keep the promise"
        pace.progress(f"searched {unit.topology} on {unit.lens.name}: {size}")


def _confirm(
    found: KindSearch, lens: Lens, place: int, units: Sequence[Unit], folder: Path, n_requests: int, pace: Pace
) -> None:
    contenders = _contenders(units)
    confirm_all(lens.scenario, folder, contenders, pace)
    for unit in units:
        unit.is_repeated = True
    found.settled[place] = settle(lens.scenario, folder, contenders, n_requests, pace) if contenders else None


def _contenders(units: Iterable[Unit]) -> list[Contender]:
    return [unit.contender for unit in units if unit.contender is not None]


def _drop_by_bound(units: Sequence[Unit], limit_usd: float) -> list[Unit]:
    kept = []
    for unit in units:
        if math.isfinite(unit.bound_usd) and unit.bound_usd > limit_usd:
            unit.why = f"its work alone costs {usd(unit.bound_usd)} a month or more, over the {usd(limit_usd)} at which it could still win"
        else:
            kept.append(unit)
    return kept


def _drop_by_search(units: Sequence[Unit], limit_usd: float) -> list[Unit]:
    kept = []
    for unit in units:
        if math.isfinite(unit.cost_usd) and unit.cost_usd > limit_usd:
            unit.why = (
                f"the smallest fleet that the search found costs {usd(unit.cost_usd)} a month, over the {usd(limit_usd)} at which "
                "it could still win; not repeated"
            )
        else:
            kept.append(unit)
    return kept
