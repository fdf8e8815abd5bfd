"""The arithmetic of featherweight workers, in whole numbers modulo 2**64, and the images that it must give."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np

from engine.serving.job import ControlUse, Job
from engine.workers.painter import JobError

N_VALUES: Final = 64
"""Numbers of one image's latents."""
SAMPLE_BYTES: Final = 8 * N_VALUES
IMAGE_STARTS: Final = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")
MASK: Final = 2**64 - 1
LORA_MAGIC: Final = b"featherweight lora\n"

Array = np.ndarray


@lru_cache(maxsize=4096)
def number(text: str) -> int:
    """64 bits drawn from a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def numbers_of(text: str) -> Array:
    values = np.arange(1, N_VALUES + 1, dtype=np.uint64) * np.uint64(number(text) | 1)
    return values ^ (values >> np.uint64(31))


def noise(job: Job, image: int) -> Array:
    return numbers_of(f"noise {job.seed} {image} {job.width_px}x{job.height_px}")


def thousandths(value: float) -> np.uint64:
    return np.uint64(round(value * 1000) & MASK)


def weight_of(base_model_id: str, loras: Sequence[tuple[int, float]]) -> np.uint64:
    weight = number(f"base {base_model_id}")
    for content, scale in loras:
        weight += content * round(scale * 1000)
    return np.uint64((weight & MASK) | 1)


def forward(x: Array, weight: np.uint64, prompt: Array, residuals: Array) -> Array:
    """The "network": ``x`` and ``residuals`` [n, 64], ``prompt`` [n, 1]; one prediction a sample."""
    return (x ^ (x >> np.uint64(29))) * weight + prompt + residuals


def residual(controlnet_id: str, image: Array, x: Array, prompt: Array, scale: float) -> Array:
    """What a ControlNet adds: ``image`` and ``prompt`` [n, 1], ``x`` [n, 64]."""
    return ((x + image) * np.uint64(number(f"controlnet {controlnet_id}") | 1) ^ prompt) * thousandths(scale)


def next_latents(x: Array, conditional: Array, unconditional: Array | None, guidance: float) -> Array:
    if unconditional is None:
        return x * np.uint64(3) + conditional
    return x * np.uint64(3) + unconditional + (conditional - unconditional) * thousandths(guidance)


def is_used(start: float, end: float, scale: float, i: int, n_steps: int) -> bool:
    """Whether a ControlNet takes part in step ``i`` (Diffusers' rule for start and end)."""
    return scale != 0.0 and not (i / n_steps < start or (i + 1) / n_steps > end)


def control_number(job: Job, use: ControlUse, index: int) -> int:
    if use.image is None:
        return number(f"control {job.seed} {index}")
    data = job.blobs[use.image]
    if not data.startswith(IMAGE_STARTS):
        raise JobError(f"the image of ControlNet {use.controlnet_id} is no PNG, JPEG or WebP", job.request_id)
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def prompt_numbers(job: Job) -> tuple[int, int]:
    return number(f"prompt {job.prompt}"), number(f"negative {job.negative_prompt or ''}")


def lora_content(lora_id: str) -> bytes:
    """The file of a featherweight LoRA."""
    return LORA_MAGIC + lora_id.encode() + b"\n" + number(f"lora {lora_id}").to_bytes(8, "big")


def lora_number(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def reference_images(job: Job, patch_step: int | None) -> list[bytes]:
    """The images that the job must give, whatever happened on the way: PNG files.

    Args:
        patch_step: before which step its LoRAs were patched in (``WorkerResult.lora_patch_step``).
    """
    plain = weight_of(job.base_model_id, ())
    patched = weight_of(job.base_model_id, [(lora_number(lora_content(u.lora_id)), u.scale) for u in job.loras])
    column = np.zeros((1, 1), dtype=np.uint64)
    conditional, negative = (column + np.uint64(value) for value in prompt_numbers(job))
    files = []
    for image in range(job.n_images):
        x = noise(job, image)[None]
        for i in range(job.n_steps):
            weight = patched if patch_step is not None and i >= patch_step else plain
            halves = []
            for prompt in (conditional, negative)[: 2 if job.uses_cfg else 1]:
                residuals = np.zeros_like(x)
                for index, use in enumerate(job.controls):
                    if is_used(use.start, use.end, use.scale, i, job.n_steps):
                        control = column + np.uint64(control_number(job, use, index))
                        residuals = residuals + residual(use.controlnet_id, control, x, prompt, use.scale)
                halves.append(forward(x, weight, prompt, residuals))
            x = next_latents(x, halves[0], halves[1] if job.uses_cfg else None, job.guidance_scale)
        files.append(png(x[0], job.width_px, job.height_px))
    return files


def png(values: Array, width_px: int, height_px: int) -> bytes:
    """An RGB image that repeats the 512 bytes of ``values``."""
    row = np.zeros((height_px, 1 + 3 * width_px), dtype=np.uint8)
    row[:, 1:] = np.resize(values.astype(">u8").view(np.uint8), (height_px, 3 * width_px))
    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(row.tobytes(), 1)), (b"IEND", b""))
    body = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)
