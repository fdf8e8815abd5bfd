"""ControlNets in another process, seen from the base worker."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch
import torch.distributed as dist

from engine.control_stack import ControlJob, ShapeKey, active_names
from engine.controlnet import ResidualLayout
from engine.models import ModelSpec
from engine.options import EngineOptions
from engine.transport import ARRIVAL_KEY, BASE_RANK, CONNECT_TIMEOUT_S, EXCHANGE_TIMEOUT_S, Link, LinkError, host_store

PREPARE_TIMEOUT_S: Final = 1200.0
"""For compiling and capturing one shape on the other side: 55 s a ControlNet measured, times several."""
STOP_TIMEOUT_S: Final = 20.0
ROOT: Final = Path(__file__).resolve().parent.parent


class RemoteControlNets:
    """A :class:`engine.control_stack.ControlSource` whose networks run in a ControlNet worker.

    The scaled latents leave before the base's encoder starts; the summed residuals are asked for after it, because a
    receiving NCCL kernel that waits beside the encoder would take multiprocessors from it.
    """

    def __init__(self, link: Link, spec: ModelSpec, names: Sequence[str], options: EngineOptions) -> None:
        """Use :meth:`start`, or :func:`connect` with a link made from torchrun's environment."""
        self._link = link
        self._spec = spec
        self._names = tuple(names)
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._prepared: dict[ShapeKey, tuple[set[str], torch.Tensor, torch.Tensor]] = {}
        self._now: tuple[torch.Tensor, torch.Tensor, list[list[str]]] | None = None
        self._sending: Any = None
        self._is_open = True

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
    ) -> RemoteControlNets:
        """Starts a worker process on this host and connects to it.

        Args:
            spec: ``sdxl`` or ``tiny``.
            controlnets: name to seed (random weights) or to a local folder.
            options: of the base; the worker uses the same with its own device.
            worker_device: ``cuda:1`` or ``cpu``.
            exchange_timeout_s: the longest wait for one tensor.
            connect_timeout_s: for the worker's start, models included.

        Raises:
            LinkError: the worker did not come up; its last words are on stderr.
        """
        store, port = host_store(connect_timeout_s)
        settings = {
            "spec": spec.name,
            "controlnets": {
                name: source if isinstance(source, int) else str(Path(source).resolve())
                for name, source in controlnets.items()
            },
            "options": options_to_plain(dataclasses.replace(options, device=worker_device)),
            "port": port,
            "exchange_timeout_s": exchange_timeout_s,
        }
        command = [sys.executable, "-m", "engine.controlnet_worker", "--settings", json.dumps(settings)]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL)  # noqa: S603, our own module
        try:
            _await_worker(store, process, connect_timeout_s)
            link = Link(store, BASE_RANK, options.device, exchange_timeout_s)
            remote = connect(link, spec, options, connect_timeout_s)
        except Exception as error:
            process.kill()
            process.wait(STOP_TIMEOUT_S)
            if isinstance(error, LinkError):
                raise
            raise LinkError(f"the ControlNet worker did not come up within {connect_timeout_s:g} s: {error}") from error
        remote._process = process
        return remote

    @property
    def names(self) -> Sequence[str]:
        """The ControlNets the worker holds."""
        return self._names

    def prepare(self, key: ShapeKey, names: Sequence[str], latents_in: torch.Tensor) -> torch.Tensor:
        """See :class:`engine.control_stack.ControlSource`."""
        if key not in self._prepared:
            layout = ResidualLayout.of(
                self._spec, key.batch, key.height, key.width, is_channels_last=self._options.channels_last
            )
            flat = torch.zeros(layout.n_elements, device=self._options.device, dtype=self._options.dtype)
            self._prepared[key] = (set(), flat, latents_in)
        done, flat, _ = self._prepared[key]
        missing = [name for name in names if name not in done]
        if missing:
            self._link.tell({"kind": "prepare", "key": dataclasses.asdict(key), "names": missing})
            self._link.expect("prepared", PREPARE_TIMEOUT_S)
            done.update(missing)
        return flat

    def begin(self, job: ControlJob) -> None:
        """See :class:`engine.control_stack.ControlSource`."""
        used = [control for control in job.controls if control.scale != 0.0]
        self._link.tell({
            "kind": "begin",
            "key": dataclasses.asdict(job.key),
            "n_steps": job.n_steps,
            "controls": [
                {
                    "name": control.name,
                    "scale": control.scale,
                    "start": control.start,
                    "end": control.end,
                    "n_images": control.image.shape[0],
                }
                for control in used
            ],
        })  # fmt: skip
        device, dtype = self._options.device, self._options.dtype
        tensors = [job.timesteps, job.text.context, job.text.pooled]
        tensors += [control.image.to(device, dtype) for control in used]
        for tensor in tensors:
            self._link.send(tensor.contiguous()).wait()
        _, flat, latents_in = self._prepared[job.key]
        self._now = (flat, latents_in, active_names(used, job.n_steps))

    def start_step(self, step: int) -> None:
        """Sends this step's scaled latents, if any ControlNet is active."""
        _, latents_in, active = self._state()
        if active[step]:
            self._sending = self._link.send(latents_in)

    def finish_step(self, step: int) -> None:
        """Receives the summed residuals into the flat buffer; zeros if no ControlNet is active."""
        flat, _, active = self._state()
        if active[step]:
            self._link.receive(flat)
            self._sending.wait()
        else:
            flat.zero_()

    def exchange(self, n_elements: int) -> None:
        """Sends a buffer of this many elements here from the worker once, for measurements of the link."""
        buffer = torch.empty(n_elements, device=self._options.device, dtype=self._options.dtype)
        self._link.tell({"kind": "push", "n_elements": n_elements})
        self._link.receive(buffer)

    def close(self) -> None:
        """Tells the worker to stop, waits a bounded time, then kills it if need be."""
        if not self._is_open:
            return
        self._is_open = False
        try:
            self._link.tell({"kind": "stop"})
            if self._process is None or self._process.poll() is None:
                self._link.hear(STOP_TIMEOUT_S)  # "stopped", or the line is already gone
        except (LinkError, RuntimeError) as error:
            sys.stderr.write(f"ControlNet worker was already gone: {error}\n")
        self._link.close()
        if self._process is not None:
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

    def _state(self) -> tuple[torch.Tensor, torch.Tensor, list[list[str]]]:
        if self._now is None:
            raise RuntimeError("RemoteControlNets.start_step or finish_step before begin")
        return self._now


