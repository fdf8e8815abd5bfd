"""What is known of the batch that a base worker runs: written by the control channel's thread, read by the work path."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.serving.job import Job
from engine.workers.painter import JobError


@dataclass(frozen=True, slots=True)
class BatchOrder:
    """A batch as the front orders it."""

    batch_id: int
    jobs: tuple[Job, ...]
    pair_of_controlnet: Mapping[str, str]
    """ControlNet id to the id of the attached pair; what is not in it runs in process."""
    patch_by_step: int

    @classmethod
    def from_message(cls, message: Mapping[str, Any], blobs: Sequence[bytes]) -> BatchOrder:
        """Decodes a ``run`` message."""
        jobs, at = [], 0
        for plain, n_blobs in zip(message["jobs"], message["n_blobs"], strict=True):
            jobs.append(Job.from_plain(plain, tuple(blobs[at : at + n_blobs])))
            at += n_blobs
        return cls(message["batch_id"], tuple(jobs), dict(message["pairs"]), message["patch_by_step"])


class BatchNews:
    """LoRAs that have come, and jobs that were given up, since the batch was ordered."""

    def __init__(self, batch_id: int, request_ids: Sequence[str], lora_paths: Mapping[str, str | None]) -> None:
        self.batch_id = batch_id
        self._changed = threading.Condition()
        self._paths = dict(lora_paths)
        self._refused: dict[str, str] = {}
        self._running = set(request_ids)

    def lora_ready(self, lora_id: str, path: str) -> None:
        """A LoRA is in the host tier."""
        with self._changed:
            if lora_id in self._paths:
                self._paths[lora_id] = path
            self._changed.notify_all()

    def lora_refused(self, lora_id: str, reason: str) -> None:
        """A LoRA will not come."""
        with self._changed:
            if lora_id in self._paths:
                self._refused[lora_id] = reason
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        """Nobody waits for this job any more."""
        with self._changed:
            self._running.discard(request_id)
            self._changed.notify_all()

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for any job of the batch."""
        return not self._running

    @property
    def has_loras(self) -> bool:
        """Whether every LoRA of the batch is here (true without any). Raises :class:`JobError` for a refused one."""
        with self._changed:
            return self._has_loras()

    def _has_loras(self) -> bool:
        for lora_id, reason in self._refused.items():
            raise JobError(f"LoRA {lora_id}: {reason}")
        return all(path is not None for path in self._paths.values())

    def wait_for_loras(self, timeout_s: float, progress: Callable[[], None]) -> bool:
        """Waits until every LoRA is here; False if all jobs were cancelled meanwhile.

        Raises:
            JobError: a LoRA was refused, or did not come in time.
        """
        until = time.monotonic() + timeout_s
        with self._changed:
            while not self._has_loras():
                if self.is_cancelled:
                    return False
                left_s = until - time.monotonic()
                if left_s <= 0:
                    missing = sorted(lora_id for lora_id, path in self._paths.items() if path is None)
                    raise JobError(f"LoRA {', '.join(missing)} did not come within {timeout_s:g} s")
                self._changed.wait(min(left_s, 1.0))
                progress()
        return True

    def path(self, lora_id: str) -> str:
        """File of a LoRA that is here."""
        path = self._paths[lora_id]
        if path is None:
            raise JobError(f"LoRA {lora_id} is not here")
        return path
