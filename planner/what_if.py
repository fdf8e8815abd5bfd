"""What if: allocations at hand under other traffic, another promise, another price, on the compiled tier, while a slider moves.

The traffic and the service times of a question are predicted once (:func:`lay_out`); more or less of it takes rows of them, so that a
change costs a few array operations and one compiled run an allocation. Copies of a request draw noise of their own. One run with the
fitted profile: no intervals, no repetitions. What the compiled tier does not model is refused (:class:`NotModelledError`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from calibrate.profile import Grade
from engine.allocation import Topology
from planner.candidates import Counts, Shape, fewest_base_replicas, misfit, screen_base_replicas, shapes_of
from planner.cost import cost_of
from planner.evaluation import Bench, lost_seconds_fast, measured
from planner.fast import NotModelledError, Prepared, flatten, prepare, simulate_fast
from planner.fast.metrics import columns_of
from planner.replication import Inputs, load_inputs, service_table
from planner.scenario import Scenario
from planner.service import STACK_OF, ServiceTable
from planner.service_noise import mix, service_noise_ratio
from planner.traffic import source_trace, stream_seed
from planner.workload import Bools, Floats, Ints, Workload, build_workload
from traces.problems import one_problem
from traces.scaling import scaled_rows
from traces.trace import Trace

RECORDED_MAX: Final = 400_000
REQUESTS_MAX: Final = 250_000
"""Requests that are simulated a slider's move, after scaling and cutting: some tenths of a second an allocation."""
CONTROLNET_LOAD: Final = 0.65
"""Mean utilisation of ControlNet workers that a first guess is sized for."""
GROWTH: Final = 1.06
GUESSES_MAX: Final = 12
NOISY: Final = ("text_s", "denoise_alone_s", "decode_s", "lora_hidden_s", "_controlnet_work_s")
PLAIN: Final = (
    "lora_attach_s", "lora_detach_s", "plain_step_s", "encoder_s", "decoder_s", "controlnet_forward_s", "transfer_s", "is_remote",
)  # fmt: skip
"""Columns of a service table that carry the request's noise, and those that do not."""


@dataclass(frozen=True, slots=True)
class Change:
    """What is changed about the traffic of a question."""

    traffic_ratio: float = 1.0
    """Times the question's own ``scale_factor``."""
    controlnet_share: float = 1.0
    """Of the requests that use ControlNets, how many keep them (0..1)."""


@dataclass(frozen=True, slots=True)
class Terms:
    """The promise and the price that an allocation is judged by."""

    latency_s: float
    attainment_ratio: float
    price_usd_per_gpu_hour: float


@dataclass(frozen=True, slots=True, eq=False)
class Ground:
    """A question's recorded traffic with its service times, and the shapes that its allocations have."""

    scenario: Scenario
    inputs: Inputs
    trace: Trace
    recorded: Workload
    """Neither scaled nor cut."""
    tables: Mapping[Topology, tuple[ServiceTable, ServiceTable]]
    """Without noise: with ControlNets as recorded, and with none."""
    unchanged: Changed
    shapes: Mapping[Topology, tuple[Shape, ...]]

    @property
    def has_controlnets(self) -> bool:
        """Whether any request uses one."""
        return bool(self.recorded.controlnet_names)

    def shape(self, topology: Topology, counts: Counts) -> Shape | None:
        """The shape of a topology with as many pools as there are counts; None if it has none."""
        return next((s for s in self.shapes[topology] if 1 + len(s.controlnet_pools) == len(counts)), None)


@dataclass(frozen=True, slots=True, eq=False)
class Changed:
    """Traffic after a change, ready to be run."""

    workload: Workload
    tables: Mapping[Topology, ServiceTable]
    prepared: Prepared


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one allocation delivers in one run."""

    topology: Topology
    counts: Counts
    pool_names: tuple[str, ...]
    n_gpus: int
    latency_p50_s: float
    latency_p95_s: float
    latency_p99_s: float
    attainment_ratio: float
    is_kept: bool
    is_saturated: bool
    cost_usd_per_month: float
    cost_usd_per_1000_images: float
    """Infinite if no image is in time."""
    busy_ratios: tuple[float, ...]
    """Of each pool, loading included."""
    bottleneck: str
    """If the promise is kept ``pool`` (the busiest one is next to bind); if not, ``idle`` (too slow with nobody else there) or the
    request record's column in which late requests lose most."""
    grades: tuple[Grade, ...]

    @property
    def busiest_pool(self) -> str:
        """Name of the busiest pool."""
        return self.pool_names[max(range(len(self.counts)), key=lambda pool: (self.busy_ratios[pool], -pool))]


