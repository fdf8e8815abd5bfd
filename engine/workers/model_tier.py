"""Which models wait in host memory to be copied onto the device: least recently used out first, by bytes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Final

from engine.allocation import GIB
from engine.policies import lru
from engine.workers.host_segments import available_bytes
from engine.workers.host_weights import HostWeights

FREE_BYTES_MIN: Final = 2 * GIB
"""What is left of the host's memory for everything else, beside room for one more model as large."""


class ModelTier:
    """Checked weights by id. May be asked from several threads.

    Beside what it keeps, one more model may be in memory: the one that is being read, or one that has left while it is copied.
    """

    def __init__(
        self,
        what: str,
        capacity_gib: float,
        available: Callable[[], int] = available_bytes,
        say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    ) -> None:
        """``capacity_gib``: 0: nothing is kept. ``what`` names it in messages."""
        self.capacity_bytes = int(capacity_gib * GIB)
        self._what = what
        self._available = available
        self._say = say
        self._has_said = False
        self._lock = threading.Lock()
        self._held: list[tuple[str, object, HostWeights] | None] = []
        """By slot: id, what the source looked like when it was read, and the weights."""
        self._n_bytes: list[int] = []
        self._following, self._preceding = lru.empty_ring(0)
        self.used_bytes = 0

    @property
    def ids(self) -> list[str]:
        """What is held, least recently used first."""
        with self._lock:
            return [entry[0] for slot in self._order() if (entry := self._held[slot]) is not None]

    def may_keep(self, n_bytes: int) -> bool:
        """Whether it is worth making a copy of weights that are not on the host yet."""
        return n_bytes <= self.capacity_bytes and self._available() >= n_bytes + FREE_BYTES_MIN

    def get(self, model_id: str, sign: object) -> HostWeights | None:
        """Weights that were read from a source that looked the same; what was read from another is dropped."""
        with self._lock:
            slot = self._slot(model_id)
            entry = self._held[slot] if slot is not None else None
            if slot is None or entry is None:
                return None
            if entry[1] != sign:
                self._remove(slot)
                return None
            lru.touch(slot, self._following, self._preceding)
            return entry[2]

    def put(self, model_id: str, sign: object, weights: HostWeights) -> bool:
        """Keeps weights that were checked, as far as there is room; says whether it does."""
        n_bytes = weights.bytes
        with self._lock:
            old = self._slot(model_id)
            if old is not None:
                self._remove(old)
            if n_bytes > self.capacity_bytes:
                return False
            # The host's memory may be less than the budget: one more model as large must still fit beside.
            lacking_bytes = n_bytes + FREE_BYTES_MIN - self._available()
            room_bytes = min(self.capacity_bytes, self.used_bytes + n_bytes - max(0, lacking_bytes))
            if lacking_bytes > 0 and not self._has_said:
                self._has_said = True
                self._say(
                    f"host tier: the host has too little free memory for {self.capacity_bytes / GIB:g} GiB of {self._what}; "
                    f"{max(0, room_bytes) / GIB:.1f} GiB are used. Lower host_{self._what}_gib, or give the worker more memory."
                )
            slot = self._free_slot()
            self._n_bytes[slot] = n_bytes
            pins = [0] * len(self._held)
            self.used_bytes = lru.insert(
                slot, self._following, self._preceding, self._n_bytes, self.used_bytes, max(0, room_bytes), pins
            )
            for other in range(len(self._held)):
                if other != slot and self._preceding[other] == other:
                    self._held[other] = None  # it had to leave
            if self._preceding[slot] == slot:
                return False
            self._held[slot] = (model_id, sign, weights)
            return True

    def drop(self, model_id: str) -> None:
        """Forgets a model, if it is held."""
        with self._lock:
            slot = self._slot(model_id)
            if slot is not None:
                self._remove(slot)

    def _remove(self, slot: int) -> None:
        lru.remove(slot, self._following, self._preceding)
        self.used_bytes -= self._n_bytes[slot]
        self._held[slot] = None

    def _slot(self, model_id: str) -> int | None:
        return next((slot for slot, entry in enumerate(self._held) if entry is not None and entry[0] == model_id), None)

    def _free_slot(self) -> int:
        """A slot that nobody holds; the ring is made one larger if there is none."""
        for slot, entry in enumerate(self._held):
            if entry is None:
                return slot
        order = self._order()
        self._held.append(None)
        self._n_bytes.append(0)
        self._following, self._preceding = lru.empty_ring(len(self._held))
        pins = [0] * len(self._held)
        held_bytes = 0
        for slot in order:
            held_bytes = lru.insert(
                slot, self._following, self._preceding, self._n_bytes, held_bytes, self.used_bytes, pins
            )
        return len(self._held) - 1

    def _order(self) -> list[int]:
        """Slots that are held, least recently used first."""
        anchor = len(self._held)
        order, slot = [], self._preceding[anchor]
        while slot != anchor:
            order.append(slot)
            slot = self._preceding[slot]
        return order
