"""Cuts an allocation into pods. A pod is one engine on one node: whatever must share a host because of its links is in one pod.

One engine routes all requests of its pod from one queue, as simulated. Several pods stand behind a Service that knows no
queue, so requests wait a little longer than in the plan, where all replicas share one; fewer, larger pods lose less.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from engine.allocation import Allocation, Policies, Pool
from planner.export.names import dns_label
from traces.problems import InputError, Problem, one_problem

PODS_TRIED_MAX: Final = 200_000
"""Pods laid out in all tries, one number of pods after the other, before settling for a number with room to spare."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Identical pods: each starts one engine with this part of the allocation."""

    name: str
    """A DNS label of at most 45 characters, unique in the export."""
    group: str
    """The pods of one group serve the same requests."""
    n_pods: int
    allocation: Allocation
    is_autoscaled: bool = False

    @property
    def n_gpus(self) -> int:
        """GPUs of one pod."""
        return self.allocation.n_gpus

    @property
    def gpu_kind(self) -> str:
        """All pools of a pod run on one kind."""
        return self.allocation.pools[0].gpu_kind


def cells_of(allocation: Allocation, gpus_per_node: int) -> tuple[Cell, ...]:
    """The pods that together are exactly the allocation.

    Raises:
        InputError: pools that must share a host do not fit one node, are fewer than the nodes they are needed on, sit on
            different GPU kinds, scale on their own, or are linked over a network.
    """
    problems: list[Problem] = []
    cells: list[Cell] = []
    for pools in _groups(allocation, problems):
        try:
            cells += _cells_of_group(allocation, pools, gpus_per_node)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return tuple(cells)


def _groups(allocation: Allocation, problems: list[Problem]) -> list[list[Pool]]:
    """Pools that must share hosts, base pools first; each base pool is in one group."""
    groups = [[pool] for pool in allocation.pools_of("base")]
    for pool in allocation.pools_of("controlnet"):
        bases = [base for base in allocation.pools_of("base") if base.topology == pool.topology]
        far = [base.name for base in bases if allocation.link_kind(base.name, pool.name) == "network"]
        if far:
            problems.append(
                Problem(
                    f"link {far[0]!r} to {pool.name!r}",
                    "is of kind 'network'",
                    "a link inside a host: nvlink, pcie, local",
                    "Workers of other hosts join by hand today (python -m engine.workers.main --join): plan with "
                    "policies.link: nvlink and without gpu.others, or provision this pool yourself",
                )
            )
            continue
        joined = [group for group in groups if any(base in group for base in bases)]
        if not joined:
            problems.append(
                Problem(
                    f"pool {pool.name!r}",
                    f"serves no base pool of topology {pool.topology!r}",
                    "at least one",
                    "Remove it",
                )
            )
            continue
        merged = [member for group in joined for member in group]
        groups = [group for group in groups if group not in joined] + [[*merged, pool]]
    return groups


def _cells_of_group(allocation: Allocation, pools: list[Pool], gpus_per_node: int) -> list[Cell]:
    where = f"pools {', '.join(repr(pool.name) for pool in pools)}"
    kinds = sorted({pool.gpu_kind for pool in pools})
    if len(kinds) > 1:
        raise one_problem(where, f"share a host but need {' and '.join(kinds)}", "one GPU kind", "Give them one kind")
    group = dns_label(pools[0].name, 30)
    scaled = [pool for pool in pools if pool.autoscale is not None]
    if scaled and len(pools) > 1:
        raise one_problem(
            where, f"share a host, and {scaled[0].name!r} scales on its own", "pools that scale apart from each other",
            "Remove its autoscaler, or plan a topology without ControlNet workers",
        )  # fmt: skip
    if scaled:
        pool = pools[0]
        if pool.workers_per_gpu != 1:
            raise one_problem(
                where, f"scale with {pool.workers_per_gpu} workers a GPU", "1", "Set workers_per_gpu to 1"
            )
        _check_fits(where, pool.n_gpus_per_replica, gpus_per_node)
        part = _part(allocation, pools, [1])
        return [Cell(f"{group}-1", group, pool.n_replicas, part, is_autoscaled=True)]
    compositions: dict[tuple[int, ...], int] = {}
    for composition in _distribute(where, pools, gpus_per_node):
        compositions[composition] = compositions.get(composition, 0) + 1
    return [
        Cell(f"{group}-{rank}", group, n_pods, _part(allocation, pools, composition))
        for rank, (composition, n_pods) in enumerate(compositions.items(), 1)
    ]


