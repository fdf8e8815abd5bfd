"""Our engine under the clock: the parts of a step, LoRAs, loading, everything around the steps, and whole images."""

from __future__ import annotations

import dataclasses
import gc
import time
import traceback
from typing import Any

import torch
from PIL import Image

from calibrate.clock import DeviceClock
from calibrate.loads import ServingLoads, What
from calibrate.lora_tier import LoraTier
from calibrate.measurement import Features
from calibrate.rig import RigSetup, Timed
from calibrate.stock import GUIDANCE_SCALE, MEMORY_HUNGRY, dtype_of
from calibrate.storage import (
    image_lora_rank,
    load_checkpoint,
    save_controlnet,
    save_pipeline,
    stored_parts,
    time_into_place,
    weight_files,
)
from engine.base import BaseWorker
from engine.controlnet import ResidualLayout
from engine.lora import PinnedLora
from engine.models import ModelSpec, build_controlnet, build_models, bytes_of
from engine.options import ControlInput, EngineOptions, ImageRequest, PromptEmbeddings
from engine.pixels import encode_png
from engine.workers.sdxl_painter import to_uint8


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
    return [Image.fromarray(row) for row in to_uint8(pixels)]


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
        self._benches: dict[tuple[int, int, int, int], Any] = {}
        generator = torch.Generator().manual_seed(setup.seed)
        self._control_image = torch.rand((1, 3, setup.height_px, setup.width_px), generator=generator)
        self._prompts = [
            PromptEmbeddings(
                torch.randn((1, 77, self.spec.context_width), generator=generator),
                torch.randn((1, self.spec.pooled_width), generator=generator),
            )
            for _ in range(2)
        ]
        self._tier = LoraTier(setup, self.options.dtype, self.clock)
        self._warmed: set[int] = set()
        self._lora_counts: set[int] = set()
        self._prepare()

    def _build_controlnets(self) -> dict[str, Any]:
        return {
            name: build_controlnet(self.spec, self.setup.device, self.options.dtype, self.setup.seed + 1 + i)
            for i, name in enumerate(self.names)
        }

    def _build_worker(self) -> BaseWorker:
        return BaseWorker(self.models, self.controlnets, self.options)

    def _prepare(self) -> None:
        """Captures what this rig will be asked for, so that the clock never sees it; what time is left for, most wanted first."""
        self._note_memory("weights")
        for batch in self.setup.forward_batches:
            self._bench(self._main(batch), 0).step()
        if not self.setup.forward_batches or 2 in self.setup.forward_batches:
            for nets in range(len(self.names) + 1):
                if nets <= 1 or self._has_time():
                    self._warm(nets)
                    self._note_memory(f"{nets}_controlnets")
        for batch, width, height, nets in self.setup.shapes:
            if self._has_time():
                try:
                    self._bench(Features(forward_batch=batch, width_px=width, height_px=height), nets)
                except (
                    RuntimeError,
                    ValueError,
                ):  # one shape that does not run costs only its own task, which says why
                    traceback.print_exc()

    def _note_memory(self, after: str) -> None:
        """Device memory that this process has taken, captured graphs included: weights of all ControlNets are there from the start."""
        if self.clock.is_cuda:
            self._facts[f"reserved_bytes.{after}"] = torch.cuda.memory_reserved(self.clock.device)

    def _has_time(self) -> bool:
        return time.perf_counter() < self.setup.prepare_until_s

    def _main(self, forward_batch: int) -> Features:
        return Features(
            forward_batch=forward_batch, width_px=self.setup.width_px, height_px=self.setup.height_px
        )  # fmt: skip

    def _warm(self, n_controlnets: int) -> None:
        """Runs a short image with this many ControlNets once, so that compiling and capturing is behind it."""
        if n_controlnets not in self._warmed:
            self._image(Features(n_images=1, n_steps=2, n_controlnets=n_controlnets, forward_batch=2))
            self._warmed.add(n_controlnets)

    def _bench(self, features: Features, n_controlnets: int) -> Any:
        """The parts of a step; an odd forward batch is one without guidance."""
        batch, width, height = features.forward_batch, features.width_px, features.height_px
        key = (batch, width, height, n_controlnets)
        if key not in self._benches:
            is_guided = batch % 2 == 0
            n_images = batch // 2 if is_guided else batch
            self._benches[key] = self.worker.prepare(n_images, height, width, n_controlnets, uses_cfg=is_guided)
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
        """The whole step, its two parts, and with ``n_controlnets`` one ControlNet and the steps that use so many."""
        plain = dataclasses.replace(features, n_controlnets=0)
        bench = self._bench(features, 0)
        found = [
            self._timed(quantity, plain, self.clock.burst(part, n_repeats))
            for quantity, part in (
                ("unet_step", bench.step),
                ("encoder_step", bench.encoder),
                ("decoder_step", bench.decoder),
            )
        ]
        return found + [
            item
            for nets in range(1, features.n_controlnets + 1)
            for item in self._controlnet_steps(dataclasses.replace(features, n_controlnets=nets), n_repeats)
        ]

    def _time_joined_step(self, features: Features, n_repeats: int) -> list[Timed]:
        """One ControlNet, and the step that uses it."""
        return self._controlnet_steps(features, n_repeats)

    def _controlnet_steps(self, features: Features, n_repeats: int) -> list[Timed]:
        bench = self._bench(features, features.n_controlnets)
        bench.begin(1)  # a worker's ControlNets serve one shape at a time: the last one announced
        found = [self._timed("step_with_controlnets", features, self.clock.burst(bench.step, n_repeats))]
        if features.n_controlnets == 1:
            plain = dataclasses.replace(features, n_controlnets=0)
            found.append(
                self._timed("controlnet_step", plain, self.clock.burst(lambda: bench.controlnet(0), n_repeats))
            )
        return found

    def _time_vae_decode(self, features: Features, n_repeats: int) -> list[Timed]:
        bench = self._bench(dataclasses.replace(features, forward_batch=2), 0)
        return [self._timed("vae_decode", features, self.clock.burst(lambda: bench.vae(features.n_images), n_repeats))]

    def _time_text_encode(self, features: Features, n_repeats: int) -> list[Timed]:
        bench = self._bench(self._main(2), 0)
        bench.text()
        return [self._timed("text_encode", features, [self.clock.wall(bench.text) for _ in range(n_repeats)])]

    def _time_encode_images(self, features: Features, n_repeats: int) -> list[Timed]:
        """Decoded images to the host, and there into PNG files; random weights draw noise, which takes longest to pack."""
        spec = self.spec
        size = (features.height_px // spec.vae_scale_factor, features.width_px // spec.vae_scale_factor)
        latents = torch.randn((features.n_images, 4, *size), device=self.setup.device, dtype=self.options.dtype)
        pixels = self.worker.decode(latents, features.height_px, features.width_px)
        copies, files = [], []
        for _ in range(n_repeats + 1):
            rows: list[Any] = []
            copies.append(self.clock.wall(lambda held=rows: held.extend(to_uint8(pixels))))  # type: ignore[misc]
            files.append(self.clock.wall(lambda held=rows: [encode_png(row) for row in held]))  # type: ignore[misc]
        return [self._timed("image_to_host", features, copies[1:]), self._timed("png_encode", features, files[1:])]

    def _time_lora(self, features: Features, n_repeats: int) -> list[Timed]:
        """Store to host tier, host tier to mapped, mapped into the weights, and off again; ``variant`` gives the rank."""
        rank = int(features.variant.removeprefix("rank"))
        sized = Features(
            n_bytes=self._tier.file(rank, 0).stat().st_size, n_loras=1, variant=features.variant
        )  # fmt: skip
        found = [
            Timed("lora_fetch.local", "", sized, tuple(self._tier.time_fetches(rank, n_repeats))),
            Timed("lora_fetch.disk", "", sized, tuple(self._tier.time_fetches(rank, 1, is_cold=True))),
            self._timed("lora_map", sized, self._tier.time_maps(rank, n_repeats)),
        ]
        patches, restores = self._patched([self._tier.get(rank, 0)], n_repeats)
        found += [self._timed("lora_attach", sized, patches), self._timed("lora_detach", sized, restores)]
        return [item for item in found if item.values_s]

    def _time_loras(self, features: Features, n_repeats: int) -> list[Timed]:
        """``n_loras`` LoRAs patched together and off again; ``variant`` gives the rank of each."""
        rank, n = int(features.variant.removeprefix("rank")), features.n_loras
        n_bytes = sum(self._tier.file(rank, i).stat().st_size for i in range(n))
        patches, restores = self._patched([self._tier.get(rank, i) for i in range(n)], n_repeats)
        sized = dataclasses.replace(features, n_bytes=n_bytes)
        return [self._timed("loras_attach", sized, patches), self._timed("loras_detach", sized, restores)]

    def _patched(self, loras: list[PinnedLora], n_repeats: int) -> tuple[list[float], list[float]]:
        patcher, patches, restores = self.worker.patcher, [], []
        for _ in range(n_repeats + 1):  # the first one grows the staging buffers and keeps the pristine weights
            patches.append(self.clock.wall(lambda: patcher.patch([(lora, 1.0) for lora in loras])))
            restores.append(self.clock.wall(patcher.restore))
        return patches[1:], restores[1:]

    def _request(self, features: Features) -> ImageRequest:
        rank = image_lora_rank(self.setup)
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
            loras=[(self._tier.get(rank, i), 1.0) for i in range(features.n_loras)],
            seed=self.setup.seed,
        )

    def _image(self, features: Features) -> Any:
        result = self.worker.generate(self._request(features))
        to_images(result.images)
        return result

    def _time_image(self, features: Features, n_repeats: int) -> list[Timed]:
        """One image as its user waits for it, LoRAs in pinned host memory; and the stages the engine reports."""
        # fetching and mapping are not the request's, nor is what a patcher does once: staging, pristine copies
        if features.n_loras and features.n_loras not in self._lora_counts:
            self._image(dataclasses.replace(features, n_steps=2))
            self._lora_counts.add(features.n_loras)
        self._warm(features.n_controlnets)
        if features.n_loras:
            n_bytes = self._tier.file(image_lora_rank(self.setup), 0).stat().st_size
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
        if source in {"serving", "host"}:
            return self._serving_loads("controlnet" if what == "controlnet" else "checkpoint", source, n_repeats)
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

    def _serving_loads(self, what: What, source: str, n_repeats: int) -> list[Timed]:
        """As the engine's workers replace a resident checkpoint or ControlNet.

        ``source`` ``serving``: one that their host tier does not hold. ``host``: one that it holds, and how long it takes to get it there.
        """
        if what == "controlnet":
            target: Any = next(iter(self.controlnets.values()))
            folder = save_controlnet(self.setup, target)
        else:
            target, folder = self.models, save_pipeline(self.setup, self.models)
        loads = ServingLoads(what, folder, self.spec, self.options, target)
        if source == "serving":
            found = [self._timed(f"{what}_load", loads.features(source), loads.both(n_repeats))]
        else:
            found = [
                self._timed(f"{what}_read", loads.features("store"), loads.reads(n_repeats)),
                self._timed(f"{what}_load", loads.features(source), loads.copies(n_repeats)),
            ]
        loads.close()
        self._facts |= loads.facts
        return found

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
        self._tier.close()
        self.worker = None  # type: ignore[assignment]
        self.models = None  # type: ignore[assignment]
        self.controlnets = {}
        gc.collect()
        self.clock.free()
