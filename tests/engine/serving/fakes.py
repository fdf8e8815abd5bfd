"""A world around the dispatcher without processes: it records what it is asked to do and objects to what must not happen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from engine.allocation import Policies, Pool
from engine.serving.dispatcher import Dispatcher, DispatchLimits
from engine.serving.job import ControlUse, Job, LoraUse, Outcome, StageSeconds, WorkerResult
from engine.serving.ports import BaseReplicaInfo, ControlNetWorkerInfo, Start


class World:
    """Implements ``Actions``; time stands still until a test moves it."""

    def __init__(self, policies: Policies | None = None, pools: Sequence[Pool] = (), **settings: Any) -> None:
        self.now_s = 0.0
        self.started: list[Start] = []
        self.running: dict[str, Start] = {}
        self.cancelled: list[tuple[str, str]] = []
        self.fetches: list[str] = []
        self.dropped: list[str] = []
        self.ready: list[tuple[str, str, str]] = []
        self.refused: list[tuple[str, str]] = []
        self.outcomes: dict[str, Outcome] = {}
        limits = settings.pop("limits", DispatchLimits())
        self.dispatcher = Dispatcher(self, lambda: self.now_s, policies, pools, limits=limits, **settings)

    # Actions

    def start(self, start: Start) -> None:
        assert start.worker_id not in self.running, "started on a busy replica"
        self.running[start.worker_id] = start
        self.started.append(start)

    def cancel(self, worker_id: str, request_id: str) -> None:
        self.cancelled.append((worker_id, request_id))

    def fetch_lora(self, lora_id: str) -> None:
        self.fetches.append(lora_id)

    def drop_lora(self, lora_id: str, path: str) -> None:
        self.dropped.append(lora_id)

    def lora_ready(self, worker_id: str, lora_id: str, path: str) -> None:
        self.ready.append((worker_id, lora_id, path))

    def lora_refused(self, worker_id: str, lora_id: str, reason: str) -> None:
        self.refused.append((worker_id, lora_id))

    def finish(self, outcome: Outcome) -> None:
        assert outcome.request_id not in self.outcomes, "ended twice"
        self.outcomes[outcome.request_id] = outcome

    # what happens

    def base(self, worker_id: str = "b0", **fields: Any) -> None:
        values = {"pool": "base", "topology": "decoupled", "base_model_ids": ("*",), "resident_base_model_ids": (),
                  "controlnet_ids": ()}  # fmt: skip
        self.dispatcher.base_up(BaseReplicaInfo(worker_id, **{**values, **fields}))

    def controlnet(
        self, worker_id: str, ids: Sequence[str] = ("*",), bases: Sequence[str] = ("b0",), **fields: Any
    ) -> None:
        info = ControlNetWorkerInfo(worker_id, "nets", tuple(ids), fields.get("resident", ()))
        self.dispatcher.controlnet_up(info)
        for base in bases:
            self.dispatcher.attached(base, worker_id)

    def submit(self, request_id: str, **fields: Any) -> None:
        fields["loras"] = tuple(LoraUse(name) for name in fields.get("loras", ()))
        fields["controls"] = tuple(ControlUse(name) for name in fields.get("controls", ()))
        self.dispatcher.submit(Job(request_id, **fields))

    def done(self, worker_id: str = "b0", **result: Any) -> None:
        start = self.running.pop(worker_id)
        results = {job.request_id: WorkerResult(StageSeconds(), **result) for job in start.jobs}
        self.dispatcher.batch_done(worker_id, results)

    def fail(
        self, worker_id: str = "b0", reason: str = "broken", *, is_retryable: bool, done: Sequence[str] = ()
    ) -> None:
        start = self.running.pop(worker_id)
        failures = {job.request_id: reason for job in start.jobs if job.request_id not in done}
        results = {name: WorkerResult(StageSeconds()) for name in done}
        self.dispatcher.batch_failed(worker_id, failures, is_retryable=is_retryable, done=results)

    def lose(self, worker_id: str = "b0", reason: str = "killed") -> None:
        self.running.pop(worker_id, None)
        self.dispatcher.base_down(worker_id, reason)

    def at(self, now_s: float) -> float | None:
        self.now_s = now_s
        return self.dispatcher.tick()

    # what a test asks

    def runs(self) -> dict[str, list[str]]:
        return {worker: [job.request_id for job in start.jobs] for worker, start in sorted(self.running.items())}

    def order(self) -> list[str]:
        return [job.request_id for start in self.started for job in start.jobs]

    def status(self, request_id: str) -> str:
        return self.outcomes[request_id].status

    def statuses(self) -> Mapping[str, int]:
        return Counter(outcome.status for outcome in self.outcomes.values())
