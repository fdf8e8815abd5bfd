"""What may compete: for each topology the pools it is made of, what fits a device, and bounds on how many replicas it needs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Protocol

import numpy as np

from engine.allocation import ANY, GIB, Allocation, Link, LinkKind, Policies, Pool, Topology
from planner.scenario import Scenario
from planner.service import ServiceTable, Sizes
from planner.simulator import ProfileFacts
from planner.workload import Floats, Workload

BASE_POOL: Final = "base"
HOUR_S: Final = 3600.0
Counts = tuple[int, ...]
"""Replicas of the base pool, then of each ControlNet pool of a shape, in the shape's order."""
DEDICATED_LOAD_MIN: Final = 1.0
"""A ControlNet gets workers of its own only if it keeps at least one busy; a fraction of a worker is cheaper to share."""


class WorkersOn(Protocol):
    """What ControlNet workers run on."""

    @property
    def gpu_kind(self) -> str:
        """The kind of GPU."""

    @property
    def facts(self) -> ProfileFacts:
        """Its memory."""

    @property
    def price_ratio(self) -> float:
        """Price of one of its GPU-hours over one of the base replicas' kind."""

    @property
    def gpus_max(self) -> int:
        """Most of them."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A topology's pools without their replica counts."""

    topology: Topology
    name: str
    """What tells this shape from others of the topology, in words; empty if it has only one."""
    controlnet_pools: tuple[tuple[str, tuple[str, ...]], ...]
    """Name and hosted ControlNets of each ControlNet pool; none if ControlNets run in the base process."""
    base_model_ids: tuple[str, ...]
    """Checkpoints that a base replica starts with, then ``*``."""
    in_process_ids: tuple[str, ...]
    """ControlNets that a base replica starts with, then ``*``; none if they run on workers."""
    controlnet_loads: tuple[float, ...]
    """Mean number of busy workers each ControlNet pool needs."""
    gpu_kind: str
    link: LinkKind
    policies: Policies
    worker_gpu_kind: str = ""
    """Of ControlNet pools; empty: as the base pool's."""
    worker_price_ratio: float = 1.0
    """Price of one of their GPU-hours over one of the base pool's."""

    workers_max: int | None = None
    """Most of them; None: base and ControlNet replicas together are limited."""

    def fits(self, counts: Counts, gpus_max: int) -> bool:
        """Whether no more GPUs than allowed are asked for: ``gpus_max`` of the base pool's kind."""
        if self.workers_max is None:
            return sum(counts) <= gpus_max
        return counts[0] <= gpus_max and sum(counts[1:]) <= self.workers_max

    def cost(self, counts: Counts) -> float:
        """What these replicas cost, in GPU-hours of the base pool's kind."""
        return counts[0] + self.worker_price_ratio * sum(counts[1:])

    def allocation(self, counts: Counts) -> Allocation:
        """The allocation with these replicas; raises ValueError if there is not one count per pool."""
        if len(counts) != 1 + len(self.controlnet_pools):
            raise ValueError(f"got {len(counts)} counts, needs {1 + len(self.controlnet_pools)}")
        base = Pool(
            BASE_POOL, "base", counts[0], self.gpu_kind, 1, self.topology, self.base_model_ids, self.in_process_ids
        )  # fmt: skip
        others = tuple(
            Pool(name, "controlnet", n, self.worker_gpu_kind or self.gpu_kind, 1, self.topology, (), hosted)
            for (name, hosted), n in zip(self.controlnet_pools, counts[1:], strict=True)
        )
        links = tuple(Link(BASE_POOL, name, self.link) for name, _ in self.controlnet_pools)
        return Allocation((base, *others), links, self.policies)


