"""Painters and ControlNet hosts of one process over real lines: what the worker processes do, with threads in their place."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.links.host_memory import HostMemoryLine
from engine.links.protocol import LineLostError
from engine.serving.job import Job
from engine.workers.agreement import HostMemoryPartner
from engine.workers.painter import LoadedLora
from engine.workers.sdxl_controlnets import SdxlControlHost, make_control_host
from engine.workers.sdxl_painter import SdxlPainter, make_painter
from engine.workers.setup import WorkerSetup

TIMEOUT_S = 30.0
IDLE_S = 3600.0
"""A worker that no test uses for a while stays."""


def no_progress(phase: str) -> None:
    """Nobody watches."""


def setup_of(role: str, **changes: Any) -> WorkerSetup:
    return WorkerSetup("w", role, "tiny", line_timeout_s=TIMEOUT_S, **changes)  # type: ignore[arg-type]


def painter_of(**changes: Any) -> SdxlPainter:
    return make_painter(setup_of("base", **changes), no_progress, None)


def line_pair(pair_id: str, kind: Any = HostMemoryLine) -> tuple[Any, Any]:
    first, second = socket.socketpair()
    return kind(first, pair_id, "controlnets", TIMEOUT_S), kind(second, pair_id, "base", TIMEOUT_S)


def serve(host: SdxlControlHost, line: Any) -> None:
    """The loop of a ControlNet worker for one client, until its line ends."""
    host.open(line.pair_id, line)
    with contextlib.suppress(LineLostError):
        while True:
            message = line.hear(IDLE_S)
            (host.begin if message["type"] == "begin" else host.step)(line.pair_id, message)
    host.close(line.pair_id)


@dataclass
class Attached:
    """A painter with ControlNet workers attached; ``pairs`` is what the process hands to ``begin``."""

    painter: SdxlPainter
    hosts: list[SdxlControlHost]
    pairs: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def attached(painter: SdxlPainter, *names_of_hosts: Sequence[str], **options: Any) -> Iterator[Attached]:
    """Attaches one ControlNet worker for each list of ids."""
    hosts, threads, lines = [], [], []
    pairs: dict[str, Any] = {}
    for place, names in enumerate(names_of_hosts):
        host = make_control_host(setup_of("controlnet", controlnet_ids=tuple(names), options=options), no_progress)
        base_end, host_end = line_pair(f"pair-{place}")
        thread = threading.Thread(target=serve, args=(host, host_end), daemon=True)
        thread.start()
        painter.open(base_end)
        pairs |= dict.fromkeys(names, base_end)
        hosts.append(host)
        threads.append(thread)
        lines += [base_end, host_end]
    try:
        yield Attached(painter, hosts, pairs)
    finally:
        for line in lines:
            painter.close(line.pair_id)
            line.close()
        for thread in threads:
            thread.join(TIMEOUT_S)


def paint(
    painter: SdxlPainter,
    jobs: Sequence[Job],
    pairs: dict[str, Any] | None = None,
    loras: Sequence[tuple[LoadedLora, float]] = (),
    patch_step: int = 0,
) -> torch.Tensor:
    """Final latents; the calls of a worker process in its order."""
    try:
        painter.activate(jobs[0].base_model_id)
        n_steps = painter.begin(jobs, pairs or {})
        for i in range(n_steps):
            if loras and i == patch_step:
                painter.patch(loras)
            painter.step(i)
        painter.finish(wants_images=False)
        return painter.latents()
    finally:
        painter.restore()


def cfg_pair(**changes: Any) -> tuple[SdxlPainter, SdxlPainter]:
    """Both ranks of a replica, connected."""
    ends = line_pair("partner", HostMemoryPartner)
    with ThreadPoolExecutor(2) as pool:
        ranks = [
            pool.submit(
                make_painter,
                setup_of("base", rank=rank, n_ranks=2, topology="decoupled_cfg2", **changes),
                no_progress,
                end,
            )
            for rank, end in enumerate(ends)
        ]
        first, second = (rank.result(TIMEOUT_S) for rank in ranks)
    return first, second


def paint_both(
    ranks: Sequence[SdxlPainter], *arguments: Any, pairs: Sequence[Any] = ({}, {}), **more: Any
) -> list[torch.Tensor]:
    """:func:`paint` on both ranks at the same time."""
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(paint, rank, *arguments, pairs=of, **more) for rank, of in zip(ranks, pairs, strict=True)]
        return [call.result(TIMEOUT_S) for call in calls]
