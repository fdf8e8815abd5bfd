"""One allocation under one scenario: what ``diffplan simulate`` runs, prints and writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.allocation import Allocation, read_allocation, to_json
from planner.bootstrap import percentile_intervals
from planner.candidates import shapes_of
from planner.cost import Cost, cost_of, cost_of_hours
from planner.explain import gpus_words, usd
from planner.files import make_folder, write_texts
from planner.plan_files import write_logs
from planner.plan_run import scenario_price
from planner.replication import Run, inputs_by_kind, load_inputs, run_fleet, service_table
from planner.scenario import Scenario, ScenarioTopology
from planner.simulator import mechanisms_in_use
from planner.simulator.allocated import gpu_hours, places
from planner.statistics import warmup_cut_s
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
            "gpu_hours_per_month": self.cost.gpu_hours_per_month,
            "mechanisms": list(mechanisms_in_use(self.allocation, self.scenario.world.world(0))),
            "cost_usd_per_month": self.cost.cost_usd_per_month,
            "cost_usd_per_1000_images": 1000 * per_image if per_image != float("inf") else None,
            "metrics": self.run.metrics.to_plain(),
            "latency_intervals": self.latency_intervals(),
            "warmup_seen_s": self.warmup_seen_s,
            "grades": self.grades,
            "allocation": json.loads(to_json(self.allocation)),
        }

    @property
    def warmup_seen_s(self) -> float:
        """From when on latencies no longer remember the empty start (MSER-5)."""
        return warmup_cut_s(self.run.result.requests)

    def latency_intervals(self) -> dict[str, dict[str, Any]]:
        """``all``, ``plain`` and ``add_on`` requests: each percentile with its block-bootstrap interval over this run."""
        frame = self.run.result.requests
        counted = frame[(frame["status"] == "done") & (frame["arrival_s"] >= self.run.result.offered_until_s - self.run.metrics.window_s)]  # fmt: skip
        has_add_ons = (counted["n_controlnets"] + counted["n_loras"]) > 0
        found = {}
        for name, rows in (("all", counted), ("plain", counted[~has_add_ons]), ("add_on", counted[has_add_ons])):
            if len(rows):
                latency_s = rows["latency_s"].to_numpy(dtype=np.float64)
                seed = stream_seed(self.scenario.simulation.seed, "percentiles")
                by_level = percentile_intervals(latency_s, confidence=self.scenario.slo.confidence, seed=seed)
                found[name] = {f"p{100 * level:g}_s": item.to_plain() for level, item in by_level.items()}
        return found


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
        return read_allocation(file)
    known = get_args(ScenarioTopology)
    name = next((item for item in known if item == topology), None)
    if name is None:
        raise one_problem("--topology", f"got {topology!r}", f"one of {', '.join(known)}")
    if replicas is None:
        raise one_problem("--replicas", "is missing", "a whole number, 1 or more", "Add it beside --topology")
    inputs = load_inputs(scenario, folder)
    workload = build_traffic(scenario, folder).workload
    service = service_table(scenario, inputs, workload, name, draw=None, noise_seed=0)
    link = inputs.link(scenario.policies.link)
    shape = shapes_of(
        scenario, name, workload, service, inputs.sizes, inputs.facts, inputs.gpu_kind, inputs.workers, link
    )[0]
    if bool(shape.controlnet_pools) != (controlnet_replicas > 0):
        needs = "1 or more for decoupled" if shape.controlnet_pools else f"0 for {name}"
        raise one_problem("--controlnet-replicas", f"got {controlnet_replicas}", needs)
    return shape.allocation((replicas, controlnet_replicas) if controlnet_replicas else (replicas,))


def simulate_once(scenario: Scenario, folder: Path, allocation: Allocation) -> Simulation:
    """Runs the scenario's traffic as stated, with the fitted profile.

    Raises:
        InputError: the allocation is for another GPU kind than the profile, or an input cannot be used.
    """
    kinds = inputs_by_kind(scenario, folder, {pool.gpu_kind for pool in allocation.pools})
    usd_per_gpu_hour = {
        kind: scenario_price(scenario, folder, inputs).price_usd_per_gpu_hour for kind, inputs in kinds.items()
    }
    workload = build_traffic(scenario, folder).workload
    seed = stream_seed(scenario.simulation.seed, "noise")
    run, grades = run_fleet(scenario, folder, workload, allocation, seed)
    return Simulation(scenario, allocation, run, _cost(scenario, allocation, run, usd_per_gpu_hour), grades)


def _cost(scenario: Scenario, allocation: Allocation, run: Run, usd_per_gpu_hour: Mapping[str, float]) -> Cost:
    """A month like this run: GPUs at their kind's price, for the time they were allocated."""
    per_month = scenario.prices.hours_per_month
    images_per_s = run.in_slo_images_per_s
    if len(usd_per_gpu_hour) == 1 and not {"autoscale", "reclaims"} & set(
        mechanisms_in_use(allocation, scenario.world.world(0))
    ):
        return cost_of(allocation.n_gpus, images_per_s, next(iter(usd_per_gpu_hour.values())), per_month)
    horizon_h = run.result.horizon_s / 3600.0
    hours = gpu_hours(run.result.workers, 0.0, run.result.horizon_s)
    usd = sum(hours[pool.name] * usd_per_gpu_hour[pool.gpu_kind] for pool in allocation.pools)
    most = sum(-(-places(pool) // pool.workers_per_gpu) * pool.n_gpus_per_replica for pool in allocation.pools)
    return cost_of_hours(most, sum(hours.values()) / horizon_h, usd / horizon_h, images_per_s, per_month)


def write_simulation(done: Simulation, out: Path) -> list[Path]:
    """``metrics.json``, ``allocation.json`` and the records."""
    make_folder(out)
    metrics = json.dumps(done.to_plain(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    texts = {"metrics.json": metrics, "allocation.json": to_json(done.allocation)}
    return [*write_texts(out, texts), *write_logs(done.run, out)]


def _fleet_words(done: Simulation) -> str:
    """The fleet's size; of one whose size changes its mean."""
    mean = done.cost.gpu_hours_per_month / done.scenario.prices.hours_per_month
    if abs(mean - done.allocation.n_gpus) < 1e-9:
        return gpus_words(done.allocation.n_gpus)
    return f"{mean:.1f} GPUs on average (at most {done.cost.n_gpus})"


def print_simulation(done: Simulation, files: Sequence[Path], console: Console) -> None:
    """The run's figures as a table."""
    metrics = done.run.metrics
    slo = done.scenario.slo
    meets = metrics.slo_attainment_ratio >= slo.attainment_ratio
    console.print(
        Text(
            f"{_fleet_words(done)} serve {metrics.slo_attainment_ratio:.2%} of the offered requests within {slo.latency_s:g} s: "
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
        *_interval_rows(done),
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
    for grade in ("extrapolated", "assumed"):
        laws = [law for law, said in done.grades.items() if said == grade]
        if laws:
            console.print(
                Text(f"Latency laws {grade}: {len(laws)} of {len(done.grades)} ({', '.join(laws)})."), soft_wrap=True
            )
    warmup_s = done.warmup_seen_s
    left_out_s = done.run.result.offered_until_s - metrics.window_s
    if warmup_s > left_out_s:
        console.print(
            Text(f"Latencies settle after {warmup_s:.0f} s (MSER-5), the first {left_out_s:.0f} s are left out: simulation.warmup_s may be too short."),
            soft_wrap=True,
        )  # fmt: skip
    console.print(Text(f"Files in {files[0].parent}: {', '.join(path.name for path in files)}"), soft_wrap=True)


def _interval_rows(done: Simulation) -> list[tuple[str, str]]:
    """p95 of all, plain and add-on requests with its interval."""
    words = {
        "all": "p95, all requests",
        "plain": "p95, requests without add-ons",
        "add_on": "p95, requests with add-ons",
    }
    rows = []
    for name, by_level in done.latency_intervals().items():
        item = by_level["p95_s"]
        between = "" if item["low"] is None else f" ({item['low']:.2f} … {item['high']:.2f})"
        rows.append((words[name], f"{item['mean']:.2f} s{between}"))
    return rows
