"""Which stacks are built and what is timed on them, in which order: the design of a measuring session. Torch-free."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

from calibrate.measurement import Features
from calibrate.rig import RigSetup

MIB: Final = 2**20
SMALL_BYTES: Final = 64
"""A message that is all latency: what larger ones take beyond it is their transfer."""
STATIONS: Final = ("stock", "engine")
PARTS: Final = ("steps", "images", "decode", "loras", "loads", "memory", "remote", "wide_images", "start")


@dataclass(frozen=True, slots=True)
class Extent:
    """How much a session measures."""

    model: str = "sdxl"
    device: str = "cuda"
    dtype: str = "bfloat16"
    n_gpus: int = 1
    width_px: int = 1024
    height_px: int = 1024
    n_steps: int = 50
    graph_batches: tuple[int, ...] = (2, 4, 8, 16)
    compiled_batches: tuple[int, ...] = (2, 4, 8)
    """Forward batches our engine is compiled for; empty: not at all."""
    tuned_batches: tuple[int, ...] = (2, 8)
    """Forward batches tuned Diffusers is compiled for; it always runs 2."""
    vae_images: tuple[int, ...] = (1, 2, 4, 8)
    n_controlnets: int = 3
    lora_ranks: tuple[int, ...] = (8, 64, 192)
    transfer_bytes: tuple[int, ...] = (1 * MIB, 16 * MIB, 64 * MIB, 128 * MIB, 512 * MIB)
    n_rounds: int = 5
    burst: int = 6
    attention: str = "default"
    seed: int = 2026

    @property
    def is_cuda(self) -> bool:
        """Whether there is a GPU to capture graphs on."""
        return self.device == "cuda"


def tiny_extent(**changes: object) -> Extent:
    """The same session on the tiny model, small enough for a CPU."""
    tiny = Extent(
        model="tiny", device="cpu", dtype="float32", width_px=64, height_px=64, n_steps=4, graph_batches=(2, 4, 8),
        compiled_batches=(), tuned_batches=(2,), vae_images=(1, 2), n_controlnets=2, lora_ranks=(2, 4, 8),
        transfer_bytes=(65536, 262144, 1048576), n_rounds=2, burst=2,
    )  # fmt: skip
    return dataclasses.replace(tiny, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Task:
    """One thing one station times in one go."""

    part: str
    station: str
    method: str
    features: Features
    n_repeats: int
    topology: str = ""
    fallback: str = ""
    """Station that does it instead where ``station`` could not be built."""
    cost_s: float = 1.0
    """First guess of the seconds it takes; a repeated task goes by what it took."""

    @property
    def key(self) -> tuple[str, str, Features]:
        """What stays the same between rounds."""
        return self.station, self.method, self.features


def _compares_choices(extent: Extent) -> bool:
    """Two more workers for comparison need the memory that a session on two GPUs has."""
    return extent.is_cuda and extent.n_gpus > 1


def setups(extent: Extent, scratch: str) -> list[RigSetup]:
    """The stations of a session, each with only the models its tasks need: all of them share one GPU's memory."""
    common = {
        "model": extent.model,
        "device": "cuda:0" if extent.is_cuda else "cpu",
        "dtype": extent.dtype,
        "width_px": extent.width_px,
        "height_px": extent.height_px,
        "n_steps": extent.n_steps,
        "scratch": scratch,
        "seed": extent.seed,
    }

    def setup(name: str, kind: str, **more: object) -> RigSetup:
        return RigSetup(name=name, kind=kind, **{**common, **more})  # type: ignore[arg-type]

    nets = extent.n_controlnets
    ours = {"uses_graph": extent.is_cuda, "uses_triton": extent.is_cuda, "attention": extent.attention}
    # two GPUs of one host: the peers on the second one, so that everything fits in memory
    peers = {"device": "cuda:1"} if extent.is_cuda and extent.n_gpus > 1 else {}
    found = [
        setup("engine", "engine", n_controlnets=nets, **ours),
        setup("stock", "stock", n_controlnets=nets, **peers),
    ]
    compiled = {**ours, "is_compiled": True}
    for batch in extent.compiled_batches:
        # only the batch of one image runs whole images with ControlNets; of the others, the parts compile side by side
        whole = nets if batch == 2 else 0
        found.append(
            setup(f"engine-compiled-{batch}", "engine", forward_batches=(batch,), n_controlnets=whole, **compiled)
        )
        if nets:
            found.append(setup(f"controlnet-compiled-{batch}", "controlnet", forward_batches=(batch,), **compiled))
    for batch in extent.tuned_batches:
        found.append(setup(f"tuned-{batch}", "tuned", is_compiled=extent.is_cuda, forward_batches=(batch,), **peers))
    if _compares_choices(extent):
        found.append(setup("engine-without-triton", "engine", **{**ours, "uses_triton": False}))
        found.append(setup("engine-cudnn", "engine", **{**ours, "attention": "cudnn"}))
    if extent.n_gpus > 1:
        if 2 in extent.compiled_batches:
            found.append(setup("remote-compiled", "remote", n_controlnets=nets, forward_batches=(2,), **compiled))
        found.append(setup("remote", "remote", n_controlnets=nets, forward_batches=(2,), **ours))
    start = {"forward_batches": (2,), **ours}
    found += [
        setup("start-engine", "start", **start),
        setup("start-stock", "start", **{**start, "uses_graph": False, "uses_triton": False}, n_controlnets=0),
    ]
    if 2 in extent.compiled_batches:
        found.append(setup("start-engine-compiled", "start", **{**start, "is_compiled": True}))
    return found


