"""Simulates a cluster as it is exported, and compares it with the plan: what one queue becomes, and what would keep the promise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from engine.allocation import Allocation
from engine.policies.autoscale_settings import Autoscale
from planner.export.balanced_run import run_pods
from planner.export.cells import cells_of
from planner.export.cluster import Cluster
from planner.export.pods_figures import Front, PodsCheck, PodsFigures, Proposal
from planner.export.scaled_run import run_scaled_pods
from planner.export.source import Source
from planner.replication import load_inputs, warmup_of
from planner.scenario import Scenario, load_scenario
from planner.statistics import t_interval
from planner.traffic import build_traffic, busiest_stretch
from planner.workload import Workload
from traces.problems import InputError, one_problem

SCENARIO_FILE: Final = "scenario.resolved.yaml"
WORK_MAX: Final = 2_000_000
"""Requests times pods of one run; of more, the busiest stretch is simulated."""
REPETITIONS_MAX: Final = 10
SCALED_REPETITIONS_MAX: Final = 3
"""As many as plans give an autoscaled variant."""
GROWTH_MAX: Final = 2.0
"""No proposal has more than this many times the plan's base replicas."""
REPAIRS_MAX: Final = 4
Say = Callable[[str], None]


def front_of(cluster: Cluster) -> Front:
    """What stands before the pods of this cluster."""
    if cluster.balancer is None:
        return Front("random")
    return Front("least_outstanding", cluster.balancer.replicas)


def check_pods(plan_path: Path, source: Source, cluster: Cluster, say: Say = lambda text: None) -> PodsCheck:
    """Simulates the pods over the plan's repetitions; if they break the promise, looks for the fleet that keeps it.

    The repetitions have the plan's arrivals, profile draws and noise: ten at most, three where pods are scaled.

    Raises:
        InputError: the plan's folder has no scenario, its inputs are gone, pools scale in a way that is not simulated, or several
            base pools share the traffic.
    """
    cells = cells_of(source.allocation, cluster.gpus_per_node)
    if len({cell.group for cell in cells}) > 1:
        raise one_problem(
            "--check-pods", "meets pods that serve different requests", "a plan with one base pool",
            "Leave --check-pods out",
        )  # fmt: skip
    bench = _Bench(plan_path, source, front_of(cluster), cluster.gpus_per_node)
    say(f"simulating {bench.n_pods} pods over {bench.n_repetitions} repetitions (--no-check-pods leaves this out)")
    exported, by_repetition = bench.figures(source.allocation, bench.front)
    by_lot = bench.by_lot(source.allocation, exported)
    proposal = None
    if exported.low < bench.promised_ratio:
        say("they break the promise: looking for a fleet that keeps it")
        proposal = bench.propose(source.allocation, by_repetition.index(min(by_repetition)))
    settings = _settings(source.allocation)
    return PodsCheck(
        bench.front, exported, by_lot, bench.promised_ratio, bench.slo_latency_s, bench.n_repetitions,
        len(bench.workloads[0]), None if settings is None else (settings.min_replicas, settings.max_replicas), bench.is_whole, proposal,
    )  # fmt: skip


def _settings(allocation: Allocation) -> Autoscale | None:
    return allocation.pools_of("base")[0].autoscale


