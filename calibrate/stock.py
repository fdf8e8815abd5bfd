"""The peers: the stock Diffusers SDXL pipelines (eager), and the same pipeline tuned the way Diffusers' own guide says.

Steps are timed inside the real pipeline: ``callback_on_step_end`` marks the stream once a step, so that the scheduler, the
guidance and the pipeline's Python are in the number, as they are for a user.
"""

from __future__ import annotations

import dataclasses
import gc
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from calibrate.clock import DeviceClock
from calibrate.measurement import Features
from calibrate.rig import RigSetup, Timed
from calibrate.storage import (
    image_lora_rank,
    lora_file,
    save_controlnet,
    save_pipeline,
    stored_parts,
    time_from_pretrained,
)
from engine.models import ModelSpec, build_controlnet, build_models, bytes_of

GUIDANCE_SCALE: Final = 5.0
# The first steps of a run include the allocator's growth and, compiled, the recording of graphs.
STEPS_SKIPPED: Final = 3
MEMORY_HUNGRY: Final = frozenset({"vae_decode", "load", "memory"})
"""After these the allocator's cache is returned to the GPU, which other stations share."""


def dtype_of(name: str) -> torch.dtype:
    """``bfloat16`` to ``torch.bfloat16``."""
    return getattr(torch, name)  # type: ignore[no-any-return]


