"""What a measuring process is told: which stack to build and what to time on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from calibrate.measurement import Features

RigKind = Literal["stock", "tuned", "engine", "controlnet", "remote", "serving", "clients", "start"]
MODELS: Final = ("sdxl", "tiny")


@dataclass(frozen=True, slots=True)
class RigSetup:
    """Everything a measuring process needs to build its stack."""

    name: str
    kind: RigKind
    model: str = "sdxl"
    device: str = "cuda:0"
    dtype: str = "bfloat16"
    is_compiled: bool = False
    uses_graph: bool = True
    uses_triton: bool = True
    attention: str = "default"
    """Which attention our engine tries first: ``default`` or ``cudnn``."""
    forward_batches: tuple[int, ...] = ()
    """What a compiled stack compiles for while it is built."""
    shapes: tuple[tuple[int, int, int, int], ...] = ()
    """Forward batch, width, height and number of ControlNets of steps that our engine captures while it is built."""
    width_px: int = 1024
    height_px: int = 1024
    n_controlnets: int = 0
    n_sharing: int = 1
    """Workers of the serving path that may share the GPU; base workers that may share a ControlNet worker."""
    n_steps: int = 50
    scratch: str = ""
    """Folder for weights and LoRAs on local disk."""
    seed: int = 0
    prepare_until_s: float = 0.0
    """On the machine's monotonic clock: until when a rig may prepare more than it must; the rest is prepared when asked for."""

    def to_plain(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> RigSetup:
        """Reads what :meth:`to_plain` wrote."""
        shapes = tuple(tuple(shape) for shape in plain.get("shapes", ()))
        return cls(**{**plain, "forward_batches": tuple(plain["forward_batches"]), "shapes": shapes})


@dataclass(frozen=True, slots=True)
class Timed:
    """What one task gave: seconds per quantity, each repetition a number."""

    quantity: str
    mode: str
    features: Features
    values_s: tuple[float, ...]


class Rig(Protocol):
    """A built stack."""

    def run(self, method: str, features: Features, n_repeats: int) -> list[Timed]:
        """Times one thing; raises whatever went wrong."""
        ...

    def facts(self) -> dict[str, float]:
        """Memory facts known so far, in bytes or GiB as their names say."""
        ...

    def close(self) -> None:
        """Frees what the rig holds, other processes included."""
        ...


def build_rig(setup: RigSetup) -> Rig:
    """Builds the stack a setup names; this is where torch is first imported."""
    if setup.device.startswith("cuda"):
        import torch

        # Triton launches on the current device; another one would also cost a context on the first GPU
        torch.cuda.set_device(setup.device)
    if setup.kind == "stock":
        from calibrate.stock import StockRig

        return StockRig(setup)
    if setup.kind == "tuned":
        from calibrate.tuned import TunedRig

        return TunedRig(setup)
    if setup.kind == "start":
        from calibrate.storage import StartRig

        return StartRig(setup)
    if setup.kind == "serving":
        from calibrate.serving import ServingRig

        return ServingRig(setup)
    if setup.kind == "clients":
        from calibrate.clients import ClientsRig

        return ClientsRig(setup)
    if setup.kind == "engine":
        from calibrate.ours import EngineRig

        return EngineRig(setup)
    from calibrate.remote import ControlNetRig, RemoteRig

    return RemoteRig(setup) if setup.kind == "remote" else ControlNetRig(setup)
