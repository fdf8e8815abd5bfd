"""The decision functions that engine and simulator share."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.policies import lru
from engine.policies.admission import UNLIMITED, is_admitted
from engine.policies.routing import affinity, best_replica, least_loaded


class NaiveLru:
    """Least recently used by the book: an ordered dictionary, oldest first."""

    def __init__(self, n_bytes: list[int], capacity: int) -> None:
        self.n_bytes, self.capacity, self.held = n_bytes, capacity, OrderedDict[int, int]()

    def access(self, key: int, pinned: set[int]) -> bool:
        if key in self.held:
            self.held.move_to_end(key)
            return True
        if self.n_bytes[key] > self.capacity:
            return False
        for victim in list(self.held):
            if sum(self.held.values()) + self.n_bytes[key] <= self.capacity:
                break
            if victim not in pinned:
                del self.held[victim]
        if sum(self.held.values()) + self.n_bytes[key] <= self.capacity:
            self.held[key] = self.n_bytes[key]
        return False


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    n_bytes=st.lists(st.integers(1, 5), min_size=6, max_size=6),
    capacity=st.integers(0, 14),
    pinned=st.sets(st.integers(0, 5), max_size=2),
    keys=st.lists(st.integers(0, 5), max_size=60),
)
def test_the_ring_is_a_least_recently_used_cache(
    n_bytes: list[int], capacity: int, pinned: set[int], keys: list[int]
) -> None:
    following, preceding = lru.empty_ring(6)
    pins = [int(key in pinned) for key in range(6)]
    naive = NaiveLru(n_bytes, capacity)
    used = 0
    for key in keys:
        hit = lru.touch(key, following, preceding)
        if not hit:
            used = lru.insert(key, following, preceding, n_bytes, used, capacity, pins)
        assert hit == naive.access(key, pinned)
        newest_first = []
        at = following[6]
        while at != 6:
            newest_first.append(at)
            at = following[at]
        assert newest_first == list(reversed(naive.held))
        assert used == sum(naive.held.values()) <= capacity


def test_a_resident_checkpoint_outweighs_warm_add_ons() -> None:
    assert best_replica([affinity(False, 5), affinity(True, 0), affinity(True, 0)]) == 1


def test_among_equally_warm_replicas_the_first_is_chosen() -> None:
    assert best_replica([affinity(True, 1)] * 3) == 0
    assert best_replica([]) == -1


def test_the_least_loaded_worker_is_chosen_and_residency_decides_ties() -> None:
    assert least_loaded([0.5, 0.2, 0.2], [True, False, True]) == 2
    assert least_loaded([0.2, 0.2], [False, False]) == 0
    assert least_loaded([0.1, 0.2], [False, True]) == 0
    assert least_loaded([], []) == -1


def test_a_full_queue_admits_nobody_and_an_unlimited_one_everybody() -> None:
    assert [is_admitted(n, 2) for n in (0, 1, 2, 3)] == [True, True, False, False]
    assert is_admitted(10**9, UNLIMITED)
    assert not is_admitted(0, 0)