def connect(
    link: Link, spec: ModelSpec, options: EngineOptions, connect_timeout_s: float = CONNECT_TIMEOUT_S
) -> RemoteControlNets:
    """Waits until the worker at the other end has its models, and exchanges greetings."""
    ready = link.expect("ready", connect_timeout_s)
    if ready["spec"] != spec.name:
        raise LinkError(f"the worker holds {ready['spec']} ControlNets, the base is {spec.name}")
    link.greet()
    return RemoteControlNets(link, spec, ready["names"], options)


def _await_worker(store: dist.Store, process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Waits until the worker has reached the store, but not for one that has ended."""
    deadline = time.monotonic() + timeout_s
    while not store.check([ARRIVAL_KEY]):
        if process.poll() is not None:
            raise LinkError(f"the ControlNet worker did not come up: it ended with code {process.returncode}")
        if time.monotonic() > deadline:
            raise LinkError(f"the ControlNet worker did not come up within {timeout_s:g} s")
        time.sleep(0.05)


def options_to_plain(options: EngineOptions) -> dict[str, Any]:
    """Options as JSON values."""
    return {**dataclasses.asdict(options), "dtype": str(options.dtype).removeprefix("torch.")}


def options_from_plain(plain: Mapping[str, Any]) -> EngineOptions:
    """The inverse of :func:`options_to_plain`."""
    return EngineOptions(**{**plain, "dtype": getattr(torch, plain["dtype"])})
