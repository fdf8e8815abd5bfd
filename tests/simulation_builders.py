"""Small traces, profiles and allocations that simulator tests build by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from calibrate.profile import FORM_PARAMETERS, LAW_FEATURES, READ_LAWS, Fact, Form, LatencyProfile, Law
from engine.allocation import Allocation, Policies, Pool
from planner.service import ServiceTable, Sizes
from planner.simulator import ProfileFacts, SimulationResult, simulate
from planner.workload import Workload, build_workload
from traces.records import REQUEST_COLUMNS
from traces.trace import Provenance, Trace

GIB = 2**30
SIZES = Sizes(lora_bytes=GIB // 4, controlnet_bytes=2 * GIB, checkpoint_bytes=6 * GIB)
FACTS = ProfileFacts(device_memory_gib=80.0, activation_gib_per_sample=0.5)


def trace_of(arrival_s: Sequence[float], *, duration_s: float | None = None, **columns: Any) -> Trace:
    """A trace with these arrivals; a column is one value for all requests or a list with one each."""
    n = len(arrival_s)
    frame = pd.DataFrame(index=range(n))
    for column in REQUEST_COLUMNS:
        given = columns.pop(column.name, np.nan if column.is_nullable else column.default)
        if column.name == "request_id":
            given = [f"r{i}" for i in range(n)]
        elif column.name == "arrival_s":
            given = list(arrival_s)
        elif isinstance(given, tuple):
            given = [given] * n
        frame[column.name] = given
    assert not columns, f"not columns of a request: {sorted(columns)}"
    last_s = float(arrival_s[-1]) if n else 0.0
    return Trace(frame, Provenance("by hand"), last_s if duration_s is None else duration_s)


def workload_of(arrival_s: Sequence[float], **columns: Any) -> Workload:
    """The workload of :func:`trace_of`."""
    return build_workload(trace_of(arrival_s, **columns))


CONSTANT_S: Mapping[str, float] = MappingProxyType({
    "text_encode": 0.5, "text_encode_unguided": 0.5, "latent_input": 0.0, "lora_wait": 0.0, "vae_decode": 0.25, "request_overhead": 0.25,
    "unet_step": 0.1, "unet_lora_step": 0.2, "controlnet_step": 0.05, "encoder_step": 0.04, "decoder_step": 0.06,
    "residual_transfer": 0.01, "remote_join": 0.002,
    "control_input": 0.0, "lora_attach": 0.125, "lora_detach": 0.0625, "lora_fetch": 2.0,
    "checkpoint_load": 4.0, "controlnet_load": 1.0, "model_fetch": 8.0, "worker_start": 60.0,
})  # fmt: skip
"""Seconds of every quantity in :func:`constant_profile`: easy to add up by hand, and no two sums alike."""


def constant_profile(noise: Sequence[float] = (), **changed_s: float) -> LatencyProfile:
    """A profile in which every quantity takes a constant time, on every stack; reads into the host tier only where they are named."""
    seconds = {**CONSTANT_S, **changed_s}

    def law(name: str) -> Law:
        parts = name.split(".")  # STACK.QUANTITY, or QUANTITY.WHERE, or STACK.QUANTITY.WHERE
        quantity = next(part for part in parts if part in seconds)
        form: Form = "affine" if LAW_FEATURES[name] else "constant"
        values = {"value_s": seconds[quantity], "fixed_s": seconds[quantity], "per_unit_s": 0.0}
        parameters = {key: values[key] for key in FORM_PARAMETERS[form]}
        return Law(name, form, LAW_FEATURES[name], parameters, "assumed", "by hand, for tests")

    facts = {
        "device_memory_gib": FACTS.device_memory_gib, "activation_gib_per_sample": FACTS.activation_gib_per_sample,
        "checkpoint_gib": 6.0, "controlnet_gib": 2.0, "residual_bytes_per_sample": 5e7,
    }  # fmt: skip
    return LatencyProfile(
        architecture="sdxl",
        gpu_kind="test",
        laws={name: law(name) for name in LAW_FEATURES if name not in READ_LAWS or name.split(".")[1] in seconds},
        facts={name: Fact(value, "assumed", "by hand, for tests") for name, value in facts.items()},
        noise_ratio_quantiles={stack: tuple(noise) for stack in ("diffusers", "diffusers_tuned", "engine")},
        draws={},
        fingerprint={},
        raw_sha256="",
    )


def base_pool(n_replicas: int, topology: Any = "colocated", name: str = "base", **fields: Any) -> Pool:
    """A base pool."""
    return Pool(name, "base", n_replicas, "test", topology=topology, **fields)


def controlnet_pool(n_replicas: int, *ids: str, name: str = "controlnet") -> Pool:
    """A ControlNet pool that hosts these ids, or any."""
    return Pool(name, "controlnet", n_replicas, "test", topology="decoupled", controlnet_ids=ids or ("*",))


def run(
    workload: Workload,
    pools: Sequence[Pool],
    service: ServiceTable,
    *,
    policies: Policies | None = None,
    **options: Any,
) -> SimulationResult:
    """Simulates with the same service table for every base pool."""
    allocation = Allocation(tuple(pools), policies=policies or Policies())
    services = {pool.name: service for pool in allocation.pools_of("base")}
    return simulate(workload, allocation, services, SIZES, options.pop("facts", FACTS), **options)


def run_queue(
    arrival_s: Sequence[float], service_s: Sequence[float], n_servers: int, **options: Any
) -> SimulationResult:
    """A bare G/G/c queue: the given arrivals and service times on identical replicas that hold everything."""
    workload = workload_of(arrival_s, base_model_id="m")
    service = ServiceTable.from_service_s(workload, np.asarray(service_s))
    return run(workload, [base_pool(n_servers, base_model_ids=("m",))], service, **options)
