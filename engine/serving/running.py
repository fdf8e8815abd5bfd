"""Batches that base replicas run: how they are sent to every rank, and how the ranks' reports become one result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.serving.job import StageSeconds, WorkerResult
from engine.serving.ports import Start
from engine.serving.supervisor import Replica
from engine.serving.worker_handle import WorkerHandle

PathFor = Callable[[WorkerHandle, str, str | None], str | None]
"""Rank, LoRA and its file here to where the rank finds it."""
PairOf = Callable[[str, str, int], str | None]
"""Base worker, ControlNet worker and rank to the id of their attached line."""


@dataclass(frozen=True, slots=True)
class BatchEnd:
    """How a batch ended."""

    results: Mapping[str, WorkerResult]
    failures: Mapping[str, str]
    is_retryable: bool


@dataclass(slots=True)
class RunningBatch:
    """One batch on one replica."""

    batch_id: int
    start: Start
    n_ranks: int
    since_s: float
    _reports: dict[int, tuple[Mapping[str, Any], Sequence[bytes]]] = field(default_factory=dict)

    def send(self, replica: Replica, pair_of: PairOf, path_for: PathFor) -> None:
        """Orders it on every rank."""
        start = self.start
        blobs = [blob for job in start.jobs for blob in job.blobs]
        for rank in replica.ranks:
            pairs = {
                controlnet_id: pair_of(start.worker_id, worker_id, rank.rank) or ""
                for controlnet_id, worker_id in start.controlnet_workers[rank.rank].items()
            }
            rank.send(
                {
                    "type": "run",
                    "batch_id": self.batch_id,
                    "jobs": [job.to_plain() for job in start.jobs],
                    "n_blobs": [len(job.blobs) for job in start.jobs],
                    "pairs": pairs,
                    "lora_paths": {name: path_for(rank, name, path) for name, path in start.lora_paths.items()},
                    "patch_by_step": start.patch_by_step,
                },
                blobs,
            )

    def report(self, rank: int, message: Mapping[str, Any], blobs: Sequence[bytes]) -> BatchEnd | None:
        """Takes one rank's report; the end of the batch once every rank has reported."""
        self._reports[rank] = (message, blobs)
        if len(self._reports) < self.n_ranks:
            return None
        leader, leader_blobs = self._reports[0]
        if leader["type"] == "batch_done":
            # The leader has the images; whatever the other rank met after the last exchange does not matter to them.
            results = _results(leader["results"], leader_blobs)
            return BatchEnd(self._with_other_misses(results), leader["failures"], is_retryable=False)
        failures: dict[str, str] = {}
        is_retryable = False
        for message_of_rank, _ in (self._reports[rank] for rank in sorted(self._reports, reverse=True)):
            failures.update(message_of_rank["failures"])
            is_retryable |= message_of_rank.get("is_retryable", False)
        return BatchEnd({}, failures, is_retryable)

    def _with_other_misses(self, results: dict[str, WorkerResult]) -> dict[str, WorkerResult]:
        """A rank with ControlNet workers of its own may have met loads that the leader knows nothing of."""
        workers = self.start.controlnet_workers
        for rank, (message, _) in self._reports.items():
            if rank > 0 and workers[rank] != workers[0]:
                for request_id, item in message.get("results", {}).items():
                    if request_id in results:
                        n = results[request_id].n_controlnet_misses + item["n_controlnet_misses"]
                        results[request_id] = dataclasses.replace(results[request_id], n_controlnet_misses=n)
        return results


def _results(plain: Mapping[str, Any], blobs: Sequence[bytes]) -> dict[str, WorkerResult]:
    results, at = {}, 0
    for request_id, item in plain.items():
        n_images = item["n_images"]
        results[request_id] = WorkerResult(
            stages=StageSeconds(**item["stages"]),
            lora_patch_step=item["lora_patch_step"],
            is_switch=item["is_switch"],
            n_controlnet_misses=item["n_controlnet_misses"],
            images=tuple(blobs[at : at + n_images]),
        )
        at += n_images
    return results
