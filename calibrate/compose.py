"""Composes an image's seconds from laws, as the planner does, and compares with images that were measured whole.

    diffusers, colocated   n_steps x (unet_step + n_controlnets x controlnet_step) + vae_decode + request_overhead + LoRAs
    decoupled              n_steps x (max(encoder, n_controlnets x controlnet_step + transfer) + decoder + join) + …

Whole images were measured with prompt embeddings given, so text encoding is left out; only requests to the engine's serving
processes (``serving``) encode their text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from calibrate.measurement import Features

LawSeconds = Callable[..., float]
"""``seconds(law_name, **features)``; raises KeyError for a law that there is not."""

STACK_OF = {
    "diffusers": "diffusers",
    "diffusers_tuned": "diffusers_tuned",
    "colocated": "engine",
    "decoupled": "engine",
    "serving": "engine",
}
"""Topology to stack; ``serving`` is ``colocated`` through the engine's processes, from submitting a job to its outcome."""
QUANTITY_OF = {**{topology: f"e2e.{topology}" for topology in STACK_OF}, "serving": "serving.latency"}
"""Topology to the quantity of its whole images."""


@dataclass(frozen=True, slots=True)
class CheckRow:
    """One kind of image: measured whole against composed from the laws."""

    topology: str
    mode: str
    n_controlnets: int
    n_loras: int
    variant: str
    n_repetitions: int
    measured_s: float
    predicted_s: float
    is_held_out: bool
    """False where the fit of ``request_overhead`` or ``remote_join`` used this image, and where a served job's stages are in laws."""
    n_images: int = 1
    n_steps: int = 0
    forward_batch: int = 0
    megapixels: float = 1.0

    @property
    def gap_ratio(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted_s / self.measured_s - 1.0


def denoise_s(seconds: LawSeconds, topology: str, image: Features, residual_bytes_per_sample: float) -> float:
    """Seconds of all denoising steps of one image job."""
    stack = STACK_OF[topology]
    step = {"forward_batch": float(image.forward_batch), "megapixels": image.megapixels}
    if topology == "decoupled" and image.n_controlnets:
        n_bytes = residual_bytes_per_sample * image.forward_batch
        remote_s = image.n_controlnets * seconds("engine.controlnet_step", **step) + seconds(
            f"engine.residual_transfer.{image.link or 'nvlink'}", n_bytes=n_bytes
        )
        encoder_s = seconds("engine.encoder_step", **step)
        each_s = max(encoder_s, remote_s) + seconds("engine.decoder_step", **step) + seconds("engine.remote_join")
    else:
        is_unfused = topology == "diffusers" and image.n_loras > 0 and image.variant != "fused"
        each_s = seconds("diffusers.unet_lora_step" if is_unfused else f"{stack}.unet_step", **step)
        if image.n_controlnets:
            each_s += image.n_controlnets * seconds(f"{stack}.controlnet_step", **step)
    return image.n_steps * each_s


def _if_known(seconds: LawSeconds, law: str, **features: float) -> float:
    """0 by laws that lack it: those of sessions without such jobs."""
    try:
        return seconds(law, **features)
    except KeyError:
        return 0.0


def _served_text_s(seconds: LawSeconds, image: Features) -> float:
    """The text stage of a served job, its starting noise included."""
    text_s = seconds("engine.text_encode")
    if image.forward_batch == image.n_images:
        text_s = _if_known(seconds, "engine.text_encode_unguided") or text_s
    size = {"n_images": float(image.n_images), "megapixels": image.megapixels}
    return text_s + _if_known(seconds, "engine.latent_input", **size)


def image_s(
    seconds: LawSeconds, topology: str, image: Features, residual_bytes_per_sample: float, *, overhead: bool = True
) -> float:
    """Seconds of one image job without waiting; with text encoding where the topology's images encode text."""
    stack = STACK_OF[topology]
    total_s = denoise_s(seconds, topology, image, residual_bytes_per_sample)
    if topology == "serving":
        total_s += _served_text_s(seconds, image)
        if image.n_controlnets:
            total_s += image.n_controlnets * seconds("engine.control_input", megapixels=image.megapixels)
    total_s += seconds(f"{stack}.vae_decode", n_images=float(image.n_images), megapixels=image.megapixels)
    if image.n_loras and stack == "engine":
        # written onto the weights together, and restored inside the request
        n_bytes = float(image.n_loras * image.n_bytes)
        total_s += seconds("engine.lora_attach", n_bytes=n_bytes) + seconds("engine.lora_detach", n_bytes=n_bytes)
        if topology == "serving":
            total_s += _if_known(seconds, "engine.lora_wait")
    elif image.n_loras:
        # stock images were measured until the picture is there: taking the LoRA off comes later
        attach = "diffusers_tuned.lora_attach" if image.variant == "fused" else f"{stack}.lora_attach"
        total_s += image.n_loras * seconds(attach, n_bytes=float(image.n_bytes))
    if overhead:
        total_s += seconds(f"{stack}.request_overhead")
    return total_s