def shapes_of(
    scenario: Scenario,
    topology: Topology,
    workload: Workload,
    service: ServiceTable,
    sizes: Sizes,
    facts: ProfileFacts,
    gpu_kind: str,
    workers: WorkersOn | None = None,
    link: LinkKind | None = None,
) -> tuple[Shape, ...]:
    """The shapes of a topology worth searching: one, and for ``decoupled`` also the one with popular ControlNets apart.

    ``workers``: what ControlNet workers run on, if that is another kind of GPU than their base replicas'; ``link``: None: the
    scenario's.

    Replicas start with the most used models that fit a device, as a running service would: with empty devices, the queue of
    the first minutes would decide how many GPUs the whole window needs.
    """
    choice = scenario.policies
    policies = choice.policies()
    checkpoints = dict(
        zip(workload.checkpoint_names, sizes.of_checkpoints(workload.checkpoint_names).tolist(), strict=True)
    )
    controlnets = dict(
        zip(workload.controlnet_names, sizes.of_controlnets(workload.controlnet_names).tolist(), strict=True)
    )
    uses = Counter(workload.checkpoint.tolist())
    by_use = sorted(checkpoints, key=lambda name: (-uses[workload.checkpoint_names.index(name)], name))
    loads = controlnet_loads(workload, service)
    room_bytes = _room_bytes(facts, workload)
    is_apart = topology == "decoupled"
    # the ControlNets of one request must still fit beside whatever is resident, so checkpoints fill at most half
    held, left_bytes = _that_fit(by_use, checkpoints, room_bytes if is_apart or not loads else room_bytes // 2)
    in_process, _ = _that_fit(
        loads, controlnets, left_bytes + (0 if is_apart or not loads else room_bytes - room_bytes // 2)
    )
    plain = Shape(
        topology,
        "",
        (),
        (*held, ANY),
        () if is_apart else (*in_process, ANY),
        (),
        gpu_kind,
        link or choice.link,
        policies,
    )
    if not is_apart or not loads:
        return (plain,)
    if workers is not None:
        room_bytes = _room_bytes(workers.facts, workload)
        plain = replace(
            plain,
            worker_gpu_kind=workers.gpu_kind,
            worker_price_ratio=workers.price_ratio,
            workers_max=workers.gpus_max,
        )
    everything, _ = _that_fit(loads, controlnets, room_bytes)
    shared = replace(
        plain,
        name="one ControlNet pool",
        controlnet_pools=(("controlnets", (*everything, ANY)),),
        controlnet_loads=(sum(loads.values()),),
    )
    popular = [name for name, load in loads.items() if load >= DEDICATED_LOAD_MIN]
    popular = popular[: scenario.search.dedicated_controlnets_max]
    if not popular or len(loads) == 1:
        return (shared,)
    pools: list[tuple[str, tuple[str, ...]]] = [(f"controlnet-{rank}", (name,)) for rank, name in enumerate(popular, 1)]
    pool_loads = [loads[name] for name in popular]
    rest = {name: load for name, load in loads.items() if name not in popular}
    if rest:
        named, _ = _that_fit(rest, controlnets, room_bytes)
        pools.append(("controlnets-rest", (*named, ANY)))
        pool_loads.append(sum(rest.values()))
    apart = replace(
        shared, name="popular ControlNets apart", controlnet_pools=tuple(pools), controlnet_loads=tuple(pool_loads)
    )
    return (shared, apart)


def _room_bytes(facts: ProfileFacts, workload: Workload) -> int:
    """Device memory for models, beside the activations of the largest forward batch."""
    return round(
        (facts.device_memory_gib - facts.activation_gib_per_sample * float(workload.forward_batch.max())) * GIB
    )


def _that_fit(names: Iterable[str], n_bytes: Mapping[str, int], room_bytes: int) -> tuple[tuple[str, ...], int]:
    """The first names that fit together, and the bytes that are left."""
    held = []
    for name in names:
        if n_bytes[name] > room_bytes:
            break
        held.append(name)
        room_bytes -= n_bytes[name]
    return tuple(held), room_bytes


def controlnet_loads(workload: Workload, service: ServiceTable) -> dict[str, float]:
    """ControlNet to the mean number of workers it keeps busy, most used first (ties by name)."""
    forward_s = np.repeat(service.controlnet_forward_s * service.noise_ratio, workload.n_controlnets)
    seconds = np.bincount(
        workload.controlnet_uses, weights=forward_s * workload.use_steps, minlength=len(workload.controlnet_names)
    )
    loads = {
        name: float(s) / workload.duration_s
        for name, s in zip(workload.controlnet_names, seconds, strict=True)
        if s > 0
    }
    return dict(sorted(loads.items(), key=lambda item: (-item[1], item[0])))


@dataclass(frozen=True, slots=True)
class Misfit:
    """Something that cannot work with any number of GPUs."""

    binds: str
    """The scenario field or fact that binds."""
    why: str
    nearest: str
    """What would be enough."""
    attainable_latency_s: float | None = None
    """If the SLO's latency binds: the smallest latency that an idle system keeps for the asked share of requests."""


def misfit(
    topology: Topology,
    workload: Workload,
    service: ServiceTable,
    sizes: Sizes,
    facts: ProfileFacts,
    scenario: Scenario,
    workers: WorkersOn | None = None,
) -> Misfit | None:
    """Why no number of replicas can do, or None. ``workers`` as :func:`shapes_of` takes them."""
    controlnet_bytes = sizes.of_controlnets(workload.controlnet_names)
    checkpoint_bytes = sizes.of_checkpoints(workload.checkpoint_names)
    if topology == "decoupled":
        held = max((int(controlnet_bytes[code]) for codes in workload.controlnets for code in codes), default=0)
        if workers is not None:
            on_worker = _too_large(held / GIB, workers.facts, workload, f"a ControlNet worker on {workers.gpu_kind}")
            if on_worker is not None:
                return on_worker
            held = 0
        largest_gib = max(held, int(checkpoint_bytes.max())) / GIB
    else:
        # of one request: the largest checkpoint and the most ControlNets may belong to different ones
        needs = set(zip(workload.checkpoint.tolist(), workload.controlnets, strict=True))
        largest_gib = (
            max(
                int(checkpoint_bytes[code]) + sum(int(controlnet_bytes[c]) for c in set(codes)) for code, codes in needs
            )
            / GIB
        )
    too_large = _too_large(largest_gib, facts, workload, "a request")
    if too_large is not None:
        return too_large
    alone_s = service.alone_s
    target = scenario.slo.attainment_ratio
    in_time_ratio = float((alone_s <= scenario.slo.latency_s).mean())
    if in_time_ratio < target:
        floor_s = float(np.quantile(alone_s, target, method="inverted_cdf"))
        return Misfit(
            "slo.latency_s",
            f"on an idle system {in_time_ratio:.1%} of the requests take {scenario.slo.latency_s:g} s or less, "
            f"{target:.1%} are asked for; no number of GPUs makes one request faster",
            f"slo.latency_s of {_ceil_to(floor_s, 2)} s or more",
            floor_s,
        )
    return None


def _too_large(models_gib: float, facts: ProfileFacts, workload: Workload, who: str) -> Misfit | None:
    activation_gib = facts.activation_gib_per_sample * float(workload.forward_batch.max())
    needed_gib = models_gib + activation_gib
    if needed_gib <= facts.device_memory_gib:
        return None
    return Misfit(
        "gpu.device_memory_gib",
        f"{who} needs {needed_gib:.1f} GiB on one device ({models_gib:.1f} GiB of models, {activation_gib:.1f} GiB of "
        f"activations), a device has {facts.device_memory_gib:.1f} GiB",
        f"a GPU with at least {needed_gib:.1f} GiB",
    )


def _ceil_to(value: float, digits: int) -> str:
    return f"{math.ceil(value * 10**digits) / 10**digits:.{digits}f}"


def fewest_base_replicas(workload: Workload, service: ServiceTable, latency_s: float, attainment_ratio: float) -> int:
    """A lower bound that no allocation of this topology can go under.

    The requests in time at least include the shortest ``attainment_ratio`` of the work, and all of that work happens on base
    replicas between the first arrival and ``latency_s`` after the last one.
    """
    if service.batch is not None:
        return 1  # requests that share a forward take less together than one by one
    n_in_time = math.floor(attainment_ratio * len(workload))
    work_s = float(np.sort(service.alone_s)[:n_in_time].sum())
    span_s = float(workload.arrival_s[-1] - workload.arrival_s[0]) + latency_s
    return max(1, math.ceil(work_s / span_s - 1e-9))


def screen_base_replicas(
    workload: Workload, service_s: Floats, latency_s: float, attainment_ratio: float, low: int
) -> int:
    """Where to start the search: the fewest replicas with which these service times alone meet the SLO; at least ``low``.

    First come, first served on c servers (Kiefer–Wolfowitz).
    """
    from planner.fast.screen import n_late  # loads the compiler, which simulating alone does without

    arrivals = workload.arrival_s
    allowed_late = (1 - attainment_ratio) * len(arrivals)
    high = low
    while n_late(arrivals, service_s, high, latency_s, allowed_late) > allowed_late and high < 10**6:
        high *= 2
    low = max(low, high // 2)
    while low < high:
        middle = (low + high) // 2
        if n_late(arrivals, service_s, middle, latency_s, allowed_late) > allowed_late:
            low = middle + 1
        else:
            high = middle
    return high


def mean_load_gpus(workload: Workload, seconds: Floats) -> float:
    """Mean number of GPUs that this work keeps busy over the window."""
    return float(seconds.sum()) / workload.duration_s


def peak_hour_load_gpus(workload: Workload, seconds: Floats) -> float:
    """As :func:`mean_load_gpus`, of the clock hour with most work; of the whole window if that has no full hour."""
    n_hours = int(workload.duration_s // HOUR_S)
    if n_hours == 0:
        return mean_load_gpus(workload, seconds)
    hour = np.minimum((workload.arrival_s // HOUR_S).astype(np.int64), n_hours)
    return float(np.bincount(hour, weights=seconds, minlength=n_hours + 1)[:n_hours].max()) / HOUR_S
