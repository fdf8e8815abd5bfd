"""Which mechanisms beyond the static model an allocation and its world switch on, and what cannot be simulated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from engine.allocation import Allocation
from engine.allocation_checks import check_allocation
from planner.service import ServiceTable
from planner.simulator.result import ProfileFacts
from planner.simulator.world import STILL, World, world_problems
from traces.problems import InputError, Problem

Switch = Callable[[Allocation, World], bool]


def _links_differ(allocation: Allocation) -> bool:
    return len({link.kind for link in allocation.links}) > 1 or any(
        link.uplink or link.compression_ratio != 1.0 for link in allocation.links
    )


SWITCHES: Final[Mapping[str, Switch]] = MappingProxyType({
    "autoscale": lambda a, w: any(pool.autoscale is not None for pool in a.pools),
    "shared_gpus": lambda a, w: any(pool.workers_per_gpu != 1 or pool.speed_ratio is not None for pool in a.pools),
    "gpu_kinds": lambda a, w: len({pool.gpu_kind for pool in a.pools}) > 1,
    "links": lambda a, w: _links_differ(a),
    "queue_order": lambda a, w: a.policies.queue_order != "fifo",
    "tenants": lambda a, w: (
        bool(a.policies.tenants) or a.policies.tenant_running_max is not None or a.policies.tenant_waiting_max is not None
    ),
    "overtaking": lambda a, w: a.policies.switch_overtake_max > 0 or a.policies.overtake_max > 0,
    "batching": lambda a, w: a.policies.forward_batch_max is not None,
    "default_deadline": lambda a, w: a.policies.deadline_s is not None,
    "admission_estimate": lambda a, w: a.policies.admission_slack_ratio is not None,
    "lora_prefetch": lambda a, w: a.policies.lora_prefetch_depth > 0,
    "lora_cache_policy": lambda a, w: a.policies.lora_cache_policy != "lru",
    "shared_hosts": lambda a, w: a.policies.replicas_per_host != 1,
    "retries": lambda a, w: w.retries is not None,
    "failures": lambda a, w: w.failures is not None,
    "reclaims": lambda a, w: w.reclaims is not None,
    "lora_store": lambda a, w: w.lora_store is not None,
})  # fmt: skip
"""Name to whether it is on. Docs: the table in docs/simulator.md has a row for each."""


def mechanisms_in_use(allocation: Allocation, world: World = STILL) -> tuple[str, ...]:
    """The mechanisms that are on, in the order of ``SWITCHES``; () is the static model, which the fast tier covers too."""
    return tuple(name for name, is_on in SWITCHES.items() if is_on(allocation, world))


def check_mechanisms(
    allocation: Allocation,
    world: World,
    services: Mapping[str, ServiceTable],
    facts: ProfileFacts | Mapping[str, ProfileFacts],
) -> None:
    """Raises :class:`InputError` with everything that is out of range, contradictory, or lacks numbers that it needs."""
    problems = check_allocation(allocation) + world_problems(world, tuple(pool.name for pool in allocation.pools))
    policies = allocation.policies
    if policies.lora_prefetch_depth > 0:
        problems.append(
            Problem(
                "allocation policies.lora_prefetch_depth", f"got {policies.lora_prefetch_depth}", "0",
                "Fetches ahead of take-up are not simulated yet; leave it out",
            )
        )  # fmt: skip
    for pool in allocation.pools:
        place = f"allocation pool {pool.name!r}"
        if not isinstance(facts, ProfileFacts) and pool.name not in facts:
            problems.append(
                Problem(place, "has no memory facts", f"one of {sorted(facts)}", "Give those of its GPU kind")
            )
    if policies.forward_batch_max is not None:
        if policies.forward_batch_max < 1:
            problems.append(
                Problem("allocation policies.forward_batch_max", f"got {policies.forward_batch_max}", "1 or more")
            )
        for pool in allocation.pools_of("base"):
            table = services.get(pool.name)
            if table is not None and (table.batch is None or table.batch.samples_max < policies.forward_batch_max):
                problems.append(
                    Problem(
                        f"allocation pool {pool.name!r}", "its service table has no times of shared forwards",
                        f"up to {policies.forward_batch_max} samples", "Build it with forward_batch_max",
                    )
                )  # fmt: skip
    if _links_differ(allocation):
        for pool in allocation.pools_of("base"):
            table = services.get(pool.name)
            wanted = {(link.kind, link.compression_ratio) for link in allocation.links if link.base_pool == pool.name}
            if pool.topology == "decoupled" and table is not None and table.is_remote.any():
                missing = sorted(wanted - set(table.transfers))
                if missing:
                    problems.append(
                        Problem(
                            f"allocation pool {pool.name!r}", "its service table lacks a link's transfers",
                            ", ".join(f"{kind} compressed {ratio:g} times" for kind, ratio in missing), "Build it with links",
                        )
                    )  # fmt: skip
    if problems:
        raise InputError(problems)
