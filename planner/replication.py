"""One run of one allocation under one scenario: what the search asks for again and again, and what the confirmation repeats."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from calibrate.profile import GRADES, Grade, LatencyProfile, OutOfDomainError
from engine.allocation import GIB, Allocation, LinkKind, Topology, read_catalogue
from planner.candidates import Counts, Shape
from planner.prices import Price, find_price, shipped_tables
from planner.profile_choice import is_carried_over, profile_of, with_workers_of
from planner.scenario import Scenario, resolve
from planner.search import QUEUE, Evaluation
from planner.service import ServiceTable, Sizes, build_service
from planner.simulator import ProfileFacts, SimulationResult, mechanisms_in_use, simulate
from planner.statistics import Metrics, summarise
from planner.traffic import build_traffic, stream_seed
from planner.workload import Workload
from traces.problems import one_problem

MIB: Final = 2**20
WARMUP_SHARE_MAX: Final = 0.2
"""A short window keeps at least four fifths of its requests, whatever warm-up the scenario asks for."""


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What a scenario names beside its traffic."""

    profile: LatencyProfile
    sizes: Sizes
    facts: ProfileFacts
    gpu_kind: str
    workers: WorkerKind | None = None
    """Of ControlNet workers, where they run on another GPU kind than their base replicas."""

    def profile_for(self, topology: Topology) -> LatencyProfile:
        """What a topology's service times are predicted with."""
        if self.workers is None or topology != "decoupled":
            return self.profile
        return with_workers_of(self.profile, self.workers.profile)

    def link(self, wanted: LinkKind) -> LinkKind:
        """The link between base replicas and ControlNet workers, for the one that the scenario wants.

        NVLink joins GPUs of one kind only: workers of another kind are taken to be on another host. A kind without NVLink, to
        which a profile was carried over, goes over PCIe.
        """
        if wanted != "nvlink":
            return wanted
        if self.workers is not None:
            return "network"
        law = "engine.residual_transfer."
        lacks_it = f"{law}nvlink" not in self.profile.laws and f"{law}pcie" in self.profile.laws
        return "pcie" if lacks_it and is_carried_over(self.profile) else wanted

    def facts_of(self, allocation: Allocation) -> ProfileFacts | dict[str, ProfileFacts]:
        """Memory facts, by pool where they differ."""
        if self.workers is None:
            return self.facts
        return {
            pool.name: self.workers.facts if pool.gpu_kind == self.workers.gpu_kind else self.facts
            for pool in allocation.pools
        }

    @property
    def profile_id(self) -> str:
        """Of all profiles that a run rests on."""
        own = self.profile.profile_id
        return own if self.workers is None else f"{own} with ControlNet workers of {self.workers.profile.profile_id}"


@dataclass(frozen=True, slots=True, eq=False)
class WorkerKind:
    """The GPU kind that ControlNet workers run on."""

    gpu_kind: str
    profile: LatencyProfile
    facts: ProfileFacts
    price_ratio: float
    """Price of one of its GPU-hours over one of the base replicas' kind."""
    gpus_max: int


@functools.lru_cache(maxsize=40)
def load_inputs(scenario: Scenario, folder: Path) -> Inputs:
    """Profile, sizes and memory facts (read once a process).

    Raises:
        InputError: a file cannot be used, the GPU kind is not the profile's, or that of ControlNet workers has no profile or price.
    """
    name = scenario.profile.name
    profile = profile_of(name, folder)
    if scenario.gpu.kind is not None and scenario.gpu.kind != profile.gpu_kind:
        raise one_problem(
            "scenario gpu.kind", f"got {scenario.gpu.kind!r}", f"{profile.gpu_kind!r}, the kind profile {name!r} was measured on",
            "Leave gpu.kind out, or name a profile measured on that kind",
        )  # fmt: skip
    add_ons = scenario.add_ons
    catalogue = read_catalogue(resolve(add_ons.catalogue, folder)) if add_ons.catalogue else None
    sizes = Sizes.from_profile(profile, lora_bytes=round(add_ons.lora_mib * MIB), catalogue=catalogue)
    if add_ons.controlnet_gib is not None:
        sizes = replace(sizes, controlnet_bytes=round(add_ons.controlnet_gib * GIB))
    if add_ons.checkpoint_gib is not None:
        sizes = replace(sizes, checkpoint_bytes=round(add_ons.checkpoint_gib * GIB))
    facts = ProfileFacts.from_profile(profile)
    if scenario.gpu.device_memory_gib is not None:
        facts = replace(facts, device_memory_gib=scenario.gpu.device_memory_gib)
    wanted = scenario.gpu.controlnet_kind
    inputs = Inputs(profile, sizes, facts, profile.gpu_kind)
    return inputs if wanted in (None, profile.gpu_kind) else replace(inputs, workers=_workers(scenario, folder, inputs))


