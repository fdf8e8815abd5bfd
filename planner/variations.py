"""Settings and GPUs that the recommended fleet could have instead: one thing changed at a time, the fleet sized again.

A plan takes caches, links, batches and the GPU kind from the scenario. Here each gets other values, on the requests that arrive in
the shortest time, with the fitted profile and the same noise, and is compared with the scenario's own, sized in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

import joblib

from engine.allocation import LinkKind, Topology
from planner.answers import answers_about
from planner.candidates import Counts, Shape, fewest_base_replicas, shapes_of
from planner.decision_record import SettingRow, SettingsRecord
from planner.evaluation import Bench
from planner.explain import gpus_words, usd
from planner.prices import Price, find_price, shipped_tables
from planner.replication import Inputs, inputs_by_kind, load_inputs, service_table
from planner.run_store import StoreError
from planner.scenario import Scenario, resolve
from planner.search import Evaluation, refine
from planner.service import ServiceTable
from planner.topology_search import Task
from planner.traffic import build_traffic, busiest_stretch, stream_seed
from planner.workload import Workload
from traces.problems import InputError

STRETCH_REQUESTS_MAX: Final = 8_000
CACHE_FACTOR: Final = 4.0
OVERTAKE: Final = 8
PRESENT: Final = "as planned"
GPU_KIND: Final = "gpu.kind"


@dataclass(frozen=True, slots=True)
class Variation:
    """One setting with another value than the scenario's."""

    setting: str
    """As the scenario names it; empty for the scenario as it is."""
    value: str
    scenario: Scenario


@dataclass(frozen=True, slots=True)
class Sized:
    """The smallest fleet near the recommended one under a variation; None if none was found."""

    counts: Counts | None
    attainment_ratio: float
    latency_at_target_s: float
    """That the promised share of the requests stays under, with as many replicas as the unchanged scenario needs."""


def variations_of(scenario: Scenario, folder: Path, topology: Topology, workload: Workload) -> list[Variation]:
    """The scenario as it is, then one change at a time of what can matter for this traffic and topology."""
    policies = scenario.policies
    found = [Variation("", PRESENT, scenario)]

    def policy(name: str, value: Any, shown: str) -> None:
        if value != getattr(policies, name):
            changed = scenario.model_copy(update={"policies": policies.model_copy(update={name: value})})
            found.append(Variation(f"policies.{name}", shown, changed))

    def cache(name: str) -> None:
        for factor in (1 / CACHE_FACTOR, CACHE_FACTOR):
            size_gib = factor * getattr(policies, name)
            policy(name, size_gib, f"{size_gib:g} GiB")

    if workload.n_loras.any():
        cache("lora_cache_gib")
        if topology == "decoupled":
            for step in (0, 5, 20):
                policy("lora_patch_by_step", step, f"step {step}" if step else "0: before the first step")
    if topology == "decoupled" and workload.n_controlnets.any():
        for kind in get_args(LinkKind):
            if kind != "local":
                policy("link", kind, kind)
    if len(workload.checkpoint_names) > 1:
        cache("checkpoint_host_cache_gib")
        policy("switch_overtake_max", OVERTAKE, f"{OVERTAKE} requests")
    if policies.forward_batch_max is None:
        samples = 2 * int(workload.forward_batch.max())
        policy("forward_batch_max", samples, f"{samples} samples")
    for other in scenario.gpu.others:
        inputs_by_kind(scenario, folder, {other.kind})  # a profile that cannot be read is said now
        profile = scenario.profile.model_copy(update={"name": other.profile})
        gpu = scenario.gpu.model_copy(update={"kind": other.kind, "device_memory_gib": None, "others": ()})
        found.append(Variation(GPU_KIND, other.kind, scenario.model_copy(update={"profile": profile, "gpu": gpu})))
    return found


def tasks(
    variations: Sequence[Variation], folder: Path, topology: Topology, shape: Shape, counts: Counts, store: Path | None
) -> list[Any]:
    """Each variation's sizing, for a process that has time."""
    return [joblib.delayed(sized)(one, folder, topology, shape, counts, store) for one in variations]


