"""Least-recently-used residency over integer keys 0..n-1, as a doubly linked ring in two arrays.

``following`` and ``preceding`` have length n + 1; entry n is the ring's anchor: ``following[n]`` is the most recently used
key, ``preceding[n]`` the least. A key that is not resident points at itself. Every operation but an eviction that meets
pinned keys is O(1), in plain Python and compiled alike; the number of bytes held is the caller's scalar.
"""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence


def empty_ring(n_keys: int) -> tuple[list[int], list[int]]:
    """``(following, preceding)`` of a cache in which nothing is resident."""
    return list(range(n_keys + 1)), list(range(n_keys + 1))


def touch(key: int, following: MutableSequence[int], preceding: MutableSequence[int]) -> bool:
    """Marks a key as just used; False, and no change, if it is not resident."""
    before = preceding[key]
    if before == key:
        return False
    anchor = len(following) - 1
    if before != anchor:  # not already the most recent
        after = following[key]
        following[before] = after
        preceding[after] = before
        _link_first(key, anchor, following, preceding)
    return True


def insert(
    key: int,
    following: MutableSequence[int],
    preceding: MutableSequence[int],
    n_bytes: Sequence[int],
    used_bytes: int,
    capacity_bytes: int,
    n_pins: Sequence[int],
) -> int:
    """Makes a key that is not resident the most recent one, evicting from the least recent; returns the bytes then held.

    Keys with ``n_pins[key] > 0`` stay. If the key does not fit even so, nothing is inserted (what was evicted on the way
    stays out) and the caller sees that it is still not resident.
    """
    anchor = len(following) - 1
    room_bytes = capacity_bytes - n_bytes[key]
    if room_bytes < 0:
        return used_bytes
    victim = preceding[anchor]
    while used_bytes > room_bytes and victim != anchor:
        earlier = preceding[victim]
        if n_pins[victim] == 0:
            remove(victim, following, preceding)
            used_bytes -= n_bytes[victim]
        victim = earlier
    if used_bytes > room_bytes:
        return used_bytes
    _link_first(key, anchor, following, preceding)
    return used_bytes + n_bytes[key]


def remove(key: int, following: MutableSequence[int], preceding: MutableSequence[int]) -> None:
    """Takes a resident key out."""
    following[preceding[key]] = following[key]
    preceding[following[key]] = preceding[key]
    following[key] = key
    preceding[key] = key


def _link_first(key: int, anchor: int, following: MutableSequence[int], preceding: MutableSequence[int]) -> None:
    first = following[anchor]
    following[key] = first
    preceding[key] = anchor
    preceding[first] = key
    following[anchor] = key
