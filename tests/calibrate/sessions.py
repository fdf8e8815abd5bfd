"""A session with a known truth over batches and pixels, some sizes held out: what fits, reports and comparisons are tested on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from calibrate.measurement import Features, Measurement, Measurements, Session
from calibrate.profile import Law

FIT_SIZES = (
    (1, 1024),
    (2, 1024),
    (4, 1024),
    (8, 1024),
    (16, 1024),
    (2, 768),
    (8, 768),
    (1, 512),
    (2, 512),
    (4, 512),
    (16, 512),
)
HELD_OUT_SIZES = (
    (3, 1024),
    (6, 1024),
    (12, 1024),
    (1, 768),
    (4, 768),
    (16, 768),
    (8, 512),
    (12, 512),
    (2, 640),
    (6, 896),
)
TRUTH: Mapping[str, Mapping[str, float]] = {
    "engine.unet_step": {"floor_s": 9e-3, "fixed_s": 1e-3, "per_unit_s": 11e-3, "attention_s": 2e-3},
    "engine.encoder_step": {"floor_s": 4e-3, "fixed_s": 5e-4, "per_unit_s": 5e-3, "attention_s": 1.5e-3},
    "engine.decoder_step": {"floor_s": 5e-3, "fixed_s": 5e-4, "per_unit_s": 6e-3, "attention_s": 5e-4},
    "engine.controlnet_step": {"floor_s": 4e-3, "fixed_s": 5e-4, "per_unit_s": 5e-3, "attention_s": 1e-3},
}
OVERHEAD_S, VAE_S, TEXT_S, CONTROL_S = 0.03, 0.025, 0.006, 0.018
HARDWARE: Mapping[str, Any] = {
    "gpu": "NVIDIA H200", "driver": "580", "software": {"torch": "2.11.0"}, "engine_sources": "aaaa", "n_gpus": 1,
}  # fmt: skip


def truth_s(law: str, batch: float, megapixels: float) -> float:
    """Seconds of a step law."""
    form = Law(law, "roofline_attention", (), TRUTH[law], "measured", "-")
    return float(form.seconds(batch * megapixels, megapixels=megapixels))


def known_session(
    seed: int = 1, *, name: str = "one", noise: float = 0.01, size_noise: float = 0.004, slower: float = 1.0,
    n_repetitions: int = 6, **changes: Any,
) -> Measurements:  # fmt: skip
    """Steps over batches and pixels, VAE, text, and images in the process and as served; all of our engine.

    Args:
        seed: of the noise.
        name: of the session.
        noise: of one repetition, relative.
        size_noise: what a size as a whole is off the truth, relative, as with real kernels.
        slower: factor on the steps.
        n_repetitions: of each size.
        **changes: of the session's fields.
    """
    rng = np.random.default_rng(seed)
    rows: list[Measurement] = []

    def add(quantity: str, features: Features, seconds: float, *, is_held_out: bool = False) -> None:
        for repetition in range(n_repetitions):
            value_s = seconds * (1 + noise * rng.standard_normal())
            rows.append(
                Measurement(
                    name, quantity, quantity.split(".")[0], "", "graph", features, repetition, len(rows), value_s, is_held_out
                )
            )  # fmt: skip

    def off() -> float:
        return 1 + size_noise * rng.standard_normal()

    for law in TRUTH:
        for sizes, is_held_out in ((FIT_SIZES, False), (HELD_OUT_SIZES, True)):
            for batch, side in sizes:
                n_images = batch // 2 if batch % 2 == 0 else batch
                seconds = slower * truth_s(law, batch, side**2 / 2**20) * off()
                add(law, Features(batch, n_images, side, side), seconds, is_held_out=is_held_out)
    for n_images, side in ((1, 512), (1, 768), (1, 1024), (2, 1024), (4, 1024), (4, 512)):
        features = Features(n_images=n_images, width_px=side, height_px=side)
        add("engine.vae_decode", features, VAE_S * n_images * side**2 / 2**20 * off())
    add("engine.text_encode", Features(), TEXT_S)
    for n_controlnets in (0, 1, 2):
        step_s = truth_s("engine.unet_step", 2, 1) + n_controlnets * truth_s("engine.controlnet_step", 2, 1)
        image = Features(2, 1, 1024, 1024, n_steps=50, n_controlnets=n_controlnets)
        inside_s = 50 * slower * step_s + VAE_S
        add("e2e.colocated", image, inside_s + OVERHEAD_S / 3)
        text_s = 3 * TEXT_S + n_controlnets * CONTROL_S
        add("serving.text", image, text_s)
        add("serving.overhead", image, OVERHEAD_S)
        add("serving.latency", image, inside_s + text_s + OVERHEAD_S)
    session = Session(name, "sdxl", "nvidia-h200", "2026-11-23T00:00:00+00:00", seed, dict(HARDWARE))
    return Measurements(tuple(rows), (dataclasses.replace(session, **changes),))
