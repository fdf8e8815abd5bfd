"""The two halves of SDXL's UNet on fused blocks; what :mod:`engine.unet` computes, with fewer kernels and passes over memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional

from engine.fused_transformer import (
    FusedProjections,
    TextKeysValues,
    is_plain_transformer,
    side_by_side,
    transformer_forward,
)
from kernels.add_channels import add_channels, concat_channels
from kernels.group_norm_silu import group_norm_silu
from kernels.upsample_nearest import upsample_nearest_2x

Skips = list[torch.Tensor]
Adds = dict[int, torch.Tensor]
"""By residual block (its id): what is added to each channel between its convolutions."""


class FusedNetwork:
    """A UNet, or the encoder half that is a ControlNet, with its fused weights."""

    def __init__(self, net: nn.Module) -> None:
        """Re-points some weights to views of fused ones (see :func:`side_by_side`); everything else is read from the modules."""
        self.net = net
        self.transformers = [part for part in net.modules() if is_plain_transformer(part)]
        self.projections = FusedProjections(self.transformers)
        self._resnets = [part for part in net.modules() if _has_time_projection(part)]
        self._time_weight = side_by_side([part.time_emb_proj.weight for part in self._resnets])
        self._time_bias = side_by_side([part.time_emb_proj.bias for part in self._resnets])
        self._conv_bias = side_by_side([part.conv1.bias for part in self._resnets])
        self._widths = [part.conv1.out_channels for part in self._resnets]

    def text(self, context: torch.Tensor) -> TextKeysValues:
        """Keys and values of a static context buffer; not yet computed."""
        return TextKeysValues(self.transformers, self.projections, context)

    def encode(self, sample: torch.Tensor, emb: torch.Tensor, text: Any) -> tuple[torch.Tensor, Skips]:
        """The half before the join; shapes as :func:`engine.unet.encode`."""
        return self.down_and_mid(self.net.conv_in(sample), emb, text)

    def down_and_mid(self, hidden: torch.Tensor, emb: torch.Tensor, text: Any) -> tuple[torch.Tensor, Skips]:
        """Down blocks and middle block on the output of ``conv_in``; hidden state and 9 skips, largest first."""
        adds = self._channel_adds(emb)
        skips = [hidden]
        for block in self.net.down_blocks:
            hidden, more = self._down(block, hidden, adds, text)
            skips += more
        return self._middle(hidden, adds, text), skips

    def _down(self, block: Any, hidden: torch.Tensor, adds: Adds, text: Any) -> tuple[torch.Tensor, Skips]:
        skips = []
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for resnet, attention in zip(block.resnets, attentions, strict=True):
            hidden = resnet_forward(resnet, hidden, adds[id(resnet)])
            if attention is not None:
                hidden = transformer_forward(attention, self.projections, hidden, text)
            skips.append(hidden)
        for downsampler in block.downsamplers or ():
            hidden = downsampler(hidden)
            skips.append(hidden)
        return hidden, skips

    def _middle(self, hidden: torch.Tensor, adds: Adds, text: Any) -> torch.Tensor:
        middle = self.net.mid_block
        hidden = resnet_forward(middle.resnets[0], hidden, adds[id(middle.resnets[0])])
        for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
            hidden = transformer_forward(attention, self.projections, hidden, text)
            hidden = resnet_forward(resnet, hidden, adds[id(resnet)])
        return hidden

    def stage(
        self, place: int, hidden: torch.Tensor, emb: torch.Tensor, text: Any, condition: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """One stage of a ControlNet; arguments and results as :func:`engine.controlnet.residual_stage`."""
        adds = self._channel_adds(emb)
        if place == len(self.net.down_blocks):
            hidden = self._middle(hidden, adds, text)
            return hidden, [_zero_conv(self.net.controlnet_mid_block, hidden)]
        skips = []
        if place == 0:
            hidden = self.net.conv_in(hidden) + condition
            skips.append(hidden)
        hidden, more = self._down(self.net.down_blocks[place], hidden, adds, text)
        skips += more
        first = 0 if place == 0 else 1 + sum(_n_skips(block) for block in self.net.down_blocks[:place])
        convs = self.net.controlnet_down_blocks[first : first + len(skips)]
        return hidden, [_zero_conv(conv, skip) for skip, conv in zip(skips, convs, strict=True)]

    def decode(
        self,
        hidden: torch.Tensor,
        skips: Sequence[torch.Tensor],
        emb: torch.Tensor,
        text: Any,
        residuals: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The half after the join; shapes as :func:`engine.unet.decode`."""
        adds = self._channel_adds(emb)
        remaining = list(skips)
        joined: list[torch.Tensor | None] = [None] * len(remaining)
        if residuals is not None:
            joined = list(residuals[:-1])
            hidden = hidden + residuals[-1]
        for block in self.net.up_blocks:
            attentions = getattr(block, "attentions", [None] * len(block.resnets))
            for resnet, attention in zip(block.resnets, attentions, strict=True):
                hidden = concat_channels(hidden, remaining.pop(), joined.pop())
                hidden = resnet_forward(resnet, hidden, adds[id(resnet)])
                if attention is not None:
                    hidden = transformer_forward(attention, self.projections, hidden, text)
            for upsampler in block.upsamplers or ():
                hidden = upsampler.conv(upsample_nearest_2x(hidden))
        norm = self.net.conv_norm_out
        hidden = group_norm_silu(hidden, norm.num_groups, norm.weight, norm.bias, norm.eps)
        return self.net.conv_out(hidden)

    def _channel_adds(self, emb: torch.Tensor) -> Adds:
        """Time projection and first bias of every residual block, by one GEMM: ``[batch, C]`` each."""
        every = functional.linear(functional.silu(emb), self._time_weight, self._time_bias) + self._conv_bias
        parts = every.split(self._widths, dim=1)
        return {id(resnet): part for resnet, part in zip(self._resnets, parts, strict=True)}


