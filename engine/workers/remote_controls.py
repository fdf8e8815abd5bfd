"""ControlNets behind a pair line, seen from the base rank: a :class:`engine.control_stack.ControlSource`.

The scaled latents leave before the encoder runs; residuals arrive as the ControlNet produces them, largest first, and are taken
in after it. Every wait is bounded; what an abandoned job still has under way is recognised by its number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from engine.control_stack import ControlJob, ShapeKey, active_names
from engine.controlnet import ResidualLayout
from engine.links.protocol import LineLostError, PairOfBase
from engine.links.tensor_line import TensorLine, Written
from engine.models import ModelSpec
from engine.options import EngineOptions
from engine.workers.painter import JobError, PeerLostError
from engine.workers.residual_wire import (
    FP8_HEADER_BYTES,
    ControlSpec,
    JobHeader,
    from_fp8,
    input_places,
    residual_bytes,
    residual_place,
)

BUSY_TIMEOUT_S: Final = 1200.0
"""Silence of a worker that has said that it loads or compiles: 55 s a ControlNet measured for torch.compile."""


def _as_peer_lost(method: Callable[..., Any]) -> Callable[..., Any]:
    """A lost line is a lost peer to the work path, which may try the job again."""

    @functools.wraps(method)
    def wrapped(self: RemoteControls, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except LineLostError as error:
            raise peer_lost(self.pair.pair_id, f"ControlNet worker {self.pair.peer}: {error}") from error

    return wrapped


def peer_lost(pair_id: str, reason: str) -> PeerLostError:
    """The error that names the line that was lost."""
    error = PeerLostError(reason)
    error.pair_id = pair_id  # type: ignore[attr-defined]
    return error


class RemoteControls:
    """The ControlNets that one attached worker computes for this rank. Which ones is said anew for every batch."""

    def __init__(
        self,
        pair: PairOfBase,
        line: TensorLine,
        spec: ModelSpec,
        options: EngineOptions,
        timeout_s: float,
        progress: Callable[[str], None] = lambda phase: None,
    ) -> None:
        """Takes an attached line.

        Args:
            pair: the line.
            line: how tensors travel over it.
            spec: of the base.
            options: of the base.
            timeout_s: longest silence of the worker while this rank waits for it.
            progress: told when the worker says that it is still loading or capturing.
        """
        self._progress = progress
        self.pair = pair
        self.line = line
        self.names: Sequence[str] = ()
        self.uses_fp8 = False
        self.n_misses = 0
        """ControlNets that the worker had to load for the current job; known after the first step."""
        self.load_s = 0.0
        self._spec = spec
        self._options = options
        self._timeout_s = timeout_s
        self._sizes: dict[str, int] = {}
        self._shapes: dict[ShapeKey, _Shape] = {}
        self._n_jobs = 0
        self._now: _Job | None = None

    def prepare(self, key: ShapeKey, names: Sequence[str], latents_in: torch.Tensor, flat: torch.Tensor) -> None:
        """See :class:`engine.control_stack.ControlSource`; the worker prepares on ``begin``."""
        if key not in self._shapes or self._shapes[key].flat is not flat:
            layout = ResidualLayout.of(
                self._spec, key.batch, key.height, key.width, is_channels_last=self._options.channels_last
            )
            self._shapes[key] = _Shape(latents_in, flat, layout.stage_ends)

    @_as_peer_lost
    def begin(self, job: ControlJob) -> None:
        """See :class:`engine.control_stack.ControlSource`. Returns without waiting for the worker."""
        shape = self._shapes[job.key]
        used = [control for control in job.controls if control.scale != 0.0]
        self._n_jobs += 1
        header = JobHeader(
            self._n_jobs,
            job.key,
            job.n_steps,
            tuple(
                ControlSpec(control.name, control.scale, control.start, control.end, control.image.shape[0])
                for control in used
            ),
            self.uses_fp8,
        )
        device, dtype = self._options.device, self._options.dtype
        places, n_bytes = input_places(header, self._spec, dtype)
        lanes = self._lanes(
            {
                "inputs": n_bytes,
                "latents": shape.latents_in.numel() * dtype.itemsize,
                "residuals": residual_bytes(shape.ends, dtype, is_fp8=self.uses_fp8),
            }
        )
        tensors = [job.timesteps, job.text.context, job.text.pooled]
        tensors += [control.image.to(device, dtype) for control in used]
        written = [
            self.line.write("inputs", place.at_bytes, tensor.contiguous())
            for place, tensor in zip(places, tensors, strict=True)
        ]
        self.line.settle()
        for item in written:
            self.line.publish(item)
        self.pair.tell({**header.to_plain(), "lanes": lanes})
        self._now = _Job(header, shape, active_names(used, job.n_steps))
        self.n_misses, self.load_s = 0, 0.0

    @_as_peer_lost
    def start_step(self, step: int) -> None:
        """See :class:`engine.control_stack.ControlSource`."""
        now = self._job()
        if not now.active[step]:
            return
        now.latents = self.line.write("latents", 0, now.shape.latents_in)
        now.step = step
        if self.line.is_stream_ordered or self.line.is_done(now.latents):
            self._tell_step()

    @_as_peer_lost
    def encoder_queued(self) -> None:
        """Waits for the latents' copy, if it was not done before, and tells the worker."""
        if self._job().latents is not None:
            self._tell_step()

    @_as_peer_lost
    def finish_step(self, step: int, *, adds: bool) -> bool:
        """See :class:`engine.control_stack.ControlSource`.

        Raises:
            PeerLostError: the worker is gone or silent for too long.
            JobError: it says that the job is at fault.
        """
        now = self._job()
        if not now.active[step]:
            return False
        is_last = False
        while not is_last:
            message = self._hear()
            if message.get("step") != step:
                raise LineLostError(f"{self.pair.peer} sent step {message.get('step')} in place of {step}")
            is_last = self._take(message, now.shape, adds=adds)
        now.step = None
        return True

    def abandon(self) -> None:
        """Forgets the job; takes in what the worker still has under way for it, so that the line is clean."""
        now, self._now = self._now, None
        if now is None or now.step is None or now.latents is not None:
            return
        self._now = now
        try:
            is_last = False
            while not is_last:
                message = self._hear()
                is_last = self._take(message, now.shape, adds=False)
        except (LineLostError, PeerLostError, JobError):
            pass  # a line that is gone shows when it is used next
        finally:
            self._now = None

    @_as_peer_lost
    def exchange(self, n_elements: int) -> None:
        """Has the worker send a buffer of this many elements once, for measurements of the line."""
        dtype = self._options.dtype
        lanes = self._lanes({"residuals": n_elements * dtype.itemsize})
        self.pair.tell({"type": "step", "what": "push", "n_elements": n_elements, "lanes": lanes})
        message = self.pair.hear(self._timeout_s)
        if message.get("type") != "pushed":
            raise LineLostError(f"{self.pair.peer} sent {str(message)[:200]} in place of 'pushed'")
        self.line.read("residuals", 0, torch.empty(n_elements, device=self._options.device, dtype=dtype))

    def close(self) -> None:
        """Frees this end's tensors; the line itself is the caller's."""
        self.line.close()
        self._shapes.clear()

    def _lanes(self, sizes: dict[str, int]) -> dict[str, Any]:
        """Makes or enlarges lanes; what the message must say about them."""
        if all(self._sizes.get(name, 0) >= size for name, size in sizes.items()):
            return {}
        self._sizes = {name: max(size, self._sizes.get(name, 0)) for name, size in sizes.items()}
        return self.line.make(self._sizes)

    def _job(self) -> _Job:
        if self._now is None:
            raise RuntimeError("RemoteControls: no job was begun")
        return self._now

    def _tell_step(self) -> None:
        now = self._job()
        if now.latents is not None:
            self.line.publish(now.latents)
            now.latents = None
            self.pair.tell({"type": "step", "job": now.header.job, "step": now.step})

    def _hear(self) -> dict[str, Any]:
        """The next message about the current job that is more than a sign of life."""
        job, limit_s = self._job().header.job, self._timeout_s
        while True:
            message = self.pair.hear(limit_s)
            if message.get("job") != job:
                if isinstance(message.get("job"), int) and message["job"] < job:
                    continue  # of a job that was given up
                raise LineLostError(f"{self.pair.peer} sent {str(message)[:200]}, which belongs to no job")
            if message["type"] == "refused":
                self._job().step = None
                raise JobError(str(message["reason"]))
            if message["type"] == "residuals":
                return message
            if message["type"] != "busy":
                raise LineLostError(f"{self.pair.peer} sent {str(message)[:200]} in place of residuals")
            self._progress("compile")
            limit_s = BUSY_TIMEOUT_S

    def _take(self, message: dict[str, Any], shape: _Shape, *, adds: bool) -> bool:
        """Takes one part of the residuals into the flat buffer; True if it was the last."""
        ends, first, last = shape.ends, message["first_part"], message["last_part"]
        if not (isinstance(first, int) and isinstance(last, int) and 0 <= first <= last < len(ends)):
            raise LineLostError(f"{self.pair.peer} sent parts {first!r}..{last!r} of {len(ends)}")
        self.n_misses += int(message.get("n_misses", 0))
        self.load_s += float(message.get("load_s", 0.0))
        is_fp8, dtype = self._job().header.is_fp8, shape.flat.dtype
        groups = [(part, part) for part in range(first, last + 1)] if is_fp8 else [(first, last)]
        for low, high in groups:
            target = shape.flat[ends[low - 1] if low else 0 : ends[high]]
            at = residual_place(ends, low, dtype, is_fp8=is_fp8)
            if is_fp8:
                packed = shape.scratch(FP8_HEADER_BYTES + target.numel(), torch.uint8)
                self.line.read("residuals", at, packed)
                received = from_fp8(packed, dtype)
            elif adds:
                received = shape.scratch(target.numel(), dtype)
                self.line.read("residuals", at, received)
            else:
                self.line.read("residuals", at, target)
                continue
            target.add_(received) if adds else target.copy_(received)
        return last == len(ends) - 1


class _Shape:
    """Where a shape's tensors lie on this side."""

    def __init__(self, latents_in: torch.Tensor, flat: torch.Tensor, ends: Sequence[int]) -> None:
        self.latents_in = latents_in
        self.flat = flat
        self.ends = ends
        self._scratch = torch.empty(0, dtype=torch.uint8, device=flat.device)

    def scratch(self, n_elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Room for what is received before it is added; the same memory each time, used in stream order."""
        n_bytes = n_elements * dtype.itemsize
        if self._scratch.numel() < n_bytes:
            self._scratch = torch.empty(n_bytes, dtype=torch.uint8, device=self.flat.device)
        return self._scratch[:n_bytes].view(dtype)


class _Job:
    """The job under way."""

    def __init__(self, header: JobHeader, shape: _Shape, active: Sequence[Sequence[str]]) -> None:
        self.header = header
        self.shape = shape
        self.active = active
        self.step: int | None = None
        """The step whose residuals are still to come."""
        self.latents: Written | None = None
        """This step's latents, on their way and not yet announced."""
