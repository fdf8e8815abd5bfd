"""The processes behind :mod:`engine_gpu`, and one image with the time of every stage."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from engine.links.host_memory import HostMemoryLine
from engine.links.protocol import LineLostError
from engine.serving.job import Job
from engine.workers.agreement import HostMemoryPartner
from engine.workers.painter import LoadedLora
from engine.workers.sdxl_controlnets import make_control_host
from engine.workers.sdxl_painter import SdxlPainter, make_painter
from engine.workers.setup import WorkerSetup

ROOT: Final = Path(__file__).resolve().parent.parent
START_TIMEOUT_S: Final = 240.0
TIMEOUT_S: Final = 60.0
EXIT_TIMEOUT_S: Final = 10.0
NETS: Final = ("a", "b", "c")


def quiet(phase: str) -> None:
    """Nobody watches the progress."""


def setup_of(model: str, role: str, device: str, **changes: Any) -> WorkerSetup:
    return WorkerSetup("bench", role, model, device, line_timeout_s=TIMEOUT_S, **changes)  # type: ignore[arg-type]


class Child:
    """A worker process at the other end of a line."""

    def __init__(self, role: str, model: str, device: str, pair_id: str, options: dict[str, Any]) -> None:
        mine, theirs = socket.socketpair()
        command = [
            sys.executable,
            str(ROOT / "benchmarks" / "engine_gpu.py"),
            "--child",
            role,
            "--fd",
            str(theirs.fileno()),
        ]
        command += ["--model", model, "--device", device, "--options", json.dumps(options)]
        self.started_s = time.perf_counter()
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths},
        )
        theirs.close()
        kind = HostMemoryPartner if role == "rank" else HostMemoryLine
        self.line: Any = kind(mine, pair_id, role, TIMEOUT_S)
        self.ready_s = 0.0

    def wait_ready(self) -> None:
        message = self.line.hear(START_TIMEOUT_S)
        if message["type"] != "ready":
            raise LineLostError(f"the {self.line.peer} said {message}")
        self.ready_s = time.perf_counter() - self.started_s

    def close(self) -> None:
        self.line.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)


def serve_controlnets(line: Any, model: str, device: str, options: dict[str, Any]) -> None:
    host = make_control_host(setup_of(model, "controlnet", device, controlnet_ids=NETS[:2], options=options), quiet)
    line.tell({"type": "ready"})
    host.open("base", line)
    with contextlib.suppress(LineLostError):
        while True:
            message = line.hear(3600.0)
            if message.get("what") == "memory":
                line.tell({"type": "memory", **host.memory()})
            else:
                (host.begin if message["type"] == "begin" else host.step)("base", message)
    host.close("base")


def serve_rank(line: Any, model: str, device: str, options: dict[str, Any]) -> None:
    """Rank 1 of a CFG pair: paints the jobs that it is told to paint, in step with rank 0."""
    line.tell({"type": "ready"})
    painter = make_painter(
        setup_of(model, "base", device, rank=1, n_ranks=2, topology="decoupled_cfg2", options=options), quiet, line
    )
    with contextlib.suppress(LineLostError):
        while True:
            message = line.hear(3600.0)
            if message["type"] != "paint":
                raise LineLostError(f"rank 0 said {message}")
            paint(painter, [Job.from_plain(message["job"])])
            line.tell({"type": "painted", **painter.memory()})


def paint(
    painter: SdxlPainter,
    jobs: Sequence[Job],
    pairs: dict[str, Any] | None = None,
    loras: Sequence[tuple[LoadedLora, float]] = (),
    patch_step: int = 0,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Final latents and seconds of every stage, the device synchronised between them."""
    laps: dict[str, float] = {}
    last = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        if painter.options.is_cuda:
            torch.cuda.synchronize(painter.options.device)
        now = time.perf_counter()
        laps[name], last = laps.get(name, 0.0) + now - last, now

    try:
        painter.activate(jobs[0].base_model_id)
        lap("activate_s")
        n_steps = painter.begin(jobs, pairs or {})
        lap("begin_s")
        for i in range(n_steps):
            if loras and i == patch_step:
                lap("denoise_s")
                painter.patch(loras)
                lap("patch_s")
            painter.step(i)
        latents = painter.latents()
        lap("denoise_s")
        painter.finish(wants_images=True)
        lap("finish_s")
    finally:
        painter.restore()
    lap("restore_s")
    return latents, {**laps, "total_s": sum(laps.values())}


def main_of_child(role: str, model: str, device: str, fd: int, options: str) -> None:
    """What a child process does; never returns."""
    torch.set_grad_enabled(False)
    kind, serve = (HostMemoryPartner, serve_rank) if role == "rank" else (HostMemoryLine, serve_controlnets)
    line = kind(socket.socket(fileno=fd), f"{role}-end", "base", TIMEOUT_S)
    serve(line, model, device, json.loads(options))
    # A device that hangs while it is torn down must not keep the process.
    last_resort = threading.Timer(EXIT_TIMEOUT_S, os._exit, (1,))
    last_resort.daemon = True
    last_resort.start()
