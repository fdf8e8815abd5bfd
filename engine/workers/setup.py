"""What a worker process is told to be, and where each model's arithmetic is found. Plain JSON values: no path from a request, no code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from engine.allocation import Topology
from engine.links.protocol import PairOfBase, PairOfControlNets
from engine.serving.warm_shapes import WarmShape, read_warm_shapes
from engine.workers.painter import ControlHost, Painter
from traces.problems import one_problem

Role = Literal["base", "controlnet", "loader"]
Progress = Callable[[str], None]
"""``progress(phase)``: called from the work path whenever something moved on (a step, a chunk of a load). Phases: ``load``,
``compile``, ``step``, ``decode``, ``fetch``. Each phase has its own limit after which a standstill gets the worker killed."""


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """Everything the front process tells a worker before it loads anything."""

    worker_id: str
    """Of the replica; both ranks of a CFG pair have the same."""
    role: Role
    model: str
    """``featherweight``, ``tiny`` or ``sdxl``."""
    device: str = "cpu"
    pool: str = ""
    topology: Topology = "colocated"
    rank: int = 0
    """0 is the leader: unconditional half and decoding under ``decoupled_cfg2``."""
    n_ranks: int = 1
    base_model_ids: tuple[str, ...] = ()
    """Checkpoints to have on the device when ready; ``("*",)``: on demand, starting with ``default``."""
    controlnet_ids: tuple[str, ...] = ()
    """ControlNets to have on the device when ready; ``("*",)``: on demand."""
    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Catalogue entry (as JSON values) of every id known at the start. An id without one has random weights drawn from the id."""
    host_tier: str = ""
    """Folder of checked LoRA files."""
    store: str = ""
    """Folder or address that loaders fetch from."""
    line_timeout_s: float = 30.0
    """Longest wait for a ControlNet worker or the other rank."""
    lora_wait_s: float = 60.0
    """Longest wait for a LoRA at the last step before which it must be in."""
    heartbeat_s: float = 1.0
    warm: tuple[str, ...] = ()
    """Shapes (``engine.serving.warm_shapes``) to capture before it is ready, for every model that it holds then."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the model side, by name."""

    @property
    def warm_shapes(self) -> tuple[WarmShape, ...]:
        """:attr:`warm`, read."""
        return read_warm_shapes(",".join(self.warm))

    def to_plain(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> WorkerSetup:
        """The inverse of :meth:`to_plain`; raises :class:`InputError` if a field is unknown or missing."""
        try:
            values = dict(plain)
            for name in ("base_model_ids", "controlnet_ids", "warm"):
                values[name] = tuple(values.get(name, ()))
            return cls(**values)
        except TypeError as error:
            raise one_problem("worker setup", f"got {error}", "the fields of WorkerSetup", "Use one version.") from None


class RefusedError(Exception):
    """A LoRA could not be fetched; ``is_final`` if its file is at fault, and trying again is of no use."""

    def __init__(self, reason: str, *, is_final: bool) -> None:
        super().__init__(reason)
        self.is_final = is_final


class Fetcher(Protocol):
    """The work of a loader process."""

    def fetch(self, lora_id: str, source: Mapping[str, Any]) -> Path:
        """Brings a checked LoRA into the host tier and returns its file; raises :class:`RefusedError`."""


def make_painter(setup: WorkerSetup, progress: Progress, partner: PairOfBase | PairOfControlNets | None) -> Painter:
    """Loads what a base rank needs.

    Args:
        partner: the line to the other rank of a CFG pair (rank 0 holds the base's end of it, which makes buffers).
    """
    if setup.model == "featherweight":
        from engine.workers.featherweight import FeatherweightPainter

        return FeatherweightPainter(setup, progress, partner)
    from engine.workers.sdxl_painter import make_painter as make

    return make(setup, progress, partner)


def make_control_host(setup: WorkerSetup, progress: Progress) -> ControlHost:
    """Loads what a ControlNet worker needs."""
    if setup.model == "featherweight":
        from engine.workers.featherweight_controlnets import FeatherweightControlHost

        return FeatherweightControlHost(setup, progress)
    from engine.workers.sdxl_controlnets import make_control_host as make

    return make(setup, progress)


def make_fetcher(setup: WorkerSetup, progress: Progress) -> Fetcher:
    """What a loader fetches with: the registry's store, or made-up files where there is no store (featherweight)."""
    if setup.model == "featherweight" and not setup.store:
        from engine.workers.featherweight import FeatherweightFetcher

        return FeatherweightFetcher(setup, progress)
    from engine.workers.loader import make_fetcher as make

    return make(setup, progress)
