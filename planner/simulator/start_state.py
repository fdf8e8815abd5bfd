"""What workers hold before the first arrival, where that is known: an engine that was warmed up is not simulated from empty.

Off by default: without a state, a pool starts with the models that it names, and with no LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from planner.simulator.lora_tiers import HostTier
from planner.simulator.replicas import BaseReplica, Cache, ControlNetWorker
from planner.workload import Workload


@dataclass(frozen=True, slots=True)
class Held:
    """Models on one worker's device, least recently used first."""

    base_model_ids: tuple[str, ...] = ()
    controlnet_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StartState:
    """Ids that the workload does not use are ignored; workers that are not named start as they would without a state."""

    workers: Mapping[str, Held] = field(default_factory=dict)
    lora_ids: tuple[str, ...] = ()
    """In the host tier of every base replica, least recently used first."""


def set_start(
    state: StartState,
    workload: Workload,
    replicas: Sequence[BaseReplica],
    workers: Sequence[ControlNetWorker],
    tiers: Sequence[HostTier] | None,
) -> None:
    """Puts models where the state says, in its order, as far as they fit.

    Args:
        tiers: of each replica, where LoRAs are kept by host; None: each replica has its own cache.
    """
    checkpoint = {name: code for code, name in enumerate(workload.checkpoint_names)}
    controlnet = {name: code for code, name in enumerate(workload.controlnet_names)}
    lora = {name: code for code, name in enumerate(workload.lora_names)}
    loras = [lora[name] for name in state.lora_ids if name in lora]
    for replica in replicas:
        held = state.workers.get(replica.worker_id, Held())
        checkpoints = [checkpoint[name] for name in held.base_model_ids if name in checkpoint]
        controlnets = [controlnet[name] for name in held.controlnet_ids if name in controlnet]
        _hold(replica.host_checkpoints, checkpoints)
        _hold(replica.host_controlnets, controlnets)
        _hold(replica.device, [*checkpoints, *(len(checkpoint) + code for code in controlnets)])
        if tiers is None:
            _hold(replica.host_loras, loras)
        else:
            for code in loras:
                if not tiers[replica.index].holds(code, 0.0):
                    tiers[replica.index].reserve(code, 0.0)
    for worker in workers:
        held = state.workers.get(worker.worker_id, Held())
        controlnets = [controlnet[name] for name in held.controlnet_ids if name in controlnet]
        _hold(worker.host, controlnets)
        _hold(worker.device, controlnets)


def _hold(cache: Cache, keys: Sequence[int]) -> None:
    for key in keys:
        if not cache.touch(key):
            cache.insert(key)
