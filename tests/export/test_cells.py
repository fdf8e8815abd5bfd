"""An allocation cut into pods: what must share a host does, and together the pods are the allocation."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.allocation import Allocation, Link, Policies
from engine.policies.autoscale_settings import Autoscale
from planner.export.cells import cells_of
from planner.export.terraform import n_nodes
from tests.export.plans import decoupled, pool
from traces.problems import InputError


def shape(allocation: Allocation, gpus_per_node: int = 8) -> list[tuple[int, dict[str, int]]]:
    return [
        (cell.n_pods, {pool.name: pool.n_replicas for pool in cell.allocation.pools})
        for cell in cells_of(allocation, gpus_per_node)
    ]


def test_a_plan_that_fits_one_node_is_one_pod() -> None:
    assert shape(decoupled(4, 2)) == [(1, {"base": 4, "controlnets": 2})]


def test_every_pod_of_a_decoupled_plan_has_bases_and_controlnet_workers() -> None:
    # 43 GPUs on nodes of 8: 6 pods; 30 = 6 x 5, 13 = 6 x 2 + 1
    assert shape(decoupled(30, 13)) == [(1, {"base": 5, "controlnets": 3}), (5, {"base": 5, "controlnets": 2})]


def test_a_pool_too_small_to_be_on_every_node_is_refused_with_what_to_do() -> None:
    with pytest.raises(InputError, match="'controlnets' has 2 replica"):
        cells_of(decoupled(30, 2), 8)


def test_a_huge_plan_that_hardly_fits_is_cut_without_trying_every_number_of_pods() -> None:
    base = pool(n=60_000, n_gpus_per_replica=2, topology="decoupled", controlnet_ids=())
    workers = pool("controlnets", 60_000, role="controlnet", topology="decoupled", base_model_ids=())
    cells = cells_of(Allocation((base, workers)), 4)
    assert sum(cell.n_pods for cell in cells) == 60_000  # two of three GPUs do not fit four


def test_a_network_link_is_refused() -> None:
    allocation = decoupled(4, 2)
    far = Allocation(allocation.pools, (Link("base", "controlnets", "network"),))
    with pytest.raises(InputError, match="'network'"):
        cells_of(far, 8)


def test_two_gpus_of_a_cfg_pair_are_never_parted() -> None:
    pairs = pool(n=5, n_gpus_per_replica=2, topology="decoupled_cfg2", controlnet_ids=())
    for cell in cells_of(Allocation((pairs,)), 5):
        assert cell.n_gpus % 2 == 0
        assert cell.n_gpus <= 5


def test_an_autoscaled_replica_is_a_pod() -> None:
    scaled = pool(n=3, n_gpus_per_replica=2, autoscale=Autoscale(max_replicas=6))
    (cell,) = cells_of(Allocation((scaled,)), 8)
    assert (cell.n_pods, cell.n_gpus, cell.is_autoscaled) == (3, 2, True)


def test_limits_that_hold_for_all_pods_together_are_shared_out() -> None:
    cells = cells_of(decoupled(12, 4, queue_limit=30), 8)
    assert [(cell.n_pods, cell.allocation.policies.queue_limit) for cell in cells] == [(2, 15)]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_pods_add_up_to_the_allocation_and_fit_their_nodes(data: st.DataObject) -> None:
    gpus_per_node = data.draw(st.integers(2, 16))
    per_gpu = data.draw(st.sampled_from([1, 1, 2, 3]))
    n_base = data.draw(st.integers(1, 200))
    if data.draw(st.booleans()):
        allocation = decoupled(n_base, data.draw(st.integers(1, 200)))
    else:
        size = data.draw(st.sampled_from([1, 2]))
        allocation = Allocation(
            (pool(n=n_base, n_gpus_per_replica=size, workers_per_gpu=per_gpu),), policies=Policies()
        )
    try:
        cells = cells_of(allocation, gpus_per_node)
    except InputError:
        return  # a sentence; which ones is tested above
    replicas: Counter[str] = Counter()
    pods: Counter[int] = Counter()
    for cell in cells:
        assert 0 < cell.n_gpus <= gpus_per_node
        assert {p.role for p in cell.allocation.pools} == {p.role for p in allocation.pools}
        pods[cell.n_gpus] += cell.n_pods
        for part in cell.allocation.pools:
            replicas[part.name] += cell.n_pods * part.n_replicas
    assert replicas == {p.name: p.n_replicas for p in allocation.pools}
    assert sum(size * count for size, count in pods.items()) == allocation.n_gpus
    assert -(-allocation.n_gpus // gpus_per_node) <= n_nodes(pods, gpus_per_node) <= sum(pods.values())
