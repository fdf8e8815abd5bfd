"""Do loads from a worker's host tier give the same bits as fresh ones, and is the tier page-locked? One line a check.

    python benchmarks/host_tier.py --device cuda:0 --model sdxl

First the tiny model from files, on the device: images after loads from the host tier against images of a worker without one. Then
``--model`` with random weights: how long a checkpoint takes that is drawn, and one that comes from the host.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from engine.models import ModelSpec, build_models
from engine.registry.checkpoint_check import PARTS
from engine.serving.job import Job
from engine.workers.sdxl_painter import SdxlPainter, make_painter
from engine.workers.setup import WorkerSetup


def painter_on(device: str, model: str, store: Path, **options: float) -> SdxlPainter:
    """A worker with room for one checkpoint on the device."""
    sources = {name: {"file": name, "architecture": "tiny"} for name in ("one", "two")} if model == "tiny" else {}
    setup = WorkerSetup(
        "check", "base", model, device, sources=sources, store=str(store), options={"n_checkpoints_max": 1, **options}
    )  # fmt: skip
    painter = make_painter(setup, lambda phase: None, None)
    painter._prompts.use = lambda model_id: None  # type: ignore[method-assign]  # the files come without tokenizers
    return painter


def paint(painter: SdxlPainter, checkpoint: str, size_px: int) -> tuple[torch.Tensor, float]:
    """Latents of two steps, and the seconds that making the checkpoint the active one took."""
    start_s = time.perf_counter()
    painter.activate(checkpoint)
    painter.settle()
    load_s = time.perf_counter() - start_s
    job = Job("check", base_model_id=checkpoint, prompt="a fox", n_steps=2, width_px=size_px, height_px=size_px, seed=1)
    for step in range(painter.begin([job], {})):
        painter.step(step)
    painter.finish(wants_images=False)
    latents = painter.latents()
    painter.restore()
    return latents, load_s


def settled(painter: SdxlPainter) -> str:
    """What the tier holds, how much of it is page-locked once the locker is through, and how long that took from now."""
    sources, start_s = painter._sources, time.perf_counter()
    locker = sources._layout.locker
    if locker is not None:
        locker.settle()
    held = [entry for entry in sources._checkpoints._held if entry is not None]
    shares = ", ".join(f"{name} {weights.locked_bytes / weights.bytes:.0%}" for name, _, weights in held)
    return f"page-locked: {shares}; after {time.perf_counter() - start_s:.3f} s"


def main() -> None:
    """Prints the lines; leaves with status 1 if any two images differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="", help="also this one, with random weights: tiny or sdxl")
    options = parser.parse_args()
    is_same = True
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        for name, seed in (("one", 4), ("two", 5)):
            for part, module in zip(PARTS, build_models(ModelSpec.tiny(), seed=seed).modules, strict=True):
                module.save_pretrained(store / name / part)
        fresh = painter_on(options.device, "tiny", store, host_checkpoint_gib=0)
        kept = painter_on(options.device, "tiny", store)
        expected = {name: paint(fresh, name, 64)[0] for name in ("one", "two", "drawn")}
        for name in ("one", "two", "drawn", "one", "drawn", "two"):
            found = torch.equal(paint(kept, name, 64)[0], expected[name])
            is_same &= found
            print(f"tiny {name}: {'same bits' if found else 'DIFFERENT'}", flush=True)
        print(f"tiny {settled(kept)}", flush=True)
        del fresh, kept
        if options.model:
            painter = painter_on(options.device, options.model, store)
            first: dict[str, torch.Tensor] = {}
            for name in ("p", "q", "p", "q", "p"):
                latents, load_s = paint(painter, name, 512 if options.model == "sdxl" else 64)
                found = torch.equal(first.setdefault(name, latents), latents)
                is_same &= found
                said = "same bits" if found else "DIFFERENT"
                print(f"{options.model} {name}: loaded in {load_s:.3f} s, {said}; {settled(painter)}", flush=True)
    if not is_same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
