"""Which waiting request an idle replica takes up next: by priority, then arrival, with bounded overtaking."""

from __future__ import annotations

from collections.abc import Sequence


def queue_key(priority: int, fair_tag: float, arrival_s: float, number: int) -> tuple[int, float, float, int]:
    """Sorts waiting requests: larger priority first, then the smaller tag, the earlier arrival, the smaller number.

    Args:
        priority: 0 for all where priorities are not looked at (first come, first served).
        fair_tag: start tag of ``engine.policies.fair_share``; 0 for all where tenants do not share by weight.
    """
    return (-priority, fair_tag, arrival_s, number)


def may_be_passed(
    is_ready: bool, is_resident: bool, n_overtaken: int, overtake_max: int, switch_overtake_max: int
) -> bool:
    """Whether a younger request may start before this one.

    Args:
        is_ready: all its LoRAs are in the host tier.
        is_resident: an idle replica that can serve it has its checkpoint on the device.
        n_overtaken: how often it has been passed already.
        overtake_max: how often a request that is not ready lets others pass.
        switch_overtake_max: likewise one that is not resident.
    """
    return (not is_ready and n_overtaken < overtake_max) or (not is_resident and n_overtaken < switch_overtake_max)


def next_in_line(
    is_ready: Sequence[bool],
    is_resident: Sequence[bool],
    n_overtaken: Sequence[int],
    overtake_max: int,
    switch_overtake_max: int,
) -> int:
    """Index of the request to start, -1 if none waits. The sequences are in queue order and hold only what can start now.

    The first that may not be passed; if all may be, the first, because an idle replica serves nobody. Those before the one that
    is returned have been overtaken once more (the caller counts). With both limits 0 it is always the first.
    """
    for index in range(len(is_ready)):
        if not may_be_passed(
            is_ready[index], is_resident[index], n_overtaken[index], overtake_max, switch_overtake_max
        ):
            return index
    return 0 if len(is_ready) > 0 else -1
