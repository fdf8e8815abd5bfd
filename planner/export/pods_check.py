"""Simulates pods as they are exported: each alone with its share of the traffic, where the plan simulated one queue for all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from planner.export.cells import Cell
from planner.export.source import Source
from traces.problems import one_problem

SCENARIO_FILE: Final = "scenario.resolved.yaml"


@dataclass(frozen=True, slots=True)
class PodFigures:
    """One run of one kind of pod."""

    cell: Cell
    slo_attainment_ratio: float
    latency_p95_s: float


def simulate_pods(plan_path: Path, cells: tuple[Cell, ...]) -> tuple[PodFigures, ...]:
    """One run of each kind of pod with an equal share of the scenario's traffic, as a Service gives it.

    The traffic is thinned by the scenario's own scaling; pods of autoscaled pools are simulated at a fixed size of one.

    Raises:
        InputError: the plan's folder has no scenario, its inputs are gone, or pods of several groups share the traffic.
    """
    from planner.scenario import load_scenario
    from planner.simulate_run import simulate_once

    path = (plan_path if plan_path.is_dir() else plan_path.parent) / SCENARIO_FILE
    if not path.is_file():
        raise one_problem(
            "--check-pods", f"finds no {SCENARIO_FILE} beside the plan", "the folder that 'diffplan plan' wrote",
            "Give that folder, or leave --check-pods out",
        )  # fmt: skip
    if len({cell.group for cell in cells}) > 1:
        raise one_problem(
            "--check-pods", "meets pods that serve different requests", "a plan with one base pool",
            "Leave --check-pods out",
        )  # fmt: skip
    scenario, folder = load_scenario(str(path))
    n_pods = sum(cell.n_pods for cell in cells)
    traffic = scenario.traffic.model_copy(update={"scale_factor": scenario.traffic.scale_factor / n_pods})
    figures = []
    for cell in cells:
        done = simulate_once(scenario.model_copy(update={"traffic": traffic}), folder, cell.allocation)
        metrics = done.run.metrics
        figures.append(PodFigures(cell, metrics.slo_attainment_ratio, metrics.latency_p95_s))
    return tuple(figures)


def pod_notes(figures: tuple[PodFigures, ...], source: Source) -> Iterator[str]:
    """What the runs say, a sentence a kind of pod and one on all of them."""
    n_pods = sum(figure.cell.n_pods for figure in figures)
    plan = source.plan
    for figure in figures:
        yield (
            f"Simulated alone with 1/{n_pods} of the traffic, a pod of diffplan-{figure.cell.name} ({figure.cell.n_pods} of "
            f"{n_pods}, {figure.cell.n_gpus} GPUs) serves {figure.slo_attainment_ratio:.2%} within {plan.slo_latency_s:g} s, "
            f"p95 {figure.latency_p95_s:.2f} s."
        )
    overall = sum(figure.slo_attainment_ratio * figure.cell.n_pods for figure in figures) / n_pods
    verdict = "keeps" if overall >= plan.slo_attainment_ratio else "BREAKS"
    yield (
        f"All pods together: {overall:.2%} in time, {plan.slo_attainment_ratio:.2%} promised. As exported, behind a Service "
        f"that knows no queues, the cluster {verdict} the promise."
    )
