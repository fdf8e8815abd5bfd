"""A ControlNet worker process started for one base worker of this process: what benches and calibration measure.

The same implementation serves in the engine, where the front process starts the workers.
"""

from __future__ import annotations

import dataclasses
import json
import select
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch

from engine.links.host_memory import HostMemoryLine
from engine.links.protocol import LineLostError
from engine.links.tensor_attach import open_as_base
from engine.models import ModelSpec
from engine.options import EngineOptions
from engine.workers.remote_controls import RemoteControls

EXCHANGE_TIMEOUT_S: Final = 60.0
"""The longest wait for one step. A step takes milliseconds; while it compiles, the worker says so."""
CONNECT_TIMEOUT_S: Final = 300.0
"""Building models on the other side included."""
STOP_TIMEOUT_S: Final = 20.0
ROOT: Final = Path(__file__).resolve().parent.parent


class LinkError(RuntimeError):
    """The worker did not come up."""


class RemoteControlNets(RemoteControls):
    """A :class:`engine.control_stack.ControlSource` whose networks run in a process of its own. Use :meth:`start`."""

    _process: subprocess.Popen[bytes]

    @classmethod
    def start(
        cls,
        spec: ModelSpec,
        controlnets: Mapping[str, int | str],
        options: EngineOptions,
        *,
        worker_device: str = "cpu",
        exchange_timeout_s: float = EXCHANGE_TIMEOUT_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        transport: str = "auto",
    ) -> RemoteControlNets:
        """Starts a worker process on this host and connects to it.

        Args:
            spec: ``sdxl`` or ``tiny``.
            controlnets: name to seed (random weights) or to a local folder.
            options: of the base; the worker uses the same with its own device.
            worker_device: ``cuda:1`` or ``cpu``.
            exchange_timeout_s: the longest wait for one step.
            connect_timeout_s: for the worker's start, models included.
            transport: see :class:`engine.workers.model_options.ModelOptions`.

        Raises:
            LinkError: the worker did not come up; its last words are on stderr.
        """
        settings = {
            "spec": spec.name,
            "controlnets": {
                name: f"seed:{source}" if isinstance(source, int) else str(Path(source).resolve())
                for name, source in controlnets.items()
            },
            "options": options_to_plain(dataclasses.replace(options, device=worker_device)),
            "timeout_s": exchange_timeout_s,
        }
        mine, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "engine.controlnet_worker", "--fd", str(theirs.fileno())]
            command += ["--settings", json.dumps(settings)]
            process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])  # noqa: S603, our own module
        pair = HostMemoryLine(mine, "bench", f"worker on {worker_device}", exchange_timeout_s)
        try:
            if not select.select([pair], [], [], connect_timeout_s)[0]:
                raise LinkError(f"the ControlNet worker did not come up within {connect_timeout_s:g} s")
            if pair.hear(exchange_timeout_s)["type"] != "ready":
                raise LinkError("the ControlNet worker did not come up: it said something else than 'ready'")
            line = open_as_base(pair, options.device, options.dtype, transport, exchange_timeout_s)
        except BaseException as error:
            pair.close()
            process.kill()
            process.wait(STOP_TIMEOUT_S)
            if isinstance(error, LineLostError):
                raise LinkError(f"the ControlNet worker did not come up: {error}") from error
            raise
        remote = cls(pair, line, spec, options, exchange_timeout_s)
        remote.names = tuple(controlnets)
        remote._process = process
        return remote

    def close(self) -> None:
        """Ends the worker: the end of its line tells it to go; waits a bounded time, then kills it if need be."""
        super().close()
        self.pair.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)

    def __enter__(self) -> RemoteControlNets:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def options_to_plain(options: EngineOptions) -> dict[str, Any]:
    """Options as JSON values."""
    return {**dataclasses.asdict(options), "dtype": str(options.dtype).removeprefix("torch.")}


def options_from_plain(plain: Mapping[str, Any]) -> EngineOptions:
    """The inverse of :func:`options_to_plain`."""
    return EngineOptions(**{**plain, "dtype": getattr(torch, plain["dtype"])})
