"""A ControlNet that one client's job waits for is read and captured while the jobs of other clients go on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from engine.serving.job import ControlUse, Job
from engine.workers.model_sources import ModelWeights
from engine.workers.painter import JobError
from engine.workers.sdxl_controlnets import SdxlControlHost, make_control_host
from tests.engine.workers.rig import line_pair, no_progress, painter_of, setup_of

STEPS = 2
N_STAGES = 4
"""Stages of a ControlNet of three levels, the middle block included."""


def job_of(name: str, controlnet: str) -> Job:
    return Job(name, n_steps=STEPS, width_px=32, height_px=32, seed=1, controls=(ControlUse(controlnet, 0.8),))


class SlowReads:
    """Reads of a host that wait until they are let go."""

    def __init__(self, host: SdxlControlHost) -> None:
        self._read = host._sources.read_controlnet
        self.begun, self.let_go = threading.Event(), threading.Event()
        host._sources.read_controlnet = self.read  # type: ignore[method-assign]

    def read(self, model_id: str) -> ModelWeights:
        self.begun.set()
        assert self.let_go.wait(20.0)
        return self._read(model_id)


class Client:
    """A base rank on a thread of its own; its worker's messages are handled by the test, one at a time."""

    def __init__(self, host: SdxlControlHost, name: str, stack: ExitStack) -> None:
        self.host = host
        self.painter = painter_of()
        self.base_end, self.host_end = line_pair(name)
        stack.callback(self.base_end.close)
        stack.callback(self.host_end.close)
        host.open(name, self.host_end)
        self.opening = threading.Thread(target=self.painter.open, args=(self.base_end,), daemon=True)
        self.opening.start()
        self.name = name
        self.handle()
        self.opening.join(20.0)
        self.result: Any = None

    def handle(self) -> str:
        message = self.host_end.hear(20.0)
        (self.host.begin if message["type"] == "begin" else self.host.step)(self.name, message)
        return str(message["type"])

    def start(self, job: Job) -> None:
        def run() -> None:
            try:
                self.painter.activate(job.base_model_id)
                for i in range(self.painter.begin([job], {job.controls[0].controlnet_id: self.base_end})):
                    self.painter.step(i)
                self.result = self.painter.latents()
            except JobError as error:
                self.result = error
            finally:
                self.painter.restore()

        self.running = threading.Thread(target=run, daemon=True)
        self.running.start()

    def serve(self, n_messages: int) -> None:
        for _ in range(n_messages):
            self.handle()
        self.running.join(20.0)
        assert not self.running.is_alive()


@pytest.fixture
def worker() -> Iterator[tuple[SdxlControlHost, Client, Client]]:
    """A host that holds ``a`` alone and has room for one more, and its two clients."""
    with ExitStack() as stack:
        setup = setup_of("controlnet", controlnet_ids=("a", "*"), options={"n_controlnets_max": 2})
        host = make_control_host(setup, no_progress)
        yield host, Client(host, "first", stack), Client(host, "second", stack)


def alone(job: Job) -> torch.Tensor:
    """What the job gives where nobody else is: the ControlNet in process."""
    painter = painter_of()
    try:
        painter.activate(job.base_model_id)
        for i in range(painter.begin([job], {})):
            painter.step(i)
        return painter.latents()
    finally:
        painter.restore()


def test_a_client_is_served_while_another_ones_controlnet_is_read_and_captured(
    worker: tuple[SdxlControlHost, Client, Client],
) -> None:
    host, first, second = worker
    reads = SlowReads(host)
    second.start(job_of("new", "b"))
    second.handle()
    assert list(host.awaited()) == ["second"]
    assert not host.advance()
    assert reads.begun.wait(20.0)
    first.start(job_of("known", "a"))
    first.handle()
    n_pieces = 0
    while "first" in host.awaited():
        n_pieces += host.advance()
    assert n_pieces == N_STAGES + 1, "its captures came in one piece, or not at all"
    first.serve(STEPS)
    assert list(host.awaited()) == ["second"]
    assert not host.advance(), "the read goes on"
    reads.let_go.set()
    while host.awaited():
        host.advance()
    second.serve(STEPS)
    assert torch.equal(first.result, alone(job_of("known", "a")))
    assert torch.equal(second.result, alone(job_of("new", "b")))


def test_steps_between_the_pieces_of_a_capture_give_the_same_bits(
    worker: tuple[SdxlControlHost, Client, Client],
) -> None:
    host, first, second = worker
    first.start(job_of("known", "a"))
    first.handle()
    while host.awaited():
        host.advance()
    second.start(job_of("new", "b"))
    second.handle()
    for _ in range(STEPS):
        while not host.advance():
            pass
        first.handle()
    first.running.join(20.0)
    assert list(host.awaited()) == ["second"]
    while host.awaited():
        host.advance()
    second.serve(STEPS)
    assert torch.equal(first.result, alone(job_of("known", "a")))
    assert torch.equal(second.result, alone(job_of("new", "b")))


def test_a_controlnet_that_cannot_be_read_fails_only_the_job_that_waits_for_it(
    worker: tuple[SdxlControlHost, Client, Client],
) -> None:
    host, first, second = worker
    host._sources._sources["lost"] = {"file": "lost"}
    second.start(job_of("new", "lost"))
    second.handle()
    while host.awaited():
        host.advance()
    second.running.join(20.0)
    assert "no store" in str(second.result)
    first.start(job_of("known", "a"))
    first.handle()
    while host.awaited():
        host.advance()
    first.serve(STEPS)
    assert torch.equal(first.result, alone(job_of("known", "a")))
