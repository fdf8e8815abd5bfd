"""What every export must say in its own form and give back when it is read: how many replicas and GPUs each pool has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.allocation import Allocation


@dataclass(frozen=True, slots=True, order=True)
class PoolCount:
    """One pool's size."""

    name: str
    role: str
    gpu_kind: str
    n_replicas: int
    n_gpus: int


def counts_of(allocation: Allocation) -> tuple[PoolCount, ...]:
    """The allocation's pools, by name."""
    return tuple(
        sorted(
            PoolCount(pool.name, pool.role, pool.gpu_kind, pool.n_replicas, pool.n_gpus) for pool in allocation.pools
        )
    )


def gpus_by_kind(counts: Iterable[PoolCount]) -> dict[str, int]:
    """GPUs of each kind, kinds sorted."""
    total: dict[str, int] = {}
    for count in sorted(counts):
        total[count.gpu_kind] = total.get(count.gpu_kind, 0) + count.n_gpus
    return dict(sorted(total.items()))


class LostInExportError(AssertionError):
    """What was read back from generated files is not what the plan says: a fault of the exporter, nothing has been written."""

    def __init__(self, target: str, planned: object, read: object) -> None:
        super().__init__(f"{target}: the plan has {planned}, the generated files say {read}")
