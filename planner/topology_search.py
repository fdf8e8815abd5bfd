"""Searches one topology of a scenario: first on the busiest stretch of the traffic, then on all of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from calibrate.profile import Grade
from engine.allocation import Topology
from planner.answers import NO_ANSWERS, Answers, answers_about, evaluation_of, plain_evaluation
from planner.candidates import (
    Counts,
    Misfit,
    Shape,
    fewest_base_replicas,
    mean_load_gpus,
    misfit,
    peak_hour_load_gpus,
    screen_base_replicas,
    shapes_of,
)
from planner.evaluation import Bench, evaluate_counts, repetition_bench
from planner.replication import Inputs, load_inputs, service_table
from planner.scenario import Scenario
from planner.search import CONTROLNET_LOADS, Evaluation, Evaluator, SearchOutcome, controlnet_counts, refine, search
from planner.service import ServiceTable
from planner.traffic import build_traffic, busiest_stretch, stream_seed
from planner.workload import Floats, Workload

DIRECT_REQUESTS_MAX: Final = 60_000
"""Longer traffic is searched on its busiest stretch first: the compiled tier takes a second or so a run from there on."""
COARSE_FACTOR: Final = 2
"""The busiest stretch is searched first only if all the traffic is this many times longer."""
COARSE_TOLERANCE: Final = 0.05
FIRST_GUESS: Final = 1.15
"""Over the bare screen, so that the first simulation is not overloaded and its busy time means something."""


@dataclass(frozen=True, slots=True)
class TopologySearch:
    """What the search found for one topology."""

    topology: Topology
    misfit: Misfit | None
    """Why no number of replicas can do."""
    shape: Shape | None
    counts: Counts | None
    """None: nothing within ``gpus_max`` meets the SLO."""
    looked_at: tuple[tuple[Shape, Evaluation], ...]
    """Allocations simulated on all of the traffic."""
    mean_load_gpus: float
    peak_hour_load_gpus: float
    """The same of the busiest full hour; of the whole window if that is shorter."""
    grades: dict[str, Grade]


def search_topology(scenario: Scenario, folder: Path, topology: Topology, store: Path | None = None) -> TopologySearch:
    """The cheapest allocation of a topology that meets the SLO in one simulation with the fitted profile.

    Service noise has the same seed in every evaluation and topology (common random numbers).

    Args:
        store: a run store that is asked before every simulation and told afterwards; none if None.
    """
    with answers_about(store, scenario, folder, None) as known:
        workload = build_traffic(scenario, folder).workload
        return search_with(scenario, load_inputs(scenario, folder), workload, topology, known)


def search_with(
    scenario: Scenario, inputs: Inputs, workload: Workload, topology: Topology, known: Answers
) -> TopologySearch:
    """:func:`search_topology` with inputs and traffic of the caller's, of which ``known`` must be about the same."""
    service = _service(scenario, inputs, workload, topology)
    work_s = service.alone_s + service.controlnet_work_s
    load, peak = mean_load_gpus(workload, work_s), peak_hour_load_gpus(workload, work_s)
    slo = scenario.slo
    workers = inputs.workers if topology == "decoupled" else None
    problem = misfit(topology, workload, service, inputs.sizes, inputs.facts, scenario, workers)
    if problem is not None:
        return TopologySearch(topology, problem, None, None, (), load, peak, dict(service.grades))
    low = fewest_base_replicas(workload, service, slo.latency_s, slo.attainment_ratio)
    link = inputs.link(scenario.policies.link)
    shapes = shapes_of(
        scenario, topology, workload, service, inputs.sizes, inputs.facts, inputs.gpu_kind, workers, link
    )
    task = Task(Bench.of(scenario, inputs, workload, service), low, known)
    one_each = shapes[0].allocation((1,) * (1 + len(shapes[0].controlnet_pools)))
    is_long = len(workload) > DIRECT_REQUESTS_MAX or not task.bench.is_compiled(one_each)
    coarse = (_coarse(task, shape) for shape in shapes if is_long and shape.controlnet_pools)
    rough = min(coarse, key=_size, default=None)
    if rough is None or rough.best is None:
        found = min((task.search(shape) for shape in shapes), key=_size)
    else:
        evaluator, others = task.evaluator(rough.shape), rough.best.counts[1:]
        found = refine(rough.shape, evaluator, (task.informed_screen(evaluator, others), *others), low)
    looked_at = tuple((found.shape, evaluation) for evaluation in found.looked_at)
    grades = dict(service.grades)
    if found.best is None:
        return TopologySearch(topology, None, None, None, looked_at, load, peak, grades)
    counts = _with_headroom(found.best.counts, scenario)
    return TopologySearch(topology, None, found.shape, counts, looked_at, load, peak, grades)


