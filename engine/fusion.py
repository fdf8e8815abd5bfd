"""Keeps diffusers' blocks in NHWC memory and runs their norms with the fused kernel, for as long as a context lasts.

Residual blocks and the VAE decoder's tail: GroupNorm + SiLU become one kernel. Spatial transformers: diffusers makes their
output contiguous in NCHW, so that every block after them would convert back and forth; here the output stays the NHWC view
that it already is.
The modules are shared with whoever else uses them (a stock pipeline measured beside ours), so nothing stays swapped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from kernels.group_norm_silu import group_norm_silu


class FusedBlocks:
    """The blocks of some networks whose forward can be swapped."""

    def __init__(self, *networks: nn.Module) -> None:
        parts = [part for network in networks for part in network.modules()]
        self.resnets = [part for part in parts if _is_plain_resnet(part)]
        self.transformers = [
            part
            for part in parts
            if isinstance(part, Transformer2DModel) and part.is_input_continuous and part.use_linear_projection
        ]
        self.tails = [
            part
            for part in parts
            if isinstance(part, Decoder)
            and isinstance(part.conv_norm_out, nn.GroupNorm)
            and isinstance(part.conv_act, nn.SiLU)
        ]

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within the context the blocks run fused."""
        try:
            for resnet in self.resnets:
                resnet.forward = MethodType(_resnet_forward, resnet)
            for transformer in self.transformers:
                transformer._operate_on_continuous_inputs = MethodType(_transformer_input, transformer)
                transformer._get_output_for_continuous_inputs = MethodType(_transformer_output, transformer)
            for tail in self.tails:
                tail.conv_norm_out.forward = MethodType(_norm_forward, tail.conv_norm_out)
                tail.conv_act.forward = _unchanged
            yield
        finally:
            # The class' own methods show again once the instance's attributes are gone.
            for resnet in self.resnets:
                vars(resnet).pop("forward", None)
            for transformer in self.transformers:
                vars(transformer).pop("_operate_on_continuous_inputs", None)
                vars(transformer).pop("_get_output_for_continuous_inputs", None)
            for tail in self.tails:
                vars(tail.conv_norm_out).pop("forward", None)
                vars(tail.conv_act).pop("forward", None)


def _is_plain_resnet(part: nn.Module) -> bool:
    """Whether its forward is exactly norm, SiLU, convolution, twice."""
    return (
        isinstance(part, ResnetBlock2D)
        # the VAE's blocks say "group", which without a time embedding is the same forward
        and (part.time_embedding_norm == "default" or part.time_emb_proj is None)
        and part.upsample is None
        and part.downsample is None
        and not part.skip_time_act
        and isinstance(part.nonlinearity, nn.SiLU)
    )


def _resnet_forward(self: Any, input_tensor: torch.Tensor, temb: torch.Tensor | None, *_: Any, **__: Any) -> Any:
    hidden = self.conv1(_norm(self.norm1, input_tensor, silu=True))
    if self.time_emb_proj is not None and temb is not None:
        hidden = hidden + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
    hidden = self.conv2(_norm(self.norm2, hidden, silu=True))
    shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
    return (shortcut + hidden) / self.output_scale_factor


def _transformer_input(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, int]:
    batch, channels, height, width = hidden_states.shape
    hidden = _norm(self.norm, hidden_states, silu=False)
    return self.proj_in(hidden.permute(0, 2, 3, 1).reshape(batch, height * width, channels)), channels


def _transformer_output(
    self: Any,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    batch_size: int,
    height: int,
    width: int,
    inner_dim: int,
) -> torch.Tensor:
    hidden = self.proj_out(hidden_states).reshape(batch_size, height, width, inner_dim)
    return hidden.permute(0, 3, 1, 2) + residual


def _norm_forward(self: nn.GroupNorm, hidden: torch.Tensor) -> torch.Tensor:
    return _norm(self, hidden, silu=True)


def _unchanged(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def _norm(norm: nn.GroupNorm, hidden: torch.Tensor, *, silu: bool) -> torch.Tensor:
    return group_norm_silu(hidden, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=silu)
