"""Loads against cache size, against a cache that is simply simulated."""

from __future__ import annotations

from collections import OrderedDict, defaultdict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from traces.stack_distance import load_curve, stack_distances


def lru_loads(keys: list[int], instances: list[int], size: int) -> int:
    """Loads of an LRU cache with this many places on each instance, by doing it."""
    caches: dict[int, OrderedDict[int, None]] = defaultdict(OrderedDict)
    loads = 0
    for key, instance in zip(keys, instances, strict=True):
        cache = caches[instance]
        if key not in cache:
            loads += 1
            if len(cache) == size:
                cache.popitem(last=False)
        cache[key] = None
        cache.move_to_end(key)
    return loads


uses = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=120)


@given(uses)
@settings(max_examples=200, deadline=None)
def test_the_curve_equals_a_simulated_cache_at_every_size(pairs: list[tuple[int, int]]) -> None:
    keys, instances = (list(side) for side in zip(*pairs, strict=True))
    distances = stack_distances(np.array(keys), np.array(instances))
    for size in range(1, 12):
        assert int(((distances < 0) | (distances >= size)).sum()) == lru_loads(keys, instances, size)
    curve = load_curve(np.array(keys), np.array(instances), len(keys), 3)
    for size, loads in zip(curve.cache_sizes, curve.loads_per_request, strict=True):
        assert loads == lru_loads(keys, instances, size) / len(keys)
    assert curve.loads_per_request[-1] == len(set(pairs)) / len(keys)  # the last size holds all: only first uses load


def test_the_curve_equals_a_simulated_cache_on_a_long_skewed_trace() -> None:
    random = np.random.default_rng(5)
    keys = random.zipf(1.3, 5000) % 400
    instances = random.integers(0, 7, 5000)
    curve = load_curve(keys, instances, 2500, 7)
    assert curve.cache_sizes[:4] == (1, 2, 4, 8)
    for size, loads in zip(curve.cache_sizes, curve.loads_per_request, strict=True):
        assert loads == lru_loads(keys.tolist(), instances.tolist(), size) / 2500


def test_distances_of_a_worked_example() -> None:
    assert stack_distances(np.array([1, 2, 3, 2, 1, 1])).tolist() == [-1, -1, -1, 1, 2, 0]


def test_nothing_used_gives_an_empty_curve() -> None:
    nothing = np.zeros(0, dtype=np.int64)
    assert stack_distances(nothing).tolist() == []
    assert load_curve(nothing, nothing, 5, 2).cache_sizes == ()