def retune(
    scenario: Scenario,
    folder: Path,
    topology: Topology,
    shape: Shape,
    counts: Counts,
    repetition: int,
    store: Path | None = None,
) -> Counts | None:
    """The smallest allocation near ``counts`` that meets the SLO in one repetition; None if none is in reach."""
    bench = repetition_bench(scenario, folder, topology, repetition)
    slo = scenario.slo
    low = fewest_base_replicas(bench.workload, bench.service, slo.latency_s, slo.attainment_ratio)
    with answers_about(store, scenario, folder, repetition) as known:
        found = refine(shape, Task(bench, low, known).evaluator(shape), counts, low)
    return found.best.counts if found.best is not None else None


@dataclass(slots=True)
class Task:
    """What every evaluation of one topology shares."""

    bench: Bench
    low: int
    known: Answers = NO_ANSWERS

    def evaluator(self, shape: Shape) -> Evaluator:
        scenario = self.bench.scenario
        target, gpus_max = scenario.slo.attainment_ratio, _at_most(scenario, scenario.search.gpus_max)
        workers_max = None if shape.workers_max is None else _at_most(scenario, shape.workers_max)
        return Evaluator(lambda counts: self._evaluate(shape, counts), target, gpus_max, workers_max)

    def _evaluate(self, shape: Shape, counts: Counts) -> Evaluation:
        return self.known.get(
            f"evaluation {shape.topology} of {len(self.bench.workload)} requests",
            shape.allocation(counts),
            lambda: evaluate_counts(self.bench, shape, counts),
            plain_evaluation,
            evaluation_of,
        )

    def search(self, shape: Shape) -> SearchOutcome:
        """The fewest replicas of a shape on this traffic."""
        evaluator = self.evaluator(shape)
        start = self.informed_screen(evaluator, controlnet_counts(shape, CONTROLNET_LOADS[0]))
        return search(shape, evaluator, start, self.low)

    def informed_screen(self, evaluator: Evaluator, others: Counts) -> int:
        """As the screen, with service times stretched to what one simulation found: loads, misses and sharing included."""
        alone_s = self.bench.service.alone_s
        first = min(math.ceil(FIRST_GUESS * self._screen(alone_s)), max(self.low, evaluator.base_max(others)))
        busy = evaluator((first, *others)).busy_ratios[0]
        stretch = busy * first * self.bench.workload.duration_s / float(alone_s.sum())
        return self._screen(alone_s * max(1.0, stretch))

    def _screen(self, service_s: Floats) -> int:
        slo = self.bench.scenario.slo
        return screen_base_replicas(self.bench.workload, service_s, slo.latency_s, slo.attainment_ratio, self.low)


def _coarse(task: Task, shape: Shape) -> SearchOutcome:
    """Searches the busiest stretch, not to the last replica; all of the traffic if it is not much longer."""
    scenario, workload = task.bench.scenario, task.bench.workload
    part = busiest_stretch(workload, scenario.search.requests_max)
    if len(workload) <= COARSE_FACTOR * len(part):
        part, table = workload, task.bench.service
    else:
        table = _service(scenario, task.bench.inputs, part, shape.topology)
    # ControlNet workers are sized for the mean load; the busiest stretch has more of it
    busier = (len(part) / part.duration_s) / (len(workload) / workload.duration_s)
    busy_shape = replace(shape, controlnet_loads=tuple(load * busier for load in shape.controlnet_loads))
    on_part = Task(Bench.of(scenario, task.bench.inputs, part, table), 1, task.known)
    evaluator = on_part.evaluator(busy_shape)
    start = on_part.informed_screen(evaluator, controlnet_counts(busy_shape, CONTROLNET_LOADS[0]))
    found = search(busy_shape, evaluator, start, 1, tolerance_ratio=COARSE_TOLERANCE)
    return SearchOutcome(shape, found.best, found.looked_at)


def _size(found: SearchOutcome) -> tuple[float, int]:
    """Less cost; among equals fewer pools."""
    return (found.shape.cost(found.best.counts), len(found.best.counts)) if found.best is not None else (10**9, 0)


def _with_headroom(counts: Counts, scenario: Scenario) -> Counts:
    ratio = scenario.search.headroom_ratio
    return tuple(math.ceil(n * (1 + ratio) - 1e-9) for n in counts)


def _service(scenario: Scenario, inputs: Inputs, workload: Workload, topology: Topology) -> ServiceTable:
    return service_table(
        scenario,
        inputs,
        workload,
        topology,
        draw=None,
        noise_seed=stream_seed(scenario.simulation.seed, "search noise"),
    )


def _at_most(scenario: Scenario, gpus_max: int) -> int:
    """What the search may use, so that the headroom still fits."""
    return max(1, math.floor(gpus_max / (1 + scenario.search.headroom_ratio) + 1e-9))
