"""SDXL's UNet forward, cut in two where ControlNet residuals join: after the middle block, before the first up block.

The encoder half needs no residual, so it runs while ControlNets do. Same modules, same order of operations as
``UNet2DConditionModel.forward``; what depends only on the step (time embeddings) is computed once per request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

Skips = list[torch.Tensor]


def embed(
    net: UNet2DConditionModel | ControlNetModel,
    timesteps: torch.Tensor,
    pooled: torch.Tensor,
    time_ids: torch.Tensor,
) -> torch.Tensor:
    """The step embedding of every step of a request at once.

    Args:
        net: a UNet or a ControlNet; each has its own embedding layers.
        timesteps: ``[n_steps]``.
        pooled: pooled text embedding, ``[batch, pooled width]``.
        time_ids: original size, crop and target size, ``[batch, 6]``.

    Returns:
        ``[n_steps, batch, 4 × first channels]``, in the type of ``pooled``.
    """
    of_time = net.time_embedding(net.time_proj(timesteps).to(pooled.dtype))  # [n_steps, D]
    of_size = net.add_time_proj(time_ids.flatten()).reshape(pooled.shape[0], -1)
    added = net.add_embedding(torch.cat([pooled, of_size], dim=-1).to(pooled.dtype))  # [batch, D]
    return of_time[:, None, :] + added[None, :, :]


def down_and_mid(
    net: Any, hidden: torch.Tensor, emb: torch.Tensor, context: torch.Tensor
) -> tuple[torch.Tensor, Skips]:
    """Runs the down blocks and the middle block of a UNet or ControlNet on the output of ``conv_in``.

    Returns:
        The middle block's output and the 9 skip tensors, largest first.
    """
    skips = [hidden]
    for block in net.down_blocks:
        hidden, more = down(block, hidden, emb, context)
        skips.extend(more)
    return net.mid_block(hidden, emb, encoder_hidden_states=context), skips


def down(block: Any, hidden: torch.Tensor, emb: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Runs one down block; returns its output and its skips."""
    if getattr(block, "has_cross_attention", False):
        return block(hidden_states=hidden, temb=emb, encoder_hidden_states=context)  # type: ignore[no-any-return]
    return block(hidden_states=hidden, temb=emb)  # type: ignore[no-any-return]


def encode(
    unet: UNet2DConditionModel, sample: torch.Tensor, emb: torch.Tensor, context: torch.Tensor
) -> tuple[torch.Tensor, Skips]:
    """The half before the join.

    Args:
        unet: the network.
        sample: scaled latents, ``[batch, 4, h, w]``; h and w are multiples of 4.
        emb: one row of :func:`embed`, ``[batch, D]``.
        context: text embeddings, ``[batch, 77, width]``.

    Returns:
        Hidden state ``[batch, C, h/4, w/4]`` and 9 skips.
    """
    return down_and_mid(unet, unet.conv_in(sample), emb, context)


def decode(
    unet: UNet2DConditionModel,
    hidden: torch.Tensor,
    skips: Sequence[torch.Tensor],
    emb: torch.Tensor,
    context: torch.Tensor,
    residuals: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """The half after the join.

    Args:
        unet: the network.
        hidden: from :func:`encode`.
        skips: from :func:`encode`.
        emb: as for :func:`encode`.
        context: as for :func:`encode`.
        residuals: 9 tensors shaped like ``skips`` and one like ``hidden``, already scaled and summed over ControlNets; or None.

    Returns:
        Predicted noise, ``[batch, 4, h, w]``.
    """
    remaining = list(skips)
    if residuals is not None:
        remaining = [skip + residual for skip, residual in zip(remaining, residuals[:-1], strict=True)]
        hidden = hidden + residuals[-1]
    for block in unet.up_blocks:
        n_taken = len(block.resnets)
        taken, remaining = tuple(remaining[-n_taken:]), remaining[:-n_taken]
        if getattr(block, "has_cross_attention", False):
            hidden = block(hidden_states=hidden, temb=emb, res_hidden_states_tuple=taken, encoder_hidden_states=context)
        else:
            hidden = block(hidden_states=hidden, temb=emb, res_hidden_states_tuple=taken)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))


def time_ids(height: int, width: int, batch: int, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
    """SDXL's size conditioning without crop, ``[batch, 6]``: original size, crop corner, target size."""
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=dtype).repeat(batch, 1).to(device)
