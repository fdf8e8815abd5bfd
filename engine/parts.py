"""How the networks of a process are run: compiled or not, fused or not, captured or not. One place for base and ControlNet workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from engine import controlnet, unet
from engine.fused_unet import FusedNetwork, is_plain_network
from engine.fused_vae import decode_latents_fused, is_plain_vae
from engine.graphs import Part, Recorder, attention_choice
from engine.options import EngineOptions


class NetworkParts:
    """The forward functions of this process, and the recorder that turns them into parts."""

    def __init__(self, options: EngineOptions, networks: Sequence[nn.Module]) -> None:
        """``networks`` are re-laid in NHWC memory and some of their weights fused, if the options say so; values stay."""
        self._options = options
        self._fused: dict[int, FusedNetwork] = {}
        self._fused_vaes: set[int] = set()
        self.admit(networks)
        self._encode: Callable[..., Any] = unet.encode
        self._decode: Callable[..., Any] = unet.decode
        self._residual_stage: Callable[..., Any] = controlnet.residual_stage
        self._vae_decode: Callable[..., Any] = decode_latents
        if options.compile:
            # One code object serves all ControlNets and shapes, each a recompilation; beyond the default limit of 8
            # torch would silently go on without compiling.
            torch._dynamo.config.recompile_limit = 256
            torch._dynamo.config.accumulated_recompile_limit = 1024
            self._encode = torch.compile(unet.encode, dynamic=False)
            self._decode = torch.compile(unet.decode, dynamic=False)
            self._residual_stage = torch.compile(controlnet.residual_stage, dynamic=False)
            self._vae_decode = torch.compile(decode_latents, dynamic=False)
        self.recorder = Recorder(
            torch.device(options.device), uses_graphs=options.uses_graphs, surroundings=self.surroundings
        )

    def admit(self, networks: Sequence[nn.Module]) -> None:
        """Takes more networks in, as those of the constructor. What is not built like SDXL's runs unfused."""
        for network in networks:
            if self._options.channels_last:
                network.to(memory_format=torch.channels_last)
            if not self._options.is_fused or id(network) in self._fused:
                continue
            if is_plain_network(network):
                self._fused[id(network)] = FusedNetwork(network)
            elif isinstance(network, AutoencoderKL) and is_plain_vae(network):
                self._fused_vaes.add(id(network))

    def dismiss(self, networks: Sequence[nn.Module]) -> None:
        """Forgets networks that will not run again."""
        for network in networks:
            self._fused.pop(id(network), None)
            self._fused_vaes.discard(id(network))

    def text(self, net: nn.Module, context: torch.Tensor) -> tuple[Any, Part]:
        """What a network takes for its text, and the part that brings it up to date with ``context``, a static buffer.

        The part is to run whenever the context has been written, or weights have been patched.
        """
        fused = self._fused.get(id(net))
        if fused is None:
            return context, _nothing
        text = fused.text(context)
        return text, self.recorder.record(text.update)

    def encode(self, net: nn.Module, sample: torch.Tensor, emb: torch.Tensor, text: Any) -> Any:
        """See :func:`engine.unet.encode`; ``text`` from :meth:`text`."""
        fused = self._fused.get(id(net))
        return self._encode(net, sample, emb, text) if fused is None else fused.encode(sample, emb, text)

    def decode(
        self,
        net: nn.Module,
        hidden: torch.Tensor,
        skips: Sequence[torch.Tensor],
        emb: torch.Tensor,
        text: Any,
        residuals: Sequence[torch.Tensor] | None,
    ) -> torch.Tensor:
        """See :func:`engine.unet.decode`; ``text`` from :meth:`text`."""
        fused = self._fused.get(id(net))
        if fused is None:
            return self._decode(net, hidden, skips, emb, text, residuals)  # type: ignore[no-any-return]
        return fused.decode(hidden, skips, emb, text, residuals)

    def residual_stage(
        self, net: nn.Module, place: int, hidden: torch.Tensor, emb: torch.Tensor, text: Any, condition: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """See :func:`engine.controlnet.residual_stage`; ``text`` from :meth:`text`."""
        fused = self._fused.get(id(net))
        if fused is None:
            return self._residual_stage(net, place, hidden, emb, text, condition)  # type: ignore[no-any-return]
        return fused.stage(place, hidden, emb, text, condition)

    def vae_decode(self, vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
        """See :func:`decode_latents`."""
        if id(vae) in self._fused_vaes:
            return decode_latents_fused(vae, latents)
        return self._vae_decode(vae, latents)  # type: ignore[no-any-return]

    def surroundings(self) -> AbstractContextManager[Any]:
        """The choice of attention, for as long as the context lasts."""
        return attention_choice(self._options.attention)  # type: ignore[no-any-return]


def _nothing() -> None:
    """The part that brings a plain context up to date."""


def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents to pixels in 0..1: ``[n, 4, h, w] -> [n, 3, height, width]``."""
    pixels = vae.decoder(vae.post_quant_conv(latents / vae.config.scaling_factor))
    return (pixels * 0.5 + 0.5).clamp(0, 1)