def _distribute(where: str, pools: Sequence[Pool], gpus_per_node: int) -> list[tuple[int, ...]]:
    """Replicas of each pool in each pod, as even as it goes, in the fewest pods that fit their nodes; larger pods first."""
    units = [-(-pool.n_replicas // pool.workers_per_gpu) for pool in pools]
    sizes = [pool.n_gpus_per_replica for pool in pools]
    _check_fits(where, sum(sizes), gpus_per_node)
    total = sum(count * size for count, size in zip(units, sizes, strict=True))
    for n_pods in _pod_counts(units, sizes, -(-total // gpus_per_node), gpus_per_node):
        loads, shares = [0] * n_pods, [[0] * len(pools) for _ in range(n_pods)]
        for index in sorted(range(len(pools)), key=lambda i: (-sizes[i], i)):
            whole, extra = divmod(units[index], n_pods)
            favoured = set(sorted(range(n_pods), key=lambda pod: (loads[pod], pod))[:extra])
            for pod in range(n_pods):
                shares[pod][index] = whole + (pod in favoured)
                loads[pod] += shares[pod][index] * sizes[index]
        if max(loads) <= gpus_per_node:
            return _in_replicas(pools, units, sorted((tuple(share) for share in shares), reverse=True))
    scarcest = pools[units.index(min(units))]
    raise one_problem(
        where,
        f"need {-(-total // gpus_per_node)} or more nodes of {gpus_per_node} GPUs, and {scarcest.name!r} has "
        f"{scarcest.n_replicas} replica(s): it cannot share a host with all that it serves",
        "a replica of every pool on every node",
        "Set gpus_per_node to what NVLink joins, or plan with search.dedicated_controlnets_max: 0",
    )


def _pod_counts(units: Sequence[int], sizes: Sequence[int], fewest: int, gpus_per_node: int) -> Iterator[int]:
    """Numbers of pods worth trying: the next from the fewest that have room in all, then one that is sure to fit."""
    last = min(units)
    tried_to = fewest + max(1, PODS_TRIED_MAX // fewest)
    yield from range(fewest, min(tried_to, last + 1))
    for n_pods in range(tried_to, last + 1):
        if sum(-(-count // n_pods) * size for count, size in zip(units, sizes, strict=True)) <= gpus_per_node:
            yield n_pods
            return


def _in_replicas(pools: Sequence[Pool], units: Sequence[int], shares: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """GPU units to replicas; where several share a GPU, the last pod has the GPU that is not full."""
    rows = [list(share) for share in shares]
    for index, pool in enumerate(pools):
        for row in rows:
            row[index] *= pool.workers_per_gpu
        rows[-1][index] -= units[index] * pool.workers_per_gpu - pool.n_replicas
    return [tuple(row) for row in rows]


def _check_fits(where: str, n_gpus: int, gpus_per_node: int) -> None:
    if n_gpus > gpus_per_node:
        raise one_problem(
            where, f"need {n_gpus} GPUs that share a host", f"at most gpus_per_node, {gpus_per_node}",
            "Set gpus_per_node to what one node has",
        )  # fmt: skip


def _part(allocation: Allocation, pools: Sequence[Pool], n_replicas: Sequence[int]) -> Allocation:
    names = {pool.name for pool in pools}
    parts = tuple(
        dataclasses.replace(pool, n_replicas=n, autoscale=None) for pool, n in zip(pools, n_replicas, strict=True)
    )
    links = tuple(link for link in allocation.links if {link.base_pool, link.controlnet_pool} <= names)
    n_bases = sum(pool.n_replicas for pool in parts if pool.role == "base")
    n_bases_of_all = sum(pool.n_replicas for pool in pools if pool.role == "base")
    return Allocation(parts, links, _shared(allocation.policies, n_bases, n_bases_of_all))


def _shared(policies: Policies, n_bases: int, n_bases_of_all: int) -> Policies:
    """A pod's share, rounded up, of every limit that holds for all pods together."""

    def share(limit: int | None) -> int | None:
        return None if limit is None else -(-limit * n_bases // n_bases_of_all)

    return dataclasses.replace(
        policies,
        queue_limit=share(policies.queue_limit),
        tenant_running_max=share(policies.tenant_running_max),
        tenant_waiting_max=share(policies.tenant_waiting_max),
        tenants=tuple(
            dataclasses.replace(tenant, running_max=share(tenant.running_max), waiting_max=share(tenant.waiting_max))
            for tenant in policies.tenants
        ),
    )
