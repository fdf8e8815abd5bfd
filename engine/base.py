"""The base worker: one checkpoint on one device, from a request to its images."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import ControlNetModel

from engine.control_stack import ControlJob, ControlSource, ControlStack, ShapeKey
from engine.lora import LoraPatcher
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
from engine.program import StepProgram, VaeProgram
from engine.schedule import Schedule
from engine.text import batch_for_guidance, encode_prompt, random_prompt
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


class BaseWorker:
    """Runs requests one after the other. ControlNets run in this process, or in another one behind ``remote``."""

    def __init__(
        self,
        models: SdxlModels,
        controlnets: Mapping[str, ControlNetModel],
        options: EngineOptions,
        remote: ControlSource | None = None,
    ) -> None:
        """Takes models that already are on the options' device and in its type.

        With ``channels_last`` their convolution weights are re-laid in NHWC memory; values stay, other users may go on.
        """
        weight = next(models.unet.parameters())
        if weight.device != torch.empty(0, device=options.device).device or weight.dtype != options.dtype:
            raise ValueError(
                f"the UNet is {weight.dtype} on {weight.device}, the options say {options.dtype} on {options.device}"
            )
        self.models = models
        self.options = options
        self.patcher = LoraPatcher(models.unet)
        self._parts = NetworkParts(options, (models.unet, models.vae, *controlnets.values()))
        self._local = ControlStack(models.spec, controlnets, options, self._parts.recorder, self._parts.residuals_of)
        self._remote = remote
        shared = sorted(set(self._local.names) & set(remote.names if remote is not None else ()))
        if shared:
            raise ValueError(f"ControlNets {shared} are both in this process and remote")
        self._programs: dict[ShapeKey, StepProgram] = {}
        self._vaes: dict[tuple[int, int], VaeProgram] = {}

    @property
    def controlnet_names(self) -> list[str]:
        """ControlNets that requests may use."""
        return [*self._local.names, *(self._remote.names if self._remote is not None else ())]

    @torch.no_grad()
    def generate(self, request: ImageRequest) -> ImageResult:
        """Makes the images of a request. LoRAs are patched before and restored after, also when something fails.

        The first request of a shape compiles and captures before the clock starts.

        Raises:
            InputError: the request does not fit what this worker holds.
        """
        request.check(self.models.spec, self.controlnet_names)
        key = ShapeKey(request.n_images, request.uses_cfg, request.height, request.width)
        with self._on_device():
            source = self._source([control.name for control in request.controls])
            step = self._prepare_step(key, source, [item.name for item in request.controls if item.scale != 0.0])
            vae = self._vae(key)
            clock = _StageClock(self.options)
            text = self._encode_text(request, key)
            text_s = clock.lap()
            try:
                if request.loras:
                    self.patcher.patch(request.loras)
                lora_s = clock.lap() if request.loras else 0.0
                latents = self._denoise(request, key, text, source, step)
                denoise_s = clock.lap()
            finally:
                # Before the decode, which does not use the UNet: a failed decode leaves pristine weights too.
                if request.loras:
                    self.patcher.restore()
            restore_s = clock.lap() if request.loras else 0.0
            images = vae.decode(latents)
            decode_s = clock.lap()
        stages = StageTimes(text_s, lora_s, denoise_s, decode_s, restore_s, clock.total_s())
        return ImageResult(images, latents, stages)

    @torch.no_grad()
    def prepare(self, n_images: int, height: int, width: int, n_controlnets: int) -> StepBench:
        """Compiles and captures a guided shape and returns its parts, filled with random numbers, for measurements."""
        names = self.controlnet_names
        if n_controlnets > len(names):
            raise one_problem(
                "n_controlnets", f"got {n_controlnets}", f"at most {len(names)}, as this worker holds", "Load more."
            )
        key = ShapeKey(n_images, True, height, width)
        used = names[:n_controlnets]
        with self._on_device():
            source = self._source(used)
            step = self._prepare_step(key, source, used)
            return StepBench(self, key, source, used, step, self._vae(key))

    def program(self, key: ShapeKey) -> StepProgram:
        """The static buffers and parts of a shape; made on first use."""
        if key not in self._programs:
            self._programs[key] = StepProgram(self.models, key, self.options, self._parts)
        return self._programs[key]

    def controlnet_part(self, key: ShapeKey, name: str) -> Callable[[], None]:
        """One ControlNet of this process at a prepared shape."""
        return self._local.part(key, name)

    def synchronize(self) -> None:
        """Waits until the device has done everything."""
        if self.options.is_cuda:
            torch.cuda.synchronize(self.options.device)

    def _on_device(self) -> Any:
        return torch.cuda.device(self.options.device) if self.options.is_cuda else nullcontext()

    def _source(self, names: Sequence[str]) -> ControlSource | None:
        if not names:
            return None
        local = [name for name in names if name in self._local.names]
        if local and len(local) < len(names):
            raise one_problem(
                "request controls", f"{local} run in this process, others are remote", "one place", "Split the request."
            )
        return self._local if local else self._remote

    def _prepare_step(self, key: ShapeKey, source: ControlSource | None, names: Sequence[str]) -> Callable[[int], None]:
        """Captures what the shape needs and returns the function that runs one step on it."""
        program = self.program(key)
        if source is None:
            decode = program.prepare_decode()

            def plain(_: int) -> None:
                program.scale_in()
                program.encode()
                decode()

            return plain
        decode_joined = program.prepare_joined(source.prepare(key, names, program.latents_in))

        def joined(step: int) -> None:
            program.scale_in()
            source.start_step(step)
            program.encode()
            source.finish_step(step)
            decode_joined()

        return joined

    def _vae(self, key: ShapeKey) -> VaeProgram:
        size = (key.height, key.width)
        if size not in self._vaes:
            self._vaes[size] = VaeProgram(self.models, key, self.options, self._parts)
        return self._vaes[size]

    def _encode_text(self, request: ImageRequest, key: ShapeKey) -> PromptEmbeddings:
        prompt = encode_prompt(self.models, request.prompt)
        negative = None
        if request.uses_cfg and request.negative is not None:
            negative = encode_prompt(self.models, request.negative)
        return batch_for_guidance(prompt, negative, key.n_images, uses_cfg=key.uses_cfg)

    def _denoise(
        self,
        request: ImageRequest,
        key: ShapeKey,
        text: PromptEmbeddings,
        source: ControlSource | None,
        step: Callable[[int], None],
    ) -> torch.Tensor:
        device, dtype = self.options.device, self.options.dtype
        program = self.program(key)
        schedule = Schedule.of(self.models.scheduler(), request.n_steps, request.guidance, device)
        sizes = time_ids(key.height, key.width, key.batch, device, dtype)
        table = embed(self.models.unet, schedule.timesteps, text.pooled, sizes)  # [n_steps, batch, D]
        program.context.copy_(text.context)
        program.latents.copy_(self._noise(request, key).to(device, dtype) * schedule.initial_sigma)
        if source is not None:
            source.begin(ControlJob(key, request.controls, request.n_steps, schedule.timesteps, text))
        for i in range(request.n_steps):
            program.scalars.copy_(schedule.scalars[i])
            program.emb.copy_(table[i])
            step(i)
        return program.latents.clone()

    def _noise(self, request: ImageRequest, key: ShapeKey) -> torch.Tensor:
        if request.latents is not None:
            return request.latents
        generator = torch.Generator("cpu").manual_seed(request.seed)
        return torch.randn(key.latent_shape(self.models.spec), generator=generator, dtype=torch.float32)


class StepBench:
    """The parts that :meth:`BaseWorker.generate` runs, one by one, on random numbers. Nothing here synchronises or times.

    With remote ControlNets a step is an exchange: call :meth:`begin` with the number of steps that follow, then
    :meth:`step` exactly that often.
    """

    def __init__(
        self,
        worker: BaseWorker,
        key: ShapeKey,
        source: ControlSource | None,
        names: Sequence[str],
        step: Callable[[int], None],
        vae: VaeProgram,
    ) -> None:
        self._worker = worker
        self._key = key
        self._source = source
        self._names = tuple(names)
        self._step = step
        self._vae = vae
        self._program = worker.program(key)
        self._prompt = random_prompt(worker.models.spec, 1)
        self._negative = random_prompt(worker.models.spec, 2)
        self._is_remote = source is not None and not isinstance(source, ControlStack)
        self._remaining = 0
        self._fill()
        if source is not None and not self._is_remote:
            self.begin(1)

    def begin(self, n_steps: int) -> None:
        """Announces this many steps to the ControlNets, as a request of that length would."""
        if self._source is None:
            return
        if self._remaining:
            raise RuntimeError(f"StepBench.begin: {self._remaining} announced steps have not run")
        spec, options = self._worker.models.spec, self._worker.options
        image = torch.rand((1, 3, self._key.height, self._key.width), dtype=torch.float32)
        text = PromptEmbeddings(
            torch.randn_like(self._program.context),
            torch.randn((self._key.batch, spec.pooled_width), device=options.device, dtype=options.dtype),
        )
        timesteps = torch.full((n_steps,), 500.0, device=options.device)
        controls = [ControlInput(name, image, 0.8) for name in self._names]
        with torch.no_grad():
            self._source.begin(ControlJob(self._key, controls, n_steps, timesteps, text))
        self._remaining = n_steps if self._is_remote else 0
        self._n_steps = n_steps

    def step(self) -> None:
        """One whole step: scaled input, encoder, ControlNets, decoder, guidance, Euler."""
        with torch.no_grad():
            if not self._is_remote:
                self._step(0)
                return
            if not self._remaining:
                raise RuntimeError("StepBench.step with remote ControlNets needs begin(n_steps) first")
            self._step(self._n_steps - self._remaining)
            self._remaining -= 1

    def encoder(self) -> None:
        """The base's first half."""
        self._program.encode()

    def decoder(self) -> None:
        """The base's second half with guidance and Euler step; with residuals if there are ControlNets."""
        if self._source is None:
            self._program.decode()
        else:
            flat = self._source.prepare(self._key, self._names, self._program.latents_in)
            self._program.prepare_joined(flat)()

    def controlnet(self, place: int) -> None:
        """One ControlNet of this process."""
        if self._is_remote:
            raise RuntimeError("StepBench.controlnet: the ControlNets are remote; prepare a worker that holds them")
        self._worker.controlnet_part(self._key, self._names[place])()

    def vae(self, n_images: int) -> None:
        """Decodes this many images."""
        with torch.no_grad():
            self._vae.decode(self._program.latents[:1].expand(n_images, -1, -1, -1))

    def text(self) -> None:
        """Encodes a prompt and a negative prompt."""
        with torch.no_grad():
            encode_prompt(self._worker.models, self._prompt)
            encode_prompt(self._worker.models, self._negative)

    def _fill(self) -> None:
        program = self._program
        for buffer in (program.latents, program.latents_in, program.emb, program.context):
            buffer.normal_()
        # sigma 3, a step so small that thousands of repetitions keep the latents finite, guidance 5
        program.scalars.copy_(torch.tensor([10.0**0.5, 3.0, -1e-4, 5.0]))


class _StageClock:
    """Wall time between synchronised points."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._start = self._last = self._now()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = self._now()
        lap, self._last = now - self._last, now
        return lap

    def total_s(self) -> float:
        """Seconds from the start to the last lap."""
        return self._last - self._start

    def _now(self) -> float:
        if self._options.is_cuda:
            torch.cuda.synchronize(self._options.device)
        return time.perf_counter()
