"""A replica as others see it: operators and metrics, and the dispatcher."""

from __future__ import annotations

from typing import Final

from engine.serving.engine_view import WorkerView
from engine.serving.ports import BaseReplicaInfo, ControlNetWorkerInfo
from engine.serving.running import RunningBatch
from engine.serving.supervisor import Replica

DOING: Final = {"compile": "compiles and captures its warm shapes", "load": "loads models"}
"""By phase of a worker's work path."""


def worker_view(replica: Replica, batch: RunningBatch | None, now_s: float) -> WorkerView:
    """For health, metrics and the admin API.

    Args:
        batch: that the replica runs. Heartbeats are up to a second old; whether a base worker has a batch is known at once.
        now_s: engine clock.
    """
    is_busy = batch is not None if replica.spec.role == "base" else replica.is_busy
    age_s = replica.progress_age_s if is_busy else 0.0
    return WorkerView(
        worker_id=replica.worker_id,
        pool=replica.spec.pool,
        role=replica.spec.role,
        state=replica.state,
        pids=tuple(rank.pid for rank in replica.ranks),
        is_busy=is_busy,
        progress_age_s=min(age_s, now_s - batch.since_s) if batch is not None else age_s,
        busy_s=replica.busy_s,
        n_restarts=replica.n_restarts,
        reason="; ".join(filter(None, (_starting(replica), replica.reason))),
        memory_bytes=replica.memory,
        shapes=tuple(replica.ranks[0].resident.get("shapes", ())) if replica.ranks else (),
    )


def _starting(replica: Replica) -> str:
    """What a replica that is not ready yet is at."""
    phases = {rank.phase for rank in replica.ranks} if replica.state == "starting" else set()
    return next((f"it {said}" for phase, said in DOING.items() if phase in phases), "")


def base_info(replica: Replica) -> BaseReplicaInfo:
    """For the dispatcher; the replica is ready."""
    spec = replica.spec
    return BaseReplicaInfo(
        worker_id=spec.worker_id,
        pool=spec.pool,
        topology=spec.topology,
        base_model_ids=spec.base_model_ids,
        resident_base_model_ids=tuple(replica.ranks[0].resident.get("base_model_ids", ())),
        controlnet_ids=spec.controlnet_ids,
        gpu_kind=spec.gpu_kind,
        n_gpus=spec.n_ranks,
    )


def controlnet_info(replica: Replica) -> ControlNetWorkerInfo:
    """For the dispatcher; the replica is ready."""
    spec = replica.spec
    return ControlNetWorkerInfo(
        worker_id=spec.worker_id,
        pool=spec.pool,
        controlnet_ids=spec.controlnet_ids,
        resident_controlnet_ids=tuple(replica.ranks[0].resident.get("controlnet_ids", ())),
        gpu_kind=spec.gpu_kind,
    )
