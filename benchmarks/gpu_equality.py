"""How far the engine's final latents are from the stock pipeline's, on a GPU in bf16, beside how far two stock runs differ.

    python benchmarks/gpu_equality.py --out row.json            # SDXL, 1024², 50 steps, bf16
    python benchmarks/gpu_equality.py --steps 30 --limit-s 140 --compiled --out row.json
    python benchmarks/gpu_equality.py --model tiny --device cpu --out row.json

Floors are distances between stock runs that differ in nothing but how they are computed: memory layout (NCHW and NHWC), and
fusing (query, key and value projections in one; with a LoRA, the LoRA merged into the weights in place of PEFT's side path).
With ``--compiled`` also transformer blocks under torch.compile. A denoising loop of an untrained network amplifies rounding,
so only the ratio to a floor says something. All ratios are stated; the bound is 1.5 times the largest floor.

Cells are done one after the other, and the file is written after each: what was cut off or left out at ``--limit-s`` is
named in it under ``left_out``.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import StableDiffusionXLControlNetPipeline, StableDiffusionXLPipeline

from calibrate.fingerprint import engine_version, software
from engine.base import BaseWorker, ControlInput, EngineOptions, ImageRequest, PromptEmbeddings
from engine.lora import pin_lora
from engine.models import ModelSpec, SdxlModels, build_controlnet, build_models, write_random_lora
from engine.remote import RemoteControlNets

SCALE: Final = 0.7
BOUND: Final = 1.5
NETS: Final = ("controlnet0", "controlnet1", "controlnet2")
LORA_RANKS: Final = (16, 32)
CELLS: Final = ((0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 2))
"""Numbers of ControlNets and LoRAs, the most telling first: all others are compared to the first."""


class Stock:
    """Stock pipelines over one set of weights. Every way of running them gets a copy: some leave marks on the modules."""

    def __init__(self, models: SdxlModels, nets: dict[str, Any], loras: list[Path]) -> None:
        self._models = models
        self._nets = nets
        self._loras = loras

    def latents(self, request: ImageRequest, n_loras: int, way: str = "plain") -> torch.Tensor:
        """Final latents. ``way``: plain, relaid (NHWC), fused (projections, or LoRAs into weights), compiled (blocks)."""
        copies = way != "plain"
        unet = copy.deepcopy(self._models.unet) if copies else self._models.unet
        nets = [self._nets[control.name] for control in request.controls]
        if copies:
            nets = [copy.deepcopy(net) for net in nets]
        if way == "relaid":
            for module in (unet, *nets):
                module.to(memory_format=torch.channels_last)
        if way == "compiled":
            unet.compile_repeated_blocks(dynamic=False)
        parts = (self._models.vae, self._models.text_encoder, self._models.text_encoder_2, None, None, unet)
        more: dict[str, Any] = {}
        pipe: Any
        if nets:
            pipe = StableDiffusionXLControlNetPipeline(*parts, nets, self._models.scheduler(), add_watermarker=False)
            more = {"image": [c.image for c in request.controls], "controlnet_conditioning_scale": [SCALE] * len(nets)}
        else:
            pipe = StableDiffusionXLPipeline(*parts, self._models.scheduler(), add_watermarker=False)
        pipe.set_progress_bar_config(disable=True)
        names = [f"lora{place}" for place in range(n_loras)]
        for name, file in zip(names, self._loras, strict=False):
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
        if names:
            pipe.set_adapters(names, [1.0] * n_loras)
            if way == "fused":
                pipe.fuse_lora(components=["unet"], adapter_names=names)
        elif way == "fused":
            pipe.fuse_qkv_projections(vae=False)
        prompt, negative = request.prompt, request.negative
        assert isinstance(prompt, PromptEmbeddings) and isinstance(negative, PromptEmbeddings)  # noqa: PT018, S101
        device, dtype = unet.device, unet.dtype
        try:
            return pipe(
                prompt_embeds=prompt.context.to(device, dtype),
                pooled_prompt_embeds=prompt.pooled.to(device, dtype),
                negative_prompt_embeds=negative.context.to(device, dtype),
                negative_pooled_prompt_embeds=negative.pooled.to(device, dtype),
                num_inference_steps=request.n_steps,
                guidance_scale=request.guidance,
                height=request.height,
                width=request.width,
                latents=request.latents.clone().to(device, dtype),  # type: ignore[union-attr]
                output_type="latent",
                **more,
            ).images
        finally:
            if names and not copies:
                pipe.unload_lora_weights()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2 distance."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm())


class Report:
    """The result so far; every change is written at once."""

    def __init__(self, path: Path, limit_s: float, plain: dict[str, Any]) -> None:
        self._path = path
        self._limit_s = limit_s
        self._start_s = time.perf_counter()
        self.plain: dict[str, Any] = {**plain, "rows": [], "left_out": [], "seconds": {}}

    def attempt(self, name: str, run: Callable[[], Any]) -> Any:
        """What ``run`` returns, timed under ``name``; None once the time is up, and the name is written down."""
        before_s = time.perf_counter() - self._start_s
        if before_s > self._limit_s:
            self.plain["left_out"].append(name)
            self.write()
            return None
        print(f"{before_s:6.1f} s  {name}", file=sys.stderr, flush=True)
        found = run()
        self.plain["seconds"][name] = round(time.perf_counter() - self._start_s - before_s, 1)
        self.plain["seconds_total"] = round(time.perf_counter() - self._start_s, 1)
        self.write()
        return found

    def write(self) -> None:
        """Beside, then renamed."""
        beside = self._path.with_name(self._path.name + ".part")
        beside.write_text(json.dumps(self.plain, indent=1) + "\n")
        beside.replace(self._path)


def settle(row: dict[str, Any]) -> None:
    """Brings ratios and verdict of a row up to date with its floors."""
    floors = {name: value for name, value in row.items() if name.startswith("stock_") and value is not None}
    row["ratio"] = row["engine_vs_stock"] / max(floors.values()) if max(floors.values(), default=0.0) > 0 else None
    row["ratio_to_each_floor"] = {
        name: row["engine_vs_stock"] / value if value > 0 else None for name, value in floors.items()
    }
    row["is_within_bound"] = row["engine_vs_stock"] <= BOUND * max(floors.values(), default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sdxl", choices=["sdxl", "tiny"])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--limit-s", type=float, default=140.0, help="nothing new is begun after this")
    parser.add_argument("--compiled", action="store_true", help="the floor under torch.compile too (about 15 s a cell)")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    spec = ModelSpec.named(arguments.model)
    is_cuda = arguments.device.startswith("cuda")
    dtype = torch.bfloat16 if is_cuda else torch.float32
    report = Report(
        arguments.out,
        arguments.limit_s,
        {
            "benchmark": "latents_engine_against_stock",
            "what": f"relative L2 of final latents, {arguments.model}, {arguments.steps} steps, {dtype}".replace(
                "torch.", ""
            ),
            "gpu": torch.cuda.get_device_name(0) if is_cuda else "cpu",
            "software": software(),
            "engine": engine_version(),
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        compare(spec, arguments, dtype, Path(folder), report)
    report.write()
    print(json.dumps(report.plain, indent=1), flush=True)


def compare(spec: ModelSpec, arguments: argparse.Namespace, dtype: torch.dtype, folder: Path, report: Report) -> None:
    """Fills the report, in the order of worth."""
    is_cuda = arguments.device.startswith("cuda")
    models = build_models(spec, arguments.device, dtype, 0)
    seeds = {name: 1 + place for place, name in enumerate(NETS)}
    nets = {name: build_controlnet(spec, arguments.device, dtype, seed) for name, seed in seeds.items()}
    files = [folder / f"lora{place}.safetensors" for place in range(len(LORA_RANKS))]
    for place, file in enumerate(files):
        write_random_lora(file, models.unet, LORA_RANKS[place], 7 + place)
    generator = torch.Generator().manual_seed(3)
    size, side = spec.default_size_px, spec.default_size_px // spec.vae_scale_factor
    prompts = [
        PromptEmbeddings(
            torch.randn((1, 77, spec.context_width), generator=generator),
            torch.randn((1, spec.pooled_width), generator=generator),
        )
        for _ in range(2)
    ]
    controls = [ControlInput(name, torch.rand((1, 3, size, size), generator=generator), SCALE) for name in NETS]
    latents = torch.randn((1, 4, side, side), generator=generator)

    def request(n_controls: int, loras: list[Any]) -> ImageRequest:
        return ImageRequest(
            prompts[0], prompts[1], 1, arguments.steps, size, size, 5.0, controls[:n_controls], loras, 0, latents
        )

    stock = Stock(models, nets, files)
    options = EngineOptions.fast(arguments.device)
    # The engine re-lays and fuses the weights it is given.
    own = dataclasses.replace(models, unet=copy.deepcopy(models.unet), vae=copy.deepcopy(models.vae))
    worker = BaseWorker(own, {name: copy.deepcopy(net) for name, net in nets.items()}, options)
    loras = [(pin_lora(file, own.unet), 1.0) for file in files]
    plain: dict[tuple[int, int], torch.Tensor] = {}
    ours: dict[tuple[int, int], torch.Tensor] = {}
    rows: dict[tuple[int, int], dict[str, Any]] = {}

    def fill_row(n: int, m: int) -> None:
        plain[n, m] = stock.latents(request(n, []), m)
        ours[n, m] = worker.generate(request(n, loras[:m])).latents
        rows[n, m] = row = {
            "cell": f"{n}C{m}L",
            "engine_vs_stock": distance(ours[n, m], plain[n, m]),
            "stock_nhwc_vs_stock_nchw": distance(stock.latents(request(n, []), m, "relaid"), plain[n, m]),
            "stock_fused_vs_stock": distance(stock.latents(request(n, []), m, "fused"), plain[n, m]),
            "changed_by_add_ons": distance(plain[n, m], plain[0, 0]),
        }
        settle(row)
        report.plain["rows"].append(row)

    def fill_remote() -> None:
        worker_device = ("cuda:1" if torch.cuda.device_count() > 1 else "cuda:0") if is_cuda else "cpu"
        with RemoteControlNets.start(spec, dict(seeds), options, worker_device=worker_device) as remote:
            report.plain["remote_transport"] = remote.line.transport
            apart = BaseWorker(own, {}, options, remote)
            found = {
                cell: torch.equal(apart.generate(request(cell[0], loras[: cell[1]])).latents, latents_of)
                for cell, latents_of in ours.items()
                if cell[0]
            }
        report.plain["remote_controlnets_are_bitwise_equal"] = all(found.values()) if found else None

    def fill_compiled(n: int, m: int) -> None:
        rows[n, m]["stock_compiled_vs_stock"] = distance(stock.latents(request(n, []), m, "compiled"), plain[n, m])
        settle(rows[n, m])

    def fill_restored() -> None:
        report.plain["restored_after_loras_is_bitwise_equal"] = bool(
            torch.equal(worker.generate(request(0, [])).latents, ours[0, 0])
        )

    for n, m in CELLS[:4]:
        report.attempt(f"{n}C{m}L", lambda n=n, m=m: fill_row(n, m))
    if any(m for _, m in ours):
        report.attempt("restored", fill_restored)
    report.attempt("{}C{}L".format(*CELLS[4]), lambda: fill_row(*CELLS[4]))
    report.attempt("remote", fill_remote)
    if arguments.compiled:
        for n, m in CELLS[:2]:
            if (n, m) in rows:
                report.attempt(f"{n}C{m}L compiled", lambda n=n, m=m: fill_compiled(n, m))
    for n, m in CELLS[5:]:
        report.attempt(f"{n}C{m}L", lambda n=n, m=m: fill_row(n, m))


if __name__ == "__main__":
    main()