class StockRig:
    """Stock Diffusers: eager, ControlNets in process one after the other, LoRAs through PEFT."""

    stack = "diffusers"
    mode = "eager"
    vae_mode = "eager"
    lists_controlnets = False
    """Whether one ControlNet goes into the pipeline as a list of one."""

    def __init__(self, setup: RigSetup) -> None:
        from diffusers import StableDiffusionXLControlNetPipeline, StableDiffusionXLPipeline

        self.setup = setup
        self.clock = DeviceClock(setup.device)
        spec, dtype = ModelSpec.named(setup.model), dtype_of(setup.dtype)
        self._facts: dict[str, float] = {}
        self.models = build_models(spec, setup.device, dtype, setup.seed)
        self._facts["checkpoint_bytes"] = self.models.bytes
        self.controlnets = [
            build_controlnet(spec, setup.device, dtype, setup.seed + 1 + i) for i in range(setup.n_controlnets)
        ]
        if self.controlnets:
            self._facts["controlnet_bytes"] = bytes_of(self.controlnets[0])
        parts: dict[str, Any] = {
            "vae": self.models.vae,
            "text_encoder": self.models.text_encoder,
            "text_encoder_2": self.models.text_encoder_2,
            "tokenizer": None,
            "tokenizer_2": None,
            "unet": self.models.unet,
            "scheduler": self.models.scheduler(),
            "add_watermarker": False,
        }
        self.pipes: dict[int, Any] = {0: StableDiffusionXLPipeline(**parts)}
        for n in range(1, len(self.controlnets) + 1):
            nets = self.controlnets[:n]
            single = n == 1 and not self.lists_controlnets
            self.pipes[n] = StableDiffusionXLControlNetPipeline(controlnet=nets[0] if single else nets, **parts)
        for pipe in self.pipes.values():
            pipe.set_progress_bar_config(disable=True)
        rng = np.random.default_rng(setup.seed)
        pixels = rng.integers(0, 256, (setup.height_px, setup.width_px, 3), dtype=np.uint8)
        self._control_image = Image.fromarray(pixels)
        generator = torch.Generator(device="cpu").manual_seed(setup.seed)
        cross, pooled = spec.context_width, spec.pooled_width
        self._embeds = {
            name: torch.randn(shape, generator=generator).to(setup.device, dtype)
            for name, shape in {
                "prompt_embeds": (1, 77, cross),
                "negative_prompt_embeds": (1, 77, cross),
                "pooled_prompt_embeds": (1, pooled),
                "negative_pooled_prompt_embeds": (1, pooled),
            }.items()
        }
        self._loaded: list[str] = []
        self._lora_counts: set[int] = set()
        self._is_cold = False
        self._prepare()

    def _prepare(self) -> None:
        for n in sorted(self.pipes):
            self._call(n, n_steps=2, n_images=1, output_type="pil")

    def _call(
        self,
        n_controlnets: int,
        *,
        n_steps: int,
        n_images: int,
        output_type: str,
        on_step: Any = None,
        size: tuple[int, int] | None = None,
        is_guided: bool = True,
    ) -> Any:
        more: dict[str, Any] = {}
        if n_controlnets:
            is_list = n_controlnets > 1 or self.lists_controlnets
            images, scales = [self._control_image] * n_controlnets, [0.7] * n_controlnets
            more = {
                "image": images if is_list else images[0],
                "controlnet_conditioning_scale": scales if is_list else scales[0],
            }
        width_px, height_px = size or (self.setup.width_px, self.setup.height_px)
        return self.pipes[n_controlnets](
            **(self._embeds if is_guided else {k: v for k, v in self._embeds.items() if "negative" not in k}),
            **more,
            height=height_px,
            width=width_px,
            num_inference_steps=n_steps,
            num_images_per_prompt=n_images,
            guidance_scale=GUIDANCE_SCALE if is_guided else 1.0,
            output_type=output_type,
            generator=torch.Generator(device="cpu").manual_seed(self.setup.seed),
            callback_on_step_end=on_step,
        )

    def _steps(self, features: Features, n_repeats: int) -> tuple[float, ...]:
        ticks: list[Any] = []

        def on_step(_pipe: Any, _index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            ticks.append(self.clock.tick())
            return tensors

        self._call(
            features.n_controlnets,
            n_steps=n_repeats + STEPS_SKIPPED + 1,
            n_images=features.forward_batch if features.forward_batch % 2 else features.forward_batch // 2,
            output_type="latent",
            on_step=on_step,
            size=(features.width_px, features.height_px),
            is_guided=features.forward_batch % 2 == 0,
        )
        return tuple(self.clock.between(ticks)[STEPS_SKIPPED:])

    def _adapt(self, n_loras: int, rank: int = 0) -> None:
        """Loads LoRAs through PEFT as a user does; all of them active, none fused."""
        pipe = self.pipes[0]
        for i in range(n_loras):
            file = lora_file(self.setup, rank or image_lora_rank(self.setup), i)
            name = f"lora{i}"
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
            self._loaded.append(name)
        if n_loras > 1:
            pipe.set_adapters(list(self._loaded), [1.0] * len(self._loaded))

    def _unadapt(self) -> None:
        self.pipes[0].unload_lora_weights()
        self._loaded.clear()

    def _fuse(self) -> None:
        self.pipes[0].fuse_lora(components=["unet"])

    def _unfuse(self) -> None:
        self.pipes[0].unfuse_lora(components=["unet"])

    def run(self, method: str, features: Features, n_repeats: int) -> list[Timed]:
        """See :class:`calibrate.rig.Rig`."""
        with torch.no_grad():
            try:
                return getattr(self, f"_time_{method}")(features, n_repeats)  # type: ignore[no-any-return]
            finally:
                if self._loaded:
                    self._unadapt()
                if method in MEMORY_HUNGRY:
                    self.clock.free()
                    self._is_cold = True

    def _timed(self, quantity: str, features: Features, values_s: Any) -> Timed:
        return Timed(f"{self.stack}.{quantity}", self.mode, features, tuple(values_s))

    def _time_unet_step(self, features: Features, n_repeats: int) -> list[Timed]:
        return [self._timed("unet_step", features, self._steps(features, n_repeats))]

    def _time_step_with_controlnets(self, features: Features, n_repeats: int) -> list[Timed]:
        return [self._timed("step_with_controlnets", features, self._steps(features, n_repeats))]

    def _time_unet_lora_step(self, features: Features, n_repeats: int) -> list[Timed]:
        self._adapt(features.n_loras)
        return [self._timed("unet_lora_step", features, self._steps(features, n_repeats))]

    def _time_vae_decode(self, features: Features, n_repeats: int) -> list[Timed]:
        """The decoder as the pipeline calls it (same strides and dtype), marked before and after."""
        vae, ticks = self.pipes[0].vae, []
        decode = vae.decode
        had_own = "decode" in vars(vae)

        def marked(*args: Any, **kwargs: Any) -> Any:
            ticks.append(self.clock.tick())
            image = decode(*args, **kwargs)
            ticks.append(self.clock.tick())
            return image

        vae.decode = marked
        try:
            for _ in range(n_repeats + 1):
                self._call(0, n_steps=1, n_images=features.n_images, output_type="pt")
        finally:
            if had_own:
                vae.decode = decode
            else:
                del vae.decode
        values = self.clock.between(ticks)[::2][1:]
        return [Timed(f"{self.stack}.vae_decode", self.vae_mode, features, tuple(values))]

    def _time_text_encode(self, features: Features, n_repeats: int) -> list[Timed]:
        encoders = [self.models.text_encoder, self.models.text_encoder_2]
        ids = torch.randint(0, 1000, (1, 77), device=self.setup.device)

        def encode() -> None:
            # prompt and negative prompt, two encoders each, one after the other: what encode_prompt does
            for _ in range(2):
                for encoder in encoders:
                    encoder(ids, output_hidden_states=True)

        encode()
        return [self._timed("text_encode", features, [self.clock.wall(encode) for _ in range(n_repeats)])]

    def _time_lora(self, features: Features, n_repeats: int) -> list[Timed]:
        """Attach, fuse, unfuse and detach one LoRA; ``variant`` gives the rank as ``rank64``."""
        rank = int(features.variant.removeprefix("rank"))
        n_bytes = lora_file(self.setup, rank, 0).stat().st_size
        sized = Features(n_bytes=n_bytes, n_loras=1, variant=features.variant)
        pipe = self.pipes[0]
        times: dict[str, list[float]] = {
            name: [] for name in ("lora_attach", "lora_fuse", "lora_unfuse", "lora_detach")
        }
        for _ in range(n_repeats):
            times["lora_attach"].append(self.clock.wall(lambda: self._adapt(1, rank)))
            times["lora_fuse"].append(self.clock.wall(lambda: pipe.fuse_lora(components=["unet"])))
            times["lora_unfuse"].append(self.clock.wall(lambda: pipe.unfuse_lora(components=["unet"])))
            times["lora_detach"].append(self.clock.wall(self._unadapt))
        return [self._timed(name, sized, values) for name, values in times.items()]

    def _time_image(self, features: Features, n_repeats: int) -> list[Timed]:
        """One image as a user waits for it: LoRAs loaded (and fused, by variant), then the pipeline, then a PIL image."""
        values = []
        if self._is_cold:
            # growing the allocator again is not part of an image
            self._call(features.n_controlnets, n_steps=1, n_images=features.n_images, output_type="pt")
            self._is_cold = False
        if features.n_loras:
            sizes = [
                lora_file(self.setup, image_lora_rank(self.setup), i).stat().st_size for i in range(features.n_loras)
            ]
            features = dataclasses.replace(features, n_bytes=sizes[0])
            self._warm_loras(features)
        for _ in range(n_repeats):

            def image() -> None:
                if features.n_loras:
                    self._adapt(features.n_loras)
                    if features.variant == "fused":
                        self._fuse()
                self._call(
                    features.n_controlnets, n_steps=features.n_steps, n_images=features.n_images, output_type="pil"
                )

            values.append(self.clock.wall(image))
            if features.n_loras:
                if features.variant == "fused":
                    self._unfuse()
                self._unadapt()
        return [Timed(f"e2e.{self.stack}", self.mode, features, tuple(values))]

    def _warm_loras(self, features: Features) -> None:
        """The first LoRAs of a process import PEFT and build what the next ones find: once for each number of them."""
        if features.n_loras in self._lora_counts:
            return
        self._adapt(features.n_loras)
        if features.variant == "fused":
            self._fuse()
        self._call(features.n_controlnets, n_steps=2, n_images=features.n_images, output_type="pil")
        if features.variant == "fused":
            self._unfuse()
        self._unadapt()
        self._lora_counts.add(features.n_loras)

    def _time_load(self, features: Features, n_repeats: int) -> list[Timed]:
        """``from_pretrained`` from the page cache to the device; ``variant`` says what (see ``stored_parts``)."""
        what = features.variant
        if what == "controlnet":
            save_controlnet(self.setup, self.controlnets[0])
        else:
            save_pipeline(self.setup, self.models)
        n_bytes, values = time_from_pretrained(
            stored_parts(self.setup, what), self.setup.device, dtype_of(self.setup.dtype), self.clock, n_repeats
        )
        quantity = "controlnet_load" if what == "controlnet" else "checkpoint_load"
        return [self._timed(quantity, Features(n_bytes=n_bytes, variant=what), values)]

    def _time_memory(self, features: Features, n_repeats: int) -> list[Timed]:
        """Peak device memory of whole images beyond the weights, for one image and for ``n_images``; a fact, no times."""
        for n_images in sorted({1, features.n_images}):
            self._facts[f"activation_bytes.{n_images}_images"] = self.clock.peak_bytes(
                lambda n=n_images: self._call(0, n_steps=2, n_images=n, output_type="pt")
            )
        if self.clock.is_cuda:
            self._facts["device_memory_bytes"] = torch.cuda.get_device_properties(self.clock.device).total_memory
        return []

    def facts(self) -> dict[str, float]:
        """Bytes of the checkpoint and of one ControlNet, peak activation bytes."""
        return dict(self._facts)

    def close(self) -> None:
        """Frees the models."""
        self.pipes.clear()
        del self.models, self.controlnets
        gc.collect()
        self.clock.free()
