"""Which checkpoints are on the device of a base rank.

Up to ``n_max`` stay resident, each with its own captured graphs: switching between them costs nothing. A further one takes the
memory of the least recently used, weights copied into place: its graphs stay valid and memory stays flat.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.base import BaseWorker
from engine.options import EngineOptions
from engine.parts import NetworkParts
from engine.workers.model_sources import ModelSources
from engine.workers.resident_controlnets import ResidentControlNets


class ResidentCheckpoints:
    """The base workers of one process, one a resident checkpoint."""

    def __init__(
        self,
        sources: ModelSources,
        options: EngineOptions,
        parts: NetworkParts,
        nets: ResidentControlNets,
        n_max: int,
        half: int | None,
        progress: Callable[[str], None],
    ) -> None:
        """``half``: which half of guided requests this rank computes; None: both."""
        self._sources = sources
        self._options = options
        self._parts = parts
        self._nets = nets
        self._n_max = n_max
        self._half = half
        self._progress = progress
        self._workers: dict[str, BaseWorker] = {}
        """In order of use, the least recently used first."""

    @property
    def names(self) -> list[str]:
        """What is resident, least recently used first."""
        return list(self._workers)

    @property
    def bytes(self) -> int:
        """Bytes of all resident weights."""
        return sum(worker.models.bytes for worker in self._workers.values())

    def worker(self, model_id: str) -> BaseWorker:
        """The worker of a resident checkpoint."""
        return self._workers[model_id]

    def ensure(self, model_id: str) -> bool:
        """Makes a checkpoint resident and the most recently used; True if it had to be loaded.

        Raises:
            JobError: it cannot be loaded.
        """
        if model_id in self._workers:
            self._workers[model_id] = self._workers.pop(model_id)
            return False
        self._progress("load")
        weights = self._sources.read_checkpoint(model_id)  # before anything is given up
        if len(self._workers) < self._n_max:
            models = self._sources.checkpoint(model_id, self._options.device, self._options.dtype, weights)
            worker = BaseWorker(models, {}, self._options, half=self._half, parts=self._parts)
            self._nets.join(worker.local)
        else:
            worker = self._workers.pop(next(iter(self._workers)))
            # If this fails the memory holds neither checkpoint, and the worker is gone from the table.
            self._sources.checkpoint_into(model_id, worker.models, weights)
            worker.patcher.forget()
        self._workers[model_id] = worker
        return True
