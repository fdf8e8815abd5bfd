"""Denoising by the laws of steps: one step's parts of each request, all its steps together, and forwards that several share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from calibrate.profile import Predictor
from engine.allocation import LinkKind, Topology
from planner.service_prediction import by_shape
from planner.service_table import BatchTimes
from planner.workload import Bools, Floats, Ints, Workload

STACK_OF: Final[Mapping[Topology, str]] = {
    "diffusers": "diffusers",
    "diffusers_tuned": "diffusers_tuned",
    "colocated": "engine",
    "decoupled": "engine",
    "decoupled_cfg2": "engine",
}


@dataclass(frozen=True, slots=True, eq=False)
class StepTimes:
    """Seconds of one step's parts per request, and of all its steps when nobody shares its ControlNet workers."""

    plain_s: Floats
    encoder_s: Floats
    decoder_s: Floats
    controlnet_s: Floats
    transfer_s: Floats
    is_remote: Bools
    n_forwards: Floats
    """ControlNet forwards of the whole request."""
    denoise_s: Floats


def predict_steps(workload: Workload, topology: Topology, predictor: Predictor, link_kind: LinkKind) -> StepTimes:
    """Steps of every request; ``link_kind`` is what residuals of ControlNet workers travel over."""
    stack = STACK_OF[topology]
    n = len(workload)
    shape: dict[str, Ints | Floats] = {"forward_batch": workload.forward_batch, "megapixels": workload.megapixels}
    has_controlnets = workload.n_controlnets > 0
    plain_s = np.zeros(n)
    # PEFT leaves LoRA matrices unfused, which costs stock Diffusers at every step
    is_unfused = (workload.n_loras > 0) & (topology == "diffusers")
    for law, rows in ((f"{stack}.unet_step", ~is_unfused), ("diffusers.unet_lora_step", is_unfused)):
        if rows.any():
            plain_s[rows] = by_shape(predictor, law, **{name: values[rows] for name, values in shape.items()})

    def where_controlled(law: str, **features: Ints | Floats) -> Floats:
        seconds = np.zeros(n)
        if has_controlnets.any():
            chosen = {name: values[has_controlnets] for name, values in features.items()}
            seconds[has_controlnets] = by_shape(predictor, law, **chosen)
        return seconds

    controlnet_s = where_controlled(f"{stack}.controlnet_step", **shape)
    n_forwards = workload.active_steps.astype(np.float64)
    none = np.zeros(n)
    if topology != "decoupled":
        if stack != "engine":
            n_forwards = (workload.n_controlnets * workload.n_steps).astype(np.float64)
        denoise_s = workload.n_steps * plain_s + n_forwards * controlnet_s
        return StepTimes(plain_s, none, none, controlnet_s, none, np.zeros(n, dtype=np.bool_), n_forwards, denoise_s)
    encoder_s = where_controlled("engine.encoder_step", **shape)
    decoder_s = where_controlled("engine.decoder_step", **shape)
    transfer_s = none
    if has_controlnets.any():
        decoder_s = decoder_s + np.where(has_controlnets, float(predictor.seconds("engine.remote_join")), 0.0)
        n_bytes = predictor.fact("residual_bytes_per_sample") * workload.forward_batch.astype(np.float64)
        transfer_s = where_controlled(f"engine.residual_transfer.{link_kind}", n_bytes=n_bytes)
    # each ControlNet on a worker of its own: a step is remote while any of them is active, however many
    n_joined = workload.joined_steps
    joined_s = np.maximum(encoder_s, controlnet_s + transfer_s * np.maximum(1, workload.n_controlnets)) + decoder_s
    denoise_s = (workload.n_steps - n_joined) * plain_s + n_joined * joined_s
    return StepTimes(plain_s, encoder_s, decoder_s, controlnet_s, transfer_s, has_controlnets, n_forwards, denoise_s)


def batch_times(
    workload: Workload, topology: Topology, predictor: Predictor, samples_max: int, steps: StepTimes, overhead_s: float
) -> BatchTimes:
    """Forwards of up to ``samples_max`` samples for every size of image; ``overhead_s`` is added to every decoding."""
    stack = STACK_OF[topology]
    is_unfused = (workload.n_loras > 0) & (topology == "diffusers")
    shapes, shape = np.unique(np.stack([workload.megapixels, is_unfused], axis=1), axis=0, return_inverse=True)
    shape = shape.reshape(-1).astype(np.int64)
    largest = max(samples_max, int(workload.forward_batch.max(initial=1)))
    plain_s = np.full((len(shapes), largest + 1), np.nan)
    controlnet_s = np.zeros((len(shapes), largest + 1))
    n_images_max = max(largest, int(workload.n_images.max(initial=1)))
    vae_s = np.full((len(shapes), n_images_max + 1), np.nan)
    for row, (megapixels, unfused) in enumerate(shapes.tolist()):
        mine = shape == row
        sizes = np.arange(int(workload.forward_batch[mine].min()), largest + 1)
        same = np.full(len(sizes), megapixels)
        law = "diffusers.unet_lora_step" if unfused else f"{stack}.unet_step"
        plain_s[row, sizes] = by_shape(predictor, law, forward_batch=sizes, megapixels=same)
        if (steps.n_forwards[mine] > 0).any() and topology != "decoupled":
            controlnet_s[row, sizes] = by_shape(
                predictor, f"{stack}.controlnet_step", forward_batch=sizes, megapixels=same
            )
        guided = bool((workload.forward_batch[mine] > workload.n_images[mine]).all())
        images = np.arange(1, max(largest // 2 if guided else largest, int(workload.n_images[mine].max())) + 1)
        decode_s = by_shape(
            predictor, f"{stack}.vae_decode", n_images=images, megapixels=np.full(len(images), megapixels)
        )
        vae_s[row, images] = decode_s + overhead_s
    n_forwards = np.where(steps.is_remote, 0.0, steps.n_forwards)
    return BatchTimes(shape, plain_s, controlnet_s, vae_s, n_forwards)
