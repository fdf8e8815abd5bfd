"""Our engine under the clock: the parts of a step, LoRA patching, loading, and whole images; alone or with remote ControlNets."""

from __future__ import annotations

import dataclasses
import gc
import time
from typing import Any

import torch
from PIL import Image

from calibrate.clock import DeviceClock
from calibrate.measurement import Features
from calibrate.rig import RigSetup, Timed
from calibrate.stock import GUIDANCE_SCALE, MEMORY_HUNGRY, dtype_of
from calibrate.storage import (
    image_lora_rank,
    load_checkpoint,
    lora_file,
    save_controlnet,
    save_pipeline,
    stored_parts,
    time_into_place,
    weight_files,
)
from engine.base import BaseWorker
from engine.control_stack import ControlStack, ShapeKey
from engine.controlnet import ResidualLayout
from engine.lora import LoraPatcher, pin_lora
from engine.models import ModelSpec, build_controlnet, build_models, bytes_of
from engine.options import ControlInput, EngineOptions, ImageRequest, PromptEmbeddings
from engine.parts import NetworkParts
from engine.remote import RemoteControlNets


def options_of(setup: RigSetup) -> EngineOptions:
    """The engine's options for a setup: its fast ones on a GPU, less what the setup switches off."""
    options = EngineOptions.fast(setup.device, compile=setup.is_compiled)
    if not options.is_cuda:
        return options
    return dataclasses.replace(
        options,
        dtype=dtype_of(setup.dtype),
        use_cuda_graph=setup.uses_graph,
        use_triton_kernels=setup.uses_triton,
        attention=setup.attention,
    )


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """``[n, 3, h, w]`` in 0..1 to PIL images, so that ours does what the stock pipeline does before it returns."""
    rows = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(row) for row in rows]


