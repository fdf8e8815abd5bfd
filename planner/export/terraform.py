"""Node pools as Terraform variables, beside a module that validates them and names no provider."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from importlib import resources
from typing import Any, Final

from planner.export.cells import Cell, cells_of
from planner.export.cluster import Cluster
from planner.export.counts import PoolCount
from planner.export.names import dns_label
from planner.export.pod import GPU_RESOURCE, node_labels
from planner.export.source import Source

VARIABLES: Final = "diffplan.auto.tfvars.json"
MODULE_FILES: Final = ("versions.tf", "variables.tf", "outputs.tf")


def terraform_texts(source: Source, cluster: Cluster) -> dict[str, str]:
    """File name (under ``terraform/``) to text.

    Raises:
        InputError: the allocation cannot be cut into pods of this cluster's nodes.
    """
    folder = resources.files("planner.export.terraform_module")
    comment = source.provenance.comment()
    texts = {name: comment + (folder / name).read_text(encoding="utf-8") for name in MODULE_FILES}
    plain = {
        "plan": source.provenance.to_plain(),
        "node_pools": node_pools(source, cluster),
        "worker_pools": [
            {
                "name": pool.name,
                "role": pool.role,
                "gpu_kind": pool.gpu_kind,
                "node_pool": node_pool_name(pool.gpu_kind, source.provenance.purchase),
                "n_replicas": pool.n_replicas,
                "n_gpus": pool.n_gpus,
            }
            for pool in source.allocation.pools
        ],
    }
    texts[VARIABLES] = json.dumps(plain, indent=2, ensure_ascii=True, allow_nan=False) + "\n"
    return texts


def node_pools(source: Source, cluster: Cluster) -> dict[str, dict[str, Any]]:
    """Name to one group of equal nodes for each GPU kind."""
    cells = cells_of(source.allocation, cluster.gpus_per_node)
    purchase = source.provenance.purchase
    made = {}
    for kind in sorted({cell.gpu_kind for cell in cells}):
        mine = [cell for cell in cells if cell.gpu_kind == kind]
        planned, least, most = (n_nodes(sizes, cluster.gpus_per_node) for sizes in _pods(mine, source))
        made[node_pool_name(kind, purchase)] = {
            "gpu_kind": kind,
            "purchase": purchase,
            "gpus_per_node": cluster.gpus_per_node,
            "n_nodes": planned,
            # packing more pods never takes fewer nodes, but the heuristic does not promise it
            "n_nodes_min": min(least, planned),
            "n_nodes_max": max(most, planned),
            "n_gpus_used": sum(cell.n_gpus * cell.n_pods for cell in mine),
            "labels": node_labels(kind, purchase, cluster),
            "taint": f"{GPU_RESOURCE}=present:NoSchedule",
        }
    return made


def node_pool_name(gpu_kind: str, purchase: str) -> str:
    """A DNS label for the nodes of one kind, bought one way."""
    return f"{dns_label(gpu_kind, 40)}-{dns_label(purchase.replace('_', '-'), 20)}"


def n_nodes(pods: Counter[int], gpus_per_node: int) -> int:
    """Nodes that hold these pods (GPUs of a pod to number of pods), largest first into the fullest node that has room."""
    free: Counter[int] = Counter()
    opened = 0
    for size in sorted(pods, reverse=True):
        left = pods[size]
        while left:
            roomy = [room for room, count in free.items() if room >= size and count]
            if not roomy:
                new = -(-left // (gpus_per_node // size))
                free[gpus_per_node] += new
                opened += new
                continue
            room = min(roomy)
            placed = min(left, free[room])
            free[room] -= placed
            free[room - size] += placed
            left -= placed
    return opened


def variable_faults(text: str) -> list[str]:
    """What the module's validations would refuse, without Terraform; empty if they would accept it."""
    plain = json.loads(text)
    pools: Mapping[str, Any] = plain["node_pools"]
    faults = []
    for name, pool in pools.items():
        used = sum(worker["n_gpus"] for worker in plain["worker_pools"] if worker["node_pool"] == name)
        if used != pool["n_gpus_used"]:
            faults.append(f"node pool {name!r} holds {used} GPUs of workers, says {pool['n_gpus_used']}")
        if used > pool["n_nodes"] * pool["gpus_per_node"]:
            faults.append(f"node pool {name!r} has room for fewer than {used} GPUs")
        if not 0 <= pool["n_nodes_min"] <= pool["n_nodes"] <= pool["n_nodes_max"]:
            faults.append(f"node pool {name!r} has a minimum above its maximum")
        if pool["purchase"] not in {"on_demand", "spot"}:
            faults.append(f"node pool {name!r} is bought as {pool['purchase']!r}")
    faults += [
        f"worker pool {worker['name']!r} runs on {worker['node_pool']!r}, which is not there"
        for worker in plain["worker_pools"]
        if worker["node_pool"] not in pools
    ]
    return faults


def counts_in_variables(text: str) -> tuple[PoolCount, ...]:
    """The counts that the variables state."""
    return tuple(
        sorted(
            PoolCount(pool["name"], pool["role"], pool["gpu_kind"], pool["n_replicas"], pool["n_gpus"])
            for pool in json.loads(text)["worker_pools"]
        )
    )


def _pods(cells: list[Cell], source: Source) -> tuple[Counter[int], Counter[int], Counter[int]]:
    """Pods by size: as planned, at every autoscaler's minimum, at its maximum."""
    settings = {pool.name: pool.autoscale for pool in source.allocation.pools}
    planned, least, most = Counter[int](), Counter[int](), Counter[int]()
    for cell in cells:
        scale = settings[cell.allocation.pools[0].name] if cell.is_autoscaled else None
        planned[cell.n_gpus] += cell.n_pods
        least[cell.n_gpus] += cell.n_pods if scale is None else scale.min_replicas
        most[cell.n_gpus] += cell.n_pods if scale is None else scale.max_replicas
    return planned, least, most
