"""The decision functions that engine and simulator share."""

from __future__ import annotations

import itertools
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.policies import lru
from engine.policies.admission import (
    UNLIMITED,
    can_meet_deadline,
    is_admitted,
    is_tried_again,
    may_run,
    wait_estimate_s,
)
from engine.policies.batching import ALONE, batch_of, is_ripe
from engine.policies.fair_share import finish_tag, start_tag, virtual_after
from engine.policies.queue_order import may_be_passed, next_in_line, queue_key
from engine.policies.routing import affinity, best_replica, control_load, least_loaded


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


def test_waiting_requests_go_by_priority_then_tag_then_arrival_then_number() -> None:
    waiting = [
        (0, 0.0, 2.0, 0),
        (5, 9.0, 9.0, 1),
        (0, 0.0, 1.0, 2),
        (0, 0.0, 1.0, 3),
        (-1, 0.0, 0.0, 4),
        (0, 1.0, 0.0, 5),
    ]
    assert [number for *_, number in sorted(waiting, key=lambda entry: queue_key(*entry))] == [1, 2, 3, 0, 5, 4]


def test_tenants_share_by_weight_and_cannot_save_up() -> None:
    # two tenants with a backlog, weights 1 and 3, unit cost: of every four served, three are the second's
    finish = {"a": 0.0, "b": 0.0}
    weight = {"a": 1.0, "b": 3.0}
    waiting = []
    for name in "ab":
        for number in range(40):
            tag = start_tag(0.0, finish[name])
            finish[name] = finish_tag(tag, 1.0, weight[name])
            waiting.append((tag, name, number))
    served = [name for _, name, _ in sorted(waiting)][:40]
    assert served.count("b") == 30
    virtual = virtual_after(0.0, 12.0)
    assert virtual_after(virtual, 3.0) == 12.0
    assert start_tag(virtual, finish_tag(0.0, 1.0, 1.0)) == 12.0  # away until now: it joins those that are served


def test_with_no_overtaking_the_first_in_line_is_always_taken() -> None:
    assert next_in_line([False, True], [False, True], [0, 0], 0, 0) == 0
    assert next_in_line([], [], [], 3, 3) == -1


def test_a_request_whose_add_ons_are_not_ready_is_passed_so_often_and_no_more() -> None:
    for n_overtaken, taken in ((0, 1), (1, 1), (2, 0), (7, 0)):
        assert next_in_line([False, True], [True, True], [n_overtaken, 0], 2, 0) == taken


def test_a_request_that_makes_the_replica_switch_is_passed_by_one_that_does_not() -> None:
    assert next_in_line([True, True], [False, True], [0, 0], 0, 1) == 1
    assert next_in_line([True, True], [False, True], [1, 0], 0, 1) == 0


def test_where_nobody_is_better_off_the_first_goes() -> None:
    assert next_in_line([False, False], [True, True], [0, 0], 5, 5) == 0


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    n_before=st.integers(0, 6), overtake_max=st.integers(0, 5), ready=st.lists(st.booleans(), min_size=30, max_size=30)
)
def test_nobody_is_overtaken_more_often_than_the_limit(n_before: int, overtake_max: int, ready: list[bool]) -> None:
    # an endless stream of younger requests; each turn starts one and one arrives
    waiting = [(False, 0) for _ in range(n_before + 1)]
    for is_ready in ready:
        index = next_in_line([r for r, _ in waiting], [True] * len(waiting), [n for _, n in waiting], overtake_max, 0)
        waiting = [(r, n + (place < index)) for place, (r, n) in enumerate(waiting) if place != index]
        waiting.append((is_ready, 0))
        assert max(n for _, n in waiting) <= overtake_max


