"""One JSON line for every answered request: enough to explain it, nothing that was private in it (no prompt, image or token)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

from engine.serving.job import Job, Outcome


@dataclass(slots=True)
class RequestTrail:
    """What is known of one HTTP request; filled in as it goes its way, written once at its end."""

    request_id: str
    path: str
    start_s: float
    tenant_id: str = ""
    variant: str = ""
    engine: str = ""
    job: Job | None = None
    outcome: Outcome | None = None
    http_status: int = 0
    code: str = ""
    """Of the refusal; empty for 200."""
    events: list[str] = field(default_factory=list)

    def line(self, end_s: float, wall_clock: str) -> dict[str, Any]:
        """JSON values, sizes and names only."""
        row: dict[str, Any] = {
            "time": wall_clock, "request_id": self.request_id, "path": self.path, "tenant_id": self.tenant_id,
            "variant": self.variant, "engine": self.engine, "http_status": self.http_status, "code": self.code,
            "latency_s": round(end_s - self.start_s, 6),
        }  # fmt: skip
        if self.events:
            row["events"] = self.events
        if self.job is not None:
            job = self.job
            row["job"] = {
                "base_model_id": job.base_model_id, "n_images": job.n_images, "n_steps": job.n_steps,
                "width_px": job.width_px, "height_px": job.height_px, "guidance_scale": job.guidance_scale,
                "controlnet_ids": [use.controlnet_id for use in job.controls],
                "lora_ids": [use.lora_id for use in job.loras], "seed": job.seed, "priority": job.priority,
                "deadline_s": job.deadline_s, "n_prompt_characters": len(job.prompt),
                "n_image_bytes": sum(map(len, job.blobs)),
            }  # fmt: skip
        if self.outcome is not None:
            outcome = self.outcome
            row["outcome"] = {
                "status": outcome.status, "reason": outcome.reason, "worker_id": outcome.worker_id,
                "n_attempts": outcome.n_attempts, "n_lora_misses": outcome.n_lora_misses,
                "queue_wait_s": None if outcome.start_s is None else round(outcome.start_s - outcome.arrival_s, 6),
            }  # fmt: skip
            if outcome.result is not None:
                row["stages"] = {name: round(value, 6) for name, value in asdict(outcome.result.stages).items()}
                row["lora_patch_step"] = outcome.result.lora_patch_step
        return row


class JsonLog:
    """Writes lines of JSON to a stream; a stream that fails is counted, never an error of the request."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.n_lost = 0

    def write(self, row: dict[str, Any]) -> None:
        """One line, flushed. Control characters of hostile texts are escaped by JSON."""
        try:
            self._stream.write(json.dumps(row, ensure_ascii=True, separators=(",", ":")) + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # a full disk or a closed pipe
            self.n_lost += 1
