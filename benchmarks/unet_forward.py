"""Milliseconds of one UNet forward inside a CUDA graph, plain and fused, and its distance from fp32; the engine's parts beside Diffusers'.

    PYTHONPATH=. python benchmarks/unet_forward.py --out row.json            # SDXL, bf16, forward batches 1, 2 and 4
    PYTHONPATH=. python benchmarks/unet_forward.py --model tiny --device cpu --out row.json

Random weights and inputs. On a CPU there are no graphs and the kernels' references run: that only shows that the script works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from calibrate.fingerprint import engine_version, software
from engine import unet as plain
from engine.fused_unet import FusedNetwork
from engine.graphs import Recorder, attention_choice
from engine.models import ModelSpec, build_models

N_REPEATS = 21


def timed(run: Callable[[], Any], device: str) -> dict[str, float]:
    """Median, least and most of the repetitions."""
    times = []
    for repeat in range(N_REPEATS + 5):
        if device != "cpu":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize(device)
        if repeat >= 5:
            times.append((time.perf_counter() - started) * 1e3)
    return {"median_ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times)}


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative L2."""
    return float((found.float() - exact).norm() / exact.norm())


@torch.no_grad()
def main() -> None:
    """Measures every variant and writes the row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sdxl")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    spec, device = ModelSpec.named(arguments.model), arguments.device
    is_cuda = device != "cpu"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    models = build_models(spec, device, dtype, 0)
    unet = models.unet.to(memory_format=torch.channels_last)
    recorder = Recorder(torch.device(device), uses_graphs=is_cuda, surroundings=lambda: attention_choice("default"))
    side = spec.default_size_px // spec.vae_scale_factor
    row: dict[str, Any] = {
        "benchmark": "unet_forward", "model": spec.name, "dtype": str(dtype),
        "gpu": torch.cuda.get_device_name(device) if is_cuda else "CPU",
        "engine_version": engine_version(), "software": software(), "batches": {},
    }  # fmt: skip
    inputs, outputs = {}, {}
    for batch in arguments.batches:
        sample = torch.randn((batch, 4, side, side), device=device, dtype=dtype).to(memory_format=torch.channels_last)
        emb = torch.randn((batch, spec.block_channels[0] * 4), device=device, dtype=dtype)
        context = torch.randn((batch, 77, spec.context_width), device=device, dtype=dtype)
        inputs[batch] = (sample, emb, context)

        def eager(inputs: tuple[torch.Tensor, ...] = inputs[batch]) -> torch.Tensor:
            sample, emb, context = inputs
            return plain.decode(unet, *plain.encode(unet, sample, emb, context), emb, context)

        outputs[batch] = eager()
        row["batches"][batch] = {"eager": timed(eager, device), "graph": timed(recorder.record(eager), device)}
    # from here on the attention weights are fused; values stay
    fused = FusedNetwork(unet)
    for batch in arguments.batches:
        sample, emb, context = inputs[batch]
        text = fused.text(context)
        update = recorder.record(text.update)
        update()
        last: list[torch.Tensor] = []

        def run(sample: torch.Tensor = sample, emb: torch.Tensor = emb, text: Any = text, last: Any = last) -> Any:
            last[:] = [fused.decode(*fused.encode(sample, emb, text), emb, text)]
            return last

        part = recorder.record(run)
        found = row["batches"][batch]
        found["fused_graph"] = timed(part, device)
        found["text_keys_values_graph"] = timed(update, device)
        found["graph_over_fused_graph"] = found["graph"]["median_ms"] / found["fused_graph"]["median_ms"]
        found["fused_output"] = last[0].clone()
    exact_unet = unet.float()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for batch in arguments.batches:
        sample, emb, context = (tensor.float() for tensor in inputs[batch])
        exact = plain.decode(exact_unet, *plain.encode(exact_unet, sample, emb, context), emb, context)
        found = row["batches"][batch]
        found["plain_relative_l2_to_fp32"] = distance(outputs[batch], exact)
        found["fused_relative_l2_to_fp32"] = distance(found.pop("fused_output"), exact)
    text_out = json.dumps(row, indent=2, sort_keys=True) + "\n"
    arguments.out.write_text(text_out, encoding="utf-8")
    print(text_out)


if __name__ == "__main__":
    main()
