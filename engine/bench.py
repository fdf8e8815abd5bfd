"""Builds a worker, makes images, reports the stages' times: what ``diffplan engine bench`` does."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from engine.base import BaseWorker
from engine.lora import pin_lora
from engine.models import ModelSpec, build_controlnet, build_models, load_local, seed_for, write_random_lora
from engine.options import ControlInput, EngineOptions, ImageRequest
from engine.remote import RemoteControlNets
from engine.text import random_prompt
from traces.problems import one_problem


@dataclass(frozen=True, slots=True)
class BenchSetup:
    """What to run."""

    model: str
    device: str
    n_controlnets: int
    n_loras: int
    lora_rank: int
    n_images: int
    n_steps: int
    size_px: int
    n_repetitions: int
    remote_device: str
    is_compiled: bool
    weights: Path | None
    seed: int


def run_bench(setup: BenchSetup, say: Callable[[str], None]) -> tuple[dict[str, Any], torch.Tensor]:
    """Runs one request to warm up and then the repetitions.

    Returns:
        Plain numbers (seconds; medians, extremes and every repetition), and the first image ``[3, height, width]`` in 0..1.

    Raises:
        InputError: the setup fits no model.
    """
    spec = ModelSpec.named(setup.model)
    size_px = setup.size_px or spec.default_size_px
    if size_px % spec.size_multiple_px or not 0 < size_px <= 8192:
        raise one_problem(
            "--size-px", f"got {size_px}", f"a multiple of {spec.size_multiple_px} up to 8192", "Round it."
        )
    options = EngineOptions.fast(setup.device, compile=setup.is_compiled)
    started = time.perf_counter()
    with ExitStack() as stack:
        if setup.weights is not None:
            models = load_local(setup.weights, options.device, options.dtype, spec)
        else:
            models = build_models(spec, options.device, options.dtype, setup.seed)
        seeds = {f"controlnet-{i}": setup.seed + 1 + i for i in range(setup.n_controlnets)}
        remote, local = None, {}
        if setup.remote_device:
            say(f"starting the ControlNet worker on {setup.remote_device} …")
            remote = stack.enter_context(
                RemoteControlNets.start(spec, seeds, options, worker_device=setup.remote_device)
            )
        else:
            local = {name: build_controlnet(spec, options.device, options.dtype, seed) for name, seed in seeds.items()}
        worker = BaseWorker(models, local, options, remote)
        pinned = []
        with tempfile.TemporaryDirectory() as folder:
            for i in range(setup.n_loras):
                path = Path(folder) / f"lora-{i}.safetensors"
                write_random_lora(path, models.unet, setup.lora_rank, setup.seed + i)
                pinned.append((pin_lora(path, models.unet), 0.8))
        worker.synchronize()
        setup_s = time.perf_counter() - started
        generator = torch.Generator().manual_seed(seed_for(setup.seed, "control images"))
        request = ImageRequest(
            prompt=random_prompt(spec, setup.seed),
            negative=random_prompt(spec, setup.seed + 1),
            n_images=setup.n_images,
            n_steps=setup.n_steps,
            width=size_px,
            height=size_px,
            controls=[
                ControlInput(name, torch.rand((1, 3, size_px, size_px), generator=generator), 0.7) for name in seeds
            ],
            loras=pinned,
            seed=setup.seed,
        )
        say("first request: compiles and captures …")
        started = time.perf_counter()
        result = worker.generate(request)
        first_s = time.perf_counter() - started
        stages = [asdict(worker.generate(request).stages) for _ in range(setup.n_repetitions)]
        first_image = result.images[0].float().cpu()
    if not bool(torch.isfinite(first_image).all()):
        raise RuntimeError("the image holds NaN or infinity")
    return {
        "what": f"{spec.name} {size_px} px, {setup.n_steps} steps, {setup.n_controlnets}C/{setup.n_loras}L"
        + (f", ControlNets on {setup.remote_device}" if setup.remote_device else ""),
        "setup": {**asdict(setup), "weights": str(setup.weights) if setup.weights else "random", "size_px": size_px},
        "device_name": torch.cuda.get_device_name(options.device) if options.is_cuda else "CPU",
        "torch_version": torch.__version__,
        "n_repetitions": setup.n_repetitions,
        "setup_s": setup_s,
        "first_s": first_s,
        "stages": {
            name: {
                "median_s": statistics.median(times),
                "min_s": min(times),
                "max_s": max(times),
                "repetitions_s": times,
            }
            for name, times in _columns(stages).items()
        },
    }, first_image


def _columns(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows] for name in rows[0]}
