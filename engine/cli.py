"""``diffplan engine``: runs the engine on this machine. Importing this module imports no torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine import replay_cli, serving_cli
from traces.problems import one_problem

if TYPE_CHECKING:
    import torch

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Run the serving engine.")


@app.callback()
def engine() -> None:
    """Run the serving engine."""


for command in (
    serving_cli.serve, serving_cli.apply, serving_cli.status, serving_cli.split, serving_cli.drain, serving_cli.reload,
    serving_cli.records, serving_cli.token, replay_cli.replay,
):  # fmt: skip
    app.command()(command)


@app.command()
def bench(
    model: Annotated[str, typer.Option(help="sdxl, or tiny for a look on a CPU.")] = "tiny",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    controlnets: Annotated[int, typer.Option(min=0, max=8, help="ControlNets used by every image.")] = 0,
    loras: Annotated[int, typer.Option(min=0, max=8, help="LoRAs patched for every image and taken off again.")] = 0,
    lora_rank: Annotated[int, typer.Option(min=1, max=256)] = 64,
    images: Annotated[int, typer.Option(min=1, max=16, help="Images per request.")] = 1,
    steps: Annotated[int, typer.Option(min=1, max=1000)] = 50,
    size_px: Annotated[int, typer.Option(help="Width and height; 0: 1024 for sdxl, 64 for tiny.")] = 0,
    repetitions: Annotated[int, typer.Option(min=1, max=1000, help="Timed requests, after one that warms up.")] = 5,
    remote: Annotated[str, typer.Option(help="Run the ControlNets in a second process on this device.")] = "",
    compile_: Annotated[bool, typer.Option("--compile", help="Use torch.compile (about 100 s per shape).")] = False,
    weights: Annotated[
        Path | None, typer.Option(help="Local folder of a checkpoint of this model; without it weights are random.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    image: Annotated[Path | None, typer.Option(help="Write the first image here as PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Result as JSON on stdout.")] = False,
) -> None:
    """Generate images and print how long each stage takes."""
    _check_device(device)
    if remote:
        _check_device(remote)
        if not controlnets:
            raise one_problem("--remote", "got a device but no ControlNets", "--controlnets 1 or more", "Add them.")
    from engine.bench import BenchSetup, run_bench

    setup = BenchSetup(
        model=model,
        device=device,
        n_controlnets=controlnets,
        n_loras=loras,
        lora_rank=lora_rank,
        n_images=images,
        n_steps=steps,
        size_px=size_px,
        n_repetitions=repetitions,
        remote_device=remote,
        is_compiled=compile_,
        weights=weights,
        seed=seed,
    )
    result, first = run_bench(setup, lambda text: typer.echo(text, err=True))
    if image is not None:
        _write_png(first, image)
    typer.echo(json.dumps(result, indent=2, sort_keys=True) if as_json else _table(result))


@app.command()
def drift(
    model: Annotated[str, typer.Option(help="sdxl, or tiny for a look on a CPU.")] = "tiny",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    steps: Annotated[int, typer.Option(min=1, max=1000)] = 30,
    patch_steps: Annotated[str, typer.Option(help="Steps with commas between; some ten of them if left out.")] = "",
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Images for each patch step.")] = 3,
    size_px: Annotated[int, typer.Option(help="Width and height; 0: 1024 for sdxl, 64 for tiny.")] = 0,
    guidance: Annotated[float, typer.Option(min=0, max=100)] = 5.0,
    lora_rank: Annotated[int, typer.Option(min=1, max=256, help="Of the random LoRA.")] = 64,
    lora_scale: Annotated[float, typer.Option(min=-10, max=10)] = 1.0,
    weights: Annotated[
        Path | None, typer.Option(help="Local folder of a checkpoint of this model; without it weights are random.")
    ] = None,
    lora: Annotated[Path | None, typer.Option(help="A safetensors file; without it the LoRA is random.")] = None,
    prompt: Annotated[str, typer.Option(help="Only with --weights.")] = "",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Result as JSON on stdout.")] = False,
) -> None:
    """Show how far an image drifts when a LoRA is patched in late, by patch step."""
    _check_device(device)
    if model not in {"tiny", "sdxl"}:
        raise one_problem("--model", f"got {model!r}", "tiny or sdxl", "Choose one.")
    try:
        listed = tuple(int(part) for part in patch_steps.split(",")) if patch_steps else ()
    except ValueError:
        raise one_problem("--patch-steps", f"got {patch_steps!r}", "whole numbers, as 0,5,10", "Correct it.") from None
    from engine.drift import DriftSetup, run_drift, table

    setup = DriftSetup(
        model=model,
        device=device,
        n_steps=steps,
        patch_steps=listed,
        size_px=size_px,
        n_seeds=seeds,
        guidance=guidance,
        lora_rank=lora_rank,
        lora_scale=lora_scale,
        weights=weights,
        lora=lora,
        prompt=prompt,
        seed=seed,
    )
    result = run_drift(setup, lambda text: typer.echo(text, err=True))
    typer.echo(json.dumps(result, indent=2, sort_keys=True) if as_json else table(result))


def _check_device(device: str) -> None:
    import torch

    n_gpus = torch.cuda.device_count()
    known = ["cpu", *(["cuda"] if n_gpus else []), *(f"cuda:{i}" for i in range(n_gpus))]
    if device not in known:
        raise one_problem("device", f"got {device!r}", f"one of {', '.join(known)}", "Choose a device of this machine.")


def _table(result: dict[str, Any]) -> str:
    lines = [f"{result['what']} on {result['device_name']}, {result['n_repetitions']} repetitions"]
    lines.append(f"{'stage':<14}{'median s':>10}{'min':>10}{'max':>10}")
    for name, row in result["stages"].items():
        lines.append(f"{name:<14}{row['median_s']:>10.4f}{row['min_s']:>10.4f}{row['max_s']:>10.4f}")
    lines.append(f"set-up {result['setup_s']:.1f} s, first request (compiles, captures) {result['first_s']:.1f} s")
    return "\n".join(lines)


def _write_png(pixels: torch.Tensor, path: Path) -> None:
    """Writes ``[3, height, width]`` in 0..1 beside the target, then renames."""
    from PIL import Image

    rows = (pixels.float().permute(1, 2, 0) * 255).round().clamp(0, 255).byte().cpu().numpy()
    beside = path.with_name(path.name + ".part")
    try:
        Image.fromarray(rows).save(beside, format="PNG")
        beside.replace(path)
    except OSError as error:
        raise one_problem(
            str(path), f"cannot be written: {error.strerror}", "a writable path", "Choose another."
        ) from None
    sys.stderr.write(f"wrote {path}\n")