def test_a_batch_takes_what_fits_of_its_kind_in_queue_order() -> None:
    kinds, sizes = [1, 2, 1, 1, 1], [2, 2, 4, 2, 2]
    free = [True] * 5
    assert batch_of(0, kinds, sizes, free, 8) == [0, 2, 3]
    assert batch_of(0, kinds, sizes, free, 5) == [0, 3]
    assert batch_of(2, kinds, sizes, free, 8) == [2, 0, 3]
    assert batch_of(0, kinds, sizes, free, ALONE) == [0]
    assert batch_of(0, kinds, sizes, [True, True, False, True, False], 8) == [0, 3]
    assert batch_of(2, kinds, sizes, [True, True, False, True, False], 8) == [2]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6), st.booleans()), min_size=1, max_size=12),
    data=st.data(),
    largest=st.integers(0, 12),
)
def test_a_batch_is_of_one_kind_holds_its_head_and_never_exceeds_the_limit(
    rows: list[tuple[int, int, bool]], data: st.DataObject, largest: int
) -> None:
    head = data.draw(st.integers(0, len(rows) - 1))
    members = batch_of(head, [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows], largest)
    assert members[0] == head
    assert len(set(members)) == len(members)
    assert {rows[index][0] for index in members} == {rows[head][0]}
    assert sum(rows[index][1] for index in members) <= max(largest, rows[head][1])
    # nobody who would still fit was left out
    room = largest - sum(rows[index][1] for index in members)
    for index, (kind, size, is_free) in enumerate(rows):
        if index not in members and kind == rows[head][0] and is_free and rows[head][2]:
            assert size > room


def test_a_window_holds_a_request_until_it_closes_or_the_batch_is_full() -> None:
    assert not is_ripe(0.4, 0.0, 0.5, 2, 2, 4)
    assert is_ripe(0.5, 0.0, 0.5, 2, 2, 4)
    assert is_ripe(0.0, 0.0, 0.5, 2, 4, 4)
    assert is_ripe(0.0, 0.0, 0.5, 6, 6, 4)
    assert is_ripe(0.0, 0.0, 0.0, 2, 2, 4)


def test_a_wait_is_the_work_ahead_shared_out_over_the_replicas() -> None:
    assert wait_estimate_s(6.0, 2.0, 4) == 2.0
    assert wait_estimate_s(0.0, 0.0, 0) == float("inf")
    assert can_meet_deadline(2.0, 3.0, 5.0, 1.0)
    assert not can_meet_deadline(2.0, 3.0, 5.0, 0.9)
    assert not can_meet_deadline(float("inf"), 3.0, 5.0, 1.0)


def test_a_failed_request_is_tried_again_within_attempts_and_deadline() -> None:
    assert is_tried_again(1, 1, 0.0, float("inf"), 3.0)
    assert not is_tried_again(2, 1, 0.0, float("inf"), 3.0)
    assert not is_tried_again(1, 0, 0.0, float("inf"), 3.0)
    assert is_tried_again(1, 1, 6.9, 10.0, 3.0)
    assert not is_tried_again(1, 1, 7.0, 10.0, 3.0)


def test_a_tenant_runs_as_many_as_it_may() -> None:
    assert [may_run(n, 2) for n in (0, 1, 2)] == [True, True, False]
    assert may_run(10**9, UNLIMITED)


def test_the_load_of_a_controlnet_counts_the_steps_of_its_window() -> None:
    assert control_load(30, 0.0, 1.0, 2) == 2.0
    assert control_load(4, 0.0, 0.5, 2) == 1.0
    assert control_load(4, 0.3, 0.9, 4) == 1.0  # only step 2 of 0..3 lies wholly inside
    assert control_load(10, 0.5, 0.5, 2) == 0.0


def test_every_decision_compiles_to_the_same_answers() -> None:
    numba = pytest.importorskip("numba", reason="numba is not installed: the simulator's fast tier needs it")
    passed = numba.njit(may_be_passed)
    arguments = list(itertools.product([False, True], [False, True], [0, 1, 2], [0, 2], [0, 1]))
    assert [passed(*each) for each in arguments] == [may_be_passed(*each) for each in arguments]
    kinds, sizes, free = np.array([1, 2, 1, 1]), np.array([2, 2, 4, 2]), np.array([True, True, True, True])
    assert list(numba.njit(batch_of)(0, kinds, sizes, free, 6)) == batch_of(0, kinds, sizes, free, 6)
    for function, values in (
        (is_ripe, (0.4, 0.0, 0.5, 2, 2, 4)),
        (queue_key, (3, 0.5, 1.5, 7)),
        (start_tag, (1.0, 2.0)),
        (finish_tag, (1.0, 2.0, 4.0)),
        (virtual_after, (1.0, 2.0)),
        (may_run, (1, UNLIMITED)),
        (wait_estimate_s, (6.0, 2.0, 4)),
        (can_meet_deadline, (2.0, 3.0, 5.0, 1.0)),
        (is_tried_again, (1, 1, 0.0, 10.0, 3.0)),
        (control_load, (30, 0.1, 0.9, 2)),
    ):
        assert numba.njit(function)(*values) == function(*values)
