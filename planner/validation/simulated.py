"""The simulation of a replay: its trace, its allocation, what its workers held when it began, and a profile's service times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

import numpy as np

from calibrate.profile import GRADES, Grade, LatencyProfile, OutOfDomainError
from engine.allocation import Allocation, Catalogue, CatalogueEntry, Pool
from planner.service import ServiceTable, Sizes, build_service
from planner.simulator import ProfileFacts, SimulationResult, simulate
from planner.validation.engine_run import EngineRun
from planner.workload import Workload, build_workload
from traces.problems import InputError, Problem, one_problem

MIB: Final = 2**20


@dataclass(frozen=True, slots=True)
class SimulationSettings:
    """What a replay's folder does not say."""

    n_repetitions: int = 20
    """Simulations that differ in their service noise only."""
    seed: int = 0
    extrapolate: bool = False
    is_store_local: bool = True
    """The engine's store was a folder of its host, or LoRAs were made up: no remote fetch was in the replay."""
    lora_mib: float = 186.0
    """Of LoRAs whose size the replay does not say."""
    device_memory_gib: float | None = None
    """In place of the profile's fact."""


@dataclass(frozen=True, slots=True, eq=False)
class Simulated:
    """One replay, simulated."""

    logs: tuple[SimulationResult, ...]
    """One a repetition."""
    grades: Mapping[str, Grade]
    """Law to the worst grade of any prediction made with it."""


def simulate_run(run: EngineRun, profile: LatencyProfile, settings: SimulationSettings) -> Simulated:
    """Simulates a replay as often as the settings say.

    Raises:
        InputError: the profile is of another GPU kind or architecture, lacks a law or a fact, or a request is outside its box.
    """
    _check_profile(run, profile)
    workload = build_workload(run.trace)
    known = {name: CatalogueEntry(name, "lora", bytes=size) for name, size in run.lora_bytes.items() if size > 0}
    sizes = Sizes.from_profile(
        profile, lora_bytes=round(settings.lora_mib * MIB), catalogue=Catalogue(MappingProxyType(known))
    )
    facts = ProfileFacts.from_profile(profile)
    if settings.device_memory_gib is not None:
        facts = replace(facts, device_memory_gib=settings.device_memory_gib)
    elif facts.device_memory_gib <= 0:
        raise one_problem(
            f"profile {profile.gpu_kind}", "says nothing about device memory", "more than 0 GiB", "Give --device-memory-gib"
        )  # fmt: skip
    allocation = _with_shared_tier(run.allocation)
    logs = []
    grades: dict[str, Grade] = {}
    for repetition in range(settings.n_repetitions):
        services = {}
        for pool in allocation.pools_of("base"):
            table = _table(workload, pool, allocation, profile, sizes, settings, repetition)
            services[pool.name] = table
            for law, grade in table.grades.items():
                grades[law] = max(grades.get(law, grade), grade, key=GRADES.index)
        log = simulate(workload, allocation, services, sizes, facts, start=run.start)
        logs.append(_with_deadlines(log, run, allocation))
    return Simulated(tuple(logs), dict(sorted(grades.items())))


def _with_deadlines(log: SimulationResult, run: EngineRun, allocation: Allocation) -> SimulationResult:
    """What ends after its deadline counts as expired, as in the engine; the replica is busy to the end in both.

    (On a device that runs behind its queue a deadline frees nothing: all steps of a request are queued by then.)
    """
    frame = log.requests
    own_s = run.trace.requests["deadline_s"].to_numpy(dtype=np.float64, na_value=np.nan)
    default_s = allocation.policies.deadline_s
    deadline_s = own_s if default_s is None else np.where(np.isnan(own_s), default_s, own_s)
    is_late = (frame["status"] == "done").to_numpy(dtype=np.bool_) & (
        frame["latency_s"].to_numpy(np.float64) > deadline_s
    )
    if not is_late.any():
        return log
    late = frame.assign(
        status=np.where(is_late, "expired", frame["status"]),
        reason=np.where(is_late, "deadline passed while it ran", frame["reason"]),
        latency_s=np.where(is_late, np.nan, frame["latency_s"]),
        end_s=np.where(is_late, frame["arrival_s"] + deadline_s, frame["end_s"]),
    )
    return replace(log, requests=late)


def _check_profile(run: EngineRun, profile: LatencyProfile) -> None:
    problems = []
    if run.model and run.model != profile.architecture:
        problems.append(
            Problem("--profile", f"is of {profile.architecture!r}, the engine ran {run.model!r}", repair="Name its own profile")
        )  # fmt: skip
    kinds = sorted({pool.gpu_kind for pool in run.allocation.pools} - {profile.gpu_kind})
    if kinds:
        problems.append(
            Problem("--profile", f"is of {profile.gpu_kind!r}, the engine's allocation says {', '.join(kinds)}", "one kind for both")
        )  # fmt: skip
    if problems:
        raise InputError(problems)


def _with_shared_tier(allocation: Allocation) -> Allocation:
    """The engine keeps one LoRA tier for all base replicas of its host: so does the simulation, for each pool."""
    most = max((pool.n_replicas for pool in allocation.pools_of("base")), default=1)
    if most <= allocation.policies.replicas_per_host:
        return allocation
    return replace(allocation, policies=replace(allocation.policies, replicas_per_host=most))


def _table(
    workload: Workload,
    pool: Pool,
    allocation: Allocation,
    profile: LatencyProfile,
    sizes: Sizes,
    settings: SimulationSettings,
    repetition: int,
) -> ServiceTable:
    links = {link.kind for link in allocation.links if link.base_pool == pool.name}
    if len(links) > 1:
        raise one_problem(f"allocation pool {pool.name!r}", f"has links of kinds {sorted(links)}", "one kind")
    try:
        return build_service(
            workload, pool.topology, profile, sizes, link_kind=next(iter(links), "nvlink"),
            lora_patch_by_step=allocation.policies.lora_patch_by_step, extrapolate=settings.extrapolate,
            noise_seed=settings.seed * 1_000_003 + repetition, forward_batch_max=allocation.policies.forward_batch_max,
            is_store_local=settings.is_store_local,
        )  # fmt: skip
    except OutOfDomainError as error:
        raise one_problem(
            "--profile", str(error), repair="Add --extrapolate to accept it, with the flag in the report"
        ) from None