class EngineRig:
    """A base worker with its ControlNets in process."""

    stack = "engine"

    def __init__(self, setup: RigSetup) -> None:
        self.setup = setup
        self.clock = DeviceClock(setup.device)
        self.options = options_of(setup)
        self.mode = "compiled" if self.options.compile else "graph" if self.options.uses_graphs else "eager"
        self.spec = ModelSpec.named(setup.model)
        self._facts: dict[str, float] = {}
        if setup.kind == "start":
            self.models = load_checkpoint(setup, self.options.dtype)
        else:
            self.models = build_models(self.spec, setup.device, self.options.dtype, setup.seed)
        self._facts["checkpoint_bytes"] = self.models.bytes
        self.names = [f"controlnet{i}" for i in range(setup.n_controlnets)]
        self.controlnets = self._build_controlnets()
        if self.controlnets:
            self._facts["controlnet_bytes"] = bytes_of(next(iter(self.controlnets.values())))
        self.worker = self._build_worker()
        self._benches: dict[tuple[int, int], Any] = {}
        generator = torch.Generator().manual_seed(setup.seed)
        self._control_image = torch.rand((1, 3, setup.height_px, setup.width_px), generator=generator)
        self._prompts = [
            PromptEmbeddings(
                torch.randn((1, 77, self.spec.context_width), generator=generator),
                torch.randn((1, self.spec.pooled_width), generator=generator),
            )
            for _ in range(2)
        ]
        self._pinned: dict[tuple[int, int], Any] = {}
        self._warmed: set[int] = set()
        self._prepare()

    def _build_controlnets(self) -> dict[str, Any]:
        return {
            name: build_controlnet(self.spec, self.setup.device, self.options.dtype, self.setup.seed + 1 + i)
            for i, name in enumerate(self.names)
        }

    def _build_worker(self) -> BaseWorker:
        return BaseWorker(self.models, self.controlnets, self.options)

    def _prepare(self) -> None:
        """Compiles and captures what this rig will be asked for, so that the clock never sees it."""
        for batch in self.setup.forward_batches:
            self._bench(batch, 0).step()
        if not self.setup.forward_batches or 2 in self.setup.forward_batches:
            for nets in range(len(self.names) + 1):
                if nets <= 1 or time.perf_counter() < self.setup.prepare_until_s or not self.options.compile:
                    self._warm(nets)

    def _warm(self, n_controlnets: int) -> None:
        """Runs a short image with this many ControlNets once, so that compiling and capturing is behind it."""
        if n_controlnets not in self._warmed:
            self._image(Features(n_images=1, n_steps=2, n_controlnets=n_controlnets, forward_batch=2))
            self._warmed.add(n_controlnets)

    def _bench(self, forward_batch: int, n_controlnets: int) -> Any:
        key = (forward_batch, n_controlnets)
        if key not in self._benches:
            self._benches[key] = self.worker.prepare(
                max(1, forward_batch // 2), self.setup.height_px, self.setup.width_px, n_controlnets
            )
        return self._benches[key]

    def run(self, method: str, features: Features, n_repeats: int) -> list[Timed]:
        """See :class:`calibrate.rig.Rig`."""
        with torch.no_grad():
            try:
                return getattr(self, f"_time_{method}")(features, n_repeats)  # type: ignore[no-any-return]
            finally:
                if method in MEMORY_HUNGRY:
                    self.clock.free()

    def _timed(self, quantity: str, features: Features, values_s: Any) -> Timed:
        return Timed(f"{self.stack}.{quantity}", self.mode, features, tuple(values_s))

    def _time_steps(self, features: Features, n_repeats: int) -> list[Timed]:
        """The whole step, its two parts, and with ``n_controlnets`` one ControlNet and the step that uses it."""
        plain = dataclasses.replace(features, n_controlnets=0)
        bench = self._bench(features.forward_batch, 0)
        found = [
            self._timed(quantity, plain, self.clock.burst(part, n_repeats))
            for quantity, part in (
                ("unet_step", bench.step),
                ("encoder_step", bench.encoder),
                ("decoder_step", bench.decoder),
            )
        ]
        if features.n_controlnets:
            found += self._controlnet_steps(features, n_repeats)
        return found

    def _time_joined_step(self, features: Features, n_repeats: int) -> list[Timed]:
        """One ControlNet, and the step that uses it."""
        return self._controlnet_steps(features, n_repeats)

    def _controlnet_steps(self, features: Features, n_repeats: int) -> list[Timed]:
        bench = self._bench(features.forward_batch, 1)
        bench.begin(1)  # a worker's ControlNets serve one shape at a time: the last one announced
        plain, one = (dataclasses.replace(features, n_controlnets=n) for n in (0, 1))
        return [
            self._timed("controlnet_step", plain, self.clock.burst(lambda: bench.controlnet(0), n_repeats)),
            self._timed("step_with_controlnets", one, self.clock.burst(bench.step, n_repeats)),
        ]

    def _time_vae_decode(self, features: Features, n_repeats: int) -> list[Timed]:
        bench = self._bench(2, 0)
        return [self._timed("vae_decode", features, self.clock.burst(lambda: bench.vae(features.n_images), n_repeats))]

    def _time_text_encode(self, features: Features, n_repeats: int) -> list[Timed]:
        bench = self._bench(2, 0)
        bench.text()
        return [self._timed("text_encode", features, [self.clock.wall(bench.text) for _ in range(n_repeats)])]

    def _lora(self, rank: int, index: int) -> Any:
        key = (rank, index)
        if key not in self._pinned:
            self._pinned[key] = pin_lora(lora_file(self.setup, rank, index), self.models.unet)
        return self._pinned[key]

    def _time_lora(self, features: Features, n_repeats: int) -> list[Timed]:
        """File to pinned memory, pinned memory into the weights, and off again; ``variant`` gives the rank as ``rank64``."""
        rank = int(features.variant.removeprefix("rank"))
        path = lora_file(self.setup, rank, 0)
        sized = Features(n_bytes=path.stat().st_size, n_loras=1, variant=features.variant)
        fetches = [self.clock.wall(lambda: pin_lora(path, self.models.unet)) for _ in range(n_repeats + 1)][1:]
        lora = self._lora(rank, 0)
        patcher = self._patcher()
        patches, restores = [], []
        for _ in range(n_repeats + 1):
            patches.append(self.clock.wall(lambda: patcher.patch([(lora, 1.0)])))
            restores.append(self.clock.wall(patcher.restore))
        return [
            Timed("lora_fetch.local", "", sized, tuple(fetches)),
            self._timed("lora_attach", sized, patches[1:]),
            self._timed("lora_detach", sized, restores[1:]),
        ]

    def _patcher(self) -> LoraPatcher:
        return LoraPatcher(self.models.unet)

    def _request(self, features: Features) -> ImageRequest:
        return ImageRequest(
            prompt=self._prompts[0],
            negative=self._prompts[1],
            n_images=features.n_images,
            n_steps=features.n_steps,
            width=self.setup.width_px,
            height=self.setup.height_px,
            guidance=GUIDANCE_SCALE,
            controls=[
                ControlInput(name=name, image=self._control_image, scale=0.7)
                for name in self.names[: features.n_controlnets]
            ],
            loras=[(self._lora(image_lora_rank(self.setup), i), 1.0) for i in range(features.n_loras)],
            seed=self.setup.seed,
        )

    def _image(self, features: Features) -> Any:
        result = self.worker.generate(self._request(features))
        to_images(result.images)
        return result

    def _time_image(self, features: Features, n_repeats: int) -> list[Timed]:
        """One image as its user waits for it, LoRAs in pinned host memory; and the stages the engine reports."""
        # pinning is the host tier's work (lora_fetch), not the request's
        self._request(features)
        self._warm(features.n_controlnets)
        if features.n_loras:
            n_bytes = lora_file(self.setup, image_lora_rank(self.setup), 0).stat().st_size
            features = dataclasses.replace(features, n_bytes=n_bytes)
        values, stages = [], []
        for _ in range(n_repeats):
            results: list[Any] = []
            values.append(self.clock.wall(lambda kept=results: kept.append(self._image(features))))
            stages.append(results[0].stages)
        found = [Timed(f"e2e.{self.stack}", self.mode, features, tuple(values))]
        for name in ("denoise", "decode", "lora", "lora_restore"):
            seconds = tuple(getattr(item, f"{name}_s") for item in stages)
            if all(value > 0 for value in seconds):
                found.append(self._timed(f"stage_{name}", features, seconds))
        return found

    def _time_load(self, features: Features, n_repeats: int) -> list[Timed]:
        """Weights into the tensors that the captured graphs hold; ``variant`` is ``WHAT_SOURCE``."""
        what, source = features.variant.rsplit("_", 1)
        if what == "controlnet":
            net = next(iter(self.controlnets.values()))
            save_controlnet(self.setup, net)
            modules = {"controlnet": net}
        else:
            save_pipeline(self.setup, self.models)
            modules = {name: getattr(self.models, name) for name, _ in stored_parts(self.setup, what)}
        files, targets = [], []
        for name, folder in stored_parts(self.setup, what):
            for path in weight_files(folder):
                files.append(path)
                targets.append(modules[name].state_dict())
        n_bytes, values = time_into_place(files, targets, self.clock, n_repeats, source)
        quantity = "controlnet_load" if what == "controlnet" else "checkpoint_load"
        return [self._timed(quantity, Features(n_bytes=n_bytes, variant=features.variant), values)]

    def _time_memory(self, features: Features, n_repeats: int) -> list[Timed]:
        """Peak memory of images beyond the weights, and the bytes a ControlNet sends per step and sample; facts, no times."""
        for n_images in sorted({1, features.n_images}):
            request = Features(n_images=n_images, n_steps=2)
            self._facts[f"activation_bytes.{n_images}_images"] = self.clock.peak_bytes(
                lambda asked=request: self._image(asked)
            )
        layout = ResidualLayout.of(
            self.spec, 1, self.setup.height_px, self.setup.width_px, is_channels_last=self.options.channels_last
        )
        self._facts["residual_bytes_per_sample"] = layout.n_elements * self.options.dtype.itemsize
        return []

    def facts(self) -> dict[str, float]:
        """Bytes of the checkpoint and of one ControlNet, peak activation bytes, residual bytes of a sample."""
        return dict(self._facts)

    def close(self) -> None:
        """Frees the models."""
        self._benches.clear()
        self._pinned.clear()
        self.worker = None  # type: ignore[assignment]
        self.models = None  # type: ignore[assignment]
        self.controlnets = {}
        gc.collect()
        self.clock.free()


class ControlNetRig:
    """One ControlNet as a ControlNet worker runs it, for forward batches whose whole step would compile too long."""

    def __init__(self, setup: RigSetup) -> None:
        self.clock = DeviceClock(setup.device)
        self.setup = setup
        options = options_of(setup)
        self.mode = "compiled" if options.compile else "graph" if options.uses_graphs else "eager"
        spec = ModelSpec.named(setup.model)
        net = build_controlnet(spec, setup.device, options.dtype, setup.seed + 1)
        parts = NetworkParts(options, (net,))
        self._stack = ControlStack(spec, {"controlnet0": net}, options, parts)
        self._keys = {}
        for batch in setup.forward_batches:
            key = ShapeKey(batch // 2, True, setup.height_px, setup.width_px)
            latents = torch.randn(key.latent_shape(spec), device=setup.device, dtype=options.dtype)
            with torch.no_grad():
                layout = ResidualLayout.of(
                    spec, key.batch, key.height, key.width, is_channels_last=options.channels_last
                )
                flat = torch.zeros(layout.n_elements, device=setup.device, dtype=options.dtype)
                self._stack.prepare(key, ["controlnet0"], latents, flat)
                self._stack.fill_random(key)
            self._keys[batch] = key

    def run(self, method: str, features: Features, n_repeats: int) -> list[Timed]:
        """Only ``steps``: the ControlNet's part of one."""
        if method != "steps":
            raise ValueError(f"a ControlNet station times only 'steps', asked for {method!r}")
        part = self._stack.part(self._keys[features.forward_batch], "controlnet0")
        plain = dataclasses.replace(features, n_controlnets=0)
        with torch.no_grad():
            return [Timed("engine.controlnet_step", self.mode, plain, tuple(self.clock.burst(part, n_repeats)))]

    def facts(self) -> dict[str, float]:
        """None of its own."""
        return {}

    def close(self) -> None:
        """Nothing that outlives the process."""


class RemoteRig(EngineRig):
    """A base worker on the first GPU whose ControlNets run in a process on the second one (on a CPU: both there)."""

    def _build_controlnets(self) -> dict[str, Any]:
        return {}

    def _build_worker(self) -> BaseWorker:
        worker_device = "cuda:1" if self.options.is_cuda else "cpu"
        self.remote = RemoteControlNets.start(
            self.spec,
            {name: self.setup.seed + 1 + i for i, name in enumerate(self.names)},
            self.options,
            worker_device=worker_device,
        )
        return BaseWorker(self.models, {}, self.options, self.remote)

    def _time_remote_step(self, features: Features, n_repeats: int) -> list[Timed]:
        """Whole steps whose residuals come from the other process, back to back as in a request."""
        bench = self._bench(features.forward_batch, features.n_controlnets)
        n_warm = 4
        bench.begin(n_warm + n_repeats)
        return [self._timed("remote_step", features, self.clock.burst(bench.step, n_repeats, n_warm))]

    def _time_transfer(self, features: Features, n_repeats: int) -> list[Timed]:
        """A buffer from the ControlNet worker to here, asked for by a message whose way is in the time."""
        n_elements = max(1, features.n_bytes // self.options.dtype.itemsize)
        for _ in range(2):
            self.remote.exchange(n_elements)
        values = [self.clock.wall(lambda: self.remote.exchange(n_elements)) for _ in range(n_repeats)]
        return [self._timed("residual_exchange", features, values)]

    def close(self) -> None:
        """Ends the ControlNet worker and frees the models."""
        self.remote.close()
        super().close()
