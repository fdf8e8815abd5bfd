"""Where every LoRA is: in the host tier (by bytes, under a cache policy), being fetched, or refused. No files are touched here.

The front process is the only one that decides what the host tier holds; loaders fetch and check, workers map.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from engine.allocation import CachePolicy
from engine.policies import lru

REFUSED_MAX: Final = 10_000
"""Refusals that are remembered; the oldest is forgotten, and its file would then be fetched and refused again."""
COUNTED_MAX: Final = 100_000
"""LoRAs whose uses are counted, those last used."""
BACKOFF_FIRST_S: Final = 1.0
BACKOFF_MAX_S: Final = 60.0
_NO_LIMIT: Final = 2**62
_NEVER_S: Final = float("inf")


@dataclass(frozen=True, slots=True)
class Dropped:
    """A file that is to leave the host tier."""

    lora_id: str
    path: str


@dataclass(slots=True)
class _Failing:
    n_failures: int
    again_at_s: float


class LoraCache:
    """State of the host tier. What cannot be held (larger than the tier, or all else is pinned) stays only while it is pinned."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._policy: CachePolicy = "lru"
        self._ttl_s = _NEVER_S
        self._last_use_s: dict[str, float] = {}
        """Of those that are kept."""
        self._n_uses: OrderedDict[str, int] = OrderedDict()
        self._slots: dict[str, int] = {}
        self._ids: list[str] = []
        self._paths: list[str] = []
        self._n_bytes: list[int] = []
        self._slot_pins: list[int] = []
        self._free: list[int] = []
        self._following, self._preceding = lru.empty_ring(0)
        self._pins: dict[str, int] = {}
        self._passing: dict[str, tuple[str, int]] = {}
        """Present but not kept: id to path and bytes."""
        self._fetching: dict[str, float] = {}
        """Id to when the fetch began."""
        self._failing: OrderedDict[str, _Failing] = OrderedDict()
        self._refused: OrderedDict[str, str] = OrderedDict()

    def set_policy(self, policy: CachePolicy, ttl_s: float | None) -> None:
        """Which one leaves; see ``Policies.lora_cache_policy``."""
        self._policy = policy
        self._ttl_s = _NEVER_S if ttl_s is None or policy != "ttl" else ttl_s

    # what is there

    @property
    def held_bytes(self) -> int:
        """Bytes of all files that are there, those included that are not kept."""
        return self.used_bytes + sum(n_bytes for _, n_bytes in self._passing.values())

    def held(self) -> dict[str, int]:
        """Id to bytes of what is kept, least recently used first."""
        found: dict[str, int] = {}
        anchor = len(self._ids)
        at = self._preceding[anchor]
        while at != anchor:
            found[self._ids[at]] = self._n_bytes[at]
            at = self._preceding[at]
        return found

    @property
    def n_pins(self) -> int:
        """Sum of all pins."""
        return sum(self._pins.values())

    def path_of(self, lora_id: str) -> str | None:
        """Its checked file in the host tier; None if it is not there."""
        slot = self._slots.get(lora_id)
        if slot is not None:
            return self._paths[slot]
        passing = self._passing.get(lora_id)
        return None if passing is None else passing[0]

    def touch(self, lora_id: str, now_s: float) -> bool:
        """Marks it as just used; False if it is not there."""
        slot = self._slots.get(lora_id)
        if slot is not None:
            self._last_use_s[lora_id] = now_s
            return lru.touch(slot, self._following, self._preceding)
        return lora_id in self._passing

    def count_use(self, lora_id: str) -> None:
        """One more request uses it; counted over the whole run, whether or not it is there."""
        self._n_uses[lora_id] = self._n_uses.pop(lora_id, 0) + 1
        if len(self._n_uses) > COUNTED_MAX:
            self._n_uses.popitem(last=False)

    def stale(self, now_s: float) -> list[Dropped]:
        """Takes out what was not used, nor pinned, for the time that the policy keeps it."""
        if self._ttl_s == _NEVER_S:
            return []
        old = [
            lora_id
            for lora_id, slot in self._slots.items()
            if self._slot_pins[slot] == 0 and now_s >= self._last_use_s[lora_id] + self._ttl_s
        ]
        return [self._take_out(lora_id) for lora_id in old]

    def next_stale_s(self) -> float:
        """When the next unpinned one has been unused for long enough to go; infinite for never."""
        if self._ttl_s == _NEVER_S:
            return _NEVER_S
        times = [self._last_use_s[lora_id] for lora_id, slot in self._slots.items() if self._slot_pins[slot] == 0]
        return min(times, default=_NEVER_S) + self._ttl_s

    def pin(self, lora_id: str) -> None:
        """A running batch uses it, or will as soon as it is there."""
        self._pins[lora_id] = self._pins.get(lora_id, 0) + 1
        slot = self._slots.get(lora_id)
        if slot is not None:
            self._slot_pins[slot] += 1

    def unpin(self, lora_id: str) -> list[Dropped]:
        """Takes one pin off; what was only kept for its pins is dropped."""
        left = self._pins[lora_id] - 1
        slot = self._slots.get(lora_id)
        if slot is not None:
            self._slot_pins[slot] -= 1
        if left > 0:
            self._pins[lora_id] = left
            return []
        del self._pins[lora_id]
        passing = self._passing.pop(lora_id, None)
        return [] if passing is None else [Dropped(lora_id, passing[0])]

    # fetching

    def is_fetching(self, lora_id: str) -> bool:
        """Whether a loader has it."""
        return lora_id in self._fetching

    def begin_fetch(self, lora_id: str, now_s: float) -> None:
        """A loader is asked for it."""
        self._fetching[lora_id] = now_s

    def overdue(self, now_s: float, limit_s: float) -> list[str]:
        """Fetches that began ``limit_s`` or longer ago."""
        return [lora_id for lora_id, began_s in self._fetching.items() if now_s >= began_s + limit_s]

    def oldest_fetch_s(self) -> float | None:
        """When the oldest fetch under way began."""
        return min(self._fetching.values(), default=None)

    def may_prefetch(self, lora_id: str, now_s: float) -> bool:
        """Not there, not under way, and not in the pause after a failed fetch."""
        if self.path_of(lora_id) is not None or lora_id in self._fetching:
            return False
        failing = self._failing.get(lora_id)
        return failing is None or now_s >= failing.again_at_s

    def prefetch_again_s(self, lora_id: str) -> float | None:
        """When the pause after a failed fetch is over; None if the last fetch did not fail."""
        failing = self._failing.get(lora_id)
        return None if failing is None else failing.again_at_s

    def fetched(self, lora_id: str, path: str, n_bytes: int, now_s: float) -> list[Dropped]:
        """It is in the host tier now; gives what has to leave for it (itself, if nobody needs it and it does not fit)."""
        self._fetching.pop(lora_id, None)
        self._failing.pop(lora_id, None)
        known = self.path_of(lora_id)
        if known is not None:
            self.touch(lora_id, now_s)
            return [] if known == path else [Dropped(lora_id, path)]
        if lora_id in self._refused:
            return [Dropped(lora_id, path)]
        dropped = self.stale(now_s)
        if self._policy == "lfu":
            dropped += self._least_used(n_bytes)
        slot = self._free.pop() if self._free else self._new_slot()
        self._ids[slot], self._paths[slot], self._n_bytes[slot] = lora_id, path, n_bytes
        self._slot_pins[slot] = self._pins.get(lora_id, 0)
        self.used_bytes = lru.insert(
            slot,
            self._following,
            self._preceding,
            self._n_bytes,
            self.used_bytes,
            self.capacity_bytes,
            self._slot_pins,
        )
        evicted = [held for held, at in self._slots.items() if self._following[at] == at]
        dropped += [self._forget(held) for held in evicted]
        if self._following[slot] != slot:
            self._slots[lora_id] = slot
            self._last_use_s[lora_id] = now_s
            return dropped
        self._free.append(slot)
        if lora_id in self._pins:
            self._passing[lora_id] = (path, n_bytes)
        else:
            dropped.append(Dropped(lora_id, path))
        return dropped

    # refusals

    def fetch_failed(self, lora_id: str, now_s: float) -> None:
        """This fetch came to nothing; the next one that nobody waits for is tried after a pause that doubles."""
        self._fetching.pop(lora_id, None)
        failing = self._failing.pop(lora_id, None) or _Failing(0, now_s)
        failing.n_failures += 1
        pause_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(failing.n_failures - 1, 30))
        failing.again_at_s = now_s + pause_s
        self._failing[lora_id] = failing
        if len(self._failing) > REFUSED_MAX:
            self._failing.popitem(last=False)

    def refuse(self, lora_id: str, reason: str) -> None:
        """Its file is not what it claims: no job may use it any more."""
        self._fetching.pop(lora_id, None)
        self._failing.pop(lora_id, None)
        self._refused[lora_id] = reason
        if len(self._refused) > REFUSED_MAX:
            self._refused.popitem(last=False)

    def pardon(self, lora_id: str) -> None:
        """Forgets a refusal: the file was replaced."""
        self._refused.pop(lora_id, None)

    def refusal_of(self, lora_id: str) -> str | None:
        """Why no job may use it; None if they may."""
        return self._refused.get(lora_id)

    def refusals(self) -> dict[str, str]:
        """Refused LoRAs and why, oldest first."""
        return dict(self._refused)

    def _least_used(self, n_bytes: int) -> list[Dropped]:
        """Makes room by taking out the least often used that are not pinned, among equals the least recently used."""
        dropped: list[Dropped] = []
        if n_bytes > self.capacity_bytes:
            return dropped
        while self.used_bytes + n_bytes > self.capacity_bytes:
            free: list[str] = []
            anchor = len(self._ids)
            at = self._preceding[anchor]
            while at != anchor:
                if self._slot_pins[at] == 0:
                    free.append(self._ids[at])
                at = self._preceding[at]
            if not free:
                break
            dropped.append(self._take_out(min(free, key=lambda lora_id: self._n_uses.get(lora_id, 0))))
        return dropped

    def _take_out(self, lora_id: str) -> Dropped:
        slot = self._slots[lora_id]
        lru.remove(slot, self._following, self._preceding)
        self.used_bytes -= self._n_bytes[slot]
        return self._forget(lora_id)

    def _forget(self, lora_id: str) -> Dropped:
        """Frees the slot of one that is out of the ring."""
        slot = self._slots.pop(lora_id)
        del self._last_use_s[lora_id]
        self._free.append(slot)
        return Dropped(lora_id, self._paths[slot])

    def _new_slot(self) -> int:
        """Doubles the ring, which has a fixed length, and keeps its order."""
        n_old = len(self._ids)
        n_new = max(16, 2 * n_old)
        newest_first = []
        at = self._following[n_old]
        while at != n_old:
            newest_first.append(at)
            at = self._following[at]
        self._following, self._preceding = lru.empty_ring(n_new)
        for values, filler in ((self._ids, ""), (self._paths, "")):
            values.extend([filler] * (n_new - n_old))
        for numbers in (self._n_bytes, self._slot_pins):
            numbers.extend([0] * (n_new - n_old))
        for slot in reversed(newest_first):
            lru.insert(slot, self._following, self._preceding, self._n_bytes, 0, _NO_LIMIT, self._slot_pins)
        self._free.extend(range(n_new - 1, n_old, -1))
        return n_old
