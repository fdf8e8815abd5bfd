"""Which ControlNets are on the device of a process: as many as fit, least recently used out first, weights replaced in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType

from engine.control_stack import ControlStack
from engine.models import bytes_of
from engine.options import EngineOptions
from engine.parts import NetworkParts
from engine.workers.model_sources import ModelSources, ModelWeights
from engine.workers.painter import JobError


class ResidentControlNets:
    """Keeps one or several stacks (one a resident checkpoint) supplied with the same networks.

    A network that leaves hands its memory to the one that comes, so that captured graphs stay valid and memory stays flat.
    """

    def __init__(
        self,
        sources: ModelSources,
        options: EngineOptions,
        parts: NetworkParts,
        n_max: int | None,
        progress: Callable[[str], None],
    ) -> None:
        """``n_max``: how many may be resident; None: as many as requests ask for."""
        self._sources = sources
        self._options = options
        self._parts = parts
        self._n_max = n_max
        self._progress = progress
        self._stacks: list[ControlStack] = []
        self._nets: dict[str, object] = {}
        """In order of use, the least recently used first."""

    @property
    def names(self) -> list[str]:
        """What is resident, least recently used first."""
        return list(self._nets)

    @property
    def bytes(self) -> int:
        """Bytes of all resident weights."""
        return sum(bytes_of(net) for net in self._nets.values())  # type: ignore[arg-type]

    def join(self, stack: ControlStack) -> None:
        """Supplies one more stack."""
        for name, net in self._nets.items():
            stack.add(name, net)  # type: ignore[arg-type]
        self._stacks.append(stack)

    def ensure(
        self,
        names: Sequence[str],
        weights: Mapping[str, ModelWeights] = MappingProxyType({}),
        in_use: Collection[str] = (),
    ) -> tuple[int, float]:
        """Makes these resident; returns how many had to be loaded, and the seconds that took.

        Args:
            names: what is needed.
            weights: of those that have been read already.
            in_use: stay if there is anything else that can make room.

        Raises:
            JobError: one cannot be loaded, or more are asked for at once than may be resident.
        """
        wanted = list(dict.fromkeys(names))
        if self._n_max is not None and len(wanted) > self._n_max:
            raise JobError(f"the job uses {len(wanted)} ControlNets of one worker, which holds at most {self._n_max}")
        missing = [name for name in wanted if name not in self._nets]
        started = time.perf_counter()
        for name in missing:
            self._progress("load")
            self._load(name, wanted, weights.get(name), in_use)
        for name in wanted:
            self._nets[name] = self._nets.pop(name)
        return len(missing), time.perf_counter() - started if missing else 0.0

    def _load(self, name: str, wanted: Sequence[str], weights: ModelWeights | None, in_use: Collection[str]) -> None:
        if self._n_max is None or len(self._nets) < self._n_max:
            net = self._sources.controlnet(name, self._options.device, self._options.dtype, weights)
            self._parts.admit((net,))
            for stack in self._stacks:
                stack.add(name, net)
            self._nets[name] = net
            return
        weights = weights or self._sources.read_controlnet(name)  # before anything is given up
        leaving = [held for held in self._nets if held not in wanted]
        old = next((held for held in leaving if held not in in_use), leaving[0])
        net = self._nets.pop(old)  # type: ignore[assignment]
        for stack in self._stacks:
            stack.rename(old, name)
        self._nets[name] = net
        try:
            self._sources.controlnet_into(name, net, weights)
        except BaseException:
            # Its memory holds neither network now: it must not serve under either name.
            del self._nets[name]
            for stack in self._stacks:
                stack.drop(name)
            self._parts.dismiss((net,))
            raise
