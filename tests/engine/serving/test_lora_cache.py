"""The host tier of LoRAs against the plainest cache that does the same."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.serving.lora_cache import BACKOFF_MAX_S, REFUSED_MAX, LoraCache


class NaiveTier:
    """Oldest first; what does not fit stays while it is pinned."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.kept: OrderedDict[str, int] = OrderedDict()
        self.passing: set[str] = set()
        self.pins: dict[str, int] = {}

    def fetched(self, name: str, n_bytes: int) -> list[str]:
        gone = []
        if n_bytes <= self.capacity:
            for other in list(self.kept):
                if sum(self.kept.values()) + n_bytes <= self.capacity:
                    break
                if not self.pins.get(other):
                    del self.kept[other]
                    gone.append(other)
        if sum(self.kept.values()) + n_bytes <= self.capacity:
            self.kept[name] = n_bytes
        elif self.pins.get(name):
            self.passing.add(name)
        else:
            gone.append(name)
        return gone


# 40 names, so that the ring, which has a fixed length, grows twice
ACTIONS = st.lists(st.tuples(st.sampled_from(["use", "use", "use", "pin", "unpin"]), st.integers(0, 39)), max_size=250)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(actions=ACTIONS, sizes=st.lists(st.integers(1, 9), min_size=40, max_size=40), capacity=st.integers(5, 150))
def test_the_tier_keeps_what_was_used_last_and_what_is_pinned(
    actions: list[tuple[str, int]], sizes: list[int], capacity: int
) -> None:
    cache, naive = LoraCache(capacity), NaiveTier(capacity)
    for now_s, (action, number) in enumerate(actions):
        name = f"l{number}"
        if action == "pin":
            cache.pin(name)
            naive.pins[name] = naive.pins.get(name, 0) + 1
        elif action == "unpin" and naive.pins.get(name):
            gone = cache.unpin(name)
            naive.pins[name] -= 1
            is_last = naive.pins[name] == 0 and name in naive.passing
            assert [item.lora_id for item in gone] == ([name] if is_last else [])
            if is_last:
                naive.passing.discard(name)
        elif action == "use":
            is_there = name in naive.kept or name in naive.passing
            assert cache.touch(name, float(now_s)) == is_there
            if name in naive.kept:
                naive.kept.move_to_end(name)
            elif not is_there:
                gone = cache.fetched(name, f"/host/{name}", sizes[number], float(now_s))
                assert sorted(item.lora_id for item in gone) == sorted(naive.fetched(name, sizes[number]))
        assert cache.used_bytes == sum(naive.kept.values()) <= capacity
        assert cache.held_bytes == cache.used_bytes + sum(sizes[int(other[1:])] for other in naive.passing)
        there = {f"l{k}" for k in range(40) if cache.path_of(f"l{k}") is not None}
        assert there == set(naive.kept) | naive.passing
        assert cache.n_pins == sum(naive.pins.values())


def test_a_failed_fetch_is_not_repeated_for_those_who_only_wait_until_a_pause_that_doubles() -> None:
    cache = LoraCache(10)
    pauses = []
    now_s = 0.0
    for _ in range(9):
        cache.begin_fetch("l", now_s)
        assert not cache.may_prefetch("l", now_s)
        cache.fetch_failed("l", now_s)
        again_s = cache.prefetch_again_s("l")
        assert again_s is not None
        assert not cache.may_prefetch("l", again_s - 0.001)
        assert cache.may_prefetch("l", again_s)
        pauses.append(again_s - now_s)
        now_s = again_s
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, BACKOFF_MAX_S, BACKOFF_MAX_S, BACKOFF_MAX_S]
    cache.fetched("l", "/host/l", 1, now_s)
    assert cache.prefetch_again_s("l") is None


def test_refusals_are_remembered_but_not_without_bound() -> None:
    cache = LoraCache(10)
    for number in range(REFUSED_MAX + 1):
        cache.refuse(f"l{number}", "broken")
    assert cache.refusal_of("l0") is None
    assert cache.refusal_of("l1") == "broken"
    assert len(cache.refusals()) == REFUSED_MAX


def test_a_file_that_arrives_after_its_refusal_or_a_second_time_is_dropped() -> None:
    cache = LoraCache(10)
    cache.refuse("bad", "broken")
    assert [item.path for item in cache.fetched("bad", "/host/bad", 1, 0.0)] == ["/host/bad"]
    assert cache.fetched("good", "/host/one", 1, 0.0) == []
    assert [item.path for item in cache.fetched("good", "/host/two", 1, 0.0)] == ["/host/two"]
    assert cache.fetched("good", "/host/one", 1, 0.0) == []
    assert cache.path_of("good") == "/host/one"


def test_unpinning_what_is_not_pinned_is_a_fault() -> None:
    with pytest.raises(KeyError):
        LoraCache(10).unpin("l")