def _workers(scenario: Scenario, folder: Path, inputs: Inputs) -> WorkerKind:
    wanted = str(scenario.gpu.controlnet_kind)
    known = sorted({inputs.gpu_kind, *(item.kind for item in scenario.gpu.others)})
    if wanted not in known:
        raise one_problem(
            "scenario gpu.controlnet_kind", f"got {wanted!r}", f"one of {', '.join(known)}",
            "Name a profile of that kind under gpu.others, or leave gpu.controlnet_kind out",
        )  # fmt: skip
    seen = seen_from(scenario, wanted)
    theirs = load_inputs(seen, folder)
    own_usd = scenario_price(scenario, folder, inputs).price_usd_per_gpu_hour
    ratio = scenario_price(seen, folder, theirs).price_usd_per_gpu_hour / own_usd
    return WorkerKind(wanted, theirs.profile, theirs.facts, ratio, seen.search.gpus_max)


def seen_from(scenario: Scenario, kind: str) -> Scenario:
    """The question as it would be asked about one of its ``gpu.others`` alone; raises KeyError if ``kind`` is none of them."""
    other = {item.kind: item for item in scenario.gpu.others}[kind]
    gpu = scenario.gpu.model_copy(
        update={"kind": kind, "device_memory_gib": other.device_memory_gib, "others": (), "controlnet_kind": None}
    )
    limits = scenario.search
    return scenario.model_copy(
        update={
            "profile": scenario.profile.model_copy(update={"name": other.profile}),
            "gpu": gpu,
            "prices": scenario.prices.model_copy(update={"price_usd_per_gpu_hour": other.price_usd_per_gpu_hour}),
            "search": limits.model_copy(update={"gpus_max": other.gpus_max}) if other.gpus_max else limits,
        }
    )


def scenario_price(scenario: Scenario, folder: Path, inputs: Inputs) -> Price:
    """The price the scenario asks for these inputs' kind of GPU; raises :class:`InputError` if there is none."""
    is_other = inputs.gpu_kind in {item.kind for item in scenario.gpu.others}
    wanted = seen_from(scenario, inputs.gpu_kind).prices if is_other else scenario.prices
    path = shipped_tables().get(wanted.table, resolve(wanted.table, folder))
    return find_price(path, inputs.gpu_kind, wanted.purchase, wanted.price_usd_per_gpu_hour)


def service_table(
    scenario: Scenario,
    inputs: Inputs,
    workload: Workload,
    topology: Topology,
    *,
    draw: int | None,
    noise_seed: int,
    allocation: Allocation | None = None,
) -> ServiceTable:
    """Service times of a workload; a request outside the measured box is the user's to decide on, so an InputError.

    With an allocation, also what its batches and links need.
    """
    policies = scenario.policies if allocation is None else allocation.policies
    links = () if allocation is None or "links" not in mechanisms_in_use(allocation) else allocation.links
    try:
        return build_service(
            workload,
            topology,
            inputs.profile_for(topology),
            inputs.sizes,
            link_kind=inputs.link(scenario.policies.link),
            lora_patch_by_step=policies.lora_patch_by_step,
            draw=draw,
            extrapolate=scenario.profile.extrapolate,
            noise_seed=noise_seed,
            forward_batch_max=policies.forward_batch_max,
            links=links,
            is_store_local=scenario.world.is_store_local,
        )
    except OutOfDomainError as error:
        raise one_problem(f"profile {scenario.profile.name}", str(error)) from None


