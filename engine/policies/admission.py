"""Whether an arriving request may wait."""

from __future__ import annotations

UNLIMITED = -1


def is_admitted(n_waiting: int, queue_limit: int) -> bool:
    """Whether one more request may wait where ``n_waiting`` already do; ``queue_limit`` UNLIMITED admits all."""
    return queue_limit == UNLIMITED or n_waiting < queue_limit
