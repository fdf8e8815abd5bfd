"""Rules of an allocation that span fields; kept apart from the records so that each stays short."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.policies.autoscale_settings import autoscale_faults
from traces.problems import Problem

if TYPE_CHECKING:  # the records' module calls this one
    from engine.allocation import Allocation, Policies


def check_allocation(allocation: Allocation, where: str = "allocation") -> list[Problem]:
    """Rules that span fields; an empty list if all hold."""
    problems = []
    names = [pool.name for pool in allocation.pools]
    if not allocation.pools_of("base"):
        problems.append(Problem(f"{where} pools", "got no base pool", "at least one", "Add a pool with role 'base'."))
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(Problem(f"{where} pools", f"got two pools named {name!r}", "unique names", "Rename one."))
    for pool in allocation.pools:
        place = f"{where} pool {pool.name!r}"
        may_be_empty = pool.autoscale is not None and pool.autoscale.min_replicas == 0
        if not (0 < pool.n_replicas <= 100_000 or (pool.n_replicas == 0 and may_be_empty)):
            problems.append(
                Problem(place, f"n_replicas is {pool.n_replicas}", "1..100000", "Set it or remove the pool.")
            )
        if not 0 < pool.n_gpus_per_replica <= 64:
            problems.append(Problem(place, f"n_gpus_per_replica is {pool.n_gpus_per_replica}", "1..64", "Set it."))
        if pool.topology == "decoupled_cfg2" and pool.role == "base" and pool.n_gpus_per_replica != 2:
            problems.append(
                Problem(place, f"n_gpus_per_replica is {pool.n_gpus_per_replica}", "2 for decoupled_cfg2", "Set it.")
            )
        if pool.role == "controlnet" and not pool.controlnet_ids:
            problems.append(Problem(place, "hosts no ControlNet", "at least one id", "Name them or remove the pool."))
        if pool.autoscale is not None:
            for name, what, allowed in autoscale_faults(pool.autoscale, pool.n_replicas):
                problems.append(
                    Problem(f"{place} {'autoscale.' if name != 'n_replicas' else ''}{name}", what, allowed, "Set it.")
                )
        if not 1 <= pool.workers_per_gpu <= 16:
            problems.append(Problem(place, f"workers_per_gpu is {pool.workers_per_gpu}", "1..16", "Set it."))
        if pool.workers_per_gpu > 1 and (pool.n_gpus_per_replica > 1 or pool.autoscale is not None):
            problems.append(
                Problem(
                    place,
                    "shares GPUs between workers",
                    "one GPU a replica and no autoscale beside it",
                    "Drop one of the two.",
                )
            )
        if pool.speed_ratio is not None and not 0 < pool.speed_ratio <= 1:
            problems.append(Problem(place, f"speed_ratio is {pool.speed_ratio}", "above 0, at most 1", "Set it."))
    problems += _policy_problems(allocation.policies, where)
    capacities: dict[str, float | None] = {}
    for link in allocation.links:
        place = f"{where} link {link.base_pool!r} to {link.controlnet_pool!r}"
        if link.compression_ratio < 1:
            problems.append(Problem(place, f"compression_ratio is {link.compression_ratio}", "1 or more", "Set it."))
        if bool(link.uplink) != bool(link.uplink_gib_per_s):
            problems.append(
                Problem(place, "has one of uplink and uplink_gib_per_s", "both or neither", "Add the other.")
            )
        if link.uplink and capacities.setdefault(link.uplink, link.uplink_gib_per_s) != link.uplink_gib_per_s:
            problems.append(
                Problem(place, f"gives uplink {link.uplink!r} another capacity", "one capacity a line", "Repair it.")
            )
        for name in (link.base_pool, link.controlnet_pool):
            if name not in names:
                problems.append(
                    Problem(f"{where} links", f"names the pool {name!r}", f"one of {sorted(names)}", "Repair it.")
                )
    return problems


def _policy_problems(policies: Policies, where: str) -> list[Problem]:
    problems = []
    place = f"{where} policies"
    names = [share.tenant_id for share in policies.tenants]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(
            Problem(f"{place}.tenants", f"got {name!r} twice", "every tenant once", "Remove one of the two.")
        )
    limits = [("tenant_running_max", policies.tenant_running_max)]
    limits += [(f"tenants running_max of {share.tenant_id!r}", share.running_max) for share in policies.tenants]
    for name, limit in limits:
        if limit is not None and limit < 1:
            problems.append(Problem(f"{place}.{name}", f"got {limit}", "1 or more, or null for no limit", "Set it."))
    for name, value in (("deadline_s", policies.deadline_s), ("admission_slack_ratio", policies.admission_slack_ratio)):
        if value is not None and value <= 0:
            problems.append(Problem(f"{place}.{name}", f"got {value:g}", "above 0, or null for none", "Set it."))
    if policies.forward_batch_max is not None and policies.forward_batch_max < 1:
        problems.append(
            Problem(f"{place}.forward_batch_max", f"got {policies.forward_batch_max}", "1 or more, or null", "Set it.")
        )
    if policies.retry_max > 10:
        problems.append(Problem(f"{place}.retry_max", f"got {policies.retry_max}", "0..10", "Set it."))
    for share in policies.tenants:
        if share.weight <= 0:
            problems.append(
                Problem(f"{place}.tenants", f"weight of {share.tenant_id!r} is {share.weight}", "above 0", "Set it.")
            )
    if (policies.lora_cache_policy == "ttl") != (policies.lora_cache_ttl_s is not None):
        problems.append(
            Problem(
                f"{place}.lora_cache_ttl_s", f"got {policies.lora_cache_ttl_s} with lora_cache_policy {policies.lora_cache_policy!r}",
                "seconds with 'ttl', nothing otherwise", "Set one of the two.",
            )
        )  # fmt: skip
    if not 1 <= policies.replicas_per_host <= 64:
        problems.append(Problem(f"{place}.replicas_per_host", f"got {policies.replicas_per_host}", "1..64", "Set it."))
    return problems