def warmup_of(scenario: Scenario, workload: Workload) -> float:
    """Seconds of arrivals that are simulated and not counted."""
    span_s = float(workload.arrival_s[-1] - workload.arrival_s[0])
    return min(scenario.simulation.warmup_s, WARMUP_SHARE_MAX * span_s)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One simulated allocation with what it delivered."""

    metrics: Metrics
    in_slo_images_per_s: float
    result: SimulationResult


def run_allocation(
    scenario: Scenario,
    inputs: Inputs,
    workload: Workload,
    allocation: Allocation,
    service: ServiceTable,
    repetition: int | None = None,
) -> Run:
    """Simulates; every base pool uses ``service``. What the world does differs from one repetition to the next."""
    services = {pool.name: service for pool in allocation.pools_of("base")}
    return _measured(
        scenario, workload, _simulated(scenario, inputs, workload, allocation, services, inputs.facts, repetition)
    )


def run_fleet(
    scenario: Scenario, folder: Path, workload: Workload, allocation: Allocation, noise_seed: int
) -> tuple[Run, dict[str, str]]:
    """Simulates pools of any topologies and GPU kinds, each with its own service times; also law to the worst grade.

    Raises:
        InputError: a pool's GPU kind has no profile in the scenario, or an input cannot be used.
    """
    inputs = inputs_by_kind(scenario, folder, {pool.gpu_kind for pool in allocation.pools})
    worker_kinds = {pool.gpu_kind for pool in allocation.pools_of("controlnet")}
    inputs = {
        kind: one if one.workers is not None and worker_kinds == {one.workers.gpu_kind} else replace(one, workers=None)
        for kind, one in inputs.items()
    }
    common = inputs[allocation.pools_of("base")[0].gpu_kind]
    is_mixed = len({pool.gpu_kind for pool in allocation.pools}) > 1
    services: dict[str, ServiceTable] = {}
    known: dict[tuple[str, Topology], ServiceTable] = {}
    for pool in allocation.pools:
        if pool.role == "controlnet" and not is_mixed:
            continue
        key = pool.gpu_kind, pool.topology
        if key not in known:
            known[key] = service_table(
                scenario, inputs[pool.gpu_kind], workload, pool.topology, draw=None, noise_seed=noise_seed, allocation=allocation
            )  # fmt: skip
        services[pool.name] = known[key]
    facts = {pool.name: inputs[pool.gpu_kind].facts for pool in allocation.pools} if is_mixed else common.facts
    result = _simulated(scenario, common, workload, allocation, services, facts, None)
    worst: dict[str, Grade] = {}
    for table in known.values():
        for law, grade in table.grades.items():
            worst[law] = max(worst.get(law, grade), grade, key=GRADES.index)
    return _measured(scenario, workload, result), {law: str(worst[law]) for law in sorted(worst)}


def inputs_by_kind(scenario: Scenario, folder: Path, kinds: set[str]) -> dict[str, Inputs]:
    """The inputs of every GPU kind; raises :class:`InputError` for one that neither the profile nor ``gpu.others`` covers."""
    found = {}
    own = load_inputs(scenario, folder)
    others = {item.kind for item in scenario.gpu.others}
    unknown = sorted(kinds - {own.gpu_kind, *others})
    if unknown:
        raise one_problem(
            "allocation gpu_kind", f"got {', '.join(unknown)}", f"{own.gpu_kind}, the kind of profile {scenario.profile.name!r}"
            + (f", or {', '.join(sorted(others))}" if others else ""),
            "Take an allocation for that kind, or name a profile of the other under gpu.others",
        )  # fmt: skip
    for kind in sorted(kinds):
        if kind == own.gpu_kind:
            found[kind] = own
        else:
            found[kind] = load_inputs(seen_from(scenario, kind), folder)
    return found


def _simulated(
    scenario: Scenario,
    inputs: Inputs,
    workload: Workload,
    allocation: Allocation,
    services: Mapping[str, ServiceTable],
    facts: ProfileFacts | Mapping[str, ProfileFacts],
    repetition: int | None,
) -> SimulationResult:
    seed = stream_seed(scenario.simulation.seed, "world", 0 if repetition is None else 1 + repetition)
    return simulate(workload, allocation, services, inputs.sizes, facts, world=scenario.world.world(seed))


def _measured(scenario: Scenario, workload: Workload, result: SimulationResult) -> Run:
    warmup_s = warmup_of(scenario, workload)
    metrics = summarise(result, scenario.slo.latency_s, warmup_s=warmup_s)
    frame = result.requests
    in_time = (
        (frame["status"] == "done") & (frame["latency_s"] <= scenario.slo.latency_s) & (frame["arrival_s"] >= warmup_s)
    )
    images = float(frame["n_images"].to_numpy(dtype=np.float64)[in_time.to_numpy(dtype=np.bool_)].sum())
    # the same window as the metrics', widened to the trace's own end: silence there is paid for too
    return Run(metrics, images / max(metrics.window_s, workload.duration_s - warmup_s), result)


def evaluate(
    scenario: Scenario, inputs: Inputs, workload: Workload, shape: Shape, service: ServiceTable, counts: Counts
) -> Evaluation:
    """One point of the search."""
    allocation = shape.allocation(counts)
    run = run_allocation(scenario, inputs, workload, allocation, service)
    busy = tuple(
        run.metrics.busy_ratio.get(pool.name, 0.0) + run.metrics.loading_ratio.get(pool.name, 0.0)
        for pool in allocation.pools
    )
    lost = lost_seconds(run.result.requests, scenario.slo.latency_s)
    return Evaluation(
        counts,
        run.metrics.slo_attainment_ratio,
        run.in_slo_images_per_s,
        busy,
        run.metrics.is_saturated,
        max(lost, key=lambda column: (lost[column], column == QUEUE)),
        _latency_at(run.result.requests, scenario.slo.attainment_ratio, warmup_of(scenario, workload)),
    )


LOSSES: Final = (QUEUE, "switch_s", "controlnet_load_s", "lora_wait_s")
SHARING: Final = "denoise_s"


def lost_seconds(requests: pd.DataFrame, latency_s: float) -> dict[str, float]:
    """Record column to the seconds that late requests spent in it beyond what an idle, warm system takes."""
    late = requests[(requests["status"] == "done") & (requests["latency_s"] > latency_s)]
    lost = {column: float(late[column].to_numpy(dtype=np.float64).sum()) for column in LOSSES}
    shared_s = late["denoise_s"].to_numpy(dtype=np.float64) - late["denoise_alone_s"].to_numpy(dtype=np.float64)
    lost[SHARING] = float(np.clip(shared_s, 0.0, None).sum())
    return lost


def _latency_at(requests: pd.DataFrame, share: float, warmup_s: float) -> float:
    offered = requests[requests["arrival_s"] >= warmup_s]
    latency_s = offered["latency_s"].to_numpy(dtype=np.float64)
    is_done = (offered["status"] == "done").to_numpy(dtype=np.bool_)
    return float(np.quantile(np.where(is_done, latency_s, np.inf), share, method="inverted_cdf"))


def profile_draw(scenario: Scenario, inputs: Inputs, repetition: int) -> int | None:
    """Which joint draw of the profile a repetition uses: every draw once before any comes twice; None if it has none."""
    n_draws = inputs.profile.n_draws
    if n_draws == 0:
        return None
    order = np.random.default_rng(stream_seed(scenario.simulation.seed, "draws")).permutation(n_draws)
    return int(order[repetition % n_draws])


@dataclass(frozen=True, slots=True)
class Confirmation:
    """What one repetition says about one allocation."""

    metrics: Metrics
    in_slo_images_per_s: float


def confirm(
    scenario: Scenario, folder: Path, repetition: int, allocations: tuple[tuple[Topology, Allocation], ...]
) -> tuple[Confirmation, ...]:
    """Runs one repetition (its arrivals, its profile draw, its service noise) of every allocation given."""
    inputs = load_inputs(scenario, folder)
    workload = build_traffic(scenario, folder, repetition).workload
    found = []
    for topology, allocation in allocations:
        run = repeat_allocation(scenario, inputs, workload, topology, allocation, repetition)
        found.append(Confirmation(run.metrics, run.in_slo_images_per_s))
    return tuple(found)


def repetition_service(
    scenario: Scenario, inputs: Inputs, workload: Workload, topology: Topology, repetition: int
) -> ServiceTable:
    """Service times of one repetition: its profile draw and its noise."""
    return service_table(
        scenario,
        inputs,
        workload,
        topology,
        draw=profile_draw(scenario, inputs, repetition),
        noise_seed=stream_seed(scenario.simulation.seed, "noise", repetition),
    )


def repeat_allocation(
    scenario: Scenario, inputs: Inputs, workload: Workload, topology: Topology, allocation: Allocation, repetition: int
) -> Run:
    """The run of one repetition, logs included."""
    service = repetition_service(scenario, inputs, workload, topology, repetition)
    return run_allocation(scenario, inputs, workload, allocation, service, repetition)
