"""One allocation under one scenario: what ``diffplan simulate`` runs, prints and writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.allocation import Allocation, read_allocation, to_json
from planner.candidates import shapes_of
from planner.cost import Cost, cost_of
from planner.explain import gpus_words, usd
from planner.files import make_folder, write_texts
from planner.plan_files import write_logs
from planner.plan_run import scenario_price
from planner.replication import Run, load_inputs, run_allocation, service_table
from planner.scenario import Scenario, ScenarioTopology
from planner.traffic import build_traffic, stream_seed
from traces.problems import one_problem


@dataclass(frozen=True, slots=True, eq=False)
class Simulation:
    """One run with its price."""

    scenario: Scenario
    allocation: Allocation
    run: Run
    cost: Cost
    grades: dict[str, str]

    def to_plain(self) -> dict[str, Any]:
        """JSON-ready."""
        per_image = self.cost.cost_usd_per_image
        return {
            "scenario": self.scenario.name,
            "slo_latency_s": self.scenario.slo.latency_s,
            "n_gpus": self.allocation.n_gpus,
            "cost_usd_per_month": self.cost.cost_usd_per_month,
            "cost_usd_per_1000_images": 1000 * per_image if per_image != float("inf") else None,
            "metrics": self.run.metrics.to_plain(),
            "grades": self.grades,
            "allocation": json.loads(to_json(self.allocation)),
        }


def chosen_allocation(
    scenario: Scenario,
    folder: Path,
    file: Path | None,
    topology: str | None,
    replicas: int | None,
    controlnet_replicas: int,
) -> Allocation:
    """The allocation that the command line names.

    Raises:
        InputError: both or neither of file and topology are given, or they do not fit together.
    """
    if (file is None) == (topology is None):
        raise one_problem(
            "--allocation, --topology", "got both" if file else "got neither", "one of the two",
            "Give a plan's allocation.json, or --topology with --replicas",
        )  # fmt: skip
    if file is not None:
        allocation = read_allocation(file)
        topologies = {pool.topology for pool in allocation.pools_of("base")}
        if len(topologies) > 1:
            raise one_problem(
                str(file), f"has base pools of {', '.join(sorted(topologies))}", "one topology", "Split the file"
            )
        return allocation
    known = get_args(ScenarioTopology)
    name = next((item for item in known if item == topology), None)
    if name is None:
        raise one_problem("--topology", f"got {topology!r}", f"one of {', '.join(known)}")
    if replicas is None:
        raise one_problem("--replicas", "is missing", "a whole number, 1 or more", "Add it beside --topology")
    inputs = load_inputs(scenario, folder)
    workload = build_traffic(scenario, folder).workload
    service = service_table(scenario, inputs, workload, name, draw=None, noise_seed=0)
    shape = shapes_of(scenario, name, workload, service, inputs.sizes, inputs.facts, inputs.gpu_kind)[0]
    if bool(shape.controlnet_pools) != (controlnet_replicas > 0):
        needs = "1 or more for decoupled" if shape.controlnet_pools else f"0 for {name}"
        raise one_problem("--controlnet-replicas", f"got {controlnet_replicas}", needs)
    return shape.allocation((replicas, controlnet_replicas) if controlnet_replicas else (replicas,))


def simulate_once(scenario: Scenario, folder: Path, allocation: Allocation) -> Simulation:
    """Runs the scenario's traffic as stated, with the fitted profile.

    Raises:
        InputError: the allocation is for another GPU kind than the profile, or an input cannot be used.
    """
    inputs = load_inputs(scenario, folder)
    others = sorted({pool.gpu_kind for pool in allocation.pools} - {inputs.gpu_kind})
    if others:
        raise one_problem(
            "allocation gpu_kind", f"got {', '.join(others)}", f"{inputs.gpu_kind}, the kind of profile {scenario.profile.name!r}",
            "Take an allocation for that kind, or a profile measured on the other",
        )  # fmt: skip
    price = scenario_price(scenario, folder, inputs)
    workload = build_traffic(scenario, folder).workload
    topology = allocation.pools_of("base")[0].topology
    seed = stream_seed(scenario.simulation.seed, "noise")
    service = service_table(scenario, inputs, workload, topology, draw=None, noise_seed=seed)
    run = run_allocation(scenario, inputs, workload, allocation, service)
    hours = scenario.prices.hours_per_month
    cost = cost_of(allocation.n_gpus, run.in_slo_images_per_s, price.price_usd_per_gpu_hour, hours)
    return Simulation(
        scenario, allocation, run, cost, {law: str(grade) for law, grade in sorted(service.grades.items())}
    )


def write_simulation(done: Simulation, out: Path) -> list[Path]:
    """``metrics.json``, ``allocation.json`` and the records."""
    make_folder(out)
    metrics = json.dumps(done.to_plain(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    texts = {"metrics.json": metrics, "allocation.json": to_json(done.allocation)}
    return [*write_texts(out, texts), *write_logs(done.run, out)]


def print_simulation(done: Simulation, files: Sequence[Path], console: Console) -> None:
    """The run's figures as a table."""
    metrics = done.run.metrics
    slo = done.scenario.slo
    meets = metrics.slo_attainment_ratio >= slo.attainment_ratio
    console.print(
        Text(
            f"{gpus_words(done.allocation.n_gpus)} serve {metrics.slo_attainment_ratio:.2%} of the offered requests within {slo.latency_s:g} s: "
            f"{'meets' if meets else 'misses'} {slo.attainment_ratio:.2%} in this one run.",
            style="bold",
        )
    )
    if metrics.is_saturated:
        console.print(
            Text("The queue kept growing: this allocation cannot carry the load, and its latencies mean nothing.")
        )
    table = Table(pad_edge=False, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    rows = [
        ("offered / served per s", f"{metrics.offered_per_s:.3g} / {metrics.served_per_s:.3g}"),
        (
            "latency p50 / p95 / p99",
            f"{metrics.latency_p50_s:.2f} / {metrics.latency_p95_s:.2f} / {metrics.latency_p99_s:.2f} s",
        ),
        ("mean wait in queue", f"{metrics.queue_wait_mean_s:.2f} s"),
        ("rejected", f"{metrics.n_rejected} of {metrics.n_offered}"),
        ("checkpoint switches", f"{metrics.switch_ratio:.1%} of the requests"),
        ("LoRA uses found in the host tier", f"{metrics.lora_warm_hit_ratio:.1%}"),
        ("ControlNet uses found on the device", f"{metrics.controlnet_warm_hit_ratio:.1%}"),
        *((f"pool {name} busy", f"{ratio:.0%}") for name, ratio in metrics.busy_ratio.items()),
        ("cost a month", usd(done.cost.cost_usd_per_month)),
    ]
    for label, value in rows:
        table.add_row(label, value)
    console.print(table)
    console.print(Text(f"Files in {files[0].parent}: {', '.join(path.name for path in files)}"), soft_wrap=True)
