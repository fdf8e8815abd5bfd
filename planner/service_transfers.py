"""What moves between store, host, device and GPUs: residuals of ControlNet workers, files of LoRAs and models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from calibrate.profile import Predictor
from engine.allocation import Link, LinkKind, Topology
from planner.service_prediction import by_bytes, by_shape
from planner.service_steps import STACK_OF
from planner.workload import Floats, Ints, Workload


def residual_transfers(
    workload: Workload, predictor: Predictor, links: Sequence[Link]
) -> tuple[Floats | None, dict[tuple[LinkKind, float], Floats]]:
    """Bytes of one step's residuals and, by link kind and compression, their seconds; None and nothing without ControlNets."""
    has_controlnets = workload.n_controlnets > 0
    if not links or not has_controlnets.any():
        return None, {}
    n_bytes = predictor.fact("residual_bytes_per_sample") * workload.forward_batch.astype(np.float64)
    found: dict[tuple[LinkKind, float], Floats] = {}
    for link in links:
        seconds = np.zeros(len(workload))
        sent = n_bytes[has_controlnets] / link.compression_ratio
        seconds[has_controlnets] = by_shape(predictor, f"engine.residual_transfer.{link.kind}", n_bytes=sent)
        found[link.kind, link.compression_ratio] = seconds
    return n_bytes, found


def lora_fetch_s(predictor: Predictor, topology: Topology, lora_bytes: Ints, *, is_store_local: bool) -> Floats:
    """From the store into the host tier. Our engine also checks and pins the file then; stock reads it at each attach."""
    fetch_s = np.zeros(len(lora_bytes)) if is_store_local else by_bytes(predictor, "lora_fetch.remote", lora_bytes)
    if STACK_OF[topology] == "engine":
        fetch_s = fetch_s + by_bytes(predictor, "lora_fetch.local", lora_bytes)
    return fetch_s


def model_fetch_s(
    predictor: Predictor, stack: str, kind: Literal["checkpoint", "controlnet"], n_bytes: Ints, *, is_store_local: bool
) -> Floats:
    """From the store into the host tier. Where the profile has the law, reading and checking are in it; else they are in the load."""
    fetch_s = np.zeros(len(n_bytes)) if is_store_local else by_bytes(predictor, "model_fetch.remote", n_bytes)
    law = f"{stack}.{kind}_read"
    return fetch_s + by_bytes(predictor, law, n_bytes) if predictor.has(law) else fetch_s
