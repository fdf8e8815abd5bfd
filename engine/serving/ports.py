"""What the dispatcher decides on and what it asks of the engine: the seam between decisions (no processes, no sockets) and processes.

The dispatcher is a synchronous state machine on one thread with an injected clock: the engine calls its methods as things
happen and carries out its :class:`Actions`. So it is tested, and fuzzed, without any process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.allocation import Topology
from engine.serving.job import Job, Outcome


@dataclass(frozen=True, slots=True)
class BaseReplicaInfo:
    """A base replica that is ready for jobs."""

    worker_id: str
    pool: str
    topology: Topology
    base_model_ids: tuple[str, ...]
    """Checkpoints it may hold; ``("*",)`` for any of the catalogue."""
    resident_base_model_ids: tuple[str, ...]
    """Checkpoints that are on its device now."""
    controlnet_ids: tuple[str, ...]
    """ControlNets that it may run in its own process; () if decoupled."""
    gpu_kind: str = ""
    n_gpus: int = 1


@dataclass(frozen=True, slots=True)
class ControlNetWorkerInfo:
    """A ControlNet worker that is ready."""

    worker_id: str
    pool: str
    controlnet_ids: tuple[str, ...]
    """What it may host; ``("*",)`` for any of the catalogue."""
    resident_controlnet_ids: tuple[str, ...]
    gpu_kind: str = ""


@dataclass(frozen=True, slots=True)
class Start:
    """One batch of compatible jobs that a base replica is to run now."""

    worker_id: str
    jobs: tuple[Job, ...]
    attempt: int
    """1 or 2."""
    controlnet_workers: tuple[Mapping[str, str], ...]
    """For each rank of the replica: ControlNet id to the worker that computes it; empty for what runs in process."""
    lora_paths: Mapping[str, str | None]
    """LoRA id to its checked file in the host tier; None while it is being fetched (``lora_ready`` follows)."""
    patch_by_step: int
    """Bounded asynchronous loading: the last step before which LoRAs must be in; 0 waits for them before the first."""


@dataclass(frozen=True, slots=True)
class BatchSpan:
    """A base replica had a batch from ``start_s`` until it gave it back, well or not, or was lost."""

    info: BaseReplicaInfo
    start_s: float
    end_s: float
    loading_s: float
    """Of that, spent making the checkpoint and in-process ControlNets ready; 0 where it did not report."""


class Actions(Protocol):
    """What the engine does for the dispatcher. None of it may call back into the dispatcher before it returns."""

    def start(self, start: Start) -> None:
        """Sends a batch to an idle replica."""

    def cancel(self, worker_id: str, request_id: str) -> None:
        """Asks a replica to give a running job up at its next step."""

    def fetch_lora(self, lora_id: str) -> None:
        """Has a loader fetch and check a LoRA into the host tier."""

    def drop_lora(self, lora_id: str, path: str) -> None:
        """Removes a LoRA's file from the host tier; no running job uses it."""

    def lora_ready(self, worker_id: str, lora_id: str, path: str) -> None:
        """Tells a replica that a LoRA it waits for is there."""

    def lora_refused(self, worker_id: str, lora_id: str, reason: str) -> None:
        """Tells a replica that a LoRA it waits for will not come."""

    def finish(self, outcome: Outcome) -> None:
        """A job has ended. Called exactly once for every job that was submitted, rejected ones included."""


class Dispatching(Protocol):
    """The dispatcher as the engine sees it (:class:`engine.serving.dispatcher.Dispatcher`)."""

    # workers
    def base_up(self, info: BaseReplicaInfo) -> None: ...
    def base_draining(self, worker_id: str) -> None:
        """It finishes what it has and gets nothing more."""

    def base_down(self, worker_id: str, reason: str) -> None:
        """It is gone; its jobs are tried once more elsewhere, or fail with this reason."""

    def controlnet_up(self, info: ControlNetWorkerInfo) -> None: ...
    def controlnet_draining(self, worker_id: str) -> None: ...
    def controlnet_down(self, worker_id: str, reason: str) -> None: ...
    def attached(self, base_worker_id: str, controlnet_worker_id: str) -> None:
        """From now on this base may use this ControlNet worker."""

    def detached(self, base_worker_id: str, controlnet_worker_id: str) -> None: ...
    def is_idle(self, worker_id: str) -> bool:
        """No job runs on, or uses, this worker: a draining one may be stopped now."""

    # jobs
    def submit(self, job: Job) -> None:
        """Queues, starts or rejects a job; ``Actions.finish`` reports a rejection before this returns."""

    def cancel(self, request_id: str) -> bool:
        """Ends a job (status ``failed``, reason ``cancelled``); False if it has ended already or is unknown."""

    def batch_done(self, worker_id: str, results: Mapping[str, object]) -> None:
        """A batch ended well: request id to :class:`engine.serving.job.WorkerResult`."""

    def batch_failed(
        self, worker_id: str, failures: Mapping[str, str], *, is_retryable: bool, done: Mapping[str, object]
    ) -> None:
        """A batch ended with failures (request id to sentence); jobs of it in ``done`` ended well."""

    # LoRAs
    def lora_fetched(self, lora_id: str, path: str, n_bytes: int) -> None: ...
    def lora_refused(self, lora_id: str, reason: str, *, is_final: bool) -> None:
        """Fetching failed. Final: the file is not what it claims, it is quarantined and later jobs with it are rejected."""

    # time
    def tick(self) -> float | None:
        """Expires deadlines, closes batching windows; engine time of the next moment it wants to be called, None for never."""

    def snapshot(self) -> DispatchSnapshot: ...
    def stop_admitting(self, reason: str) -> None:
        """Rejects every later job."""


@dataclass(frozen=True, slots=True)
class DispatchSnapshot:
    """Numbers for health and metrics."""

    n_waiting: int
    n_running: int
    n_waiting_by_pool: Mapping[str, int]
    oldest_wait_s: float
    n_submitted: int
    n_ended: Mapping[str, int]
    """By status."""
    n_retried: int
    n_lora_hits: int
    n_lora_misses: int
    lora_cache_bytes: int
    running: Mapping[str, Sequence[str]]
    """Base worker to the request ids it runs."""
