"""The VAE's decoder as our engine runs it on a GPU: the arithmetic of diffusers' modules with fewer passes over large images.

Biases travel with passes that happen anyway, upsampling writes each pixel once, and the one attention layer, whose heads are too
wide (512) for the fast attention kernels, is two matrix products with an fp32 softmax between them.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

from engine.fused_unet import resnet_forward
from kernels.add_channels import add_channels
from kernels.group_norm_silu import group_norm_silu
from kernels.upsample_nearest import upsample_nearest_2x

QUERIES_MAX: Final = 4096
"""Queries a time: 16384 keys × 4096 × 4 bytes are 256 MiB of logits."""


def is_plain_vae(vae: Any) -> bool:
    """Whether :func:`decode_latents_fused` computes what this VAE's decoder computes."""
    decoder = vae.decoder
    blocks = [decoder.mid_block, *decoder.up_blocks]
    resnets = [resnet for block in blocks for resnet in block.resnets]
    upsamplers = [upsampler for block in decoder.up_blocks for upsampler in block.upsamplers or ()]
    return (
        isinstance(decoder.conv_norm_out, nn.GroupNorm)
        and isinstance(decoder.conv_act, nn.SiLU)
        and len(decoder.mid_block.attentions) == 1
        and decoder.mid_block.attentions[0] is not None
        and all(
            type(resnet).__name__ == "ResnetBlock2D"
            and resnet.time_emb_proj is None
            and resnet.output_scale_factor == 1.0
            and isinstance(resnet.nonlinearity, nn.SiLU)
            for resnet in resnets
        )
        and all(
            upsampler.interpolate and upsampler.norm is None and not upsampler.use_conv_transpose and upsampler.use_conv
            for upsampler in upsamplers
        )
    )


def decode_latents_fused(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents to pixels in 0..1: ``[n, 4, h, w]`` in NHWC memory to ``[n, 3, height, width]``."""
    decoder = vae.decoder
    hidden = decoder.conv_in(vae.post_quant_conv(latents / vae.config.scaling_factor))
    middle = decoder.mid_block
    hidden = resnet_forward(middle.resnets[0], hidden)
    hidden = _attend(middle.attentions[0], hidden)
    hidden = resnet_forward(middle.resnets[1], hidden)
    bias: torch.Tensor | None = None
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            hidden = resnet_forward(resnet, hidden, input_add=bias)
            bias = None
        for upsampler in block.upsamplers or ():
            conv = upsampler.conv
            hidden = functional.conv2d(upsample_nearest_2x(hidden), conv.weight, None, conv.stride, conv.padding)
            bias = conv.bias
    norm = decoder.conv_norm_out
    hidden = group_norm_silu(hidden, norm.num_groups, norm.weight, norm.bias, norm.eps, channel_add=_row(bias))
    pixels = decoder.conv_out(hidden)
    return (pixels * 0.5 + 0.5).clamp(0, 1)


def _row(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias[None]


def _attend(attn: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Single-head self-attention over all pixels with its residual."""
    n, channels, height, width = hidden.shape
    norm = attn.group_norm
    normed = group_norm_silu(hidden, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=False)
    tokens = normed.permute(0, 2, 3, 1).reshape(n, height * width, channels)
    query, key, value = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
    if attn.heads != 1 or not hidden.is_cuda:
        split = [x.view(n, -1, attn.heads, channels // attn.heads).transpose(1, 2) for x in (query, key, value)]
        out = functional.scaled_dot_product_attention(*split).transpose(1, 2).reshape(tokens.shape)
    else:
        query = query * channels**-0.5
        out = torch.empty_like(tokens)
        for image in range(n):
            for first in range(0, tokens.shape[1], QUERIES_MAX):
                part = slice(first, first + QUERIES_MAX)
                logits = torch.mm(query[image, part], key[image].t(), out_dtype=torch.float32)
                torch.mm(torch.softmax(logits, dim=-1).to(value.dtype), value[image], out=out[image, part])
    last = attn.to_out[0]
    out = functional.linear(out, last.weight).reshape(n, height, width, channels).permute(0, 3, 1, 2)
    return add_channels(out, last.bias, hidden)
