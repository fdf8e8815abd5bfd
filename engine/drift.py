"""How far an image drifts when a LoRA is patched in after denoising has begun: what ``diffplan engine drift`` reports.

The yardstick is the same request with the LoRA patched in before the first step. On random weights the numbers are numerical: they
say how strongly early steps determine the latents, and nothing about image quality. With a local checkpoint and a trained LoRA the
same command compares pictures.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.base import BaseWorker
from engine.lora import PinnedLora, pin_lora
from engine.models import ModelSpec, build_models, load_local, write_random_lora
from engine.options import EngineOptions, ImageRequest
from engine.text import random_prompt
from engine.workers.prompts import Prompts
from traces.problems import InputError, Problem, one_problem

NUMERICAL = "numerical: random weights, says nothing about image quality"
QUALITY = "quality: local checkpoint and LoRA; pixels are compared, no judge of likeness is asked"


@dataclass(frozen=True, slots=True)
class DriftSetup:
    """What to run."""

    model: str = "tiny"
    device: str = "cpu"
    n_steps: int = 30
    patch_steps: tuple[int, ...] = ()
    """Steps before which the LoRA is patched in; (): some ten of them, up to the last."""
    size_px: int = 0
    """0: the model's own."""
    n_seeds: int = 3
    guidance: float = 5.0
    lora_rank: int = 64
    lora_scale: float = 1.0
    weights: Path | None = None
    """Local folder of a checkpoint of this model; None: random weights."""
    lora: Path | None = None
    """A safetensors file; None: a random one."""
    prompt: str = ""
    """Only with ``weights``; empty: random tokens."""
    seed: int = 0


def run_drift(setup: DriftSetup, say: Callable[[str], None]) -> dict[str, Any]:
    """Paints every patch step for every seed.

    Returns:
        ``label``, ``setup`` and ``rows``, one a patch step: ``patch_step``, ``latents_relative_l2`` and ``pixels_rms`` (0..1), each as
        median, min and max over the seeds, and ``psnr_db`` of the medians. The last row, ``patch_step`` null, is the image without
        the LoRA: the furthest it can drift by coming late.

    Raises:
        InputError: the setup fits no model.
    """
    spec = _checked(setup)
    options = EngineOptions.fast(setup.device)
    steps = setup.patch_steps or default_patch_steps(setup.n_steps)
    with torch.no_grad():
        if setup.weights is not None:
            models = load_local(setup.weights, options.device, options.dtype, spec)
        else:
            models = build_models(spec, options.device, options.dtype, setup.seed)
        worker = BaseWorker(models, {}, options)
        lora = _lora(setup, worker)
        found: dict[int | None, list[tuple[float, float]]] = {step: [] for step in (*steps, None)}
        for seed in range(setup.seed, setup.seed + setup.n_seeds):
            request = _request(setup, spec, seed)
            say(f"seed {seed}: synchronous …")
            exact = _paint(worker, request, lora, setup.lora_scale, 0)
            for step in found:
                say(f"seed {seed}: {'without the LoRA' if step is None else f'patched before step {step}'} …")
                late = _paint(worker, request, lora, setup.lora_scale, step)
                found[step].append((_relative_l2(late[0], exact[0]), _rms(late[1], exact[1])))
    is_real = setup.weights is not None and setup.lora is not None
    return {
        "label": QUALITY if is_real else NUMERICAL,
        "what": f"{spec.name} {setup.size_px or spec.default_size_px} px, {setup.n_steps} Euler steps, guidance {setup.guidance:g}, "
        f"LoRA scale {setup.lora_scale:g}, {setup.n_seeds} seeds",
        "device_name": torch.cuda.get_device_name(options.device) if options.is_cuda else "CPU",
        "dtype": str(options.dtype).removeprefix("torch."),
        "n_steps": setup.n_steps,
        "rows": [_row(step, values) for step, values in found.items()],
    }


