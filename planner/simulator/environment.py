"""A SimPy environment that calls back at exact times.

SimPy schedules by delay, and ``now + (time - now)`` is not always ``time`` in floating point: recorded times would then differ
from scheduled ones in the last digit. Events here carry the absolute time, and a priority that decides ties by kind.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappush
from typing import Any, Final

import simpy
from simpy.events import Event, EventPriority

EXPIRY: Final = 0
"""Ties: what expires now is not taken up now; a replica that becomes free now serves an arrival of now."""
COMPLETION: Final = 1
ARRIVAL: Final = 2


class ExactEnvironment(simpy.Environment):
    """SimPy's environment, with :meth:`call_at`."""

    n_events: int = 0

    def call_at(self, time_s: float, priority: int, callback: Callable[[Event], None], value: Any) -> None:
        """Calls ``callback(event)``, with ``event._value`` set to ``value``, at ``time_s`` (now, if that has passed)."""
        event = Event.__new__(Event)
        event.env = self
        event.callbacks = [callback]
        event._ok = True
        event._value = value
        self.n_events += 1
        moment_s = time_s if time_s > self._now else self._now
        heappush(self._queue, (moment_s, EventPriority(priority), next(self._eid), event))

    def skip_to(self, time_s: float) -> bool:
        """Moves the clock there if something is to happen, and all of it later; else leaves it. Counts as an event."""
        if not self._queue or self._queue[0][0] <= time_s:
            return False
        self._now = time_s
        self.n_events += 1
        return True
