"""From an allocation to the workers it wants, and what it takes to get from one to the next."""

from __future__ import annotations

import pytest

from engine.allocation import Allocation, Link, Pool
from engine.serving.reconcile import Devices, check_runnable, difference, wanted_by
from traces.problems import InputError


def plan(**pools: object) -> Allocation:
    return Allocation(pools=tuple(pool for pool in pools.values() if isinstance(pool, Pool)))


BASE = Pool("base", "base", 2, "h200", 1, "decoupled")
PAIR = Pool("pair", "base", 1, "h200", 2, "decoupled_cfg2")
SOLO = Pool("solo", "base", 1, "h200", 1, "colocated", controlnet_ids=("a",))
CN = Pool("cn", "controlnet", 2, "h200", controlnet_ids=("a",))


def test_every_replica_is_a_worker_and_loaders_come_on_top() -> None:
    wanted = wanted_by(plan(a=BASE, b=PAIR, c=SOLO, d=CN), n_loaders=1)
    assert list(wanted.workers) == ["base-0", "base-1", "pair-0", "solo-0", "cn-0", "cn-1", "loaders-0"]
    assert {name: spec.n_ranks for name, spec in wanted.workers.items() if spec.n_ranks > 1} == {"pair-0": 2}


def test_only_workers_that_run_controlnets_in_process_are_told_of_them() -> None:
    workers = wanted_by(plan(a=BASE, b=SOLO, c=CN), 0).workers
    assert {name: spec.controlnet_ids for name, spec in workers.items()} == {
        "base-0": (), "base-1": (), "solo-0": ("a",), "cn-0": ("a",), "cn-1": ("a",)
    }  # fmt: skip


def test_decoupled_bases_are_paired_with_the_pools_that_links_name_or_with_all() -> None:
    other = Pool("other", "controlnet", 1, "h200")
    allocation = Allocation(pools=(BASE, PAIR, SOLO, CN, other), links=(Link("pair", "other"),))
    assert wanted_by(allocation, 0).pairings == {
        *((f"base-{i}", f"cn-{j}") for i in range(2) for j in range(2)),
        *((f"base-{i}", "other-0") for i in range(2)),
        ("pair-0", "other-0"),
    }


def test_the_difference_touches_only_what_differs() -> None:
    one = wanted_by(plan(a=BASE, b=CN), 1)
    two = wanted_by(plan(a=Pool("base", "base", 1, "h200", 1, "decoupled"), b=PAIR, c=CN), 1)
    todo = difference(one, two)
    assert [spec.worker_id for spec in todo.start] == ["pair-0"]
    assert todo.stop == ("base-1",)
    assert todo.keep == ("base-0", "cn-0", "cn-1", "loaders-0")
    assert (todo.update, todo.attach, todo.detach) == ((), (), ())
    assert difference(one, one).keep == tuple(sorted(one.workers))


def test_another_topology_replaces_a_worker_other_ids_do_not() -> None:
    one = wanted_by(plan(a=BASE, b=CN), 0)
    other_ids = Pool("cn", "controlnet", 2, "h200", controlnet_ids=("a", "b"))
    other_topology = Pool("base", "base", 2, "h200", 1, "colocated")
    assert [spec.worker_id for spec in difference(one, wanted_by(plan(a=BASE, b=other_ids), 0)).update] == [
        "cn-0",
        "cn-1",
    ]
    todo = difference(one, wanted_by(plan(a=other_topology, b=CN), 0))
    assert [spec.worker_id for spec in todo.start] == list(todo.stop) == ["base-0", "base-1"]


def test_links_that_change_attach_and_detach_without_touching_workers() -> None:
    right = Pool("right", "controlnet", 1, "h200")
    pools = (BASE, CN, right)
    one = wanted_by(Allocation(pools=pools, links=(Link("base", "cn"),)), 0)
    two = wanted_by(Allocation(pools=pools, links=(Link("base", "right"),)), 0)
    todo = difference(one, two)
    assert (todo.start, todo.stop) == ((), ())
    assert todo.attach == (("base-0", "right-0"), ("base-1", "right-0"))
    assert set(todo.detach) == {(f"base-{i}", f"cn-{j}") for i in range(2) for j in range(2)}


def test_devices_are_given_in_order_and_given_back() -> None:
    workers = wanted_by(plan(a=PAIR, b=CN), 1).workers
    devices = Devices(["cuda:0", "cuda:1", "cuda:2", "cuda:2"])
    assert devices.take(workers["pair-0"]) == ("cuda:0", "cuda:1")
    assert devices.take(workers["cn-0"]) == ("cuda:2",)
    assert devices.take(workers["cn-1"]) == ("cuda:2",)
    assert devices.take(workers["loaders-0"]) == ("cpu",)
    assert not devices.can_take(1)
    devices.give_back("pair-0")
    assert devices.can_take(2)


def test_too_few_devices_are_refused_with_both_numbers() -> None:
    specs = tuple(wanted_by(plan(a=PAIR, b=CN), 1).workers.values())
    with pytest.raises(InputError, match="names 3 devices, the allocation needs 4"):
        Devices(["cuda:0", "cuda:1", "cuda:2"]).check(specs)
    with pytest.raises(InputError, match="names no device"):
        Devices([]).check(specs)
    Devices(["cpu"]).check(specs)


def test_what_can_be_simulated_but_not_started_is_refused_by_name() -> None:
    pools = (
        Pool("a", "base", 1, "h200", 1, "diffusers"),
        Pool("b", "base", 1, "h200", 4, "colocated"),
        Pool("loaders", "controlnet", 1, "h200"),
        Pool("../x", "controlnet", 1, "h200"),
    )
    problems = [str(problem) for problem in check_runnable(Allocation(pools=pools))]
    assert len(problems) == 4
    assert "baseline" in problems[0]
    assert "n_gpus_per_replica is 4" in problems[1]
    assert "loaders" in problems[2]
    assert "file name" in problems[3]
