"""How much a measuring session measures: model, device, and the shapes, sizes and counts of its design. Torch-free."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

MIB: Final = 2**20
Shape = tuple[int, int, int]
"""Forward batch, width and height of a step; number of images, width and height of a decode."""

_FIT: Final[tuple[Shape, ...]] = (
    *((batch, 1024, 1024) for batch in (2, 1, 4, 8, 16)),
    *((batch, 512, 512) for batch in (2, 1, 4, 16)),
    *((batch, 768, 768) for batch in (2, 8)),
)
_HELD_OUT: Final[tuple[Shape, ...]] = (
    (6, 1024, 1024), (3, 1024, 1024), (12, 1024, 1024), (4, 768, 768), (1, 768, 768), (12, 768, 768), (8, 512, 512),
    (6, 512, 512), (2, 640, 640), (8, 640, 640), (2, 832, 1216), (4, 1216, 832), (2, 1152, 896), (2, 896, 896),
    (16, 640, 640), (2, 1344, 768), (2, 1536, 640), (8, 1152, 896), (1, 832, 1216),
)  # fmt: skip
_CANDIDATES: Final[tuple[Shape, ...]] = ((16, 768, 768), (4, 896, 896), (8, 896, 896), (1, 640, 640), (4, 640, 640))


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
    fit_shapes: tuple[Shape, ...] = _FIT
    """Steps that laws are fitted to; an odd forward batch has no guidance."""
    held_out_shapes: tuple[Shape, ...] = _HELD_OUT
    """Steps that laws are checked with, never fitted to."""
    candidate_shapes: tuple[Shape, ...] = _CANDIDATES
    """Steps that are added to the fit where it is least certain and time is left."""
    cohosted_shapes: tuple[Shape, ...] = ((2, 1024, 1024), (8, 1024, 1024), (2, 512, 512))
    """Steps that are also timed with 2 ControlNets and more."""
    stock_shapes: tuple[Shape, ...] = ((2, 1024, 1024), (8, 1024, 1024), (2, 512, 512), (1, 1024, 1024))
    compiled_batches: tuple[int, ...] = ()
    """Forward batches our engine is also compiled for by Inductor; it is slower so."""
    tuned_batches: tuple[int, ...] = (2,)
    """Forward batches tuned Diffusers is compiled for; it always runs 2."""
    n_tuned_controlnets: int = 3
    """ControlNets that tuned Diffusers is compiled with; 0: it is measured without."""
    vae_shapes: tuple[Shape, ...] = (
        (1, 1024, 1024), (2, 1024, 1024), (4, 1024, 1024), (1, 512, 512), (4, 512, 512), (1, 768, 768),
    )  # fmt: skip
    held_out_vae_shapes: tuple[Shape, ...] = (
        (3, 1024, 1024),
        (8, 512, 512),
        (2, 768, 768),
        (1, 640, 640),
        (1, 832, 1216),
    )
    n_controlnets: int = 3
    lora_ranks: tuple[int, ...] = (8, 64, 192)
    held_out_lora_ranks: tuple[int, ...] = (128,)
    transfer_bytes: tuple[int, ...] = (1 * MIB, 16 * MIB, 64 * MIB, 128 * MIB, 512 * MIB)
    n_rounds: int = 5
    n_peer_rounds: int = 3
    """Rounds in which the slow peers take part as well."""
    burst: int = 6
    n_sharing: int = 2
    """Workers that share one GPU in the last part of the serving path; 1: none share."""
    attention: str = "default"
    seed: int = 2026

    @property
    def is_cuda(self) -> bool:
        """Whether there is a GPU to capture graphs on."""
        return self.device == "cuda"


def tiny_extent(**changes: object) -> Extent:
    """The same session on the tiny model, small enough for a CPU."""
    tiny = Extent(
        model="tiny", device="cpu", dtype="float32", width_px=64, height_px=64, n_steps=4,
        fit_shapes=((2, 64, 64), (4, 64, 64), (2, 32, 32), (1, 64, 64)), held_out_shapes=((3, 64, 64), (2, 32, 64)),
        candidate_shapes=((4, 32, 32),), cohosted_shapes=((2, 64, 64),), stock_shapes=((2, 64, 64), (4, 64, 64)),
        tuned_batches=(2,), n_tuned_controlnets=1, vae_shapes=((1, 64, 64), (2, 64, 64)),
        held_out_vae_shapes=((1, 32, 64),), n_controlnets=2, lora_ranks=(2, 4, 8), held_out_lora_ranks=(6,),
        transfer_bytes=(65536, 262144, 1048576), n_rounds=2, n_peer_rounds=1, burst=2, n_sharing=1,
    )  # fmt: skip
    return dataclasses.replace(tiny, **changes)  # type: ignore[arg-type]


def extent_for(
    model: str,
    device: str,
    *,
    compiled_batches: tuple[int, ...] = (),
    tuned_batches: tuple[int, ...] = (2,),
    **changes: object,
) -> Extent:
    """The standard session of a model on a kind of device; ``changes`` are fields of :class:`Extent`."""
    on_gpu = device == "cuda"
    common = {"device": device, "dtype": "bfloat16" if on_gpu else "float32", **changes}
    if model == "sdxl":
        return Extent(compiled_batches=compiled_batches, tuned_batches=tuned_batches, **common)  # type: ignore[arg-type]
    # nothing is compiled on a CPU, so one batch shows as much as several
    common["n_tuned_controlnets"] = min(int(str(common.get("n_tuned_controlnets", 1))), 1)
    return tiny_extent(
        compiled_batches=compiled_batches if on_gpu else (),
        tuned_batches=tuned_batches if on_gpu else tuned_batches[:1],
        **common,
    )
