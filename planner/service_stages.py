"""Stages of a request around its steps: text, control images, LoRAs on and off the weights."""

from __future__ import annotations

import math

import numpy as np

from calibrate.profile import Predictor
from planner.service_prediction import by_bytes, by_shape
from planner.workload import Floats, Ints, Workload


def lora_patch_s(workload: Workload, predictor: Predictor, law: str, lora_bytes: Ints) -> Floats:
    """All LoRAs of each request onto the weights, or off them.

    Our engine writes the weights once for all of them: the law at the sum of their bytes, as far as that was measured; beyond it, and in
    the other stacks, one after the other.
    """
    alone_s = workload.lora_sum(by_bytes(predictor, law, lora_bytes))
    if law == "engine.lora_attach" and predictor.has("engine.lora_wait") and (workload.n_loras > 0).any():
        once_s = np.where(workload.n_loras > 0, float(predictor.seconds("engine.lora_wait")), 0.0)
    else:
        once_s = np.zeros(len(workload))
    several = workload.n_loras > 1
    if not law.startswith("engine.") or not several.any():
        return alone_s + once_s
    n_bytes = workload.lora_sum(lora_bytes.astype(np.float64))
    _, most = predictor.profile.laws[law].domain.get("n_bytes", (0.0, math.inf))
    together = several & (n_bytes <= most)
    if together.any():
        alone_s[together] = by_shape(predictor, law, n_bytes=n_bytes[together])
    return alone_s + once_s


def text_encode_s(workload: Workload, stack: str, predictor: Predictor) -> Floats:
    """Prompts and starting noise; a profile that does not tell them apart has both in ``text_encode``."""
    seconds = np.full(len(workload), float(predictor.seconds(f"{stack}.text_encode")))
    unguided = workload.forward_batch == workload.n_images
    if unguided.any() and predictor.has(f"{stack}.text_encode_unguided"):
        seconds[unguided] = float(predictor.seconds(f"{stack}.text_encode_unguided"))
    if predictor.has(f"{stack}.latent_input"):
        return seconds + by_shape(
            predictor, f"{stack}.latent_input", n_images=workload.n_images, megapixels=workload.megapixels
        )
    return seconds


def control_input_s(workload: Workload, stack: str, predictor: Predictor) -> Floats:
    """Control images onto the device, one a ControlNet; 0 by a profile without that law, which older ones are."""
    seconds = np.zeros(len(workload))
    has_controlnets = workload.n_controlnets > 0
    if has_controlnets.any() and predictor.has(f"{stack}.control_input"):
        one_s = by_shape(predictor, f"{stack}.control_input", megapixels=workload.megapixels[has_controlnets])
        seconds[has_controlnets] = workload.n_controlnets[has_controlnets] * one_s
    return seconds