def lay_out(scenario: Scenario, folder: Path) -> Ground:
    """Reads a question's trace and predicts its service times on every topology that competes.

    Raises:
        InputError: an input cannot be used, or the trace is longer than is answered while a slider moves.
        NotModelledError: the compiled tier cannot lay the traffic out, or ControlNet workers have another GPU kind.
    """
    inputs = load_inputs(scenario, folder)
    if inputs.workers is not None:  # costs here are of one kind
        raise NotModelledError(("gpu.controlnet_kind",))
    trace = source_trace(scenario, folder)
    if len(trace) > RECORDED_MAX:
        raise one_problem(
            "trace", f"has {len(trace):,} requests", f"at most {RECORDED_MAX:,} for answers while a slider moves", "Cut it, or make a plan instead"
        )  # fmt: skip
    recorded = build_workload(trace)
    nothing: tuple[tuple[int, ...], ...] = ((),) * len(recorded)
    bare = replace(recorded, controlnets=nothing, control_steps=((),) * len(recorded))

    def table(workload: Workload, topology: Topology) -> ServiceTable:
        found = service_table(scenario, inputs, workload, topology, draw=None, noise_seed=0)
        if found.batch is not None:
            raise NotModelledError(("batching",))
        quiet: dict[str, Any] = {name: getattr(found, name) / found.noise_ratio for name in NOISY}
        return replace(found, noise_ratio=np.ones(len(found)), **quiet)

    tables: dict[Topology, tuple[ServiceTable, ServiceTable]] = {}
    for topology in scenario.topologies:
        with_them = table(recorded, topology)
        tables[topology] = (with_them, table(bare, topology) if recorded.controlnet_names else with_them)
    unchanged = _changed(scenario, inputs, trace, recorded, tables, Change())
    shapes: dict[Topology, tuple[Shape, ...]] = {
        topology: shapes_of(
            scenario, topology, unchanged.workload, unchanged.tables[topology], inputs.sizes, inputs.facts, inputs.gpu_kind
        )
        for topology in scenario.topologies
    }  # fmt: skip
    return Ground(scenario, inputs, trace, recorded, tables, unchanged, shapes)


def change(ground: Ground, asked: Change) -> Changed:
    """The traffic of a question after a change.

    Raises:
        InputError: nothing is left, or more requests than are simulated while a slider moves.
        NotModelledError: the compiled tier cannot lay it out.
    """
    if asked == Change():
        return ground.unchanged
    return _changed(ground.scenario, ground.inputs, ground.trace, ground.recorded, ground.tables, asked)


def _changed(
    scenario: Scenario,
    inputs: Inputs,
    trace: Trace,
    recorded: Workload,
    tables: Mapping[Topology, tuple[ServiceTable, ServiceTable]],
    asked: Change,
) -> Changed:
    traffic = scenario.traffic
    found = scaled_rows(
        trace, traffic.scale_factor * asked.traffic_ratio, traffic.shift_law, traffic.seed,
        window_s=(traffic.window.start_h * 3600, traffic.window.end_h * 3600) if traffic.window is not None else None,
        busiest_s=traffic.busiest.length_h * 3600 if traffic.busiest is not None else None,
    )  # fmt: skip
    n = len(found.source)
    if not 2 <= n <= REQUESTS_MAX:
        raise one_problem(
            "Traffic", f"keeps {n:,} requests after scaling and cutting", f"2..{REQUESTS_MAX:,} for answers while a slider moves",
            "Move the traffic slider, or search again instead",
        )  # fmt: skip
    if not found.arrival_s[-1] > found.arrival_s[0]:
        raise one_problem("Traffic", f"keeps {n} requests that arrive at once", "two or more, at different times")
    keys = recorded.request_key[found.source]
    is_copy = found.copy > 0
    keys = np.where(is_copy, mix(keys ^ mix(found.copy.astype(np.uint64))), keys)
    workload = _taken(recorded, found.source, keys, found.arrival_s, found.duration_s)
    keeps = np.ones(n, dtype=np.bool_)
    if asked.controlnet_share < 1 and recorded.controlnet_names:
        keeps = keeps_controlnets(recorded, asked.controlnet_share, scenario.simulation.seed)[found.source]
        workload = _without_controlnets(workload, keeps)
    seed = stream_seed(scenario.simulation.seed, "search noise")
    noise: dict[str, Floats] = {}
    taken: dict[Topology, ServiceTable] = {}
    for topology, pair in tables.items():
        stack = STACK_OF[topology]
        if stack not in noise:
            quantiles = inputs.profile.noise_ratio_quantiles.get(stack, ())
            noise[stack] = np.broadcast_to(service_noise_ratio(workload, quantiles, seed), (n,))
        taken[topology] = _rows_of(pair, found.source, keeps, noise[stack])
    return Changed(workload, taken, prepare(flatten(workload), tuple(taken.values())))