def default_patch_steps(n_steps: int) -> tuple[int, ...]:
    """0, 1, 2, 3, 5, then every tenth of the steps."""
    tenths = {round(n_steps * i / 10) for i in range(1, 10)}
    return tuple(sorted(step for step in {0, 1, 2, 3, 5, *tenths} if step < n_steps))


def _checked(setup: DriftSetup) -> ModelSpec:
    spec = ModelSpec.named(setup.model)
    problems = []
    for name, value, most in (("n_steps", setup.n_steps, 1000), ("n_seeds", setup.n_seeds, 100)):
        if not 1 <= value <= most:
            problems.append(Problem(f"--{name.replace('_', '-')}", f"got {value}", f"1..{most}", "Set it."))
    if any(not 0 <= step < setup.n_steps for step in setup.patch_steps):
        problems.append(
            Problem("--patch-steps", f"got {list(setup.patch_steps)}", f"0..{setup.n_steps - 1} each", "Set them.")
        )
    if setup.prompt and setup.weights is None:
        problems.append(Problem("--prompt", "got a text for random weights", "--weights FOLDER with it", "Add it."))
    if problems:
        raise InputError(problems)
    return spec


def _lora(setup: DriftSetup, worker: BaseWorker) -> PinnedLora:
    unet = worker.models.unet
    if setup.lora is not None:
        if not setup.lora.is_file():
            raise one_problem("--lora", f"{setup.lora} is no file", "a safetensors file", "Check the path.")
        return pin_lora(setup.lora, unet)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.safetensors"
        write_random_lora(path, unet, setup.lora_rank, setup.seed)
        return pin_lora(path, unet)


def _request(setup: DriftSetup, spec: ModelSpec, seed: int) -> ImageRequest:
    size_px = setup.size_px or spec.default_size_px
    prompt, negative = random_prompt(spec, seed), None
    if setup.weights is not None and setup.prompt:
        prompts = Prompts(spec, setup.weights)
        prompt, negative = prompts.ids(setup.prompt), prompts.ids("")
    return ImageRequest(
        prompt, negative, n_steps=setup.n_steps, width=size_px, height=size_px, guidance=setup.guidance, seed=seed
    )


def _paint(
    worker: BaseWorker, request: ImageRequest, lora: PinnedLora, scale: float, patch_step: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Final latents and pixels; None: without the LoRA."""
    try:
        for i in range(worker.begin(request)):
            if i == patch_step:
                worker.patch([(lora, scale)])
            worker.step(i)
        latents = worker.latents()
    finally:
        worker.restore()
    return latents, worker.decode(latents, request.height, request.width)


def _relative_l2(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def _rms(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).pow(2).mean().sqrt())


def _row(step: int | None, values: Sequence[tuple[float, float]]) -> dict[str, Any]:
    latents, pixels = zip(*values, strict=True)
    rms = statistics.median(pixels)
    return {
        "patch_step": step,
        "latents_relative_l2": _spread(latents),
        "pixels_rms": _spread(pixels),
        "psnr_db": -20 * math.log10(rms) if rms > 0 else None,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(result: dict[str, Any]) -> str:
    """The result as text for a terminal."""
    lines = [
        f"{result['what']} on {result['device_name']}", result["label"], "",
        f"{'patched before step':<22}{'latents, relative L2':>22}{'min':>9}{'max':>9}{'pixels, rms':>13}{'PSNR dB':>10}",
    ]  # fmt: skip
    for row in result["rows"]:
        latents = row["latents_relative_l2"]
        name = "never" if row["patch_step"] is None else str(row["patch_step"])
        psnr = "same" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
        lines.append(
            f"{name:<22}{latents['median']:>22.4f}{latents['min']:>9.4f}{latents['max']:>9.4f}"
            f"{row['pixels_rms']['median']:>13.4f}{psnr:>10}"
        )
    return "\n".join(lines)
