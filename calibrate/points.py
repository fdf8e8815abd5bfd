"""What is timed on the stacks, in which order: the design of a measuring session. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from calibrate.extent import Extent, Shape
from calibrate.measurement import Features

SMALL_BYTES: Final = 64
"""A message that is all latency: what larger ones take beyond it is their transfer."""
STATIONS: Final = ("stock", "engine")
LARGE_MP: Final = 5.0
"""Samples x megapixels of a step from which on fewer repetitions do: long steps scatter less."""
CLIENTS_MAX: Final = 3
"""Base workers on one ControlNet worker."""
PARTS: Final = (
    "steps", "images", "decode", "loras", "loads", "memory", "remote", "wide_images", "start", "serving", "clients",
)  # fmt: skip


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
    is_held_out: bool = False
    """Its rows check laws and never fit one."""

    @property
    def key(self) -> tuple[str, str, Features]:
        """What stays the same between rounds."""
        return self.station, self.method, self.features

    @property
    def name(self) -> str:
        """The key as text, for the session's books: ``engine steps forward_batch=2 width_px=1024``."""
        return f"{self.station} {self.method} {short(self.features)}".rstrip()


def short(features: Features) -> str:
    """The features that apply: ``forward_batch=2 width_px=1024``."""
    parts = {f.name: getattr(features, f.name) for f in dataclasses.fields(features)}
    return " ".join(f"{name}={value}" for name, value in parts.items() if value not in (0, ""))


def compares_choices(extent: Extent) -> bool:
    """Two more workers for comparison need the memory that a session on two GPUs has."""
    return extent.is_cuda and extent.n_gpus > 1


def tuned_nets(extent: Extent) -> int:
    """ControlNets that tuned Diffusers is measured with."""
    return min(extent.n_controlnets, extent.n_tuned_controlnets) if extent.tuned_batches else 0


def nets_of(extent: Extent, shape: Shape) -> int:
    """ControlNets that a step of this shape is timed with, at most."""
    return extent.n_controlnets if shape in extent.cohosted_shapes else min(extent.n_controlnets, 1)


def _step(shape: Shape, n_controlnets: int = 0, n_loras: int = 0, variant: str = "") -> Features:
    batch, width, height = shape
    return Features(
        forward_batch=batch,
        n_images=batch // 2 if batch % 2 == 0 else batch,
        width_px=width,
        height_px=height,
        n_controlnets=n_controlnets,
        n_loras=n_loras,
        variant=variant,
    )


def _main(extent: Extent, batch: int) -> Shape:
    return batch, extent.width_px, extent.height_px


def image(extent: Extent, n_controlnets: int, n_loras: int, variant: str = "", link: str = "") -> Features:
    """One image at the session's size and steps."""
    return dataclasses.replace(
        _step(_main(extent, 2), n_controlnets, n_loras, variant), n_steps=extent.n_steps, link=link
    )