def keeps_controlnets(recorded: Workload, share: float, seed: int) -> Bools:
    """Which recorded requests keep their ControlNets; whoever keeps them keeps them at every larger share too. [n]"""
    salt = np.array([stream_seed(seed, "what-if ControlNets")], dtype=np.uint64)
    uniform = (mix(recorded.request_key ^ mix(salt)[0]) >> np.uint64(11)) * 2.0**-53
    found: Bools = uniform < share
    return found


def trace_with_share(trace: Trace, share: float, seed: int) -> Trace:
    """The trace in which only this share of the requests with ControlNets keep them: the same ones that a slider keeps."""
    keeps = keeps_controlnets(build_workload(trace), share, seed).tolist()
    requests = trace.requests.copy()
    for name in ("controlnet_ids", "controlnet_scales", "control_start", "control_end"):
        requests[name] = [value if keep else () for value, keep in zip(requests[name], keeps, strict=True)]
    return replace(
        trace,
        requests=requests,
        provenance=trace.provenance.with_note(f"{share:.0%} of the requests with ControlNets keep them"),
    )


def _taken(
    recorded: Workload, rows: Ints, keys: npt.NDArray[np.uint64], arrival_s: Floats, duration_s: float
) -> Workload:
    order = rows.tolist()
    return replace(
        recorded,
        request_ids=tuple(map(recorded.request_ids.__getitem__, order)),
        request_key=keys,
        arrival_s=arrival_s,
        checkpoint=recorded.checkpoint[rows],
        controlnets=tuple(map(recorded.controlnets.__getitem__, order)),
        control_steps=tuple(map(recorded.control_steps.__getitem__, order)),
        loras=tuple(map(recorded.loras.__getitem__, order)),
        n_steps=recorded.n_steps[rows],
        n_images=recorded.n_images[rows],
        forward_batch=recorded.forward_batch[rows],
        megapixels=recorded.megapixels[rows],
        deadline_s=recorded.deadline_s[rows],
        tenant=recorded.tenant[rows],
        priority=recorded.priority[rows],
        duration_s=duration_s,
    )


def _without_controlnets(workload: Workload, keeps: Bools) -> Workload:
    kept = keeps.tolist()
    return replace(
        workload,
        controlnets=tuple(codes if keep else () for codes, keep in zip(workload.controlnets, kept, strict=True)),
        control_steps=tuple(steps if keep else () for steps, keep in zip(workload.control_steps, kept, strict=True)),
    )


def _rows_of(pair: tuple[ServiceTable, ServiceTable], rows: Ints, keeps: Bools, noise_ratio: Floats) -> ServiceTable:
    with_them, bare = pair

    def column(name: str) -> npt.NDArray[Any]:
        values: npt.NDArray[Any] = getattr(with_them, name)[rows]
        return values if bare is with_them or keeps.all() else np.where(keeps, values, getattr(bare, name)[rows])

    columns: dict[str, Any] = {name: column(name) for name in PLAIN}
    columns |= {name: column(name) * noise_ratio for name in NOISY}
    return replace(with_them, noise_ratio=noise_ratio, **columns)