class _Bench:
    """A plan's traffic, and fleets tried on it."""

    def __init__(self, plan_path: Path, source: Source, front: Front, gpus_per_node: int) -> None:
        path = (plan_path if plan_path.is_dir() else plan_path.parent) / SCENARIO_FILE
        if not path.is_file():
            raise one_problem(
                "--check-pods", f"finds no {SCENARIO_FILE} beside the plan", "the folder that 'diffplan plan' wrote",
                "Give that folder, or leave --check-pods out",
            )  # fmt: skip
        self._scenario: Scenario
        self._scenario, folder = load_scenario(str(path))
        self._inputs = load_inputs(self._scenario, folder)
        if self._inputs.profile.profile_id != source.plan.ids.profile_id:
            raise one_problem(
                "--check-pods", f"finds profile {self._inputs.profile.profile_id}, not the plan's", source.plan.ids.profile_id,
                "Plan again, or leave --check-pods out",
            )  # fmt: skip
        self.front, self._gpus_per_node = front, gpus_per_node
        self.promised_ratio, self.slo_latency_s = source.plan.slo_attainment_ratio, source.plan.slo_latency_s
        settings = _settings(source.allocation)
        self.n_pods = len(self._pods(source.allocation)) if settings is None else settings.max_replicas
        most = REPETITIONS_MAX if settings is None else SCALED_REPETITIONS_MAX
        self.n_repetitions = min(self._scenario.simulation.replications, most)
        whole = [build_traffic(self._scenario, folder, k).workload for k in range(self.n_repetitions)]
        n_max = max(1000, WORK_MAX // self.n_pods)
        self.workloads = [busiest_stretch(workload, n_max) for workload in whole]
        self.is_whole = len(self.workloads[0]) == len(whole[0])

    def figures(self, allocation: Allocation, front: Front) -> tuple[PodsFigures, list[float]]:
        """Over all repetitions, and the attainment of each.

        Raises:
            InputError: the allocation cannot be cut into pods or simulated.
        """
        runs = [self._run(allocation, front, k) for k in range(self.n_repetitions)]
        attained = [run[0] for run in runs]
        interval = t_interval(attained, self._scenario.slo.confidence)
        low = interval.mean if math.isnan(interval.low) else interval.low
        high = interval.mean if math.isnan(interval.high) else interval.high
        settings = _settings(allocation)
        n_pods = len(self._pods(allocation)) if settings is None else settings.max_replicas
        mean_gpus = float(np.mean([run[2] for run in runs]))
        latency = np.mean([run[1] for run in runs], axis=0).tolist()
        figures = PodsFigures(allocation.n_gpus, mean_gpus, n_pods, interval.mean, low, min(1.0, high), *latency)
        return figures, attained

    def by_lot(self, allocation: Allocation, exported: PodsFigures) -> PodsFigures:
        """The allocation behind a Service alone; ``exported`` are its figures as exported."""
        if self.front.balancing == "random" or exported.n_pods == 1:
            return exported
        return self.figures(allocation, Front("random"))[0]

    def _pods(self, allocation: Allocation) -> list[Allocation]:
        cells = cells_of(allocation, self._gpus_per_node)
        return [cell.allocation for cell in cells for _ in range(cell.n_pods)]

    def _run(self, allocation: Allocation, front: Front, repetition: int) -> tuple[float, list[float], float]:
        """Share in time, and the 50, 95 and 99 % latency, of requests that arrive after the warm-up; GPUs on average."""
        workload: Workload = self.workloads[repetition]
        settings = _settings(allocation)
        if settings is None:
            served = run_pods(self._scenario, self._inputs, workload, self._pods(allocation), front, repetition)
            frame, mean_gpus = served.requests, float(allocation.n_gpus)
        else:
            (cell,) = cells_of(allocation, self._gpus_per_node)
            scaled = run_scaled_pods(
                self._scenario, self._inputs, workload, cell.allocation, settings, cell.n_pods, front, repetition
            )
            frame, mean_gpus = scaled.requests, scaled.mean_gpus
        frame = frame[frame["arrival_s"] >= warmup_of(self._scenario, workload)]
        latency_s = frame["latency_s"].to_numpy(dtype=np.float64)[(frame["status"] == "done").to_numpy(dtype=np.bool_)]
        in_time = float((latency_s <= self.slo_latency_s).sum()) / max(len(frame), 1)
        quantiles = np.quantile(latency_s, (0.5, 0.95, 0.99)) if len(latency_s) else np.full(3, math.nan)
        return in_time, quantiles.tolist(), mean_gpus

    def propose(self, planned: Allocation, worst: int) -> Proposal | None:
        """The smallest fleet found that keeps the promise: bisected on the worst repetition, grown until all of them hold.

        Base replicas are added, ControlNet replicas in proportion; of a pool that scales, its fewest replicas are raised.
        """
        n_base = sum(pool.n_replicas for pool in planned.pools_of("base"))
        settings = _settings(planned)
        most = max(1, math.ceil((GROWTH_MAX - 1.0) * n_base))
        if settings is not None:
            most = settings.max_replicas - settings.min_replicas
            if most == 0:
                return None
        bad, good = 0, most
        if not self._holds(_grown(planned, good), worst):
            return None
        while good - bad > 1:
            middle = (bad + good) // 2
            if self._holds(_grown(planned, middle), worst):
                good = middle
            else:
                bad = middle
        for _ in range(REPAIRS_MAX):
            larger = _grown(planned, good)
            figures = self._figures_if_possible(larger)
            if figures is not None and figures.low >= self.promised_ratio:
                return Proposal(larger, figures)
            good += max(1, round(0.03 * n_base))
            if good > most:
                return None
        return None

    def _holds(self, allocation: Allocation, repetition: int) -> bool:
        try:
            return self._run(allocation, self.front, repetition)[0] >= self.promised_ratio
        except InputError:  # cannot be cut into nodes: another size can
            return False

    def _figures_if_possible(self, allocation: Allocation) -> PodsFigures | None:
        try:
            return self.figures(allocation, self.front)[0]
        except InputError:
            return None


def _grown(planned: Allocation, n_more: int) -> Allocation:
    """The allocation with more base replicas, and ControlNet replicas in proportion; with more at least, where it scales."""
    settings = _settings(planned)
    if settings is not None:
        (base,) = planned.pools
        least = settings.min_replicas + n_more
        held = dataclasses.replace(settings, min_replicas=least)
        return dataclasses.replace(
            planned, pools=(dataclasses.replace(base, n_replicas=max(base.n_replicas, least), autoscale=held),)
        )
    n_base = sum(pool.n_replicas for pool in planned.pools_of("base"))
    ratio = (n_base + n_more) / n_base
    pools = tuple(
        dataclasses.replace(
            pool, n_replicas=pool.n_replicas + n_more if pool.role == "base" else math.ceil(round(pool.n_replicas * ratio, 9))
        )
        for pool in planned.pools
    )  # fmt: skip
    return dataclasses.replace(planned, pools=pools)
