"""What a base rank and a ControlNet worker say to each other about one job, and where its tensors lie in the lanes.

    base → ControlNets   {"type": "step", "what": "open", …}       once, when attached; answered by "opened"
                         {"type": "begin", "job": n, …}            lane "inputs": timesteps, text, control images
                         {"type": "step", "job": n, "step": i}     lane "latents": the scaled latents of step i
    ControlNets → base   {"type": "residuals", "job", "step", "first_part", "last_part"}   lane "residuals"
                         {"type": "busy", "job"}                   still loading or capturing: wait on
                         {"type": "refused", "job", "reason"}      the job is at fault

Both sides compute offsets from the same message, so none travels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from engine.control_stack import ShapeKey
from engine.links.tensor_line import aligned
from engine.models import N_TEXT_POSITIONS, ModelSpec

FP8_MAX: Final = 448.0
"""The largest number of float8_e4m3fn."""
FP8_HEADER_BYTES: Final = 256
"""The scale (fp32) in front of a part's bytes, padded so that these stay aligned."""
FP8_RELATIVE_ERROR: Final = 2.0**-4
"""Rounding to 3 bits of mantissa changes a normal number by at most this share (1/16); about 2.6 % in the root mean square. Numbers
below 2^-15 of the part's largest round to a fixed grid instead."""


@dataclass(frozen=True, slots=True)
class ControlSpec:
    """One ControlNet of a job, without its image."""

    name: str
    scale: float
    start: float
    end: float
    n_images: int
    """Rows of its image: 1 or the job's number of images."""


@dataclass(frozen=True, slots=True)
class JobHeader:
    """What ``begin`` says."""

    job: int
    key: ShapeKey
    n_steps: int
    controls: tuple[ControlSpec, ...]
    is_fp8: bool = False
    """Residuals travel as 8-bit floats, scaled by the largest of each part."""

    def to_plain(self) -> dict[str, Any]:
        """JSON values."""
        return {"type": "begin", **dataclasses.asdict(self)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> JobHeader:
        """The inverse; raises KeyError or TypeError for what this code does not write."""
        return cls(
            int(plain["job"]),
            ShapeKey(**plain["key"]),
            int(plain["n_steps"]),
            tuple(ControlSpec(**item) for item in plain["controls"]),
            bool(plain["is_fp8"]),
        )


@dataclass(frozen=True, slots=True)
class InputPlace:
    """One tensor in the lane of inputs."""

    at_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def input_places(header: JobHeader, spec: ModelSpec, dtype: torch.dtype) -> tuple[list[InputPlace], int]:
    """Timesteps, text context, pooled text and the control images in order; and the bytes of the lane."""
    key = header.key
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((header.n_steps,), torch.float32),
        ((key.batch, N_TEXT_POSITIONS, spec.context_width), dtype),
        ((key.batch, spec.pooled_width), dtype),
        *(((control.n_images, 3, key.height, key.width), dtype) for control in header.controls),
    ]
    places, at = [], 0
    for shape, kind in shapes:
        places.append(InputPlace(at, shape, kind))
        at += aligned(_n_elements(shape) * kind.itemsize)
    return places, at


def residual_bytes(ends: Sequence[int], dtype: torch.dtype, *, is_fp8: bool) -> int:
    """Bytes of the residual lane; ``ends`` are the parts' ends in elements."""
    if not is_fp8:
        return ends[-1] * dtype.itemsize
    return residual_place(ends, len(ends), dtype, is_fp8=True)


def residual_place(ends: Sequence[int], part: int, dtype: torch.dtype, *, is_fp8: bool) -> int:
    """Where a part begins in the residual lane, in bytes."""
    first = ends[part - 1] if part else 0
    if not is_fp8:
        return first * dtype.itemsize
    return sum(
        FP8_HEADER_BYTES + aligned(stop - start)
        for start, stop in zip([0, *ends[:-1]][:part], ends[:part], strict=True)
    )


def to_fp8(part: torch.Tensor) -> torch.Tensor:
    """A part of the residuals as bytes: its scale, then one byte an element. Nothing waits for the host."""
    largest = part.abs().amax().to(torch.float32).clamp_min(torch.finfo(torch.float32).tiny)
    scale = largest / FP8_MAX
    packed = torch.empty(FP8_HEADER_BYTES + part.numel(), device=part.device, dtype=torch.uint8)
    packed[:4].copy_(scale.view(1).view(torch.uint8))
    packed[FP8_HEADER_BYTES:].copy_((part / scale).to(torch.float8_e4m3fn).view(torch.uint8))
    return packed


def from_fp8(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of :func:`to_fp8` but for rounding."""
    scale = packed[:4].view(torch.float32)
    return (packed[FP8_HEADER_BYTES:].view(torch.float8_e4m3fn).to(torch.float32) * scale).to(dtype)


def _n_elements(shape: Sequence[int]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n
