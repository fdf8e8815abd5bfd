"""SDXL ControlNets: the image embedding once per request, the residuals of several nets summed into one flat buffer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from diffusers import ControlNetModel

from engine.models import ModelSpec
from engine.unet import down


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


def residual_stage(
    net: ControlNetModel,
    place: int,
    hidden: torch.Tensor,
    emb: torch.Tensor,
    context: torch.Tensor,
    condition: torch.Tensor,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One stage of a ControlNet's forward: a down block (or, last, the middle block) and the residuals that it completes.

    Every zero convolution runs right after its block, so that a stage's residuals can leave while the next one computes;
    the largest come first.

    Args:
        net: the ControlNet.
        place: 0 .. number of down blocks; the last is the middle block.
        hidden: stage 0: scaled latents, ``[batch, 4, h, w]``; later ones: what the stage before returned.
        emb: one row of :func:`engine.unet.embed` with this net.
        context: text embeddings.
        condition: from :func:`embed_condition`; only stage 0 uses it.

    Returns:
        Hidden state and this stage's residuals, not yet scaled. All stages together give 9 shaped like the UNet's skips and
        one shaped like its hidden state.
    """
    if place == len(net.down_blocks):
        hidden = net.mid_block(hidden, emb, encoder_hidden_states=context)
        return hidden, [net.controlnet_mid_block(hidden)]
    skips = []
    if place == 0:
        hidden = net.conv_in(hidden) + condition
        skips.append(hidden)
    hidden, more = down(net.down_blocks[place], hidden, emb, context)
    skips.extend(more)
    first = 0 if place == 0 else 1 + sum(_n_skips(block) for block in net.down_blocks[:place])
    convs = net.controlnet_down_blocks[first : first + len(skips)]
    return hidden, [zero_conv(skip) for skip, zero_conv in zip(skips, convs, strict=True)]


def _n_skips(block: Any) -> int:
    return len(block.resnets) + (0 if block.downsamplers is None else len(block.downsamplers))


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
    def stage_counts(self) -> tuple[int, ...]:
        """How many of the residuals each :func:`residual_stage` completes; a stage's lie side by side."""
        # the first convolution's, two and a downsampler's; then three a level, but two in the last; the middle block's
        n_levels = (len(self.shapes) - 1) // 3
        return (4, *[3] * (n_levels - 2), 2, 1)

    @property
    def stage_ends(self) -> tuple[int, ...]:
        """Where in the flat buffer each stage's residuals end."""
        lengths = [math.prod(shape) for shape in self.shapes]
        return tuple(sum(lengths[:place]) for place in accumulate(self.stage_counts))

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
