"""The single changes that a diagnosis tries: each alters one thing of the present service and is simulated like it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from engine.allocation import GIB, Allocation, Policies, Topology
from planner.candidates import Shape, shapes_of
from planner.diagnose_question import Present, table_of
from planner.service import STACK_OF, ServiceTable
from planner.workload import Ints
from traces.problems import InputError

CACHE_FACTOR: Final = 4.0
OVERTAKE: Final = 8
BATCH_SAMPLES: Final = 8
Kind = Literal["single", "combined", "fleet"]


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """One altered service. ``allocations(n)`` gives the ways to divide n GPUs among its pools that are worth a look."""

    key: str
    words: str
    kind: Kind
    """``single``: one thing differs. ``combined``: several, shown for comparison. ``fleet``: only the number of GPUs."""
    service: ServiceTable
    allocations: Callable[[int], tuple[Allocation, ...]]
    gpus_min: int
    note: str = ""
    """What the numbers rest on beyond the profile's laws."""


@dataclass(frozen=True, slots=True)
class NotTried:
    """A change that means nothing here, or that cannot be simulated, and why."""

    words: str
    why: str


def changes_of(present: Present, fleet: Allocation) -> tuple[list[Change], list[NotTried]]:
    """Every change that makes a difference to this traffic, and those left out with the reason."""
    tried: list[Change] = []
    left_out: list[NotTried] = []
    for words, make in _catalogue(present, fleet):
        try:
            made = make()
        except InputError as error:
            left_out.append(NotTried(words, str(error.problems[0])))
            continue
        if isinstance(made, str):
            left_out.append(NotTried(words, made))
        else:
            tried.append(made)
    return tried, left_out


Made = Change | str


def _catalogue(present: Present, fleet: Allocation) -> Iterator[tuple[str, Callable[[], Made]]]:
    policies = fleet.policies
    workload = present.workload
    has_loras = bool(workload.n_loras.any())
    has_controlnets = bool(workload.n_controlnets.any())
    is_engine = STACK_OF[present.topology] == "engine"
    n_checkpoints = len(workload.checkpoint_names)
    samples = int(workload.forward_batch.max())

    def with_policies(key: str, words: str, new: Policies, applies: bool, why: str) -> Callable[[], Made]:
        def make() -> Made:
            if not applies:
                return why
            sized = replace(fleet, policies=new)
            service = present.service
            if new.forward_batch_max != policies.forward_batch_max:
                service = table_of(present.scenario, present.inputs, workload, present.topology, sized)
            return Change(key, words, "single", service, resized(sized), _least(fleet))

        return make

    words = "compile the present pipeline (torch.compile, CUDA graphs, LoRAs fused per request)"
    yield (
        words,
        lambda: (
            _other_topology(present, fleet, "compiled", words, "single", "diffusers_tuned")
            if present.topology == "diffusers"
            else "the present service is not stock Diffusers"
        ),
    )
    words_kernels = "our engine's kernels in place, LoRAs handled as today"
    yield (
        words_kernels,
        lambda: (
            "the present service runs on our engine already"
            if is_engine
            else _kernels_only(present, fleet, words_kernels)
        ),
    )
    words_loras = "LoRAs patched in place, everything else as today"
    yield (
        words_loras,
        lambda: (
            "the traffic has no LoRAs"
            if not has_loras
            else "the present service patches LoRAs in place already"
            if is_engine
            else _loras_only(present, fleet, words_loras)
        ),
    )
    words_engine = (
        "ControlNets back in the base process"
        if present.topology == "decoupled"
        else "our engine on the same GPUs: kernels and LoRAs in place"
    )
    yield (
        words_engine,
        lambda: (
            "the present service runs on our engine already"
            if present.topology == "colocated"
            else _other_topology(
                present, fleet, "colocated", words_engine, "single" if is_engine else "combined", "colocated"
            )
        ),
    )
    words_apart = "ControlNets on workers of their own"
    if not is_engine:
        words_apart += ", on our engine"
    yield (
        words_apart,
        lambda: (
            "the traffic has no ControlNets"
            if not has_controlnets
            else "the present service has them apart already"
            if present.topology == "decoupled"
            else _apart(present, fleet, words_apart)
        ),
    )
    words = f"LoRA cache of each replica {CACHE_FACTOR:g} times as large"
    yield words, with_policies(
        "lora_cache", words, replace(policies, lora_cache_gib=CACHE_FACTOR * policies.lora_cache_gib), has_loras, "the traffic has no LoRAs",
    )  # fmt: skip
    words = f"host memory for checkpoints {CACHE_FACTOR:g} times as large"
    yield words, with_policies(
        "checkpoint_cache", words, replace(policies, checkpoint_host_cache_gib=CACHE_FACTOR * policies.checkpoint_host_cache_gib),
        n_checkpoints > 1 and _is_short(present.inputs.sizes.of_checkpoints(workload.checkpoint_names), policies.checkpoint_host_cache_gib),
        "the traffic has one checkpoint" if n_checkpoints == 1 else _why_not_short(policies.checkpoint_host_cache_gib),
    )  # fmt: skip
    words = f"host memory for ControlNets {CACHE_FACTOR:g} times as large"
    yield words, with_policies(
        "controlnet_cache", words, replace(policies, controlnet_host_cache_gib=CACHE_FACTOR * policies.controlnet_host_cache_gib),
        has_controlnets and _is_short(present.inputs.sizes.of_controlnets(workload.controlnet_names), policies.controlnet_host_cache_gib),
        _why_not_short(policies.controlnet_host_cache_gib) if has_controlnets else "the traffic has no ControlNets",
    )  # fmt: skip
    words = f"up to {OVERTAKE} requests may pass one that would switch the checkpoint"
    yield words, with_policies(
        "order", words, replace(policies, switch_overtake_max=max(OVERTAKE, policies.switch_overtake_max)),
        n_checkpoints > 1 and policies.switch_overtake_max < OVERTAKE,
        "the traffic has one checkpoint" if n_checkpoints == 1 else "they may already",
    )  # fmt: skip
    batch = max(BATCH_SAMPLES, 2 * samples)
    words = f"alike requests share a forward of up to {batch} samples"
    yield words, with_policies(
        "batching", words, replace(policies, forward_batch_max=batch), policies.forward_batch_max is None,
        "they share forwards already",
    )  # fmt: skip
    words_divided = "the same GPUs divided otherwise between the pools"
    yield (
        words_divided,
        lambda: (
            "the fleet has one pool"
            if len(fleet.pools) == 1
            else Change("division", words_divided, "fleet", present.service, _divided(fleet), _least(fleet))
            if _divided(fleet)(fleet.n_gpus)
            else "every pool has one GPU"
        ),
    )
    for place, pool in enumerate(fleet.pools):
        words_more = "one more GPU" if len(fleet.pools) == 1 else f"one more GPU for pool {pool.name}"
        yield words_more, functools.partial(_one_more, present, fleet, place, words_more)


