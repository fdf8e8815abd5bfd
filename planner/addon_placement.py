"""What a ControlNet would cost elsewhere: the fewest GPUs of fleets that place one of them otherwise, on the same requests.

A fleet is a base pool that runs some ControlNets in process, a base pool whose ControlNets run on workers, and pools of those
workers. The recommended placement is sized again the same way, so that the difference is the placement's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from engine.allocation import ANY, Allocation, Link, Pool, Topology
from planner.answers import NO_ANSWERS, Answers, answers_about
from planner.candidates import BASE_POOL, Counts, Shape, controlnet_loads
from planner.decision_record import PlacedRow, Placement
from planner.fast import Prepared, prepare, simulate_fast
from planner.fast.metrics import columns_of, summarise_fast
from planner.replication import Inputs, load_inputs, service_table, warmup_of
from planner.run_store import metrics_of
from planner.scenario import Scenario
from planner.service import ServiceTable
from planner.simulator import mechanisms_in_use
from planner.statistics import Metrics
from planner.traffic import build_traffic, busiest_stretch, stream_seed
from planner.workload import Bools, Workload

STRETCH_REQUESTS_MAX: Final = 12_000
CONTROLNETS_MAX: Final = 5
"""ControlNets that are tried elsewhere, busiest first."""
USE_RATIO_MIN: Final = 0.01
TRIALS_MAX: Final = 60
"""Simulations of one placement."""
STEP_RATIO: Final = 0.04
"""Of the fleet: how fast sizing goes before it goes one by one."""
START_LOAD: Final = 0.75
"""Mean utilisation that sizing starts from."""
APART: Final = "base-apart"
"""The base pool whose ControlNets run on workers, beside one that runs some in process."""
TOPOLOGIES: Final[tuple[Topology, ...]] = ("colocated", "decoupled")


@dataclass(frozen=True, slots=True)
class Fleet:
    """Pools without their replica counts."""

    placement: Placement
    in_process: tuple[str, ...] | None
    """ControlNets that the plain base pool runs itself; None: there is no such pool."""
    on_workers: tuple[tuple[str, tuple[str, ...]], ...]
    """Worker pools and what they host; none: there is no base pool that uses workers."""

    @property
    def n_pools(self) -> int:
        """Pools to be sized."""
        return (self.in_process is not None) + (1 + len(self.on_workers) if self.on_workers else 0)

    def allocation(self, counts: Counts, like: Shape) -> Allocation:
        """The allocation with these replicas, everything else as in a shape."""
        left = list(counts)
        pools: list[Pool] = []
        links: list[Link] = []
        if self.in_process is not None:
            pools.append(_base(BASE_POOL, left.pop(0), "colocated", self.in_process, like))
        if self.on_workers:
            name = APART if self.in_process is not None else BASE_POOL
            pools.append(_base(name, left.pop(0), "decoupled", (), like))
            for worker, hosted in self.on_workers:
                pools.append(
                    Pool(worker, "controlnet", left.pop(0), like.gpu_kind, 1, "decoupled", base_model_ids=(), controlnet_ids=hosted)
                )  # fmt: skip
                links.append(Link(name, worker, like.link))
        return Allocation(tuple(pools), tuple(links), like.policies)


def _base(name: str, n: int, topology: Topology, in_process: tuple[str, ...], like: Shape) -> Pool:
    return Pool(name, "base", n, like.gpu_kind, 1, topology, like.base_model_ids, in_process)


def fleets_for(name: str, shape: Shape, names: Sequence[str]) -> list[Fleet]:
    """The recommended placement first, then the others of one ControlNet; none for a topology without our engine.

    Args:
        names: all ControlNets of the traffic, busiest first.
    """
    others = tuple(other for other in names if other != name)
    if shape.topology == "colocated":
        rest = (("controlnets-rest", (*others, ANY)),) if others else ()
        return [
            Fleet("in process", shape.in_process_ids, ()),
            # its requests' other ControlNets go to workers with it: a request denoises in one place
            Fleet("own workers", others, (("controlnet-own", (name,)), *rest)),
        ]
    if shape.topology != "decoupled" or not shape.controlnet_pools:
        return []
    here = shape.controlnet_pools
    own = next((pool for pool in here if pool[1] == (name,)), None)
    if own is None:
        shared = tuple((pool, tuple(one for one in hosted if one != name)) for pool, hosted in here)
        apart = Fleet("own workers", None, (("controlnet-own", (name,)), *shared))
        first = Fleet("shared workers", None, here)
    else:
        merged = tuple(pool for pool in here if pool is not own)
        merged = ((merged[-1][0], (name, *merged[-1][1])),) if len(merged) == 1 else ((("controlnets", (*names, ANY))),)
        apart = Fleet("shared workers", None, merged)
        first = Fleet("own workers", None, here)
    return [first, apart, Fleet("in process", (name,), here)]


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """The requests that placements are tried on, laid out for both topologies of our engine."""

    scenario: Scenario
    inputs: Inputs
    workload: Workload
    prepared: Prepared
    services: Mapping[Topology, ServiceTable]
    known: Answers = NO_ANSWERS

    def run(self, allocation: Allocation, mine: Bools | None = None, whose: str = "nobody") -> tuple[Metrics, float]:
        """Metrics, and the median latency of the requests ``mine``, which ``whose`` names for the store; NaN without one."""
        return self.known.get(
            f"placed, of {len(self.workload)} requests those of {whose}",
            allocation,
            lambda: self._run(allocation, mine),
            lambda found: {"metrics": found[0].to_plain(), "with_it_s": found[1]},
            lambda plain: (metrics_of(plain["metrics"]), plain["with_it_s"]),
        )

    def _run(self, allocation: Allocation, mine: Bools | None) -> tuple[Metrics, float]:
        services = {pool.name: self.services[pool.topology] for pool in allocation.pools_of("base")}
        run = simulate_fast(self.prepared, allocation, services, self.inputs.sizes, self.inputs.facts)
        columns = columns_of(run)
        warmup_s = warmup_of(self.scenario, self.workload)
        metrics = summarise_fast(run, self.scenario.slo.latency_s, warmup_s=warmup_s, columns=columns)
        if mine is None:
            return metrics, math.nan
        latency_s = columns.latency_s[mine & columns.is_done & (columns.arrival_s >= warmup_s)]
        return metrics, float(np.median(latency_s)) if len(latency_s) else math.nan

    def users_of(self, controlnet: str) -> Bools:
        """The requests that use a ControlNet."""
        code = self.workload.controlnet_names.index(controlnet)
        rows = np.repeat(np.arange(len(self.workload)), self.workload.n_controlnets)
        mine = np.zeros(len(self.workload), dtype=np.bool_)
        mine[rows[self.workload.controlnet_uses == code]] = True
        return mine


def busiest_controlnets(scenario: Scenario, folder: Path, shape: Shape | None) -> list[str]:
    """The ControlNets worth trying elsewhere; none for a topology without our engine, or with mechanisms switched on."""
    if shape is None or shape.topology not in TOPOLOGIES:
        return []
    one_each = shape.allocation((1,) * (1 + len(shape.controlnet_pools)))
    if mechanisms_in_use(one_each, scenario.world.world(0)):
        return []  # only the compiled tier is fast enough for so many fleets
    workload = build_traffic(scenario, folder).workload
    uses = np.bincount(workload.controlnet_uses, minlength=len(workload.controlnet_names))
    often = {
        name for name, n in zip(workload.controlnet_names, uses, strict=True) if n >= USE_RATIO_MIN * len(workload)
    }
    if not often:
        return []
    trial = trial_of(scenario, folder)
    return [name for name in controlnet_loads(trial.workload, trial.services["decoupled"]) if name in often][
        :CONTROLNETS_MAX
    ]


def trial_of(scenario: Scenario, folder: Path, known: Answers = NO_ANSWERS) -> Trial:
    """The requests that arrive in the shortest time, laid out with the fitted profile."""
    inputs = load_inputs(scenario, folder)
    workload = busiest_stretch(build_traffic(scenario, folder).workload, STRETCH_REQUESTS_MAX)
    seed = stream_seed(scenario.simulation.seed, "search noise")
    services = {
        topology: service_table(scenario, inputs, workload, topology, draw=None, noise_seed=seed)
        for topology in TOPOLOGIES
    }
    return Trial(scenario, inputs, workload, prepare(workload, list(services.values())), services, known)


def words_of_stretch(n_requests: int) -> str:
    """Which of so many requests placements are simulated on."""
    n_tried = min(n_requests, STRETCH_REQUESTS_MAX)
    where = "all requests" if n_tried == n_requests else f"the busiest {n_tried} requests in a row"
    return f"{where}, one run each with the fitted profile; the recommended placement sized again on the same"


def place_otherwise(
    scenario: Scenario,
    folder: Path,
    shape: Shape,
    name: str,
    price_usd_per_gpu_hour: float,
    store: Path | None = None,
) -> tuple[PlacedRow, ...]:
    """The recommended placement of one ControlNet and the others, each with the fewest GPUs that keep the promise.

    One simulation each with the fitted profile and the same noise; mechanisms beyond the static model are not in it.
    """
    with answers_about(store, scenario, folder, None) as known:
        return _place_otherwise(trial_of(scenario, folder, known), shape, name, price_usd_per_gpu_hour)


def _place_otherwise(trial: Trial, shape: Shape, name: str, price_usd_per_gpu_hour: float) -> tuple[PlacedRow, ...]:
    loads = controlnet_loads(trial.workload, trial.services["decoupled"])
    mine = trial.users_of(name)
    monthly_usd = price_usd_per_gpu_hour * trial.scenario.prices.hours_per_month
    rows: list[PlacedRow] = []
    for fleet in fleets_for(name, shape, list(loads)):

        def build(counts: Counts, fleet: Fleet = fleet) -> Allocation:
            return fleet.allocation(counts, shape)

        counts = fewest(trial, build, start_counts(trial, fleet, loads))
        if counts is None:
            rows.append(PlacedRow(
                placement=fleet.placement, pools={}, n_gpus=None, cost_usd_per_month=None, difference_usd_per_month=None,
                slo_attainment_ratio=None, latency_p50_s=None, latency_p99_s=None, with_it_p50_s=None,
            ))  # fmt: skip
            continue
        allocation = fleet.allocation(counts, shape)
        metrics, with_it_s = trial.run(allocation, mine, f"ControlNet {name}")
        here = rows[0].n_gpus if rows else sum(counts)
        rows.append(PlacedRow(
            placement=fleet.placement, pools={pool.name: pool.n_replicas for pool in allocation.pools}, n_gpus=sum(counts),
            cost_usd_per_month=sum(counts) * monthly_usd,
            difference_usd_per_month=None if here is None else (sum(counts) - here) * monthly_usd,
            slo_attainment_ratio=metrics.slo_attainment_ratio, latency_p50_s=metrics.latency_p50_s,
            latency_p99_s=metrics.latency_p99_s, with_it_p50_s=with_it_s,
        ))  # fmt: skip
    return tuple(rows)


def fewest(trial: Trial, build: Callable[[Counts], Allocation], start: Counts) -> Counts | None:
    """The fewest replicas of a fleet: grown from its load until the promise is kept, then shrunk one by one and by exchange.

    Args:
        build: replicas to the allocation, its pools in the order of the counts.

    None if nothing within ``search.gpus_max`` and ``TRIALS_MAX`` simulations keeps it.
    """
    scenario = trial.scenario
    seen: dict[Counts, Metrics] = {}

    def look(counts: Counts) -> Metrics | None:
        if counts not in seen:
            if len(seen) >= TRIALS_MAX or sum(counts) > scenario.search.gpus_max or min(counts) < 1:
                return None
            seen[counts] = trial.run(build(counts))[0]
        return seen[counts]

    def keeps(counts: Counts) -> bool:
        found = look(counts)
        return found is not None and found.slo_attainment_ratio >= scenario.slo.attainment_ratio

    names = [pool.name for pool in build((1,) * len(start)).pools]
    counts = start
    while not keeps(counts):
        found = look(counts)
        if found is None:
            return None
        busy = [found.busy_ratio[name] + found.loading_ratio[name] for name in names]
        busiest = busy.index(max(busy))
        counts = tuple(
            n + (max(1, round(STEP_RATIO * sum(counts))) if k == busiest else 0) for k, n in enumerate(counts)
        )
    step = max(1, round(STEP_RATIO * sum(counts)))
    while True:
        smaller = next((one for one in _smaller(counts, step) if keeps(one)), None)
        if smaller is not None:
            counts = smaller
        elif step == 1:
            return counts
        else:
            step = 1


def start_counts(trial: Trial, fleet: Fleet, loads: Mapping[str, float]) -> Counts:
    """Each pool at ``START_LOAD`` of the work that goes there."""
    workload = trial.workload
    is_apart = np.zeros(len(workload), dtype=np.bool_)
    if fleet.in_process is None:
        is_apart[:] = True
    elif fleet.on_workers:
        codes = {code for code, name in enumerate(workload.controlnet_names) if name not in fleet.in_process}
        is_apart[:] = [bool(codes.intersection(used)) for used in workload.controlnets]
    counts = []
    if fleet.in_process is not None:
        counts.append(float(trial.services["colocated"].alone_s[~is_apart].sum()) / workload.duration_s)
    if fleet.on_workers:
        table = trial.services["decoupled"]
        counts.append(float(table.alone_s[is_apart].sum()) / workload.duration_s)
        share = float(table.controlnet_work_s[is_apart].sum()) / max(1e-9, float(table.controlnet_work_s.sum()))
        hosted = {name for _, names in fleet.on_workers for name in names}
        for _, names in fleet.on_workers:
            rest = sum(load for name, load in loads.items() if name not in hosted) if ANY in names else 0.0
            counts.append(share * (sum(loads.get(name, 0.0) for name in names) + rest))
    return tuple(max(1, math.ceil(load / START_LOAD)) for load in counts)


def _smaller(counts: Counts, step: int) -> list[Counts]:
    """A step less of one pool; if the step is 1, also two less of one and one more of another."""
    pools = range(len(counts))
    found = [tuple(n - step * (k == taken) for k, n in enumerate(counts)) for taken in pools]
    if step == 1:
        found += [
            tuple(n - 2 * (k == taken) + (k == given) for k, n in enumerate(counts))
            for taken in pools
            for given in pools
            if given != taken
        ]
    return [one for one in found if min(one) >= 1]
