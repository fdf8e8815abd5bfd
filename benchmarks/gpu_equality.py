"""How far the engine's final latents are from the stock pipeline's, on a GPU in bf16, beside how far two stock runs differ.

    python benchmarks/gpu_equality.py --out row.json            # SDXL, 1024², 50 steps, bf16
    python benchmarks/gpu_equality.py --model tiny --device cpu --out row.json

There are two floors, both between stock runs that differ in nothing but how they are computed: memory layout (NCHW and NHWC), and
fusing (query, key and value projections in one; with a LoRA, the LoRA merged into the weights in place of PEFT's side path). A
denoising loop of an untrained network amplifies rounding, so only the ratio to a floor says something. Both ratios are stated; the
bound is 1.5 times the larger floor.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLControlNetPipeline, StableDiffusionXLPipeline

from calibrate.fingerprint import engine_version, software
from engine.base import BaseWorker, ControlInput, EngineOptions, ImageRequest, PromptEmbeddings
from engine.lora import pin_lora
from engine.models import ModelSpec, SdxlModels, build_controlnet, build_models, write_random_lora
from engine.remote import RemoteControlNets

SCALE = 0.7
BOUND = 1.5


def stock_latents(
    models: SdxlModels, nets: list[Any], request: ImageRequest, lora: Path | None, *, is_fused: bool = False
) -> torch.Tensor:
    """Final latents of the stock pipeline for the same request. Fusing projections leaves its mark on the modules."""
    parts = (models.vae, models.text_encoder, models.text_encoder_2, None, None, models.unet)
    more: dict[str, Any] = {}
    if nets:
        pipe = StableDiffusionXLControlNetPipeline(*parts, nets, models.scheduler(), add_watermarker=False)
        more = {"image": [c.image for c in request.controls], "controlnet_conditioning_scale": [SCALE] * len(nets)}
    else:
        pipe = StableDiffusionXLPipeline(*parts, models.scheduler(), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
        if is_fused:
            pipe.fuse_lora(components=["unet"])
    elif is_fused:
        pipe.fuse_qkv_projections(vae=False)
    prompt, negative = request.prompt, request.negative
    assert isinstance(prompt, PromptEmbeddings) and isinstance(negative, PromptEmbeddings)  # noqa: PT018, S101
    device, dtype = models.unet.device, models.unet.dtype
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
        if lora is not None:
            if is_fused:
                pipe.unfuse_lora(components=["unet"])
            pipe.unload_lora_weights()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2 distance."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sdxl", choices=["sdxl", "tiny"])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    start_s = time.perf_counter()
    torch.set_grad_enabled(False)
    spec = ModelSpec.named(arguments.model)
    is_cuda = arguments.device.startswith("cuda")
    dtype = torch.bfloat16 if is_cuda else torch.float32
    models = build_models(spec, arguments.device, dtype, 0)
    names = ["controlnet0", "controlnet1"]
    nets = {name: build_controlnet(spec, arguments.device, dtype, 1 + i) for i, name in enumerate(names)}
    generator = torch.Generator().manual_seed(3)
    size, side = spec.default_size_px, spec.default_size_px // spec.vae_scale_factor
    prompts = [
        PromptEmbeddings(
            torch.randn((1, 77, spec.context_width), generator=generator),
            torch.randn((1, spec.pooled_width), generator=generator),
        )
        for _ in range(2)
    ]
    controls = [ControlInput(name, torch.rand((1, 3, size, size), generator=generator), SCALE) for name in names]
    latents = torch.randn((1, 4, side, side), generator=generator)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lora.safetensors"
        write_random_lora(file, models.unet, 16, 7)
        cells = [("0C0L", 0, False), ("1C0L", 1, False), ("2C0L", 2, False), ("0C1L", 0, True), ("1C1L", 1, True)]
        stock, fused, relaid, ours = {}, {}, {}, {}

        def request(n_controls: int, loras: list[Any]) -> ImageRequest:
            return ImageRequest(
                prompts[0], prompts[1], 1, arguments.steps, size, size, 5.0, controls[:n_controls], loras, 0, latents
            )

        for name, n, has_lora in cells:
            stock[name] = stock_latents(
                models, [nets[c] for c in names[:n]], request(n, []), file if has_lora else None
            )
        # On a twin with the same weights: fused projections stay in the modules. LoRAs first, which must not meet them.
        twin = build_models(spec, arguments.device, dtype, 0)
        for name, n, has_lora in sorted(cells, key=lambda cell: not cell[2]):
            fused[name] = stock_latents(
                twin, [nets[c] for c in names[:n]], request(n, []), file if has_lora else None, is_fused=True
            )
        del twin
        for module in (models.unet, *nets.values()):
            module.to(memory_format=torch.channels_last)
        for name, n, has_lora in cells:
            relaid[name] = stock_latents(
                models, [nets[c] for c in names[:n]], request(n, []), file if has_lora else None
            )
        if not EngineOptions.fast(arguments.device).channels_last:
            for module in (models.unet, *nets.values()):
                module.to(memory_format=torch.contiguous_format)
        lora = pin_lora(file, models.unet)
        worker = BaseWorker(models, nets, EngineOptions.fast(arguments.device))
        for name, n, has_lora in cells:
            ours[name] = worker.generate(request(n, [(lora, 1.0)] if has_lora else [])).latents
        again = worker.generate(request(0, [])).latents
        remote_equal: bool | None = None
        worker_device = ("cuda:1" if torch.cuda.device_count() > 1 else "cuda:0") if is_cuda else "cpu"
        seeds: dict[str, Any] = {name: 1 + i for i, name in enumerate(names)}
        options = EngineOptions.fast(arguments.device)
        with RemoteControlNets.start(spec, seeds, options, worker_device=worker_device) as remote:
            transport = remote.line.transport
            apart = BaseWorker(models, {}, options, remote)
            for name, n, has_lora in cells:
                if n:
                    found = apart.generate(request(n, [(lora, 1.0)] if has_lora else [])).latents
                    remote_equal = bool(torch.equal(found, ours[name])) and remote_equal is not False
    for name, _, _ in cells:
        layout_floor, fusing_floor = distance(relaid[name], stock[name]), distance(fused[name], stock[name])
        engine = distance(ours[name], stock[name])
        rows.append({
            "cell": name,
            "engine_vs_stock": engine,
            "stock_nhwc_vs_stock_nchw": layout_floor,
            "stock_fused_vs_stock": fusing_floor,
            "ratio": engine / layout_floor if layout_floor > 0 else None,
            "ratio_to_fusing": engine / fusing_floor if fusing_floor > 0 else None,
            "is_within_bound": engine <= BOUND * max(layout_floor, fusing_floor),
            "changed_by_add_ons": distance(stock[name], stock["0C0L"]),
        })  # fmt: skip
    result = {
        "benchmark": "latents_engine_against_stock",
        "what": f"relative L2 of final latents, {arguments.model}, {arguments.steps} steps, {dtype}".replace(
            "torch.", ""
        ),
        "gpu": torch.cuda.get_device_name(0) if is_cuda else "cpu",
        "software": software(),
        "engine": engine_version(),
        "restored_after_loras_is_bitwise_equal": bool(torch.equal(again, ours["0C0L"])),
        "remote_controlnets_are_bitwise_equal": remote_equal,
        "remote_transport": transport,
        "rows": rows,
        "seconds": round(time.perf_counter() - start_s, 1),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
