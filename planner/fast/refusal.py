"""What the compiled tier does not model is refused by name, so that callers fall back to the SimPy model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from engine.allocation import Allocation
from planner.simulator import mechanisms_in_use
from planner.simulator.replicas import FactsByPool, facts_of
from planner.simulator.world import World

STATE_BYTES_MAX: Final = 6 * 2**30
"""Most memory for the caches' links (models × replicas, 8 bytes each); the SimPy model needs several times as much."""


class NotModelledError(Exception):
    """The compiled tier cannot run this; the SimPy model can. ``reasons`` names each mechanism or limit."""

    def __init__(self, reasons: tuple[str, ...]) -> None:
        super().__init__(f"the fast tier does not model {', '.join(reasons)}; the SimPy model does")
        self.reasons = reasons


def check_mechanisms(
    allocation: Allocation,
    world: World,
    services: Mapping[str, object],
    facts: FactsByPool,
) -> None:
    """Raises :class:`NotModelledError` with every mechanism that is on: the compiled tier has the static model only."""
    reasons = list(mechanisms_in_use(allocation, world))
    # one size of device a role: that is how its caches are laid out
    sizes = [{facts_of(facts, pool) for pool in allocation.pools_of(role)} for role in ("base", "controlnet")]
    if any(len(own) > 1 for own in sizes) or any(pool.name in services for pool in allocation.pools_of("controlnet")):
        reasons.append("gpu_kinds")
    if reasons:
        raise NotModelledError(tuple(dict.fromkeys(reasons)))


def check_size(n_keys: int, n_replicas: int) -> None:
    """Raises :class:`NotModelledError` if the caches' state would not fit."""
    state_bytes = 8 * n_keys * n_replicas
    if state_bytes > STATE_BYTES_MAX:
        raise NotModelledError((
            f"{n_keys} models on {n_replicas} replicas ({state_bytes / 2**30:.1f} GiB of cache state, "
            f"at most {STATE_BYTES_MAX / 2**30:.0f})",
        ))  # fmt: skip
