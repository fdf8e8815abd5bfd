"""Seconds per image of our engine on one GPU for 0–3 ControlNets × 0–2 LoRAs, and of the parts of a step; stock Diffusers beside it.

    PYTHONPATH=. python benchmarks/engine_cells.py --out row.json                              # SDXL, 1024², 50 steps, bf16
    PYTHONPATH=. python benchmarks/engine_cells.py --model tiny --device cpu --steps 3 --out row.json

Every image attaches its LoRAs from pinned memory (another one each time) and takes them off again: both are counted. Stock runs
(``--stock 0,0 1,0``) load their LoRA files and fuse them, and alternate with ours. Random weights, which are as fast as trained ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLControlNetPipeline, StableDiffusionXLPipeline

from calibrate.fingerprint import engine_version, software
from engine.base import BaseWorker, ControlInput, EngineOptions, ImageRequest
from engine.lora import pin_lora
from engine.models import ModelSpec, build_controlnet, build_models, write_random_lora
from engine.text import encode_prompt, random_prompt

RANK = 64
N_FILES = 4


class Cells:
    """Our worker with its ControlNets, and what stock needs."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.spec, self.device, self.n_steps = ModelSpec.named(arguments.model), arguments.device, arguments.steps
        self.options = EngineOptions.fast(self.device)
        started = time.perf_counter()
        self.models = build_models(self.spec, self.device, self.options.dtype, 0)
        nets = {
            f"net-{i}": build_controlnet(self.spec, self.device, self.options.dtype, i + 1)
            for i in range(arguments.controlnets)
        }
        self.worker = BaseWorker(self.models, nets, self.options)
        self.build_s = time.perf_counter() - started
        self.paths = [folder / f"lora-{i}.safetensors" for i in range(N_FILES)]
        for i, path in enumerate(self.paths):
            write_random_lora(path, self.models.unet, RANK if self.spec.name == "sdxl" else 4, i)
        self.pinned = [pin_lora(path, self.models.unet) for path in self.paths]
        self.prompts = [random_prompt(self.spec, seed) for seed in (1, 2)]
        size = self.spec.default_size_px
        self.images = [torch.rand((1, 3, size, size), generator=torch.Generator().manual_seed(i)) for i in range(3)]
        self.n_made = 0
        self._stock: tuple[Any, list[Any]] | None = None

    def ours(self, n_controls: int, n_loras: int) -> tuple[float, dict[str, float]]:
        """One image; seconds until it is in host memory."""
        size = self.spec.default_size_px
        self.n_made += 1
        controls = [ControlInput(f"net-{i}", self.images[i], 0.7) for i in range(n_controls)]
        loras = [(self.pinned[(self.n_made + i) % N_FILES], 0.8) for i in range(n_loras)]
        request = ImageRequest(*self.prompts, 1, self.n_steps, size, size, 5.0, controls, loras, seed=self.n_made)
        started = time.perf_counter()
        result = self.worker.generate(request)
        (result.images.float() * 255).round().to(torch.uint8).cpu()
        seconds = time.perf_counter() - started
        stages = result.stages
        return seconds, {"denoise_s": stages.denoise_s, "lora_s": stages.lora_s, "decode_s": stages.decode_s,
                         "text_s": stages.text_s, "lora_restore_s": stages.lora_restore_s}  # fmt: skip

    @torch.no_grad()
    def stock(self, n_controls: int, n_loras: int) -> float:
        """One image by Diffusers' pipeline, eager, on models of its own."""
        if self._stock is None:
            dtype = self.options.dtype
            nets = [build_controlnet(self.spec, self.device, dtype, i + 1) for i in range(3)]
            self._stock = (build_models(self.spec, self.device, dtype, 0), nets)
        models, nets = self._stock
        parts = (models.vae, models.text_encoder, models.text_encoder_2, None, None, models.unet)
        more: dict[str, Any] = {}
        if n_controls:
            pipe = StableDiffusionXLControlNetPipeline(
                *parts, nets[:n_controls], models.scheduler(), add_watermarker=False
            )
            more = {"image": self.images[:n_controls], "controlnet_conditioning_scale": [0.7] * n_controls}
        else:
            pipe = StableDiffusionXLPipeline(*parts, models.scheduler(), add_watermarker=False)
        pipe.set_progress_bar_config(disable=True)
        self.n_made += 1
        started = time.perf_counter()
        names = [f"l{i}" for i in range(n_loras)]
        for i, name in enumerate(names):
            path = self.paths[(self.n_made + i) % N_FILES]
            pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
        if names:
            pipe.set_adapters(names, [0.8] * n_loras)
            pipe.fuse_lora(components=["unet"], adapter_names=names)
        prompt, negative = (encode_prompt(models, tokens) for tokens in self.prompts)
        size = self.spec.default_size_px
        pipe(
            prompt_embeds=prompt.context, pooled_prompt_embeds=prompt.pooled,
            negative_prompt_embeds=negative.context, negative_pooled_prompt_embeds=negative.pooled,
            num_inference_steps=self.n_steps, guidance_scale=5.0, width=size, height=size, output_type="pil", **more,
        )  # fmt: skip
        if names:
            pipe.unfuse_lora(components=["unet"])
            pipe.unload_lora_weights()
        return time.perf_counter() - started

    def parts(self, n_images: int, n_repeats: int = 30) -> dict[str, Any]:
        """Milliseconds of the parts of a guided step on their own."""
        size = self.spec.default_size_px
        bench = self.worker.prepare(n_images, size, size, min(1, len(self.worker.controlnet_names)))
        plain = self.worker.prepare(n_images, size, size, 0)
        found = {"encoder": bench.encoder, "decoder": plain.decoder, "decoder_joined": bench.decoder, "step": plain.step,
                 "step_1C": bench.step, "vae_one_image": lambda: plain.vae(1), "text": plain.text}  # fmt: skip
        if self.worker.controlnet_names:
            found["controlnet"] = lambda: bench.controlnet(0)
        return {name: self._timed(run, n_repeats) for name, run in found.items()}

    def loras(self) -> dict[str, Any]:
        """Attaching and detaching LoRAs, from pinned memory, in milliseconds."""
        patcher = self.worker.patcher
        rows: dict[str, Any] = {"bytes": self.pinned[0].bytes, "rank": self.pinned[0].rank}
        for n in (1, 2):
            rows[f"attach_{n}"] = self._timed(lambda n=n: patcher.patch([(self.pinned[i], 0.8) for i in range(n)]), 10)
            rows[f"detach_{n}"] = self._timed(
                patcher.restore, 10, before=lambda n=n: patcher.patch([(self.pinned[i], 0.8) for i in range(n)])
            )
        patcher.restore()
        return rows

    def _timed(self, run: Any, n_repeats: int, before: Any = None) -> dict[str, float]:
        times = []
        for repeat in range(n_repeats + 2):
            if before is not None:
                before()
            self.worker.synchronize()
            started = time.perf_counter()
            run()
            self.worker.synchronize()
            if repeat >= 2:
                times.append((time.perf_counter() - started) * 1e3)
        return {"median_ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times)}


def summary(times: list[float]) -> dict[str, Any]:
    """Median and spread of seconds per image."""
    median = statistics.median(times)
    return {
        "median_s": median, "min_s": min(times), "max_s": max(times), "repetitions_s": times,
        "images_per_gpu_minute": 60 / median,
    }  # fmt: skip


def main() -> None:
    """Measures parts, then every cell, and writes after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sdxl")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--controlnets", type=int, default=3, choices=range(4))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stock", nargs="*", default=[], metavar="C,L", help="cells that stock Diffusers runs too")
    parser.add_argument("--budget-seconds", type=float, default=1e9, help="no further cell is begun after this")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    started = time.perf_counter()
    row: dict[str, Any] = {
        "what": f"{arguments.model}, {arguments.steps} steps, one image a request",
        "gpu": torch.cuda.get_device_name(arguments.device) if arguments.device.startswith("cuda") else "CPU",
        "engine_version": engine_version(),
        "software": software(),
        "cells": {},
    }

    def write() -> None:
        beside = arguments.out.with_name(arguments.out.name + ".part")
        beside.write_text(json.dumps(row, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        beside.replace(arguments.out)

    with tempfile.TemporaryDirectory() as folder:
        cells = Cells(arguments, Path(folder))
        row["build_s"] = cells.build_s
        before = time.perf_counter()
        cells.ours(0, 0)
        row["first_image_s"] = time.perf_counter() - before
        row["parts"] = cells.parts(1)
        row["loras"] = cells.loras()
        write()
        print(json.dumps({**row["parts"], **row["loras"]}, indent=1), flush=True)
        for n_controls in range(arguments.controlnets + 1):
            for n_loras in range(3):
                if time.perf_counter() - started > arguments.budget_seconds:
                    row["stopped"] = "budget"
                    break
                name = f"{n_controls},{n_loras}"
                cells.ours(n_controls, n_loras)
                ours, stages, stock = [], {}, []
                if name in arguments.stock:
                    cells.stock(n_controls, n_loras)
                for _ in range(arguments.repeats):
                    seconds, stages = cells.ours(n_controls, n_loras)
                    ours.append(seconds)
                    if name in arguments.stock:
                        stock.append(cells.stock(n_controls, n_loras))
                row["cells"][name] = {"ours": summary(ours), "last_stages": stages}
                if stock:
                    row["cells"][name] |= {"stock": summary(stock)}
                    row["cells"][name]["stock_over_ours"] = statistics.median(stock) / statistics.median(ours)
                write()
                print(
                    name,
                    {
                        k: round(v["median_s"], 3)
                        for k, v in row["cells"][name].items()
                        if "s" in k and isinstance(v, dict) and "median_s" in v
                    },
                    {k: round(v, 4) for k, v in stages.items()},
                    flush=True,
                )


if __name__ == "__main__":
    main()
