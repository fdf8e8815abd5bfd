"""When each live job expires: a heap that forgets jobs that ended."""

from __future__ import annotations

import heapq
from collections.abc import Container

from engine.serving.waiting import Ticket


class Deadlines:
    """Moments of expiry. Entries of ended jobs stay until they are met or outnumber the live ones."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, str]] = []

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def next_s(self) -> float:
        """The earliest moment; infinite for none."""
        return self._heap[0][0] if self._heap else float("inf")

    def add(self, ticket: Ticket, live: Container[str], n_live: int) -> None:
        """Remembers a ticket; ``live`` holds the ids of jobs that have not ended."""
        heapq.heappush(self._heap, (ticket.deadline_at_s, ticket.number, ticket.job.request_id))
        if len(self._heap) > 2 * n_live + 64:
            self._heap = [entry for entry in self._heap if entry[2] in live]
            heapq.heapify(self._heap)

    def pop_due(self, now_s: float) -> tuple[int, str] | None:
        """Number and id of the job whose moment has come first; None if none is due. It may have ended already."""
        if not self._heap or self._heap[0][0] > now_s:
            return None
        _, number, request_id = heapq.heappop(self._heap)
        return number, request_id
