"""LoRAs in host memory and on their way there: caches by bytes, one fetch at a time for each LoRA, one store for all.

A tier belongs to one host; every base replica there shares it. A LoRA takes its room when its fetch begins. What does not fit,
because everything else is in use, is fetched for those who wait for it and not kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

from simpy.events import Event

from engine.allocation import CachePolicy
from planner.simulator.environment import COMPLETION, ExactEnvironment

Waiter = Callable[[float], None]
ROUNDING: Final = 1e-12
"""Of its bytes: a fetch with no more than this left has ended but for rounding."""


class HostTier:
    """The LoRAs of one host."""

    def __init__(
        self, n_bytes: Sequence[int], capacity_bytes: int, policy: CachePolicy = "lru", ttl_s: float | None = None
    ) -> None:
        self._n_bytes = n_bytes
        self.capacity_bytes = capacity_bytes
        self._policy = policy
        self._ttl_s = float("inf") if ttl_s is None else ttl_s
        self.used_bytes = 0
        self.peak_bytes = 0
        self._last_use_s: OrderedDict[int, float] = OrderedDict()
        """Resident LoRAs, least recently used first."""
        self._n_uses: dict[int, int] = {}
        """Over the whole run, of resident and other LoRAs."""
        self._n_pins: dict[int, int] = {}
        self.flights: dict[int, list[Waiter]] = {}
        """LoRAs on their way, and who waits for them."""

    def holds(self, lora: int, now_s: float) -> bool:
        """Whether a LoRA is there, whole and not past its time."""
        return lora in self._last_use_s and lora not in self.flights and not self._is_stale(lora, now_s)

    def use(self, lora: int, now_s: float) -> bool:
        """Counts a use; whether the LoRA is there (then it is also the most recent)."""
        self._n_uses[lora] = self._n_uses.get(lora, 0) + 1
        if not self.holds(lora, now_s):
            return False
        self._last_use_s[lora] = now_s
        self._last_use_s.move_to_end(lora)
        return True

    def pin(self, lora: int) -> None:
        """Keeps a LoRA until :meth:`unpin`."""
        self._n_pins[lora] = self._n_pins.get(lora, 0) + 1

    def unpin(self, lora: int) -> None:
        """Undoes one :meth:`pin`."""
        self._n_pins[lora] -= 1

    def reserve(self, lora: int, now_s: float) -> bool:
        """Makes room and takes it; False if there is none. The LoRA must not be resident, unless past its time."""
        if lora in self._last_use_s:
            self._drop(lora)
        room_bytes = self.capacity_bytes - self._n_bytes[lora]
        if room_bytes < 0:
            return False
        if self._policy == "ttl":
            for other in [key for key in self._last_use_s if self._is_stale(key, now_s) and not self._is_held(key)]:
                self._drop(other)
        while self.used_bytes > room_bytes:
            victim = self._victim()
            if victim < 0:
                return False
            self._drop(victim)
        self._last_use_s[lora] = now_s
        self.used_bytes += self._n_bytes[lora]
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return True

    def land(self, lora: int, now_s: float) -> list[Waiter]:
        """A fetch is over; who waited for it."""
        if lora in self._last_use_s:
            self._last_use_s[lora] = now_s
            self._last_use_s.move_to_end(lora)
        return self.flights.pop(lora)

    def _victim(self) -> int:
        """Who leaves next; -1 if everybody must stay. Least recently used first among equals."""
        free = [key for key in self._last_use_s if not self._is_held(key)]
        if not free:
            return -1
        return min(free, key=lambda key: self._n_uses.get(key, 0)) if self._policy == "lfu" else free[0]

    def _is_held(self, lora: int) -> bool:
        return self._n_pins.get(lora, 0) > 0 or lora in self.flights

    def _is_stale(self, lora: int, now_s: float) -> bool:
        return now_s - self._last_use_s[lora] >= self._ttl_s and self._n_pins.get(lora, 0) == 0

    def _drop(self, lora: int) -> None:
        del self._last_use_s[lora]
        self.used_bytes -= self._n_bytes[lora]


class Flow:
    """One fetch under way."""

    __slots__ = ("at_end", "cap_per_s", "left_bytes", "n_bytes", "number", "rate_per_s")

    def __init__(self, number: int, n_bytes: float, alone_s: float, at_end: Callable[[float], None]) -> None:
        self.number = number
        self.n_bytes = n_bytes
        self.left_bytes = n_bytes
        self.cap_per_s = n_bytes / alone_s
        self.rate_per_s = 0.0
        self.at_end = at_end


class Store:
    """The remote store: fetches share its bandwidth max–min fair, none faster than alone (processor sharing with caps)."""

    def __init__(self, env: ExactEnvironment, bandwidth_bytes_per_s: float) -> None:
        self._env = env
        self._bandwidth = bandwidth_bytes_per_s
        self._flows: list[Flow] = []
        self._updated_s = 0.0
        self._n_flows = 0
        self._version = 0

    def fetch(self, n_bytes: float, alone_s: float, now_s: float, at_end: Callable[[float], None]) -> None:
        """Fetches so many bytes; ``at_end(time)`` is called when they are there."""
        if alone_s <= 0.0 or n_bytes <= 0.0 or self._bandwidth == float("inf"):
            self._env.call_at(now_s + alone_s, COMPLETION, lambda _: at_end(self._env.now), None)
            return
        self._progress(now_s)
        self._flows.append(Flow(self._n_flows, n_bytes, alone_s, at_end))
        self._n_flows += 1
        self._share(now_s)

    def _progress(self, now_s: float) -> None:
        for flow in self._flows:
            flow.left_bytes -= flow.rate_per_s * (now_s - self._updated_s)
        self._updated_s = now_s

    def _share(self, now_s: float) -> None:
        left = self._bandwidth
        order = [(flow.cap_per_s, flow.number, flow) for flow in self._flows]
        order.sort(key=lambda item: item[:2])
        for k, (cap, _, flow) in enumerate(order):
            flow.rate_per_s = min(cap, left / (len(order) - k))
            left -= flow.rate_per_s
        self._version += 1
        if self._flows:
            next_s = now_s + min(max(flow.left_bytes, 0.0) / flow.rate_per_s for flow in self._flows)
            self._env.call_at(next_s, COMPLETION, self._on_end, self._version)

    def _on_end(self, event: Event) -> None:
        if event._value != self._version:
            return
        now_s = self._env.now
        due = min(self._flows, key=lambda flow: (flow.left_bytes / flow.rate_per_s, flow.number))
        self._progress(now_s)
        # the one that this event is for, and those that end with it but for rounding
        ended = [flow for flow in self._flows if flow is due or flow.left_bytes <= ROUNDING * flow.n_bytes]
        self._flows = [flow for flow in self._flows if flow not in ended]
        self._share(now_s)
        for flow in ended:  # in the order in which they began
            flow.at_end(now_s)


class Fetching:
    """A request's LoRAs, one after the other: there, on their way for somebody else, or to be fetched."""

    def __init__(
        self,
        tier: HostTier,
        store: Store,
        n_bytes: Sequence[int],
        alone_s: Sequence[float],
        loras: Sequence[int],
        at_end: Callable[[float], None],
    ) -> None:
        self._tier = tier
        self._store = store
        self._n_bytes = n_bytes
        self._alone_s = alone_s
        self._loras = loras
        self._at_end = at_end
        self._pinned: list[int] = []
        self._next = 0
        self._is_abandoned = False
        self.n_fetched = 0
        """Fetches begun for this request; joining another's is none."""

    def go(self, now_s: float) -> None:
        """Goes as far as it can now; ``at_end`` is called (perhaps at once) when every LoRA is there."""
        while self._next < len(self._loras):
            lora = self._loras[self._next]
            self._next += 1
            if self._tier.use(lora, now_s):
                self._hold(lora)
                continue
            waiters = self._tier.flights.get(lora)
            if waiters is not None:
                waiters.append(self._arrived)
                return
            self.n_fetched += 1
            self._begin(lora, now_s)
            return
        self._at_end(now_s)

    def _begin(self, lora: int, now_s: float) -> None:
        tier = self._tier
        tier.reserve(lora, now_s)
        tier.flights[lora] = [self._arrived]

        def landed(end_s: float) -> None:
            for waiter in tier.land(lora, end_s):
                waiter(end_s)

        self._store.fetch(self._n_bytes[lora], self._alone_s[lora], now_s, landed)

    def _arrived(self, now_s: float) -> None:
        if self._is_abandoned:
            return
        self._hold(self._loras[self._next - 1])
        self.go(now_s)

    def _hold(self, lora: int) -> None:
        self._tier.pin(lora)
        self._pinned.append(lora)

    def release(self) -> None:
        """The request needs its LoRAs no more; what is still on its way comes for others."""
        self._is_abandoned = True
        for lora in self._pinned:
            self._tier.unpin(lora)
        self._pinned.clear()
