"""Which replica takes a request, and which ControlNet worker serves one of its ControlNets."""

from __future__ import annotations

from collections.abc import Sequence

CHECKPOINT_WEIGHT = 1000
"""A resident checkpoint outweighs any number of warm add-ons: loading it takes seconds, an add-on a fraction of one."""


def affinity(has_checkpoint: bool, n_warm_add_ons: int) -> int:
    """How much of what a request needs an idle replica already has; larger is better."""
    return CHECKPOINT_WEIGHT * has_checkpoint + n_warm_add_ons


def best_replica(affinities: Sequence[int]) -> int:
    """Index of the first largest affinity, -1 if there is none: warm replicas are preferred, then the lowest index."""
    best = -1
    best_value = -1
    for index in range(len(affinities)):
        if affinities[index] > best_value:
            best_value = affinities[index]
            best = index
    return best


def least_loaded(loads: Sequence[float], is_resident: Sequence[bool]) -> int:
    """Index of the smallest load; among equals one where the ControlNet is resident, then the lowest index. -1 if none."""
    best = -1
    for index in range(len(loads)):
        if (
            best < 0
            or loads[index] < loads[best]
            or (loads[index] == loads[best] and is_resident[index] and not is_resident[best])
        ):
            best = index
    return best


def control_load(n_steps: int, start: float, end: float, forward_batch: int) -> float:
    """How much one use of a ControlNet asks of a worker, in samples per denoising step: what :func:`least_loaded` compares.

    The share of the request's steps in which it is used, times the samples of a forward. ``n_steps`` at least 1. Which steps
    are in a window: those with ``start <= i / n_steps`` and ``(i + 1) / n_steps <= end``, as Diffusers decides it.
    """
    n_used = 0
    for step in range(n_steps):
        if start <= step / n_steps and (step + 1) / n_steps <= end:
            n_used += 1
    return forward_batch * n_used / n_steps
