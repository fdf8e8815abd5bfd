"""Makes ControlNets ready that jobs wait for, without holding up the work path: read beside it, captured on it piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from engine.control_stack import ControlStack, ShapeKey
from engine.workers.model_sources import ModelSources
from engine.workers.resident_controlnets import ResidentControlNets


class Readying:
    """One of these serves one stack. Reading takes seconds for each ControlNet, a stage's capture tenths of one."""

    def __init__(
        self,
        nets: ResidentControlNets,
        sources: ModelSources,
        stack: ControlStack,
        preparing: Callable[[ShapeKey, str], Iterator[None]],
        progress: Callable[[str], None],
    ) -> None:
        """``preparing``: captures one ControlNet at a shape, in pieces."""
        self._nets = nets
        self._sources = sources
        self._stack = stack
        self._preparing = preparing
        self._progress = progress
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="controlnet-reader")

    def is_ready(self, key: ShapeKey, names: Sequence[str]) -> bool:
        """Whether nothing has to be loaded or captured for a job."""
        return all(name in self._nets.names for name in names) and self._stack.is_prepared(key, names)

    def pieces(
        self, key: ShapeKey, names: Sequence[str], in_use: Callable[[], Collection[str]]
    ) -> Iterator[tuple[bool, int]]:
        """Makes ControlNets ready at a shape; ends when they are.

        Args:
            key: the shape.
            names: the job's ControlNets.
            in_use: those that other jobs hold, which make room last.

        Yields:
            Whether something was done (False: a read is under way), and how many ControlNets were loaded by it.

        Raises:
            JobError: one cannot be loaded, or there is no room for all of them.
        """
        while not self.is_ready(key, names):
            for place, name in enumerate(names):
                if name in self._nets.names:
                    continue
                self._progress("load")
                reading = self._reader.submit(self._sources.read_controlnet, name)
                while not reading.done():
                    yield False, 0
                weights = {name: reading.result()}
                n_loaded, _ = self._nets.ensure(names[: place + 1], weights, in_use())
                yield True, n_loaded
            for name in names:
                if self._stack.is_prepared(key, [name]):
                    continue
                self._progress("compile")
                for _ in self._preparing(key, name):
                    yield True, 0
                    self._progress("compile")
        self._nets.ensure(names)  # used last
