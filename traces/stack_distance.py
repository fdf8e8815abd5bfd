"""How often an LRU cache would load, for every cache size at once.

The stack distance of a use is the number of *other* things used since the last use of the same one (Mattson et al.,
"Evaluation techniques for storage hierarchies", IBM Systems Journal 9(2), 1970). An LRU cache of c places hits exactly
the uses whose distance is below c, so one pass over the trace gives the whole curve of loads against cache size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

FIRST_USE: Final = -1
"""Distance of a use that no cache can hit."""


def stack_distances(keys: IntArray, caches: IntArray | None = None) -> IntArray:
    """LRU stack distance of each use, ``FIRST_USE`` for first ones.

    Args:
        keys: what is used, in order of use. [n]
        caches: which cache serves the use; each cache has its own stack. One cache for all if None. [n]

    Returns:
        Distances in the order of ``keys``. [n]

    With p the place of the previous use of the same key, the keys used in between are those whose own previous use lies
    before p: d(i) = #{j < i : prev(j) < p} − (p + 1), since all j ≤ p satisfy prev(j) < p. Counting those pairs is one
    O(n log n) sweep (:func:`_count_smaller_before`).
    """
    n = len(keys)
    if n == 0:
        return np.zeros(0, dtype=np.int64)
    cache = np.zeros(n, dtype=np.int64) if caches is None else caches
    by_cache = np.argsort(cache, kind="stable")  # uses of one cache become contiguous
    key, cache = keys[by_cache], cache[by_cache]
    order = np.lexsort((key, cache))  # stable: uses of one key in one cache stay in their order
    is_same = (key[order[1:]] == key[order[:-1]]) & (cache[order[1:]] == cache[order[:-1]])
    previous = np.full(n, FIRST_USE, dtype=np.int64)
    previous[order[1:][is_same]] = order[:-1][is_same]
    distances = _count_smaller_before(previous) - (previous + 1)
    distances[previous == FIRST_USE] = FIRST_USE
    out = np.empty(n, dtype=np.int64)
    out[by_cache] = distances
    return out


def _count_smaller_before(values: IntArray) -> IntArray:
    """For each place i the number of places j < i with values[j] < values[i]; only exact where values[i] is unique.

    Takes the places in order of value and splits them by the bits of the place, highest first: a place with a 1 bit has
    passed, among the smaller values of its group, exactly those with a 0 bit that came earlier.
    """
    n = len(values)
    places = np.argsort(values, kind="stable").astype(np.int64)
    counts = np.zeros(n, dtype=np.int64)
    here = np.arange(n, dtype=np.int64)
    zeros_before = np.zeros(n + 1, dtype=np.int64)
    for bit in range(max(n - 1, 1).bit_length() - 1, -1, -1):
        is_one = (places >> bit) & 1 == 1
        np.cumsum(~is_one, out=zeros_before[1:])
        start = (places >> (bit + 1)) << (bit + 1)  # groups are aligned: each place 0..n-1 is there once
        zeros_in_group = zeros_before[here] - zeros_before[start]
        counts[places[is_one]] += zeros_in_group[is_one]
        target = np.where(is_one, here + (1 << bit) - zeros_in_group, start + zeros_in_group)
        parted = np.empty(n, dtype=np.int64)
        parted[target] = places
        places = parted
    return counts


@dataclass(frozen=True, slots=True)
class LoadCurve:
    """Loads per request against the places of an LRU cache on each instance."""

    n_uses: int
    n_distinct: int
    """Distinct things over all instances."""
    distinct_per_instance: float
    """Mean over the instances that served any request: loads no cache avoids, per instance."""
    cache_sizes: tuple[int, ...]
    loads_per_request: tuple[float, ...]
    """Loads over requests for each cache size; the last size holds everything an instance ever uses."""


def load_curve(keys: IntArray, instances: IntArray, n_requests: int, n_instances: int) -> LoadCurve:
    """The curve at doubling cache sizes, up to the largest working set of an instance.

    Args:
        keys: what is used, in order of arrival; a request that uses several things uses them one after the other. [n]
        instances: instance that serves the use, 0..n_instances-1. [n]
        n_requests: all requests, those without any use included.
        n_instances: instances that serve requests.
    """
    if len(keys) == 0:
        return LoadCurve(0, 0, 0.0, (), ())
    distances = stack_distances(keys, instances)
    is_first = distances == FIRST_USE
    largest = int(np.bincount(instances[is_first]).max())
    sizes = [1 << power for power in range(largest.bit_length()) if 1 << power < largest] + [largest]
    ordered = np.sort(distances[~is_first])
    n_first = int(is_first.sum())
    loads = [n_first + len(ordered) - int(np.searchsorted(ordered, size, side="left")) for size in sizes]
    return LoadCurve(
        n_uses=len(keys),
        n_distinct=len(np.unique(keys)),
        distinct_per_instance=n_first / n_instances,
        cache_sizes=tuple(sizes),
        loads_per_request=tuple(load / n_requests for load in loads),
    )
