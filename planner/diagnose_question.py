"""What ``diffplan diagnose`` is asked: the user's present service — traffic, fleet, and, if there is one, the log of what happened."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, cast, get_args

import numpy as np
import pandas as pd

from engine.allocation import Allocation, Topology, read_allocation
from planner.attribution import Weights
from planner.candidates import shapes_of
from planner.replication import Inputs, load_inputs, service_table
from planner.scenario import SAMPLE_PREFIX, Scenario, ScenarioTopology, load_scenario, shipped_scenarios
from planner.service import STACK_OF, ServiceTable
from planner.traffic import build_traffic, stream_seed
from planner.workload import Workload
from traces.problems import InputError, Problem, one_problem
from traces.reader import read_table
from traces.records import REQUEST_RECORD_COLUMNS

SCENARIO_SUFFIXES: Final = (".yaml", ".yml")
LOG_MATCH_MIN: Final = 0.99
"""Less of the trace than this in the log, or the reverse, and the two are not of one service."""


@dataclass(frozen=True, slots=True)
class PresentFleet:
    """How the user says the service runs today; ``None`` where nothing was said."""

    topology: str | None = None
    n_replicas: int | None = None
    n_controlnet_replicas: int = 0
    allocation: Path | None = None


@dataclass(frozen=True, slots=True)
class TraceDefaults:
    """What a trace file does not say and a scenario would."""

    profile: str = "h200"
    latency_s: float = 60.0
    attainment_ratio: float = 0.95


@dataclass(frozen=True, slots=True, eq=False)
class Present:
    """The present service, ready to be simulated."""

    scenario: Scenario
    folder: Path
    inputs: Inputs
    workload: Workload
    topology: Topology
    service: ServiceTable
    weights: Weights
    assumptions: tuple[str, ...]


def load_question(name: str, defaults: TraceDefaults) -> tuple[Scenario, Path, tuple[str, ...]]:
    """A scenario, or a trace with stated defaults; also what had to be taken for granted.

    Raises:
        InputError: neither can be read.
    """
    is_sample = name.startswith(SAMPLE_PREFIX)
    is_scenario = (
        name.removeprefix(SAMPLE_PREFIX) in shipped_scenarios()
        if is_sample
        else name.lower().endswith(SCENARIO_SUFFIXES)
    )
    if is_scenario:
        scenario, folder = load_scenario(name)
        return scenario, folder, ()
    reference = name if is_sample else str(Path(name).resolve())
    profile = defaults.profile
    plain = {
        "name": Path(name.removeprefix(SAMPLE_PREFIX)).stem[:100] or "trace",
        "traffic": {"trace": reference},
        "slo": {"latency_s": defaults.latency_s, "attainment_ratio": defaults.attainment_ratio},
        "profile": {"name": profile, "extrapolate": True},
    }
    assumptions = (
        f"The promise is taken as {defaults.attainment_ratio:.0%} within {defaults.latency_s:g} s (--slo-seconds, --slo-ratio).",
        f"Latencies are those of profile {profile} (--profile), extrapolated where the trace leaves its measured range.",
        "Prices and sizes are a scenario's defaults; write a scenario to state yours.",
    )
    return Scenario.model_validate(plain), Path.cwd(), assumptions


def load_present(
    scenario: Scenario, folder: Path, fleet: PresentFleet, assumptions: tuple[str, ...]
) -> tuple[Present, Allocation | None]:
    """Traffic and service times of the present service, and its allocation if the user named one.

    Raises:
        InputError: the fleet is contradictory, mixed, or of a topology that cannot be modelled.
    """
    inputs = load_inputs(scenario, folder)
    workload = build_traffic(scenario, folder).workload
    if fleet.allocation is not None:
        if fleet.topology is not None or fleet.n_replicas is not None:
            raise one_problem("--allocation, --topology", "got both", "one of the two")
        allocation = read_allocation(fleet.allocation)
        topology = _only_topology(allocation, inputs.gpu_kind, str(fleet.allocation))
        return _present(scenario, folder, inputs, workload, topology, allocation, assumptions), allocation
    known = get_args(ScenarioTopology)
    asked = fleet.topology or "diffusers"
    if asked not in known:
        raise one_problem("--topology", f"got {asked!r}", f"one of {', '.join(known)}")
    topology = cast(Topology, asked)
    if fleet.topology is None:
        assumptions = (
            *assumptions,
            "The present service is taken to be the stock Diffusers pipeline (--topology, or --allocation FILE).",
        )
    present = _present(scenario, folder, inputs, workload, topology, None, assumptions)
    if fleet.n_replicas is None:
        return present, None
    shape = shapes_of(scenario, topology, workload, present.service, inputs.sizes, inputs.facts, inputs.gpu_kind)[0]
    if len(shape.controlnet_pools) != (1 if fleet.n_controlnet_replicas else 0):
        needs = "1 or more for decoupled" if shape.controlnet_pools else f"0 for {topology} on this traffic"
        raise one_problem("--controlnet-replicas", f"got {fleet.n_controlnet_replicas}", needs)
    counts = (fleet.n_replicas, fleet.n_controlnet_replicas) if shape.controlnet_pools else (fleet.n_replicas,)
    return present, shape.allocation(counts)


def _only_topology(allocation: Allocation, gpu_kind: str, where: str) -> Topology:
    topologies = {pool.topology for pool in allocation.pools_of("base")}
    kinds = {pool.gpu_kind for pool in allocation.pools}
    problems = []
    if len(topologies) != 1:
        problems.append(Problem(where, f"its base pools are {', '.join(sorted(topologies))}", "one topology"))
    if kinds != {gpu_kind}:
        problems.append(Problem(where, f"its GPUs are {', '.join(sorted(kinds))}", f"{gpu_kind}, the profile's"))
    if problems:
        raise InputError(problems)
    return topologies.pop()


def _present(
    scenario: Scenario,
    folder: Path,
    inputs: Inputs,
    workload: Workload,
    topology: Topology,
    allocation: Allocation | None,
    assumptions: tuple[str, ...],
) -> Present:
    service = table_of(scenario, inputs, workload, topology, allocation)
    weights = weights_of(scenario, inputs, workload, service, allocation)
    return Present(scenario, folder, inputs, workload, topology, service, weights, assumptions)


def table_of(
    scenario: Scenario, inputs: Inputs, workload: Workload, topology: Topology, allocation: Allocation | None
) -> ServiceTable:
    """Service times with the fitted profile; every change of a diagnosis draws the same noise for the same request."""
    seed = stream_seed(scenario.simulation.seed, "noise")
    return service_table(
        scenario, inputs, workload, topology, draw=None, noise_seed=seed, allocation=allocation
    )  # fmt: skip


def weights_of(
    scenario: Scenario, inputs: Inputs, workload: Workload, service: ServiceTable, allocation: Allocation | None
) -> Weights:
    """How each request's denoising divides: the differences between its time with and without ControlNets and LoRAs."""
    nothing: tuple[tuple[int, ...], ...] = ((),) * len(workload)
    without_loras = replace(workload, loras=nothing)
    bare = replace(without_loras, controlnets=nothing, control_steps=((),) * len(workload))
    plain_s = table_of(scenario, inputs, bare, service.topology, allocation).denoise_alone_s
    controlled_s = table_of(scenario, inputs, without_loras, service.topology, allocation).denoise_alone_s
    return Weights(
        plain_s=plain_s,
        # a step whose ControlNets run elsewhere may take less than the fused step: then they add nothing
        controlnet_s=np.maximum(controlled_s - plain_s, 0.0),
        lora_s=np.maximum(service.denoise_alone_s - controlled_s, 0.0),
        remote_work_s=service.controlnet_work_s,
        lora_weight=inputs.sizes.of_loras(workload.lora_names).astype(np.float64),
        counts_windows=STACK_OF[service.topology] == "engine",
    )


def read_log(path: Path, workload: Workload) -> pd.DataFrame:
    """Request records of the present service, row i for the workload's request i.

    Raises:
        InputError: the log cannot be read, names a request twice, or is not of this trace.
    """
    frame = read_table(path, REQUEST_RECORD_COLUMNS)
    names = frame["request_id"]
    if names.duplicated().any():
        twice = names[names.duplicated()].iloc[0]
        raise one_problem(str(path), f"has request {twice!r} twice", "each request once")
    found = frame.set_index("request_id")
    known = [name in found.index for name in workload.request_ids]
    n_known = sum(known)
    if n_known != len(workload) or len(frame) > n_known / LOG_MATCH_MIN:
        raise one_problem(
            str(path), f"has {n_known} of the trace's {len(workload)} requests, and {len(frame) - n_known} others",
            "records of exactly the requests of the trace",
            "Cut the trace to the log's window, and leave scaling out",
        )  # fmt: skip
    return found.loc[list(workload.request_ids)].reset_index()