def resnet_forward(
    self: Any,
    hidden_states: torch.Tensor,
    channel_add: torch.Tensor | None = None,
    *,
    input_add: torch.Tensor | None = None,
) -> torch.Tensor:
    """A residual block whose biases travel with the passes that happen anyway.

    Args:
        self: the block.
        hidden_states: ``[N, C, H, W]`` in NHWC memory.
        channel_add: time projection plus the first convolution's bias, ``[N, C']``; None for the bias alone.
        input_add: ``[C]``, what is still missing in ``hidden_states``: the bias of the convolution before.
    """
    norm, conv = self.norm1, self.conv1
    hidden = group_norm_silu(
        hidden_states, norm.num_groups, norm.weight, norm.bias, norm.eps,
        channel_add=None if input_add is None else input_add[None],
    )  # fmt: skip
    hidden = functional.conv2d(hidden, conv.weight, None, conv.stride, conv.padding)
    norm = self.norm2
    hidden = group_norm_silu(
        hidden, norm.num_groups, norm.weight, norm.bias, norm.eps,
        channel_add=conv.bias[None] if channel_add is None else channel_add,
    )  # fmt: skip
    conv = self.conv2
    hidden = functional.conv2d(hidden, conv.weight, None, conv.stride, conv.padding)
    if self.conv_shortcut is None:
        return add_channels(hidden, conv.bias if input_add is None else conv.bias + input_add, hidden_states)
    n, c, h, w = hidden_states.shape
    shortcut = self.conv_shortcut
    weight = shortcut.weight.view(-1, c)
    bias = shortcut.bias if input_add is None else torch.addmv(shortcut.bias, weight, input_add)
    residual = functional.linear(hidden_states.permute(0, 2, 3, 1).reshape(n * h * w, c), weight, bias)
    return add_channels(hidden, conv.bias, residual.view(n, h, w, -1).permute(0, 3, 1, 2))


def is_plain_network(net: nn.Module) -> bool:
    """Whether :class:`FusedNetwork` computes what this UNet or ControlNet computes."""
    resnets = [part for part in net.modules() if isinstance(part, ResnetBlock2D)]
    samplers = [part for part in net.modules() if isinstance(part, Upsample2D)]
    return (
        isinstance(net, UNet2DConditionModel | ControlNetModel)
        and all(is_plain_transformer(part) for part in net.modules() if isinstance(part, Transformer2DModel))
        and all(
            part.time_emb_proj is not None
            and part.time_embedding_norm == "default"
            and part.upsample is None
            and part.downsample is None
            and not part.skip_time_act
            and part.output_scale_factor == 1.0
            and isinstance(part.nonlinearity, nn.SiLU)
            for part in resnets
        )
        and all(
            part.interpolate and part.use_conv and part.norm is None and not part.use_conv_transpose
            for part in samplers
        )
    )


def _has_time_projection(part: nn.Module) -> bool:
    return isinstance(part, ResnetBlock2D) and part.time_emb_proj is not None


def _n_skips(block: Any) -> int:
    return len(block.resnets) + (0 if block.downsamplers is None else len(block.downsamplers))


def _zero_conv(conv: Any, skip: torch.Tensor) -> torch.Tensor:
    """A 1 × 1 convolution as a matrix product, which takes the bias along."""
    n, c, h, w = skip.shape
    flat = functional.linear(skip.permute(0, 2, 3, 1).reshape(n * h * w, c), conv.weight.view(-1, c), conv.bias)
    return flat.view(n, h, w, -1).permute(0, 3, 1, 2)
