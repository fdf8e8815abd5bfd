"""One denoising step of the base at one shape: static buffers, and the parts that are replayed on them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.control_stack import ShapeKey
from engine.controlnet import ResidualLayout
from engine.graphs import Part
from engine.models import N_TEXT_POSITIONS, SdxlModels
from engine.options import EngineOptions, PromptEmbeddings, TokenIds
from engine.parts import NetworkParts
from engine.schedule import N_STEP_SCALARS, euler_step, guide, scaled_input
from engine.text import encode_prompt


class StepProgram:
    """The base worker's share of a step. Inputs are written into the buffers, then the parts run in order.

    ``project_text`` is to run whenever the context has been written or weights have been patched.

    ``scale_in`` (latents → ``latents_in``), ``encode``, ``decode`` or ``decode_joined`` (prediction, guidance, Euler step →
    latents). A program of one CFG half stops at its prediction: it lies in ``own_half``; once the other rank's lies in
    ``other_half``, ``advance`` takes the step.
    """

    def __init__(
        self, models: SdxlModels, key: ShapeKey, options: EngineOptions, parts: NetworkParts, half: int | None = None
    ) -> None:
        """``half``: 0 for the unconditional, 1 for the conditional half of guided requests; ``key.uses_cfg`` is False then."""
        spec, device, dtype = models.spec, options.device, options.dtype
        self.key = key
        self._half = half
        self._unet = models.unet
        self._parts = parts
        self._memory = torch.channels_last if options.channels_last else torch.contiguous_format
        self._layout = ResidualLayout.of(spec, key.batch, key.height, key.width, is_channels_last=options.channels_last)
        # Finite numbers everywhere: a capture runs the parts on whatever lies in the buffers.
        self.latents = torch.randn(key.latent_shape(spec), device=device, dtype=dtype)
        self.latents_in = torch.randn_like(self.latents)
        self.scalars = torch.ones(N_STEP_SCALARS, device=device, dtype=torch.float32)
        self.emb = torch.zeros((key.batch, spec.block_channels[0] * 4), device=device, dtype=dtype)
        self.context = torch.zeros((key.batch, 77, spec.context_width), device=device, dtype=dtype)
        self._text, self.project_text = parts.text(models.unet, self.context)
        self._encoded: tuple[torch.Tensor, list[torch.Tensor]] | None = None
        self._decode: Part | None = None
        self._flat: torch.Tensor | None = None
        self._joined: Part | None = None
        self.scale_in = parts.recorder.record(self._run_scale_in)
        self.encode = parts.recorder.record(self._run_encode)
        if half is not None:
            self._halves = torch.zeros((2, *self.latents.shape), device=device, dtype=dtype)
            self.own_half, self.other_half = self._halves[half], self._halves[1 - half]
            self.advance = parts.recorder.record(self._run_advance)

    @property
    def flat(self) -> torch.Tensor:
        """The buffer of residuals that :meth:`decode_joined` adds; made on first use."""
        if self._flat is None:
            self._flat = torch.zeros(self._layout.n_elements, device=self.latents.device, dtype=self.latents.dtype)
        return self._flat

    def decode(self) -> None:
        """The second half of the network without residuals."""
        self.prepare_decode()()

    def prepare_decode(self) -> Part:
        """Captures :meth:`decode` if it is not yet; overwrites latents."""
        if self._decode is None:
            self.encode()
            self._decode = self._parts.recorder.record(self._decoder(None))
        return self._decode

    def prepare_joined(self) -> Part:
        """The second half of the network with the residuals that lie in :attr:`flat`; overwrites latents."""
        if self._joined is None:
            self.encode()
            self._joined = self._parts.recorder.record(self._decoder(self._layout.views(self.flat)))
        return self._joined

    def _run_scale_in(self) -> None:
        self.latents_in.copy_(scaled_input(self.latents, self.scalars))

    def _run_encode(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        sample = torch.cat([self.latents_in] * 2) if self.key.uses_cfg else self.latents_in
        sample = sample.to(memory_format=self._memory)
        self._encoded = self._parts.encode(self._unet, sample, self.emb, self._text)
        return self._encoded

    def _decoder(self, residuals: list[torch.Tensor] | None) -> Callable[[], None]:
        def run() -> None:
            if self._encoded is None:
                raise RuntimeError("StepProgram.decode before encode")
            hidden, skips = self._encoded
            prediction = self._parts.decode(self._unet, hidden, skips, self.emb, self._text, residuals)
            if self._half is not None:
                self.own_half.copy_(prediction)
                return
            if self.key.uses_cfg:
                prediction = guide(prediction, self.scalars)
            self.latents.copy_(euler_step(self.latents, prediction, self.scalars))

        return run

    def _run_advance(self) -> None:
        prediction = guide(self._halves.flatten(0, 1), self.scalars)
        self.latents.copy_(euler_step(self.latents, prediction, self.scalars))


class TextProgram:
    """Both text encoders over static token ids: launched one by one they take the host 40 ms and more a prompt."""

    def __init__(self, models: SdxlModels, n_rows: int, parts: NetworkParts) -> None:
        """``n_rows``: prompts encoded together."""
        device = models.device
        self._tokens = TokenIds(
            torch.zeros((n_rows, N_TEXT_POSITIONS), dtype=torch.int64, device=device),
            torch.zeros((n_rows, N_TEXT_POSITIONS), dtype=torch.int64, device=device),
        )
        self._found: PromptEmbeddings | None = None

        def run() -> PromptEmbeddings:
            self._found = encode_prompt(models, self._tokens)
            return self._found

        self._encode = parts.recorder.record(run)

    def encode(self, tokens: TokenIds) -> PromptEmbeddings:
        """Embeddings of as many prompts, in tensors of their own."""
        self._tokens.ids.copy_(tokens.ids)
        self._tokens.ids_2.copy_(tokens.ids_2)
        self._encode()
        if self._found is None:
            raise RuntimeError("TextProgram.encode: nothing was encoded")
        return PromptEmbeddings(self._found.context.clone(), self._found.pooled.clone())


class VaeProgram:
    """Decodes one image at a time: one graph serves every ``n_images``, and memory stays that of one."""

    def __init__(self, models: SdxlModels, key: ShapeKey, options: EngineOptions, parts: NetworkParts) -> None:
        _, channels, h, w = key.latent_shape(models.spec)
        self._memory = torch.channels_last if options.channels_last else torch.contiguous_format
        self.latents = torch.randn((1, channels, h, w), device=options.device, dtype=options.dtype)
        self.image = torch.empty((1, 3, key.height, key.width), device=options.device, dtype=options.dtype)

        def run() -> None:
            self.image.copy_(parts.vae_decode(models.vae, self.latents.to(memory_format=self._memory)))

        self.decode_one = parts.recorder.record(run)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """``[n, 4, h, w] -> [n, 3, height, width]`` in 0..1."""
        images = torch.empty((latents.shape[0], *self.image.shape[1:]), device=latents.device, dtype=latents.dtype)
        for place in range(latents.shape[0]):
            self.latents.copy_(latents[place : place + 1])
            self.decode_one()
            images[place].copy_(self.image[0])
        return images
