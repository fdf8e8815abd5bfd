"""SDXL ControlNets: the image embedding once per request, the residuals of several nets summed into one flat buffer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers import ControlNetModel

from engine.models import ModelSpec
from engine.unet import down_and_mid


def embed_condition(net: ControlNetModel, image: torch.Tensor, batch: int) -> torch.Tensor:
    """The embedding of the control image, constant over the steps of a request.

    Args:
        net: the ControlNet.
        image: ``[1 or n_images, 3, height, width]`` in 0..1.
        batch: forward batch, a multiple of ``n_images``.

    Returns:
        ``[batch, first channels, h, w]``.
    """
    if net.config.controlnet_conditioning_channel_order == "bgr":
        image = torch.flip(image, dims=[1])
    embedding = net.controlnet_cond_embedding(image)
    return embedding.repeat(batch // embedding.shape[0], 1, 1, 1)


def residuals_of(
    net: ControlNetModel,
    sample: torch.Tensor,
    emb: torch.Tensor,
    context: torch.Tensor,
    condition: torch.Tensor,
) -> list[torch.Tensor]:
    """One ControlNet forward.

    Args:
        net: the ControlNet.
        sample: scaled latents, ``[batch, 4, h, w]``.
        emb: one row of :func:`engine.unet.embed` with this net.
        context: text embeddings.
        condition: from :func:`embed_condition`.

    Returns:
        9 residuals shaped like the UNet's skips and one shaped like its hidden state, not yet scaled.
    """
    hidden, skips = down_and_mid(net, net.conv_in(sample) + condition, emb, context)
    residuals = [zero_conv(skip) for skip, zero_conv in zip(skips, net.controlnet_down_blocks, strict=True)]
    return [*residuals, net.controlnet_mid_block(hidden)]


def active_steps(start: float, end: float, n_steps: int) -> list[bool]:
    """At which steps a ControlNet is used; the same rule, in the same floating-point order, as diffusers' pipelines."""
    return [not (step / n_steps < start or (step + 1) / n_steps > end) for step in range(n_steps)]


@dataclass(frozen=True, slots=True)
class ResidualLayout:
    """Where the ten residuals of one forward lie in a flat buffer, so that they travel as one message."""

    shapes: tuple[tuple[int, int, int, int], ...]
    """``(batch, channels, h, w)`` of 9 skips and the middle block."""
    is_channels_last: bool

    @classmethod
    def of(cls, spec: ModelSpec, batch: int, height: int, width: int, *, is_channels_last: bool) -> ResidualLayout:
        """The layout for images of this size in pixels."""
        h, w = height // spec.vae_scale_factor, width // spec.vae_scale_factor
        channels = spec.block_channels
        shapes = [(batch, channels[0], h, w)]
        for level, width_c in enumerate(channels):
            shapes += [(batch, width_c, h, w)] * 2
            if level < len(channels) - 1:
                h, w = h // 2, w // 2
                shapes.append((batch, width_c, h, w))
        shapes.append((batch, channels[-1], h, w))
        return cls(tuple(shapes), is_channels_last)

    @property
    def n_elements(self) -> int:
        """Length of the flat buffer."""
        return sum(math.prod(shape) for shape in self.shapes)

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The ten tensors inside ``flat``, dense in the memory order of the activations."""
        ends = [0]
        for shape in self.shapes:
            ends.append(ends[-1] + math.prod(shape))
        views = []
        for shape, (first, last) in zip(self.shapes, pairwise(ends), strict=True):
            batch, channels, h, w = shape
            if self.is_channels_last:
                views.append(flat[first:last].view(batch, h, w, channels).permute(0, 3, 1, 2))
            else:
                views.append(flat[first:last].view(shape))
        return views


def add_scaled(sums: Sequence[torch.Tensor], residuals: Sequence[torch.Tensor], scale: torch.Tensor) -> None:
    """Adds ``residuals × scale`` to ``sums`` in place; ``scale`` is a tensor without dimensions, so that a graph can replay it."""
    for total, residual in zip(sums, residuals, strict=True):
        total.addcmul_(residual, scale)  # one pass over memory
