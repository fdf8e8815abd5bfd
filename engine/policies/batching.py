"""Which waiting requests share a forward, and how long one waits for company.

Whether two requests are compatible is not decided here: they carry the same ``kind`` (a number) if they agree in everything
that a batch shares.
"""

from __future__ import annotations

from collections.abc import Sequence

ALONE = 0
"""As ``forward_batch_max``: requests are never put together."""


def batch_of(
    head: int, kinds: Sequence[int], forward_batches: Sequence[int], is_free: Sequence[bool], forward_batch_max: int
) -> list[int]:
    """Indices of the requests that run together with request ``head``, itself first, then the others in queue order.

    First fit: a request that would make the forward batch larger than ``forward_batch_max`` is left out and smaller ones behind
    it are still tried. A head that is larger by itself runs alone.

    Args:
        is_free: False for requests that must not join others (tried again after a failure, tenant at its limit).
    """
    members = [head]
    room = forward_batch_max - forward_batches[head]
    if room <= 0 or not is_free[head]:
        return members
    for index in range(len(kinds)):
        if index != head and is_free[index] and kinds[index] == kinds[head] and forward_batches[index] <= room:
            members.append(index)
            room -= forward_batches[index]
            if room == 0:
                break
    return members


def is_ripe(
    now_s: float,
    arrival_s: float,
    batch_window_s: float,
    forward_batch: int,
    waiting_batch: int,
    forward_batch_max: int,
) -> bool:
    """Whether a request need not wait for more company.

    Args:
        forward_batch: its own samples.
        waiting_batch: samples of all waiting requests of its kind, its own included.
    """
    return (
        batch_window_s <= 0.0
        or forward_batch >= forward_batch_max
        or waiting_batch >= forward_batch_max
        or now_s >= arrival_s + batch_window_s
    )
