"""Which stacks a measuring session builds, and with what: one setup for each station. Torch-free."""

from __future__ import annotations

from calibrate.extent import Extent
from calibrate.points import client_tasks, compares_choices, nets_of, tuned_nets
from calibrate.rig import RigSetup


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
        setup("engine", "engine", n_controlnets=nets, shapes=_captured(extent), **ours),
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
    if tuned_nets(extent):
        found.append(
            setup("tuned-controlnets", "tuned", is_compiled=extent.is_cuda, forward_batches=(2,), **peers,
                  n_controlnets=tuned_nets(extent))
        )  # fmt: skip
    if compares_choices(extent):
        found.append(setup("engine-without-triton", "engine", **{**ours, "uses_triton": False}))
        found.append(setup("engine-cudnn", "engine", **{**ours, "attention": "cudnn"}))
    if extent.n_gpus > 1:
        if 2 in extent.compiled_batches:
            found.append(setup("remote-compiled", "remote", n_controlnets=nets, forward_batches=(2,), **compiled))
        found.append(setup("remote", "remote", n_controlnets=nets, forward_batches=(2,), **ours))
    start = {"forward_batches": (2,), **ours, "uses_graph": False, "uses_triton": False}
    found += [
        setup("start-stock", "start", n_controlnets=0, **start),
        setup("serving", "serving", n_controlnets=nets, n_sharing=extent.n_sharing, **ours),
        setup("clients", "clients", n_controlnets=nets, n_sharing=_clients(extent), **ours),
    ]
    return found


def _clients(extent: Extent) -> int:
    """The most base workers that any task lets share a ControlNet worker."""
    return max((int(task.features.variant[len("clients")]) for task in client_tasks(extent)), default=1)


def _captured(extent: Extent) -> tuple[tuple[int, int, int, int], ...]:
    """Every step of the design with every number of ControlNets it is timed with."""
    return tuple(
        (*shape, nets)
        for shape in (*extent.fit_shapes, *extent.held_out_shapes)
        for nets in range(nets_of(extent, shape) + 1)
    )
