"""What lives on disk: LoRA files, checkpoints and ControlNets; how long they take onto the device; how long a worker starts."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from calibrate.clock import DeviceClock
from calibrate.measurement import Features
from calibrate.rig import RigSetup, Timed
from engine.models import ModelSpec, SdxlModels, write_random_lora

SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - private folders are made in it
HOST_TIER_BYTES: Final = 4 * 2**30
"""Room for the LoRAs of a session."""
PIPELINE_PARTS: Final = ("unet", "vae", "text_encoder", "text_encoder_2")


def lora_file(setup: RigSetup, rank: int, index: int) -> Path:
    """A LoRA with random weights on local disk; just written, so the page cache holds it."""
    path = Path(setup.scratch) / "loras" / f"{setup.model}_rank{rank}_{index}.safetensors"
    spec = ModelSpec.named(setup.model)
    _once(path, lambda beside: write_random_lora(beside, spec, rank, 1000 * rank + index))
    return path


def image_lora_rank(setup: RigSetup) -> int:
    """Rank of the LoRAs that whole images use: the common one, 186 MB on SDXL's attention."""
    return 64 if setup.model == "sdxl" else 4


def host_tier_parent(setup: RigSetup) -> Path:
    """Where a host tier is made: in shared memory as the engine does, or on the local disk of a host that has little of it."""
    if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free >= HOST_TIER_BYTES:
        return SHARED_MEMORY
    return Path(setup.scratch)


def pipeline_folder(setup: RigSetup) -> Path:
    """Where the checkpoint's parts are saved."""
    return Path(setup.scratch) / f"{setup.model}_checkpoint"


def controlnet_folder(setup: RigSetup) -> Path:
    """Where one ControlNet is saved."""
    return Path(setup.scratch) / f"{setup.model}_controlnet"


def save_pipeline(setup: RigSetup, models: Any) -> Path:
    """Saves UNet, VAE and text encoders as safetensors, and the scheduler and tokenizers that a checkpoint comes with, once."""

    def save(beside: Path) -> None:
        for name in PIPELINE_PARTS:
            getattr(models, name).save_pretrained(beside / name, max_shard_size="20GB")
        models.scheduler().save_pretrained(beside / "scheduler")
        for name in ("tokenizer", "tokenizer_2"):
            _save_tokenizer(beside / name)

    _once(pipeline_folder(setup), save)
    return pipeline_folder(setup)


def _save_tokenizer(folder: Path) -> None:
    """CLIP's tokenizer with an alphabet and no merges: one token a letter. Random weights need no more, and nobody its files."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    config = {"tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>", "model_max_length": 77}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def save_controlnet(setup: RigSetup, controlnet: Any) -> Path:
    """Saves one ControlNet as safetensors, once."""
    _once(controlnet_folder(setup), lambda beside: controlnet.save_pretrained(beside, max_shard_size="20GB"))
    return controlnet_folder(setup)


def _once(path: Path, write: Callable[[Path], object]) -> None:
    """Runs ``write`` beside ``path`` and renames, unless ``path`` exists; safe between stations."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        beside = path.with_name("part_" + path.name)
        write(beside)
        beside.replace(path)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files below a folder, sorted."""
    return sorted(folder.rglob("*.safetensors"))


def stored_parts(setup: RigSetup, what: str) -> list[tuple[str, Path]]:
    """Module name and folder of what a load task moves: ``checkpoint`` (all four), one of its parts, or ``controlnet``."""
    if what == "controlnet":
        return [("controlnet", controlnet_folder(setup))]
    names = PIPELINE_PARTS if what == "checkpoint" else (what,)
    return [(name, pipeline_folder(setup) / name) for name in names]


def load_part(name: str, folder: Path, device: str, dtype: torch.dtype) -> Any:
    """One module through Diffusers' or Transformers' own loader."""
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    loaders: dict[str, Any] = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "controlnet": ControlNetModel,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    kind = {"dtype": dtype} if name.startswith("text") else {"torch_dtype": dtype}
    return loaders[name].from_pretrained(str(folder), local_files_only=True, **kind).to(device)


def load_checkpoint(setup: RigSetup, dtype: torch.dtype) -> SdxlModels:
    """The saved checkpoint on the setup's device."""
    parts = {
        name: load_part(name, folder, setup.device, dtype).eval().requires_grad_(False)
        for name, folder in stored_parts(setup, "checkpoint")
    }
    return SdxlModels(ModelSpec.named(setup.model), **parts)


