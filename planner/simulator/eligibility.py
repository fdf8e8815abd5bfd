"""Which base pools can serve which requests: requests with the same answer wait in one queue."""

from __future__ import annotations

from collections.abc import Sequence

from engine.allocation import Allocation
from planner.simulator.replicas import hosts
from planner.workload import Workload


def pools_of_requests(
    allocation: Allocation, workload: Workload, is_hosted: Sequence[bool], n_requests: int
) -> tuple[list[int], list[tuple[int, ...]]]:
    """For each request a group, and for each group the base pools (by index) that can serve it; () if none can.

    A pool can serve a request if it may hold its checkpoint and its ControlNets: in process those it names, decoupled those
    that some ControlNet worker may hold (``is_hosted`` by ControlNet code).
    """
    base_pools = allocation.pools_of("base")
    checkpoint_ok = [[hosts(pool.base_model_ids, name) for name in workload.checkpoint_names] for pool in base_pools]
    controlnet_ok = [
        list(is_hosted)
        if pool.topology == "decoupled"
        else [hosts(pool.controlnet_ids, name) for name in workload.controlnet_names]
        for pool in base_pools
    ]
    groups: dict[tuple[int, ...], int] = {}
    known: dict[tuple[int, tuple[int, ...]], int] = {}
    group_of: list[int] = []
    for needs in zip(workload.checkpoint[:n_requests].tolist(), workload.controlnets[:n_requests], strict=True):
        group = known.get(needs)
        if group is None:
            able = tuple(
                p
                for p in range(len(base_pools))
                if checkpoint_ok[p][needs[0]] and all(controlnet_ok[p][code] for code in needs[1])
            )
            group = known[needs] = groups.setdefault(able, len(groups))
        group_of.append(group)
    return group_of, list(groups)