def _one_more(present: Present, fleet: Allocation, place: int, words: str) -> Made:
    pool = fleet.pools[place]
    more = replace(pool, n_replicas=pool.n_replicas + pool.workers_per_gpu)
    larger = replace(fleet, pools=(*fleet.pools[:place], more, *fleet.pools[place + 1 :]))
    return Change(f"one_more.{pool.name}", words, "fleet", present.service, lambda n: (larger,), _least(fleet))


def resized(fleet: Allocation) -> Callable[[int], tuple[Allocation, ...]]:
    """The fleet with n GPUs: the pools in proportion to today's, and with up to two moved from one pool to another."""

    def at(n_gpus: int) -> tuple[Allocation, ...]:
        if n_gpus == fleet.n_gpus:
            return (fleet,)  # today's own division is the one compared with
        per_place = [pool.workers_per_gpu for pool in fleet.pools]
        gpus = [pool.n_gpus for pool in fleet.pools]
        shares = np.array(gpus, dtype=np.float64) / sum(gpus)
        wanted = np.maximum(1, np.floor(shares * n_gpus)).astype(int).tolist()
        first_base = next(i for i, pool in enumerate(fleet.pools) if pool.role == "base")
        wanted[first_base] += n_gpus - sum(wanted)
        found = {}
        for counts in _moves(wanted):
            pools = tuple(
                replace(pool, n_replicas=n * places)
                for pool, n, places in zip(fleet.pools, counts, per_place, strict=True)
            )
            found[counts] = replace(fleet, pools=pools)
        return tuple(found.values())

    return at


def _divided(fleet: Allocation) -> Callable[[int], tuple[Allocation, ...]]:
    """Other divisions than today's."""
    one_more = replace(fleet.pools[0], n_replicas=fleet.pools[0].n_replicas + fleet.pools[0].workers_per_gpu)
    other = replace(fleet, pools=(one_more, *fleet.pools[1:]))  # of another size, so that today's is one of many
    sized = resized(other)

    def at(n_gpus: int) -> tuple[Allocation, ...]:
        return tuple(item for item in sized(n_gpus) if item.pools != fleet.pools)

    return at


