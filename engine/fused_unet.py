"""The two halves of SDXL's UNet on fused blocks; what :mod:`engine.unet` computes, with fewer kernels and passes over memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from engine.fused_transformer import FusedProjections, TextKeysValues, is_plain_transformer, transformer_forward
from kernels.add_channels import add_channels, concat_channels
from kernels.group_norm_silu import group_norm_silu

Skips = list[torch.Tensor]


class FusedNetwork:
    """A UNet, or the encoder half that is a ControlNet, with its fused weights."""

    def __init__(self, net: nn.Module) -> None:
        """Re-points attention weights (see :class:`FusedProjections`); everything else is read from the modules."""
        self.net = net
        self.transformers = [part for part in net.modules() if is_plain_transformer(part)]
        self.projections = FusedProjections(self.transformers)
        self._resnets = [part for part in net.modules() if _has_time_projection(part)]
        self._time_weight = torch.cat([part.time_emb_proj.weight.data for part in self._resnets])
        self._time_bias = torch.cat([part.time_emb_proj.bias.data + part.conv1.bias.data for part in self._resnets])
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
            attentions = getattr(block, "attentions", [None] * len(block.resnets))
            for resnet, attention in zip(block.resnets, attentions, strict=True):
                hidden = resnet_forward(resnet, hidden, adds[id(resnet)])
                if attention is not None:
                    hidden = transformer_forward(attention, self.projections, hidden, text)
                skips.append(hidden)
            for downsampler in block.downsamplers or ():
                hidden = downsampler(hidden)
                skips.append(hidden)
        middle = self.net.mid_block
        hidden = resnet_forward(middle.resnets[0], hidden, adds[id(middle.resnets[0])])
        for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
            hidden = transformer_forward(attention, self.projections, hidden, text)
            hidden = resnet_forward(resnet, hidden, adds[id(resnet)])
        return hidden, skips

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
                hidden = upsampler(hidden)
        norm = self.net.conv_norm_out
        hidden = group_norm_silu(hidden, norm.num_groups, norm.weight, norm.bias, norm.eps)
        return self.net.conv_out(hidden)

    def _channel_adds(self, emb: torch.Tensor) -> dict[int, torch.Tensor]:
        """Time projection and first bias of every residual block, by one GEMM: ``[batch, C]`` each."""
        every = functional.linear(functional.silu(emb), self._time_weight, self._time_bias)
        parts = every.split(self._widths, dim=1)
        return {id(resnet): part for resnet, part in zip(self._resnets, parts, strict=True)}


def resnet_forward(self: Any, hidden_states: torch.Tensor, channel_add: torch.Tensor | None = None) -> torch.Tensor:
    """A residual block whose biases travel with the passes that happen anyway.

    Args:
        self: the block.
        hidden_states: ``[N, C, H, W]`` in NHWC memory.
        channel_add: time projection plus the first convolution's bias, ``[N, C']``; None for the bias alone.
    """
    norm, conv = self.norm1, self.conv1
    hidden = group_norm_silu(hidden_states, norm.num_groups, norm.weight, norm.bias, norm.eps)
    hidden = functional.conv2d(hidden, conv.weight, None, conv.stride, conv.padding)
    norm = self.norm2
    hidden = group_norm_silu(
        hidden, norm.num_groups, norm.weight, norm.bias, norm.eps,
        channel_add=conv.bias[None] if channel_add is None else channel_add,
    )  # fmt: skip
    conv = self.conv2
    hidden = functional.conv2d(hidden, conv.weight, None, conv.stride, conv.padding)
    residual = hidden_states
    if self.conv_shortcut is not None:
        n, c, h, w = hidden_states.shape
        flat = hidden_states.permute(0, 2, 3, 1).reshape(n * h * w, c)
        shortcut = self.conv_shortcut
        residual = functional.linear(flat, shortcut.weight.view(-1, c), shortcut.bias)
        residual = residual.view(n, h, w, -1).permute(0, 3, 1, 2)
    return add_channels(hidden, conv.bias, residual)


def _has_time_projection(part: nn.Module) -> bool:
    return type(part).__name__ == "ResnetBlock2D" and part.time_emb_proj is not None
