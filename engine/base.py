"""The base worker: one checkpoint on one device, from a request to its images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import ControlNetModel

from engine.control_stack import ControlJob, ControlSource, ControlStack, ShapeKey
from engine.lora import LoraPatcher, PinnedLora
from engine.models import SdxlModels
from engine.options import (
    ControlInput,
    EngineOptions,
    ImageRequest,
    ImageResult,
    PromptEmbeddings,
    StageTimes,
    TokenIds,
)
from engine.parts import NetworkParts
from engine.program import StepProgram, TextProgram, VaeProgram
from engine.schedule import Schedule
from engine.stage_clock import StageClock
from engine.step_bench import StepBench
from engine.text import batch_for_guidance, encode_prompt
from engine.unet import embed, time_ids
from traces.problems import one_problem

__all__ = [
    "BaseWorker",
    "ControlInput",
    "EngineOptions",
    "ImageRequest",
    "ImageResult",
    "PromptEmbeddings",
    "StageTimes",
    "StepBench",
    "TokenIds",
]


class PredictionExchange(Protocol):
    """How the two ranks of a guided request give each other their predictions."""

    def swap(self, step: int, own: torch.Tensor, other: torch.Tensor) -> None:
        """Sends ``own`` and receives into ``other``, in the order of the current stream. Raises if the other rank is gone."""


@dataclass(slots=True, eq=False)
class _Running:
    """The request that is being worked on."""

    request: ImageRequest
    program: StepProgram
    schedule: Schedule
    table: torch.Tensor
    sources: Sequence[ControlSource]
    is_half: bool


class BaseWorker:
    """Runs requests one after the other. ControlNets run in this process or elsewhere.

    :meth:`generate` makes a request's images in one call. Serving takes the same steps one by one: :meth:`begin`,
    :meth:`step` for each step with :meth:`patch` before one of them, :meth:`finish`, and in any case :meth:`restore`.
    """

    def __init__(
        self,
        models: SdxlModels,
        controlnets: Mapping[str, ControlNetModel],
        options: EngineOptions,
        remote: ControlSource | None = None,
        half: int | None = None,
        parts: NetworkParts | None = None,
    ) -> None:
        """Takes models that already are on the options' device and in its type.

        With ``channels_last`` their convolution weights are re-laid in NHWC memory; values stay, other users may go on.

        Args:
            models: the checkpoint.
            controlnets: those of this process.
            options: how networks are run.
            remote: ControlNets elsewhere that every request may use, beside those given to :meth:`begin`.
            half: 0 or 1: this rank runs the unconditional or the conditional half of guided requests.
            parts: shared with other workers of this process; None: made here.
        """
        weight = next(models.unet.parameters())
        if weight.device != torch.empty(0, device=options.device).device or weight.dtype != options.dtype:
            raise ValueError(
                f"the UNet is {weight.dtype} on {weight.device}, the options say {options.dtype} on {options.device}"
            )
        self.models = models
        self.options = options
        self.half = half
        networks = (models.unet, models.vae, *controlnets.values())
        if parts is None:
            parts = NetworkParts(options, networks)
        else:
            parts.admit(networks)
        self._parts = parts
        self.patcher = LoraPatcher(models.unet)
        self.local = ControlStack(models.spec, controlnets, options, parts)
        self._remote = remote
        shared = sorted(set(self.local.names) & set(remote.names if remote is not None else ()))
        if shared:
            raise ValueError(f"ControlNets {shared} are both in this process and remote")
        self._programs: dict[tuple[ShapeKey, bool], StepProgram] = {}
        self._vaes: dict[tuple[int, int], VaeProgram] = {}
        self._texts: dict[int, TextProgram] = {}
        self._now: _Running | None = None
        self.exchange: PredictionExchange | None = None
        """Set by whoever connects the ranks of a CFG pair."""

    @property
    def controlnet_names(self) -> list[str]:
        """ControlNets that requests may use."""
        return [*self.local.names, *(self._remote.names if self._remote is not None else ())]

    @torch.no_grad()
    def generate(self, request: ImageRequest) -> ImageResult:
        """Makes the images of a request. LoRAs are patched before and restored after, also when something fails.

        The first request of a shape compiles and captures before the clock starts.

        Raises:
            InputError: the request does not fit what this worker holds.
        """
        with self._on_device():
            self.prepare_request(request)
            clock = StageClock(self.options)
            try:
                n_steps = self.begin(request)
                text_s = clock.lap()
                if request.loras:
                    self.patch(request.loras)
                lora_s = clock.lap() if request.loras else 0.0
                for i in range(n_steps):
                    self.step(i)
                latents = self.latents()
                denoise_s = clock.lap()
            finally:
                # Before the decode, which does not use the UNet: a failed decode leaves pristine weights too.
                self.restore()
            restore_s = clock.lap() if request.loras else 0.0
            images = self.decode(latents, request.height, request.width)
            decode_s = clock.lap()
        stages = StageTimes(text_s, lora_s, denoise_s, decode_s, restore_s, clock.total_s())
        return ImageResult(images, latents, stages)

    @torch.no_grad()
    def prepare_request(self, request: ImageRequest, remotes: Sequence[ControlSource] = ()) -> None:
        """Checks a request, and compiles and captures what its shape needs.

        Raises:
            InputError: the request does not fit what this worker holds.
        """
        held = [*self.controlnet_names, *(name for source in remotes for name in source.names)]
        request.check(self.models.spec, held)
        with self._on_device():
            key, is_half = self._key(request)
            program = self.program(key, is_half=is_half)
            names = [control.name for control in request.controls if control.scale != 0.0]
            self._prepare_sources(program, self._sources(names, remotes))
            self._vae(request.height, request.width)
            for prompt in (request.prompt, request.negative):
                if isinstance(prompt, TokenIds) and prompt.ids.shape[0] not in self._texts:
                    self.encode_prompt(prompt)  # captures

    @torch.no_grad()
    def prepare_joined(self, request: ImageRequest) -> None:
        """Captures the decoder that adds residuals, for a request that will use ControlNets of other processes."""
        with self._on_device():
            key, is_half = self._key(request)
            self.program(key, is_half=is_half).prepare_joined()

    @property
    def prepared(self) -> list[tuple[ShapeKey, bool]]:
        """Shapes that have been compiled and captured, and whether half of a guided request."""
        return list(self._programs)

    @torch.no_grad()
    def begin(self, request: ImageRequest, remotes: Sequence[ControlSource] = ()) -> int:
        """Takes up a request: text, noise, control images. LoRAs of the request are left to :meth:`patch`.

        Args:
            request: :meth:`prepare_request` has run for one like it; if not, that happens here.
            remotes: ControlNets elsewhere, for this request.

        Returns:
            The number of steps.

        Raises:
            InputError: the request does not fit what this worker holds.
        """
        if self._now is not None:
            raise RuntimeError("BaseWorker.begin: the request before has not been restored")
        self.prepare_request(request, remotes)
        with self._on_device():
            return self._begin(request, remotes)

    @torch.no_grad()
    def step(self, i: int) -> None:
        """One denoising step."""
        now = self._running()
        with self._on_device():
            program = now.program
            program.scalars.copy_(now.schedule.scalars[i])
            program.emb.copy_(now.table[i])
            run_step(program, now.sources, i)
            if now.is_half:
                if self.exchange is None:
                    raise RuntimeError("BaseWorker.step: a CFG half without an exchange")
                self.exchange.swap(i, program.own_half, program.other_half)
                program.advance()

    @torch.no_grad()
    def patch(self, loras: Sequence[tuple[PinnedLora, float]]) -> None:
        """Makes the weights pristine + LoRAs, in the order of the stream: the next step uses them."""
        with self._on_device():
            self.patcher.patch(loras)
            if self._now is not None:
                self._now.program.project_text()

    @torch.no_grad()
    def latents(self) -> torch.Tensor:
        """A copy of the latents as the last step left them."""
        return self._running().program.latents.clone()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """``[n, 4, h, w] -> [n, 3, height, width]`` in 0..1."""
        with self._on_device():
            return self._vae(height, width).decode(latents)

    def restore(self) -> None:
        """Puts pristine weights back, bit by bit, and forgets the request; also in the middle of one, or if there is none."""
        now, self._now = self._now, None
        with self._on_device():
            self.patcher.restore()
        for source in now.sources if now is not None else ():
            source.abandon()

    @torch.no_grad()
    def prepare(
        self, n_images: int, height: int, width: int, n_controlnets: int, *, uses_cfg: bool = True
    ) -> StepBench:
        """Compiles and captures a shape and returns its parts, filled with random numbers, for measurements."""
        names = self.controlnet_names
        if n_controlnets > len(names):
            raise one_problem(
                "n_controlnets", f"got {n_controlnets}", f"at most {len(names)}, as this worker holds", "Load more."
            )
        key = ShapeKey(n_images, uses_cfg, height, width)
        used = names[:n_controlnets]
        with self._on_device():
            sources = self._sources(used, ())
            self._prepare_sources(self.program(key), sources)
            source = next(iter(sources), None)
            return StepBench(self, key, source, used, self._vae(height, width))

    def program(self, key: ShapeKey, *, is_half: bool = False) -> StepProgram:
        """The static buffers and parts of a shape; made on first use."""
        place = (key, is_half)
        if place not in self._programs:
            half = self.half if is_half else None
            self._programs[place] = StepProgram(self.models, key, self.options, self._parts, half)
        return self._programs[place]

    def controlnet_part(self, key: ShapeKey, name: str) -> Callable[[], None]:
        """One ControlNet of this process at a prepared shape."""
        return self.local.part(key, name)

    def synchronize(self) -> None:
        """Waits until the device has done everything."""
        if self.options.is_cuda:
            torch.cuda.synchronize(self.options.device)

    @torch.no_grad()
    def encode_prompt(self, prompt: TokenIds | PromptEmbeddings) -> PromptEmbeddings:
        """Runs both text encoders; embeddings pass through."""
        if isinstance(prompt, PromptEmbeddings):
            return encode_prompt(self.models, prompt)
        n_rows = prompt.ids.shape[0]
        if n_rows not in self._texts:
            self._texts[n_rows] = TextProgram(self.models, n_rows, self._parts)
        return self._texts[n_rows].encode(prompt)

    def _on_device(self) -> Any:
        return torch.cuda.device(self.options.device) if self.options.is_cuda else nullcontext()

    def _running(self) -> _Running:
        if self._now is None:
            raise RuntimeError("BaseWorker: no request is running")
        return self._now

    def _key(self, request: ImageRequest) -> tuple[ShapeKey, bool]:
        """The shape this rank computes, and whether it is half of a guided request."""
        is_half = self.half is not None and request.uses_cfg
        return ShapeKey(request.n_images, request.uses_cfg and not is_half, request.height, request.width), is_half

    def _sources(self, names: Sequence[str], remotes: Sequence[ControlSource]) -> dict[ControlSource, list[str]]:
        """Who computes which of these ControlNets. A source given for the request takes what it names, also if it is held here."""
        elsewhere = {name: source for source in remotes for name in source.names}
        held = [self.local, *([self._remote] if self._remote is not None else []), *remotes]
        taken: dict[ControlSource, list[str]] = {}
        for source in held:
            mine = [name for name in names if name in source.names and elsewhere.get(name, source) is source]
            if mine:
                taken[source] = mine
        return taken

    def _prepare_sources(self, program: StepProgram, sources: Mapping[ControlSource, Sequence[str]]) -> None:
        if not sources:
            program.prepare_decode()
            return
        program.prepare_joined()
        for source, names in sources.items():
            source.prepare(program.key, names, program.latents_in, program.flat)

    def _begin(self, request: ImageRequest, remotes: Sequence[ControlSource]) -> int:
        device, dtype = self.options.device, self.options.dtype
        key, is_half = self._key(request)
        program = self.program(key, is_half=is_half)
        text = self._encode_text(request)
        if is_half and self.half is not None:
            rows = slice(self.half * request.n_images, (self.half + 1) * request.n_images)
            text = PromptEmbeddings(text.context[rows], text.pooled[rows])
        schedule = Schedule.of(self.models.scheduler(), request.n_steps, request.guidance, device)
        sizes = time_ids(key.height, key.width, key.batch, device, dtype)
        table = embed(self.models.unet, schedule.timesteps, text.pooled, sizes)  # [n_steps, batch, D]
        program.context.copy_(text.context)
        program.project_text()
        program.latents.copy_(self._noise(request).to(device, dtype) * schedule.initial_sigma)
        used = [control for control in request.controls if control.scale != 0.0]
        sources = self._sources([control.name for control in used], remotes)
        self._now = _Running(request, program, schedule, table, list(sources), is_half)
        for source, names in sources.items():
            controls = [control for control in used if control.name in names]
            source.begin(ControlJob(key, controls, request.n_steps, schedule.timesteps, text))
        return request.n_steps

    def _vae(self, height: int, width: int) -> VaeProgram:
        size = (height, width)
        if size not in self._vaes:
            key = ShapeKey(1, False, height, width)
            self._vaes[size] = VaeProgram(self.models, key, self.options, self._parts)
        return self._vaes[size]

    def _encode_text(self, request: ImageRequest) -> PromptEmbeddings:
        prompt = self.encode_prompt(request.prompt)
        negative = None
        if request.uses_cfg and request.negative is not None:
            negative = self.encode_prompt(request.negative)
        return batch_for_guidance(prompt, negative, request.n_images, uses_cfg=request.uses_cfg)

    def _noise(self, request: ImageRequest) -> torch.Tensor:
        if request.latents is not None:
            return request.latents
        generator = torch.Generator("cpu").manual_seed(request.seed)
        shape = ShapeKey(request.n_images, False, request.height, request.width).latent_shape(self.models.spec)
        return torch.randn(shape, generator=generator, dtype=torch.float32)


def run_step(program: StepProgram, sources: Sequence[ControlSource], i: int) -> None:
    """One step on a prepared program whose inputs are set: encoder beside ControlNets, join, decoder."""
    program.scale_in()
    for source in sources:
        source.start_step(i)
    program.encode()
    if not sources:
        program.decode()
        return
    for source in sources:
        source.encoder_queued()
    is_written = False
    for source in sources:
        is_written |= source.finish_step(i, adds=is_written)
    if not is_written:
        # The captured decoder always reads the buffer.
        program.flat.zero_()
    program.prepare_joined()()