def fit_step_task(extent: Extent, shape: Shape, *, is_held_out: bool = False) -> Task:
    """All parts of our engine's step at one shape."""
    samples_mp = shape[0] * shape[1] * shape[2] / 2**20
    # a sample of 1024 x 1024 takes 14 ms a step on an H200; five quantities, and a capture where it was not done before
    cost_s, nets = 0.5 + 0.4 * samples_mp, nets_of(extent, shape)
    n_repeats = extent.burst if samples_mp <= LARGE_MP else max(2, extent.burst * 2 // 3)
    return Task("steps", "engine", "steps", _step(shape, nets), n_repeats, cost_s=cost_s, is_held_out=is_held_out)


def step_tasks(extent: Extent, *, with_held_out: bool = True) -> list[Task]:
    """UNet, its two parts and ControlNet steps of every stack."""
    nets, n = extent.n_controlnets, extent.burst
    found = [fit_step_task(extent, shape) for shape in extent.fit_shapes]
    if with_held_out:
        found += [fit_step_task(extent, shape, is_held_out=True) for shape in extent.held_out_shapes]
    for shape in extent.stock_shapes:
        found.append(Task("steps", "stock", "unet_step", _step(shape), n, cost_s=1.5))
        if nets:
            found.append(Task("steps", "stock", "step_with_controlnets", _step(shape, 1), n, cost_s=2))
    for batch in (2, 8):
        if _main(extent, batch) in extent.stock_shapes:
            found.append(Task("steps", "stock", "unet_lora_step", _step(_main(extent, batch), 0, 1), n, cost_s=6))
    for batch in extent.compiled_batches:
        main = _main(extent, batch)
        found.append(Task("steps", f"engine-compiled-{batch}", "steps", _step(main), n, cost_s=3))
        if nets:
            found.append(Task("steps", f"controlnet-compiled-{batch}", "steps", _step(main), n))
    for batch in extent.tuned_batches:
        found.append(Task("steps", f"tuned-{batch}", "unet_step", _step(_main(extent, batch)), n, cost_s=1))
    for count in range(1, tuned_nets(extent) + 1):
        joined = _step(_main(extent, 2), count)
        found.append(Task("steps", "tuned-controlnets", "step_with_controlnets", joined, n, cost_s=1.5))
    if compares_choices(extent):
        # what one choice is worth, everything else equal
        for station, variant in (("engine-without-triton", "without_triton"), ("engine-cudnn", "cudnn")):
            found.append(Task("steps", station, "steps", _step(_main(extent, 2), variant=variant), n, cost_s=3))
    return found


def our_images(extent: Extent) -> list[Task]:
    """One image of our engine end to end, for 0 to all ControlNets and 0 to 2 LoRAs; the corners of LoRAs."""
    nets = extent.n_controlnets
    cells = [*((c, 0) for c in range(nets + 1)), (0, 1), (min(1, nets), 1), (0, 2), (nets, 2)]
    return [
        Task("images", "engine", "image", image(extent, c, n_loras), 1, "colocated", cost_s=2 + 0.8 * c)
        for c, n_loras in dict.fromkeys(cells)
    ]


def peer_images(extent: Extent) -> list[Task]:
    """The same of stock and tuned Diffusers; with LoRAs only one, fused: the rest is in ``wide_images``."""
    found = []
    for c in range(extent.n_controlnets + 1):
        found.append(Task("images", "stock", "image", image(extent, c, 0), 1, "diffusers", cost_s=4 + 1.6 * c))
        found += _tuned_image(extent, "images", c, 0)
    found.append(Task("images", "stock", "image", image(extent, 0, 1, "fused"), 1, "diffusers", cost_s=6))
    return found + _tuned_image(extent, "images", 0, 1)


def _tuned_image(extent: Extent, part: str, c: int, n_loras: int) -> list[Task]:
    if not extent.tuned_batches or c > tuned_nets(extent):
        return []
    station = "tuned-controlnets" if c else "tuned-2"
    features = image(extent, c, n_loras, "fused" if n_loras else "")
    return [Task(part, station, "image", features, 1, "diffusers_tuned", cost_s=2 + 0.8 * c + 2 * n_loras)]


def wide_image_tasks(extent: Extent) -> list[Task]:
    """Images with LoRAs that are left: all of ours; of the stock pipeline, whose runs take up to 19 s, the corners."""
    nets = extent.n_controlnets
    had = {task.features for task in our_images(extent)}
    found = [
        Task("wide_images", "engine", "image", image(extent, c, n_loras), 1, "colocated", cost_s=2 + c)
        for c in range(nets + 1)
        for n_loras in (1, 2)
        if image(extent, c, n_loras) not in had
    ]
    for c, n_loras in dict.fromkeys([(min(1, nets), 1), (nets, 2)]):
        found.append(
            Task("wide_images", "stock", "image", image(extent, c, n_loras, "fused"), 1, "diffusers", cost_s=8 + 2 * c)
        )
        found += _tuned_image(extent, "wide_images", c, n_loras)
    for c, n_loras in dict.fromkeys([(0, 1), (nets, 2)]):
        found.append(
            Task("wide_images", "stock", "image", image(extent, c, n_loras), 1, "diffusers", cost_s=10 + 3 * c)
        )
    return found


def decode_tasks(extent: Extent) -> list[Task]:
    """VAE and text encoding, and images to the host and into files."""
    found = []

    def pixels(shape: Shape) -> Features:
        return Features(n_images=shape[0], width_px=shape[1], height_px=shape[2])

    for shape in extent.vae_shapes:
        found.append(Task("decode", "engine", "vae_decode", pixels(shape), 5))
        if shape[1:] == (extent.width_px, extent.height_px):
            found.append(Task("decode", "stock", "vae_decode", pixels(shape), 4))
            found.append(Task("decode", "engine", "encode_images", pixels(shape), 4))
    found += [
        Task("decode", "engine", "vae_decode", pixels(shape), 5, is_held_out=True)
        for shape in extent.held_out_vae_shapes
    ]
    if extent.tuned_batches:
        found.append(Task("decode", "tuned-2", "vae_decode", pixels((1, extent.width_px, extent.height_px)), 5))
    return found + [Task("decode", station, "text_encode", Features(), 7) for station in ("stock", "engine")]


def lora_tasks(extent: Extent) -> list[Task]:
    """LoRAs of every size from the store into the weights and off again; two of them together."""
    found = [
        Task("loras", "engine", "lora", Features(variant=f"rank{rank}"), 4, cost_s=4, is_held_out=is_held_out)
        for ranks, is_held_out in ((extent.lora_ranks, False), (extent.held_out_lora_ranks, True))
        for rank in ranks
    ]
    middle = extent.lora_ranks[len(extent.lora_ranks) // 2]
    found.append(Task("loras", "engine", "loras", Features(n_loras=2, variant=f"rank{middle}"), 4, cost_s=2))
    for rank in extent.lora_ranks:
        found.append(Task("loras", "stock", "lora", Features(variant=f"rank{rank}"), 2, cost_s=5))
    if extent.tuned_batches:
        found.append(Task("loras", "tuned-2", "lora", Features(variant=f"rank{middle}"), 2, cost_s=5))
    return found


def load_tasks(extent: Extent) -> list[Task]:
    """Checkpoints and ControlNets onto the device, as the engine's workers load them and as the stock pipeline does."""
    nets = ["controlnet"] if extent.n_controlnets else []
    found = []
    for variant, cost_s in (("checkpoint", 4.0), *((net, 1.5) for net in nets)):
        host, serving = Features(variant=f"{variant}_host"), Features(variant=f"{variant}_serving")
        # The files are written once; each repetition reads them anew. Copies from the host tier cost next to nothing.
        found.append(Task("loads", "engine", "load", host, 5, cost_s=7 * cost_s))
        found.append(Task("loads", "engine", "load", serving, 1, cost_s=cost_s))
    for variant in ("checkpoint", "unet", "text_encoder_2", "vae", *nets):
        found.append(Task("loads", "stock", "load", Features(variant=variant), 2, cost_s=5))
    found.append(Task("loads", "stock", "load", Features(variant="text_encoder"), 2, is_held_out=True))
    return found


def memory_tasks(extent: Extent) -> list[Task]:
    """Peak memory of whole images, for the facts."""
    n_images = max(shape[0] for shape in extent.vae_shapes)
    return [Task("memory", station, "memory", Features(n_images=n_images), 1, cost_s=3) for station in STATIONS]


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
        step = dataclasses.replace(_step(_main(extent, 2), nets), link="nvlink")
        found += [
            Task("remote", station, "remote_step", step, 4 * extent.burst, cost_s=3)
            for station in dict.fromkeys((best, "remote"))
        ]
    for nets in range(extent.n_controlnets + 1):
        for n_loras in (0, min(2, max(1, nets))):
            whole = image(extent, nets, n_loras, link="nvlink")
            found.append(Task("remote", best, "image", whole, 1, "decoupled", "remote", 3 + nets))
    return found


def start_tasks(extent: Extent) -> list[Task]:
    """A fresh worker of the stock pipeline, from process start to ready; ours is in the serving part."""
    return [Task("start", "start-stock", "start", Features(), 1, "diffusers", cost_s=25)]


def serving_tasks(extent: Extent) -> list[list[Task]]:
    """Jobs through the real engine's processes, one at a time; then as many at once as workers share the GPU."""

    def tasks(jobs: Iterable[Features], n_repeats: int, cost_s: float) -> list[Task]:
        return [
            Task("serving", "serving", "jobs", job, n_repeats, "colocated", cost_s=cost_s + 2 * job.n_controlnets)
            for job in dict.fromkeys(jobs)
        ]

    nets = range(1, extent.n_controlnets + 1)
    whole = [image(extent, 0, 0), image(extent, 0, 0, "png"), image(extent, 0, 1)]
    whole += [image(extent, 1, n_loras) for n_loras in (0, 1) if nets]
    small = (2, extent.width_px // 2, extent.height_px // 2)
    # few steps: what is left of a job is what surrounds them
    brief = [_job(small, 4), *(_job(small, 4, c) for c in nets if c <= 2), *(_job(small, 4, 0, n) for n in (1, 2))]
    brief += [_job((1, *small[1:]), 30), _job((8, *small[1:]), 4), dataclasses.replace(_job(small, 4), variant="png")]
    brief += [_job(_main(extent, 2), 4), *(_job(_main(extent, 2), 4, c) for c in nets)]
    shared = [
        [Task("serving", "serving", "shared_jobs", image(extent, 0, 0, f"shared{n}"), 3, "colocated", cost_s=30)]
        for n in range(2, extent.n_sharing + 1)
    ]
    return [tasks(brief, 5, 6.0), tasks(whole, 3, 8.0), *shared, change_tasks(extent)]


def change_tasks(extent: Extent) -> list[Task]:
    """A switch to another checkpoint and back; a worker that comes beside one that serves, and goes."""
    brief = dataclasses.replace(_job(_main(extent, 2), 4), variant="switch")
    return [
        Task("serving", "serving", "switch_jobs", brief, 3, "colocated", cost_s=30),
        Task("serving", "serving", "drain", Features(), 2, "colocated", cost_s=80),
    ]


def client_tasks(extent: Extent) -> list[Task]:
    """1 to 3 base workers, as many as there are GPUs for, that share one ControlNet worker: with equal work, and with unequal."""
    if (extent.is_cuda and extent.n_gpus < 2) or not extent.n_controlnets:
        return []
    most = min(CLIENTS_MAX, extent.n_gpus - 1) if extent.is_cuda else min(2, CLIENTS_MAX)
    link = "nvlink" if extent.is_cuda else ""
    variants = [(f"clients{n}", nets) for n in range(1, most + 1) for nets in (1, extent.n_controlnets)]
    variants += [(f"clients{n}_unequal", extent.n_controlnets) for n in range(2, most + 1) if extent.n_controlnets > 1]
    return [
        Task("clients", "clients", "client_jobs", image(extent, nets, 0, variant, link), 4, "decoupled", cost_s=40)
        for variant, nets in dict.fromkeys(variants)
    ]


def _job(shape: Shape, n_steps: int, n_controlnets: int = 0, n_loras: int = 0) -> Features:
    return dataclasses.replace(_step(shape, n_controlnets, n_loras), n_steps=n_steps)


def unordered(blocks: Iterable[list[Task]]) -> list[Task]:
    """Every different task of the blocks, in the order in which it first comes."""
    return list({task.key: task for block in blocks for task in block}.values())


def schedule(extent: Extent, parts: tuple[str, ...]) -> list[list[Task]]:
    """Blocks of tasks, most valuable first; inside a block the order is drawn anew, so that repetitions interleave.

    What a law or the comparison of topologies cannot do without comes in the first blocks; further rounds tighten it. A
    session that runs out of time keeps the first.
    """
    # the tiny model's first guesses: everything is quick
    pace = 1.0 if extent.model == "sdxl" else 0.05
    ours, peers = our_images(extent), peer_images(extent)
    remote, loads, loras = remote_tasks(extent), load_tasks(extent), lora_tasks(extent)
    early = [*decode_tasks(extent), *memory_tasks(extent)]
    between = [early, [task for task in loras if task.station != "stock"],
               [task for task in loads if task.station == "engine"]]  # fmt: skip
    blocks = [remote, step_tasks(extent)]
    n_peer_rounds = min(extent.n_peer_rounds, extent.n_rounds)
    # our own images are quick: their further rounds ride along with the peers' first ones
    n_extra = extent.n_rounds - n_peer_rounds
    for index in range(max(n_peer_rounds, len(between))):
        if index < n_peer_rounds:
            own = [*ours, *ours] if index < n_extra else ours
            blocks.append([*own, *peers])
        if index < len(between):
            blocks.append(between[index])
    blocks += [ours] * max(0, n_extra - n_peer_rounds)
    blocks += [
        *serving_tasks(extent),
        client_tasks(extent),
        remote,
        step_tasks(extent, with_held_out=False),
        wide_image_tasks(extent),
    ]
    blocks += [[task for task in loras if task.station == "stock"], [task for task in loads if task.station == "stock"]]
    # after the loads, which save the checkpoint that a worker starts from
    blocks += [start_tasks(extent)]
    for _ in range(1, extent.n_rounds):
        blocks += [remote, step_tasks(extent), wide_image_tasks(extent), early]
    return [
        kept
        for block in blocks
        if (kept := [dataclasses.replace(t, cost_s=t.cost_s * pace) for t in block if t.part in parts])
    ]
