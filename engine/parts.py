"""How the networks of a process are run: compiled or not, fused or not, captured or not. One place for base and ControlNet workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from engine import controlnet, unet
from engine.fusion import FusedBlocks
from engine.graphs import Recorder, attention_choice
from engine.options import EngineOptions


class NetworkParts:
    """The forward functions of this process, and the recorder that turns them into parts."""

    def __init__(self, options: EngineOptions, networks: Sequence[nn.Module]) -> None:
        """``networks`` are re-laid in NHWC memory if the options say so; their values stay."""
        if options.channels_last:
            for network in networks:
                network.to(memory_format=torch.channels_last)
        self._options = options
        self._blocks = FusedBlocks(*networks) if options.uses_fused_norms else None
        self.encode: Callable[..., Any] = unet.encode
        self.decode: Callable[..., Any] = unet.decode
        self.residuals_of: Callable[..., Any] = controlnet.residuals_of
        self.vae_decode: Callable[..., Any] = decode_latents
        if options.compile:
            # One code object serves all ControlNets and shapes, each a recompilation; beyond the default limit of 8
            # torch would silently go on without compiling.
            torch._dynamo.config.recompile_limit = 256
            torch._dynamo.config.accumulated_recompile_limit = 1024
            self.encode = torch.compile(unet.encode, dynamic=False)
            self.decode = torch.compile(unet.decode, dynamic=False)
            self.residuals_of = torch.compile(controlnet.residuals_of, dynamic=False)
            self.vae_decode = torch.compile(decode_latents, dynamic=False)
        self.recorder = Recorder(
            torch.device(options.device), uses_graphs=options.uses_graphs, surroundings=self.surroundings
        )

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """Fused norms and the choice of attention, for as long as the context lasts."""
        with ExitStack() as stack:
            if self._blocks is not None:
                stack.enter_context(self._blocks.swapped())
            stack.enter_context(attention_choice(self._options.attention))
            yield


def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents to pixels in 0..1: ``[n, 4, h, w] -> [n, 3, height, width]``."""
    pixels = vae.decoder(vae.post_quant_conv(latents / vae.config.scaling_factor))
    return (pixels * 0.5 + 0.5).clamp(0, 1)
