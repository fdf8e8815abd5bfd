"""Spatial transformers as our engine runs them on a GPU: the same arithmetic as diffusers' modules, with fewer passes over memory.

- The projections of queries, keys and values are one GEMM. Their weights become one tensor of which the modules' own weights are
  views, so that whoever patches or loads the modules' weights in place changes the fused ones.
- Keys and values of the text are constant over the steps of a request: :class:`TextKeysValues` holds them.
- A residual addition and the norm after it are one kernel, also from one block to the next; GEGLU is one kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.nn import functional

from kernels.add_channels import add_channels
from kernels.add_layer_norm import add_layer_norm
from kernels.geglu_linear import geglu_linear
from kernels.group_norm_silu import group_norm_silu


def is_plain_transformer(part: nn.Module) -> bool:
    """Whether :func:`transformer_forward` computes what this module computes."""
    return (
        isinstance(part, Transformer2DModel)
        and part.is_input_continuous
        and part.use_linear_projection
        and all(_is_plain_block(block) for block in part.transformer_blocks)
    )


def _is_plain_block(block: nn.Module) -> bool:
    if not isinstance(block, BasicTransformerBlock) or block.norm_type != "layer_norm" or block.attn2 is None:
        return False
    attentions = (block.attn1, block.attn2)
    return (
        not block.only_cross_attention
        and block.pos_embed is None
        and type(block.ff.net[0]).__name__ == "GEGLU"
        and all(
            attn.to_q.bias is None
            and attn.to_k.bias is None
            and attn.to_v.bias is None
            and attn.norm_q is None
            and attn.group_norm is None
            and attn.spatial_norm is None
            and not attn.residual_connection
            and attn.rescale_output_factor == 1.0
            for attn in attentions
        )
    )


class FusedProjections:
    """The fused weights of some transformers."""

    def __init__(self, transformers: Sequence[nn.Module]) -> None:
        """Re-points the modules' weights to views of fused ones; values stay, addresses change once."""
        self.weights: dict[int, torch.Tensor] = {}
        for transformer in transformers:
            for block in transformer.transformer_blocks:
                first, second = block.attn1, block.attn2
                self.weights[id(first)] = side_by_side([first.to_q.weight, first.to_k.weight, first.to_v.weight])
                self.weights[id(second)] = side_by_side([second.to_k.weight, second.to_v.weight])


def side_by_side(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """One tensor whose rows are those of all parameters, which become views of it.

    Values stay and addresses change once, so whoever loads or patches the parameters in place changes the fused tensor. Called
    again for the same parameters, it returns the tensor they are views of.
    """
    first = parameters[0].data
    start, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    is_done = True
    for parameter in parameters:
        is_done &= parameter.data_ptr() == start and parameter.untyped_storage().data_ptr() == storage
        start += parameter.numel() * parameter.element_size()
    if is_done:
        n_rows = sum(parameter.shape[0] for parameter in parameters)
        return first.as_strided((n_rows, *first.shape[1:]), first.stride())
    fused = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, fused.split([p.shape[0] for p in parameters]), strict=True):
        parameter.data = part
    return fused


class TextKeysValues:
    """Keys and values of the text for every cross-attention of a network; passed on as ``encoder_hidden_states``."""

    def __init__(self, transformers: Sequence[nn.Module], fused: FusedProjections, context: torch.Tensor) -> None:
        """``context`` ``[batch, 77, width]`` is a static buffer; :meth:`update` reads it."""
        self._context = context
        self._layers = [
            (fused.weights[id(block.attn2)], block.attn2) for part in transformers for block in part.transformer_blocks
        ]
        batch, length, _ = context.shape
        self._kept = {
            id(attn): torch.zeros((batch, length, weight.shape[0]), device=context.device, dtype=context.dtype)
            for weight, attn in self._layers
        }

    def update(self) -> None:
        """Computes everything from the context and the weights as they are now: after a new text, after a patch."""
        context = self._context.reshape(-1, self._context.shape[-1])
        for weight, attn in self._layers:
            kept = self._kept[id(attn)]
            torch.mm(context, weight.t(), out=kept.view(-1, kept.shape[-1]))

    def of(self, attn: nn.Module) -> torch.Tensor:
        """``[batch, 77, 2 × inner]``: keys, then values."""
        return self._kept[id(attn)]


def transformer_forward(
    self: Any, fused: FusedProjections, hidden_states: torch.Tensor, text: TextKeysValues | torch.Tensor
) -> torch.Tensor:
    """A whole spatial transformer, ``[N, C, H, W]`` in NHWC memory to the same."""
    batch, channels, height, width = hidden_states.shape
    norm = self.norm
    hidden = group_norm_silu(hidden_states, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=False)
    total = self.proj_in(hidden.permute(0, 2, 3, 1).reshape(batch, height * width, channels))
    branch: torch.Tensor | None = None
    for block in self.transformer_blocks:
        branch, total = _block(block, fused, branch, total, text)
    if branch is not None:
        total = total + branch
    out = functional.linear(total, self.proj_out.weight).reshape(batch, height, width, -1).permute(0, 3, 1, 2)
    return add_channels(out, self.proj_out.bias, hidden_states)


def _block(
    block: Any, fused: FusedProjections, branch: torch.Tensor | None, total: torch.Tensor, text: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """One block; the sum ``total + branch`` that enters it, and the one that leaves it, are made by the norm that follows."""
    if branch is None:
        total, normed = _norm(block.norm1, total, None)
    else:
        total, normed = _norm(block.norm1, branch, total)
    attn = block.attn1
    query, key, value = functional.linear(normed, fused.weights[id(attn)]).chunk(3, dim=-1)
    total, normed = _norm(block.norm2, _attend(attn, query, key, value), total)
    attn = block.attn2
    query = functional.linear(normed, attn.to_q.weight)
    if isinstance(text, TextKeysValues):
        keys_values = text.of(attn)
    else:
        keys_values = functional.linear(text, fused.weights[id(attn)])
    key, value = keys_values.chunk(2, dim=-1)
    total, normed = _norm(block.norm3, _attend(attn, query, key, value), total)
    gate = block.ff.net[0].proj
    hidden = geglu_linear(normed, gate.weight, gate.bias)
    last = block.ff.net[2]
    return functional.linear(hidden, last.weight, last.bias), total


def _norm(norm: nn.LayerNorm, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)


def _attend(attn: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    batch, length, inner = query.shape
    heads = attn.heads

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.view(batch, -1, heads, inner // heads).transpose(1, 2)

    out = functional.scaled_dot_product_attention(split(query), split(key), split(value))
    out = out.transpose(1, 2).reshape(batch, length, inner)
    return functional.linear(out, attn.to_out[0].weight, attn.to_out[0].bias)