def _moves(counts: list[int]) -> Iterator[tuple[int, ...]]:
    """These counts, then each with one or two taken from one pool and given to another; none below 1."""
    if min(counts) >= 1:
        yield tuple(counts)
    for n_moved in (1, 2):
        for source, target in itertools.permutations(range(len(counts)), 2):
            moved = list(counts)
            moved[source] -= n_moved
            moved[target] += n_moved
            if min(moved) >= 1:
                yield tuple(moved)


def _is_short(n_bytes: Ints, cache_gib: float) -> bool:
    """Whether some of these models do not fit into the host memory that there is for them."""
    return cache_gib > 0 and int(n_bytes.sum()) > cache_gib * GIB


def _why_not_short(cache_gib: float) -> str:
    return "it holds all of them already" if cache_gib > 0 else "there is none to enlarge"


def _least(fleet: Allocation) -> int:
    return len(fleet.pools)


def _other_topology(
    present: Present, fleet: Allocation, key: str, words: str, kind: Kind, topology: Topology
) -> Change:
    service = table_of(present.scenario, present.inputs, present.workload, topology, fleet)
    shape = _plain_shape(present, topology, service)
    return Change(key, words, kind, service, lambda n: (_with_policies(shape.allocation((n,)), fleet),), 1)


def _with_policies(allocation: Allocation, fleet: Allocation) -> Allocation:
    return replace(allocation, policies=fleet.policies)


def _plain_shape(present: Present, topology: Topology, service: ServiceTable) -> Shape:
    inputs = present.inputs
    return shapes_of(
        present.scenario, topology, present.workload, service, inputs.sizes, inputs.facts, inputs.gpu_kind
    )[0]


def _kernels_only(present: Present, fleet: Allocation, words: str) -> Made:
    stock = present.service
    if stock.batch is not None:
        return "shared forwards cannot be composed of two stacks"
    ours = table_of(present.scenario, present.inputs, present.workload, "colocated", fleet)
    service = replace(
        ours, topology=stock.topology, lora_attach_s=stock.lora_attach_s, lora_detach_s=stock.lora_detach_s,
        lora_fetch_s=stock.lora_fetch_s, denoise_alone_s=ours.denoise_alone_s + present.weights.lora_s,
        checkpoint_load_s=stock.checkpoint_load_s, checkpoint_fetch_s=stock.checkpoint_fetch_s,
        controlnet_load_s=stock.controlnet_load_s, controlnet_fetch_s=stock.controlnet_fetch_s,
    )  # fmt: skip
    note = "Composed of two stacks' laws: unfused LoRAs add to our step what they add to the present one."
    return Change("kernels", words, "single", service, resized(fleet), _least(fleet), note)


def _loras_only(present: Present, fleet: Allocation, words: str) -> Made:
    stock = present.service
    if stock.batch is not None:
        return "shared forwards cannot be composed of two stacks"
    ours = table_of(present.scenario, present.inputs, present.workload, "colocated", fleet)
    service = replace(
        stock, lora_attach_s=ours.lora_attach_s, lora_detach_s=ours.lora_detach_s, lora_fetch_s=ours.lora_fetch_s,
        denoise_alone_s=stock.denoise_alone_s - present.weights.lora_s,
    )  # fmt: skip
    note = "Composed of two stacks' laws: the present steps without what unfused LoRAs add."
    return Change("loras_in_place", words, "single", service, resized(fleet), _least(fleet), note)


def _apart(present: Present, fleet: Allocation, words: str) -> Made:
    if fleet.n_gpus < 2:
        return "it needs two GPUs or more; the present fleet has one"
    kind: Kind = "single" if present.topology == "colocated" else "combined"
    service = table_of(present.scenario, present.inputs, present.workload, "decoupled", fleet)
    shape = _plain_shape(present, "decoupled", service)
    work_s, base_s = float(service.controlnet_work_s.sum()), float(service.alone_s.sum())
    # a ControlNet worker serves forwards only, a base replica whole requests: GPUs go by the work of each
    share = work_s / (work_s + base_s)

    def at(n_gpus: int) -> tuple[Allocation, ...]:
        n_workers = min(n_gpus - 1, max(1, math.ceil(share * n_gpus)))
        return tuple(
            _with_policies(shape.allocation(counts), fleet) for counts in _moves([n_gpus - n_workers, n_workers])
        )

    note = "GPUs divided between the two roles by their work, up to two moved; 'diffplan plan' searches the division."
    return Change("decoupled", words, kind, service, at, 2, note)