def run(ground: Ground, changed: Changed, topology: Topology, counts: Counts, terms: Terms) -> Outcome:
    """Simulates one allocation under changed traffic.

    Raises:
        ValueError: the topology has no shape with so many pools.
        NotModelledError: the question switches something on that only the SimPy model knows.
    """
    shape = ground.shape(topology, counts)
    if shape is None:
        raise ValueError(f"{topology} has no shape with {len(counts)} pools")
    scenario = ground.scenario.model_copy(
        update={
            "slo": ground.scenario.slo.model_copy(
                update={"latency_s": terms.latency_s, "attainment_ratio": terms.attainment_ratio}
            )
        }
    )
    allocation = shape.allocation(counts)
    table = changed.tables[topology]
    world = scenario.world.world(stream_seed(scenario.simulation.seed, "world"))
    base = {pool.name: table for pool in allocation.pools_of("base")}
    found = simulate_fast(
        changed.prepared, allocation, base, ground.inputs.sizes, ground.inputs.facts, world=world
    )  # fmt: skip
    columns = columns_of(found)
    bench = Bench(scenario, ground.inputs, changed.workload, table, changed.prepared)
    metrics, images_per_s = measured(bench, found, columns)
    cost = cost_of(allocation.n_gpus, images_per_s, terms.price_usd_per_gpu_hour, scenario.prices.hours_per_month)
    is_kept = metrics.slo_attainment_ratio >= terms.attainment_ratio
    if is_kept:
        bottleneck = "pool"
    elif float((table.alone_s <= terms.latency_s).mean()) < terms.attainment_ratio:
        bottleneck = "idle"
    else:
        lost = lost_seconds_fast(found, columns, terms.latency_s)
        bottleneck = max(lost, key=lambda name: (lost[name], name == "queue_wait_s"))
    names = tuple(pool.name for pool in allocation.pools)
    busy = tuple(metrics.busy_ratio[name] + metrics.loading_ratio[name] for name in names)
    return Outcome(
        topology, counts, names, allocation.n_gpus, metrics.latency_p50_s, metrics.latency_p95_s, metrics.latency_p99_s,
        metrics.slo_attainment_ratio, is_kept, metrics.is_saturated, cost.cost_usd_per_month, 1000 * cost.cost_usd_per_image, busy, bottleneck,
        tuple(table.grades.values()),
    )  # fmt: skip


def first_guess(ground: Ground, topology: Topology, terms: Terms) -> Counts:
    """A fleet of a topology to begin with, for the question as it is: the fewest that a few runs show to keep the promise.

    If no fleet can, or none is found in ``GUESSES_MAX`` runs, one that carries the load.
    """
    workload, table = ground.unchanged.workload, ground.unchanged.tables[topology]
    shape = ground.shapes[topology][0]
    others = tuple(max(1, math.ceil(load / CONTROLNET_LOAD)) for load in shape.controlnet_loads)
    share, latency_s = terms.attainment_ratio, terms.latency_s
    alone_s = table.alone_s
    if misfit(topology, workload, table, ground.inputs.sizes, ground.inputs.facts, ground.scenario) is not None:
        return (max(1, math.ceil(float(alone_s.sum()) / workload.duration_s / 0.8)), *others)
    low = fewest_base_replicas(workload, table, latency_s, share)
    n = min(screen_base_replicas(workload, alone_s, latency_s, share, low), ground.scenario.search.gpus_max)
    bad = 0
    for _ in range(GUESSES_MAX):
        if run(ground, ground.unchanged, topology, (n, *others), terms).is_kept:
            break
        bad, n = n, min(max(n + 1, math.ceil(n * GROWTH)), ground.scenario.search.gpus_max)
    while n - bad > 1 and bad:
        middle = (n + bad) // 2
        if run(ground, ground.unchanged, topology, (middle, *others), terms).is_kept:
            n = middle
        else:
            bad = middle
    return (n, *others)


def sizes_around(counts: Counts, pool: int, gpus_max: int) -> tuple[Counts, ...]:
    """The allocation with fewer and more replicas of one pool, for a curve: about ±10, 20 and 40 %, at least one apart."""
    n = counts[pool]
    steps: Iterable[int] = sorted({max(1, n + s * max(k, round(n * r))) for k, r in ((1, 0.1), (2, 0.2), (3, 0.4)) for s in (-1, 1)} - {n})  # fmt: skip
    rest = sum(counts) - n
    return tuple((*counts[:pool], size, *counts[pool + 1 :]) for size in steps if size + rest <= gpus_max)