def time_from_pretrained(
    parts: list[tuple[str, Path]], device: str, dtype: torch.dtype, clock: DeviceClock, n_repeats: int
) -> tuple[int, list[float]]:
    """Stock loading, file (page-cached) to device; bytes of the files and seconds each time."""
    n_bytes = sum(path.stat().st_size for _, folder in parts for path in weight_files(folder))

    def load() -> list[Any]:
        return [load_part(name, folder, device, dtype) for name, folder in parts]

    values = []
    for index in range(n_repeats + 1):
        seconds = clock.wall(load)
        clock.free()
        if index:  # the first one imports what loading needs
            values.append(seconds)
    return n_bytes, values


def time_into_place(
    files: list[Path], targets: list[dict[str, torch.Tensor]], clock: DeviceClock, n_repeats: int, variant: str
) -> tuple[int, list[float]]:
    """Weights into tensors that already live on the device, whose addresses captured graphs hold.

    ``variant`` ``file``: from the page cache through safetensors; ``pinned``: from page-locked host memory, the copy alone.
    ``targets`` are the state dictionaries the files belong to, in the same order.
    """
    from safetensors.torch import load_file

    n_bytes = sum(path.stat().st_size for path in files)
    device = str(clock.device)
    pinned: list[dict[str, torch.Tensor]] = []
    if variant == "pinned":
        for path in files:
            held = load_file(path)
            pinned.append({name: tensor.pin_memory() if clock.is_cuda else tensor for name, tensor in held.items()})

    def load() -> None:
        for index, (path, target) in enumerate(zip(files, targets, strict=True)):
            source = pinned[index] if pinned else load_file(path, device=device)
            for name, tensor in source.items():
                # a tied or absent tensor (position ids) is not part of the saved state
                if name in target:
                    target[name].copy_(tensor, non_blocking=True)

    with torch.no_grad():
        load()
        return n_bytes, [clock.wall(load) for _ in range(n_repeats)]


class StartRig:
    """A worker from nothing: builds its stack, loads the checkpoint from disk, serves one short image; then it is ready.

    What is timed is the station's own start, from process creation to this constructor's return.
    """

    def __init__(self, setup: RigSetup) -> None:
        self.setup = setup
        if not pipeline_folder(setup).exists():
            raise FileNotFoundError(f"{pipeline_folder(setup)} holds no checkpoint: measure the part 'loads' as well")
        if setup.uses_graph or setup.is_compiled or setup.uses_triton:
            from calibrate.ours import EngineRig

            EngineRig(setup)
        else:
            from diffusers import StableDiffusionXLPipeline

            from calibrate.stock import dtype_of

            dtype = dtype_of(setup.dtype)
            models = load_checkpoint(setup, dtype)
            pipe = StableDiffusionXLPipeline(
                vae=models.vae,
                text_encoder=models.text_encoder,
                text_encoder_2=models.text_encoder_2,
                tokenizer=None,
                tokenizer_2=None,
                unet=models.unet,
                scheduler=models.scheduler(),
                add_watermarker=False,
            )
            pipe.set_progress_bar_config(disable=True)
            context, pooled = models.spec.context_width, models.spec.pooled_width
            kind = {"device": setup.device, "dtype": dtype}
            pipe(
                prompt_embeds=torch.zeros((1, 77, context), **kind),
                negative_prompt_embeds=torch.zeros((1, 77, context), **kind),
                pooled_prompt_embeds=torch.zeros((1, pooled), **kind),
                negative_pooled_prompt_embeds=torch.zeros((1, pooled), **kind),
                height=setup.height_px,
                width=setup.width_px,
                num_inference_steps=2,
            )

    def run(self, method: str, features: Features, n_repeats: int) -> list[Timed]:
        """A start has nothing more to time."""
        raise ValueError(f"a start station times nothing but its start, asked for {method!r}")

    def facts(self) -> dict[str, float]:
        """None."""
        return {}

    def close(self) -> None:
        """Nothing to free: the process ends."""
