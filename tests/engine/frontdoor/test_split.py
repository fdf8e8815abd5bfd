"""A traffic split keeps to its shares exactly, keeps users on their side, and moves only those who must move."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from engine.frontdoor.split import N_BUCKETS, Split, Variant, bucket_of, split_from_plain, sticky_key
from tests.engine.frontdoor.conftest import INK_1, INK_2, OpenDoor, run
from tests.engine.frontdoor.dispatcher_engine import DispatcherEngine
from traces.problems import InputError

KEYS = [f"user-{number}" for number in range(40_000)]


def split(*shares: float, salt: str = "") -> Split:
    return Split(tuple(Variant(f"v{index}", share) for index, share in enumerate(shares)), salt)


def test_buckets_are_divided_exactly_by_the_shares() -> None:
    key_of = {bucket_of(key): key for key in (f"k{number}" for number in range(200_000))}
    assert len(key_of) == N_BUCKETS
    counts = Counter(split(0.9, 0.0, 0.0723, 0.0277).variant_of(key).name for key in key_of.values())
    assert counts == {"v0": 9000, "v2": 723, "v3": 277}


def test_a_key_is_always_on_the_same_side_and_the_salt_draws_anew() -> None:
    first = [split(0.5, 0.5, salt="a").variant_of(key).name for key in KEYS]
    assert first == [split(0.5, 0.5, salt="a").variant_of(key).name for key in KEYS]
    assert bucket_of("user\0acme\0u1", "a") == 7569  # fixed: another machine or version must not move users
    again = [split(0.5, 0.5, salt="b").variant_of(key).name for key in KEYS]
    n_moved = sum(a != b for a, b in zip(first, again, strict=True))
    # Independent sides: half of 40,000 move, standard deviation sqrt(40,000)/2 = 100; six of them.
    assert abs(n_moved - 20_000) < 600


def test_growing_the_last_share_moves_only_those_who_join_it() -> None:
    before, after = split(0.9, 0.1), split(0.7, 0.3)
    moves = {(before.variant_of(key).name, after.variant_of(key).name) for key in KEYS}
    assert moves == {("v0", "v0"), ("v0", "v1"), ("v1", "v1")}


def test_users_of_two_tenants_and_requests_without_a_user_are_told_apart() -> None:
    keys = {
        sticky_key("a", "u", "r1"),
        sticky_key("b", "u", "r1"),
        sticky_key("a", "", "r1"),
        sticky_key("a", "", "r2"),
    }
    assert len(keys) == 4
    assert sticky_key("a", "u", "r1") == sticky_key("a", "u", "r2")


@pytest.mark.parametrize(
    ("plain", "words"),
    [
        ([], "got list, needs a JSON object"),
        ({"variants": []}, "a list of 1..16"),
        ({"variants": [{"name": "a", "share": 0.5}]}, "shares add up to 0.5, needs 1"),
        ({"variants": [{"name": "a", "share": 1, "colour": 1}]}, "colour: is not a known field"),
        ({"variants": [{"name": "a", "share": 1, "engine": "b"}]}, "got 'b', needs one of \\['main'\\]"),
        ({"variants": [{"name": "", "share": 1}]}, "name: got ''"),
        ({"variants": [{"name": "a\nb", "share": 1}]}, "printable"),
        ({"variants": [{"name": "a", "share": 0.5}, {"name": "a", "share": 0.5}]}, "a second time"),
        ({"variants": [{"name": "a", "share": True}]}, "got True"),
        ({"variants": [{"name": "a", "share": 0.00001}, {"name": "b", "share": 0.99999}]}, "multiple of 1/10000"),
        ({"variants": [{"name": "a", "share": 1, "add_ons": {"ink": 2}}]}, "an object of texts"),
        ({"variants": [{"name": "a", "share": 1}], "salt": 1}, "salt: got 1"),
    ],
)
def test_a_split_that_makes_no_sense_is_refused(plain: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        split_from_plain(plain, {"main": None})


def test_a_split_survives_its_own_json() -> None:
    sides = Split((Variant("a", 0.25, "main", {"ink": "ink@2"}), Variant("b", 0.75, "main")), "s")
    assert split_from_plain(sides.to_plain(), {"main": None}) == sides


def test_two_versions_of_an_add_on_share_the_traffic_and_the_side_is_told(open_door: OpenDoor) -> None:
    sides = Split((Variant("now", 0.5), Variant("new", 0.5, add_ons={"ink": "ink@2"})))
    expected = {"now": INK_1, "new": INK_2}

    async def test() -> None:
        engine = DispatcherEngine(service_s=0)
        async with open_door(engine, split=sides) as door:
            for number in range(12):
                _, answer, headers = await door.ask(user=f"user-{number}", loras=[{"id": "ink"}])
                side = sides.variant_of(sticky_key("", f"user-{number}", "")).name
                assert headers["X-Diffplan-Variant"] == answer["diffplan"]["variant"] == side
                job = engine.jobs[-1]
                assert (job.variant, job.loras[0].lora_id) == (side, expected[side])
                assert door.log_rows()[-1]["variant"] == side
        assert {job.variant for job in engine.jobs} == {"now", "new"}

    run(test())


def test_two_allocations_share_the_traffic(open_door: OpenDoor) -> None:
    engines = {"main": DispatcherEngine(service_s=0), "b": DispatcherEngine(service_s=0)}
    sides = Split((Variant("a", 0.5), Variant("b", 0.5, "b")))

    async def test() -> None:
        async with open_door(engines, split=sides) as door:
            for number in range(20):
                assert (await door.ask(user=f"user-{number}"))[0] == 200
        users = [sides.variant_of(sticky_key("", f"user-{number}", "")).engine for number in range(20)]
        assert [len(engines[name].jobs) for name in ("main", "b")] == [users.count("main"), users.count("b")]
        assert min(len(engine.jobs) for engine in engines.values()) > 0

    run(test())
