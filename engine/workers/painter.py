"""What a worker process needs of a model: the seam between processes (the same for all) and arithmetic (SDXL, tiny, or numpy).

``engine.workers.base_process`` and ``engine.workers.controlnet_process`` drive these protocols; they know nothing of torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engine.links.protocol import PairOfBase, PairOfControlNets
from engine.serving.job import Job


class JobError(Exception):
    """This job, or one of its add-ons, is at fault: the job fails with the sentence, the worker goes on."""

    def __init__(self, reason: str, request_id: str = "") -> None:
        """``request_id``: the job of the batch that is at fault; the others are begun again without it. Empty: all of them."""
        super().__init__(reason)
        self.request_id = request_id


class PeerLostError(Exception):
    """A ControlNet worker or the other CFG rank is gone or late: the job may be tried again, the worker goes on."""

    def __init__(self, reason: str, pair_id: str = "") -> None:
        """``pair_id``: the line that was lost, where that is known."""
        super().__init__(reason)
        self.pair_id = pair_id


@dataclass(frozen=True, slots=True)
class LoadedLora:
    """A checked LoRA in the host tier."""

    lora_id: str
    path: str
    """File in the layout of ``engine.registry.flat_lora``; mapped, not copied."""


class Painter(Protocol):
    """One base replica's share of the arithmetic (its only GPU, or one CFG half). Jobs of a batch are compatible.

    Order of calls for a batch: ``activate``, ``begin``, then for every step ``step`` with at most one ``patch`` before one of
    them, then ``finish``. ``restore`` follows in any case, also after an exception, and leaves pristine weights and no job.

    Under ``decoupled_cfg2`` both ranks get the same calls with the same arguments at the same step: ``base_process`` agrees on
    the patch step and on giving up over messages of its own on the partner line (kinds that start with ``cfg_``), always while
    neither rank is inside a call. What a painter says on that line within a call, it must also hear within that call.
    """

    def open(self, pair: PairOfBase) -> None:
        """A ControlNet worker has been attached (between jobs): set up what is faster than the line's own buffers.

        Its peer is inside :meth:`ControlHost.open` at the same time. Raises :class:`PeerLostError`.
        """

    def close(self, pair_id: str) -> None:
        """It has been detached or is gone; called between jobs, also for a pair whose :meth:`open` failed."""

    def activate(self, base_model_id: str) -> bool:
        """Makes a checkpoint the active one; True if it had to be loaded."""

    def begin(self, jobs: Sequence[Job], pairs: Mapping[str, PairOfBase]) -> int:
        """Encodes text, draws noise, announces the job to the ControlNet workers; returns the number of steps.

        Args:
            pairs: ControlNet id to the line to the worker that computes it; ControlNets not in it run in process.

        Raises:
            JobError: the job does not fit the model.
            PeerLostError: a ControlNet worker is gone.
        """

    def step(self, i: int) -> None:
        """One denoising step. Raises :class:`PeerLostError` as :meth:`begin` does, after a bounded wait."""

    def patch(self, loras: Sequence[tuple[LoadedLora, float]]) -> None:
        """Makes the weights pristine + LoRAs. Raises :class:`JobError` naming the LoRA that does not fit."""

    def settle(self) -> None:
        """Returns when the device has done what was asked of it so far: there a stage's time ends."""

    def finish(self, *, wants_images: bool) -> list[list[bytes]]:
        """Decodes; images of each job, files or :func:`engine.pixels.to_rows` ([] per job if not wanted, but decoded all the same)."""

    def restore(self) -> None:
        """Puts the pristine weights back, bit by bit, and forgets the batch."""

    def memory(self) -> Mapping[str, int]:
        """``device_bytes``, ``device_bytes_peak``, ``host_bytes``."""

    def resident(self) -> Mapping[str, list[str]]:
        """``base_model_ids`` and ``controlnet_ids`` on the device now."""

    def admit(self, kind: str, model_id: str, source: Mapping[str, Any]) -> None:
        """Makes a checkpoint or (in-process) ControlNet of the catalogue known, to be loaded when it is asked for."""


class ControlHost(Protocol):
    """The ControlNets of one ControlNet worker, serving several base workers (clients) in turn."""

    def open(self, client: str, pair: PairOfControlNets) -> None:
        """A base worker has attached."""

    def close(self, client: str) -> None:
        """It has detached or is gone: its job, if any, is forgotten. Others are not disturbed."""

    def begin(self, client: str, message: Mapping[str, Any]) -> None:
        """A client announces a job (what :meth:`Painter.begin` sent). Raises :class:`JobError` for this client only.

        What has to be loaded or captured for it is left to :meth:`advance`.
        """

    def awaited(self) -> Collection[str]:
        """Clients whose job cannot go on yet: what they send is left alone until it can."""

    def advance(self) -> bool:
        """Does a short piece of what clients wait for; False if all of it is under way elsewhere, and this should be tried again soon.

        So nobody waits longer than a piece for a load that somebody else needs.
        """

    def step(self, client: str, message: Mapping[str, Any]) -> None:
        """A client asks for the residuals of one step; they are pushed into its buffers as they are produced."""

    def admit(self, controlnet_id: str, source: Mapping[str, Any]) -> None:
        """Makes a ControlNet known, to be loaded when it is asked for; residents and clients are not disturbed."""

    def memory(self) -> Mapping[str, int]: ...
    def resident(self) -> list[str]: ...