def _step(extent: Extent, batch: int, n_controlnets: int = 0, n_loras: int = 0, variant: str = "") -> Features:
    return Features(
        forward_batch=batch,
        n_images=max(1, batch // 2),
        width_px=extent.width_px,
        height_px=extent.height_px,
        n_controlnets=n_controlnets,
        n_loras=n_loras,
        variant=variant,
    )


def _image(extent: Extent, n_controlnets: int, n_loras: int, variant: str = "", link: str = "") -> Features:
    return Features(
        forward_batch=2,
        n_images=1,
        width_px=extent.width_px,
        height_px=extent.height_px,
        n_steps=extent.n_steps,
        n_controlnets=n_controlnets,
        n_loras=n_loras,
        variant=variant,
        link=link,
    )


def step_tasks(extent: Extent) -> list[Task]:
    """UNet, its two parts and ControlNet steps of every stack."""
    nets, n = extent.n_controlnets, extent.burst
    found = []
    for batch in extent.graph_batches:
        found += [
            Task("steps", "stock", "unet_step", _step(extent, batch), n, cost_s=2),
            Task("steps", "engine", "steps", _step(extent, batch, min(nets, 1)), n, cost_s=6),
        ]
        if nets:
            found.append(Task("steps", "stock", "step_with_controlnets", _step(extent, batch, 1), n, cost_s=2))
        if batch in (2, 8):
            found.append(Task("steps", "stock", "unet_lora_step", _step(extent, batch, 0, 1), n, cost_s=6))
    for batch in extent.compiled_batches:
        found.append(Task("steps", f"engine-compiled-{batch}", "steps", _step(extent, batch), n, cost_s=3))
        if nets:
            found.append(Task("steps", f"controlnet-compiled-{batch}", "steps", _step(extent, batch), n))
    for batch in extent.tuned_batches:
        found.append(Task("steps", f"tuned-{batch}", "unet_step", _step(extent, batch), n, cost_s=2))
    if nets and 2 in extent.compiled_batches:
        found.append(Task("steps", "engine-compiled-2", "joined_step", _step(extent, 2, 1), n, cost_s=3))
    if _compares_choices(extent):
        # what one choice is worth, everything else equal
        for station, variant in (("engine-without-triton", "without_triton"), ("engine-cudnn", "cudnn")):
            found.append(Task("steps", station, "steps", _step(extent, 2, variant=variant), n, cost_s=3))
    return found


def image_tasks(extent: Extent) -> list[Task]:
    """One image end to end, by topology and ControlNets, without LoRAs; every stack's best way to run it."""
    ours = "engine-compiled-2" if 2 in extent.compiled_batches else "engine"
    found = []
    for nets in range(extent.n_controlnets + 1):
        image = _image(extent, nets, 0)
        found += [
            Task("images", "stock", "image", image, 1, "diffusers", cost_s=4 + 2 * nets),
            Task("images", ours, "image", image, 1, "colocated", "engine", 2 + nets),
        ]
    if extent.tuned_batches:
        found.append(Task("images", "tuned-2", "image", _image(extent, 0, 0), 1, "diffusers_tuned", cost_s=2))
    return found


def wide_image_tasks(extent: Extent) -> list[Task]:
    """Images with LoRAs: all of ours; of the stock pipeline, whose runs take up to 19 s, the corners."""
    ours = "engine-compiled-2" if 2 in extent.compiled_batches else "engine"
    nets = extent.n_controlnets
    found = [
        Task("wide_images", ours, "image", _image(extent, c, n_loras), 1, "colocated", "engine", 2 + c)
        for c in range(nets + 1)
        for n_loras in (1, 2)
    ]
    if ours != "engine":
        # the same images without torch.compile: what a worker gives before its compile artefacts are there
        found += [
            Task("wide_images", "engine", "image", _image(extent, c, 0), 1, "colocated", cost_s=3 + c)
            for c in (0, nets)
        ]
    corners = {(0, 1, ""), (0, 1, "fused"), (min(1, nets), 1, ""), (nets, 2, ""), (nets, 2, "fused")}
    for c, n_loras, variant in sorted(corners):
        found.append(
            Task(
                "wide_images", "stock", "image", _image(extent, c, n_loras, variant), 1, "diffusers", cost_s=10 + 3 * c
            )
        )
    return found


def decode_tasks(extent: Extent) -> list[Task]:
    """VAE and text encoding."""
    found = []
    for n in extent.vae_images:
        pixels = Features(n_images=n, width_px=extent.width_px, height_px=extent.height_px)
        found += [
            Task("decode", "stock", "vae_decode", pixels, 5, cost_s=2),
            Task("decode", "engine", "vae_decode", pixels, 5, cost_s=2),
        ]
        if n == 1 and extent.tuned_batches:
            found.append(Task("decode", "tuned-2", "vae_decode", pixels, 5))
        if 2 in extent.compiled_batches:
            found.append(Task("decode", "engine-compiled-2", "vae_decode", pixels, 5))
    found += [Task("decode", station, "text_encode", Features(), 7) for station in ("stock", "engine")]
    return found


def lora_tasks(extent: Extent) -> list[Task]:
    """Attach and detach of one LoRA by size, and its way from file to host memory."""
    return [
        Task("loras", station, "lora", Features(variant=f"rank{rank}"), 3 if station == "stock" else 5, cost_s=8)
        for rank in extent.lora_ranks
        for station in ("stock", "engine")
    ]


def load_tasks(extent: Extent) -> list[Task]:
    """Checkpoints and ControlNets onto the device."""
    found = []
    for variant in ("checkpoint", "unet", "text_encoder_2", "vae", *(["controlnet"] if extent.n_controlnets else [])):
        found.append(Task("loads", "stock", "load", Features(variant=variant), 2, cost_s=15))
        for source in ("file", "pinned"):
            found.append(Task("loads", "engine", "load", Features(variant=f"{variant}_{source}"), 3, cost_s=8))
    return found


def memory_tasks(extent: Extent) -> list[Task]:
    """Peak memory of whole images, for the facts."""
    n_images = max(extent.vae_images[:3])
    return [Task("memory", station, "memory", Features(n_images=n_images), 1, cost_s=6) for station in STATIONS]


def remote_tasks(extent: Extent) -> list[Task]:
    """Residuals between two GPUs, steps that join them, and whole images with remote ControlNets."""
    if extent.n_gpus < 2:
        return []
    best = "remote-compiled" if 2 in extent.compiled_batches else "remote"
    found = [
        Task("remote", "remote", "transfer", Features(n_bytes=n_bytes, link="nvlink"), 15, fallback=best)
        for n_bytes in (SMALL_BYTES, *extent.transfer_bytes)
    ]
    for nets in range(1, extent.n_controlnets + 1):
        step = dataclasses.replace(_step(extent, 2, nets), link="nvlink")
        found += [
            Task("remote", station, "remote_step", step, 4 * extent.burst, cost_s=3)
            for station in dict.fromkeys((best, "remote"))
        ]
    for nets in range(extent.n_controlnets + 1):
        for n_loras in (0, min(2, max(1, nets))):
            image = _image(extent, nets, n_loras, link="nvlink")
            found.append(Task("remote", best, "image", image, 1, "decoupled", "remote", 3 + nets))
    return found


def start_tasks(extent: Extent, *, with_compiled: bool) -> list[Task]:
    """Fresh workers, from process start to ready."""
    names = ["start-stock", "start-engine"]
    if with_compiled and 2 in extent.compiled_batches:
        names.append("start-engine-compiled")
    return [
        Task("start", name, "start", Features(), 1, "diffusers" if name == "start-stock" else "colocated", cost_s=60)
        for name in names
    ]


def schedule(extent: Extent, parts: tuple[str, ...]) -> list[list[Task]]:
    """Blocks of tasks, most valuable first; inside a block the order is drawn anew, so that repetitions interleave.

    What a law or the comparison of topologies cannot do without comes in the first blocks; further rounds tighten it. A
    session that runs out of time keeps the first.
    """
    # the tiny model's first guesses: everything is quick
    pace = 1.0 if extent.model == "sdxl" else 0.05
    steps, images, wide = step_tasks(extent), image_tasks(extent), wide_image_tasks(extent)
    once = {
        "decode": decode_tasks(extent),
        "loras": lora_tasks(extent),
        "loads": load_tasks(extent),
        "memory": memory_tasks(extent),
    }
    remote = remote_tasks(extent)
    rounds = range(extent.n_rounds)
    blocks = [remote, steps, images, once["decode"], once["loras"], once["loads"], once["memory"]]
    # after the loads, which save the checkpoint that a worker starts from
    blocks += [start_tasks(extent, with_compiled=False)]
    for index in rounds[1:]:
        blocks += [remote, steps, images]
        if index == 2:
            blocks += [start_tasks(extent, with_compiled=True)]
        if index % 2:
            blocks += [wide, once["decode"]]
        else:
            blocks += [once["loras"], wide]
    return [
        kept
        for block in blocks
        if (kept := [dataclasses.replace(t, cost_s=t.cost_s * pace) for t in block if t.part in parts])
    ]
