"""A device works behind its queue: a stage's seconds are those until the device is done, not those of asking it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from engine.serving.job import Job, LoraUse
from engine.workers import base_process
from engine.workers.base_process import BaseProcess
from engine.workers.batch import BatchNews, BatchOrder
from engine.workers.painter import LoadedLora
from engine.workers.setup import WorkerSetup


class Clock:
    """A clock that only the device moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


class QueueingPainter:
    """Asks a device, which takes its time only when somebody waits for it."""

    local_load_s = 0.25

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._queued_s = 0.0
        self.controlnet_load_s = self.local_load_s

    def activate(self, base_model_id: str) -> bool:
        return False

    def begin(self, jobs: Sequence[Job], pairs: Mapping[str, Any]) -> int:
        self._clock.now_s += self.local_load_s  # loading waits for itself
        self._queued_s += 1.0
        return jobs[0].n_steps

    def step(self, i: int) -> None:
        self._queued_s += 10.0

    def patch(self, loras: Sequence[tuple[LoadedLora, float]]) -> None:
        self._queued_s += 100.0

    def settle(self) -> None:
        self._clock.now_s += self._queued_s
        self._queued_s = 0.0

    def finish(self, *, wants_images: bool) -> list[list[bytes]]:
        self._queued_s += 1000.0
        self.settle()
        return [[]]

    def restore(self) -> None:
        self._queued_s += 7.0

    def resident(self) -> Mapping[str, list[str]]:
        return {}

    def memory(self) -> Mapping[str, int]:
        return {}


class Ears:
    """Of the harness what a batch needs; keeps what was said."""

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []

    def listen(self, hear: object) -> None:
        pass

    def progress(self, phase: str) -> None:
        pass

    def send(self, message: dict[str, Any], blobs: object = ()) -> None:
        self.said.append(message)


def stages_of(monkeypatch: pytest.MonkeyPatch, job: Job, patch_by_step: int = 0) -> dict[str, float]:
    clock, ears = Clock(), Ears()
    monkeypatch.setattr(base_process, "make_painter", lambda *_: QueueingPainter(clock))
    monkeypatch.setattr(base_process.time, "monotonic", clock.monotonic)
    process = BaseProcess(ears, WorkerSetup("base-0", "base", "featherweight", "cpu"))  # type: ignore[arg-type]
    paths = {use.lora_id: f"/dev/shm/{use.lora_id}" for use in job.loras}  # noqa: S108 - a name, no file
    process._news = BatchNews(1, [job.request_id], paths)
    process._run_batch(BatchOrder(1, (job,), {}, patch_by_step))
    stages: dict[str, float] = ears.said[-1]["results"][job.request_id]["stages"]
    return stages


def test_steps_that_were_only_queued_count_as_denoising_and_not_as_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = stages_of(monkeypatch, Job("r", n_steps=3))
    assert (stages["text_s"], stages["denoise_s"], stages["decode_s"]) == (1.0, 30.0, 1000.0)


def test_patching_and_restoring_count_as_waiting_for_loras(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = stages_of(monkeypatch, Job("r", n_steps=3, loras=(LoraUse("l"),)))
    assert (stages["lora_wait_s"], stages["denoise_s"], stages["decode_s"]) == (107.0, 30.0, 1000.0)


def test_controlnets_loaded_in_process_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = stages_of(monkeypatch, Job("r", n_steps=1))
    assert (stages["controlnet_load_s"], stages["text_s"]) == (0.25, 1.0)