def sized(
    variation: Variation, folder: Path, topology: Topology, shape: Shape, counts: Counts, store: Path | None = None
) -> Sized:
    """The smallest fleet of the shape's kind near ``counts`` that keeps the promise under a variation.

    Outside what the profile measured, or without a law it needs, nothing is found.

    Raises:
        InputError: the store cannot be used.
    """
    scenario = variation.scenario
    workload = busiest_stretch(build_traffic(scenario, folder).workload, STRETCH_REQUESTS_MAX)
    seed = stream_seed(scenario.simulation.seed, "search noise")
    try:
        inputs = load_inputs(scenario, folder)
        service = service_table(scenario, inputs, workload, topology, draw=None, noise_seed=seed)
        own = _same_kind(scenario, inputs, workload, topology, service, shape)
        with answers_about(store, scenario, folder, None) as known:
            task = Task(Bench.of(scenario, inputs, workload, service), 1, known)
            low = fewest_base_replicas(workload, service, scenario.slo.latency_s, scenario.slo.attainment_ratio)
            evaluator = task.evaluator(own)
            here: Evaluation = evaluator(counts)
            best = refine(own, evaluator, counts, low).best
    except StoreError:
        raise
    except InputError:
        return Sized(None, math.nan, math.nan)
    return Sized(best.counts if best else None, here.attainment_ratio, here.latency_at_target_s)


def _same_kind(
    scenario: Scenario, inputs: Inputs, workload: Workload, topology: Topology, service: ServiceTable, shape: Shape
) -> Shape:
    link = inputs.link(scenario.policies.link)
    found = shapes_of(
        scenario, topology, workload, service, inputs.sizes, inputs.facts, inputs.gpu_kind, inputs.workers, link
    )
    return next((one for one in found if len(one.controlnet_pools) == len(shape.controlnet_pools)), found[0])


def settings_record(
    scenario: Scenario,
    folder: Path,
    variations: Sequence[Variation],
    found: Sequence[Sized],
    price: Price,
    n_requests: int,
) -> SettingsRecord:
    """One row a variation, the scenario as it is first, with the cost of the fleet it needs on the same requests."""
    monthly_usd = scenario.prices.hours_per_month
    here = found[0].counts
    here_usd = None if here is None else sum(here) * price.price_usd_per_gpu_hour * monthly_usd
    rows = []
    for variation, one in zip(variations, found, strict=True):
        own_price = price if variation.setting != GPU_KIND else _price_of(variation, folder)
        usable = one.counts is not None and own_price is not None
        cost_usd = (
            sum(one.counts or ()) * own_price.price_usd_per_gpu_hour * monthly_usd if usable and own_price else None
        )
        rows.append(SettingRow(
            setting=variation.setting, value=variation.value, n_gpus=None if one.counts is None else sum(one.counts),
            cost_usd_per_month=cost_usd,
            difference_usd_per_month=None if cost_usd is None or here_usd is None else cost_usd - here_usd,
            same_size_attainment_ratio=one.attainment_ratio, same_size_latency_at_target_s=one.latency_at_target_s,
        ))  # fmt: skip
    n_tried = min(n_requests, STRETCH_REQUESTS_MAX)
    where = "all requests" if n_tried == n_requests else f"the busiest {n_tried} requests in a row"
    return SettingsRecord(
        sentence=_sentence(rows), rows=tuple(rows), simulated_on=f"{where}, one run each with the fitted profile"
    )


def _price_of(variation: Variation, folder: Path) -> Price | None:
    wanted = variation.scenario.prices
    path = shipped_tables().get(wanted.table, resolve(wanted.table, folder))
    try:
        return find_price(path, variation.value, wanted.purchase)
    except InputError:
        return None


def _sentence(rows: Sequence[SettingRow]) -> str:
    cheaper = [row for row in rows[1:] if row.difference_usd_per_month is not None and row.difference_usd_per_month < 0]
    if rows[0].n_gpus is None:
        return "On these requests no size near the recommended one keeps the promise."
    if not cheaper:
        return "No other value of a setting, one at a time, needs fewer GPUs than the scenario's."
    best = min(cheaper, key=lambda row: (row.difference_usd_per_month or 0.0, row.setting, row.value))
    return (
        f"{best.setting} at {best.value} needs {gpus_words(best.n_gpus)} in place of {rows[0].n_gpus} on these requests, "
        f"{usd(-(best.difference_usd_per_month or 0.0))} a month less. That is one run each: plan again with it."
    )
