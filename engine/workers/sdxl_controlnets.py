"""The ControlNets of one ControlNet worker, for several base ranks in turn: residuals leave as they are produced.

Each client's job keeps its own inputs (text, embedded control images, step embeddings) on the device, so serving another client
in between costs two copies. ControlNets that are used together are summed here and travel once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Final

import torch

from engine.allocation import ANY
from engine.control_stack import ControlJob, ControlStack, OpenJob, ShapeKey
from engine.controlnet import ResidualLayout
from engine.links.protocol import LineLostError, PairOfControlNets
from engine.links.tensor_attach import open_as_controlnets
from engine.links.tensor_line import TensorLine, Written
from engine.models import ModelSpec
from engine.options import ControlInput, EngineOptions, PromptEmbeddings
from engine.parts import NetworkParts
from engine.workers.host_weights import host_layout
from engine.workers.model_options import ModelOptions
from engine.workers.model_sources import ModelSources
from engine.workers.model_tier import ModelTier
from engine.workers.painter import JobError
from engine.workers.readying import Readying
from engine.workers.resident_controlnets import ResidentControlNets
from engine.workers.residual_wire import JobHeader, input_places, residual_place, to_fp8
from engine.workers.setup import Progress, WorkerSetup

PUSH_ELEMENTS_MAX: Final = 2**30
POLL_S: Final = 0.005


def make_control_host(setup: WorkerSetup, progress: Progress) -> SdxlControlHost:
    """Loads what the setup names.

    Raises:
        InputError: the options are wrong.
        JobError: a ControlNet cannot be loaded.
    """
    return SdxlControlHost(setup, ModelOptions.from_plain(setup.options), progress)


class SdxlControlHost:
    """A :class:`engine.workers.painter.ControlHost`."""

    def __init__(
        self, setup: WorkerSetup, options: ModelOptions, progress: Progress, engine_options: EngineOptions | None = None
    ) -> None:
        """``engine_options``: how networks are run, in place of what ``options`` say."""
        self._spec = ModelSpec.named(setup.model)
        self._options = engine_options or options.engine(setup.device)
        self._timeout_s = setup.line_timeout_s
        self._progress = progress
        self._is_up = False
        if self._options.is_cuda:
            torch.cuda.set_device(self._options.device)
        self._parts = NetworkParts(self._options, ())
        self._stack = ControlStack(self._spec, {}, self._options, self._parts)
        self._sources = ModelSources(
            self._spec,
            setup.sources,
            setup.store,
            progress=self._read_on,
            layout=host_layout(self._options),
            controlnets=ModelTier("controlnet", options.host_controlnet_gib),
        )
        self._nets = ResidentControlNets(self._sources, self._options, self._parts, options.n_controlnets_max, progress)
        self._nets.join(self._stack)
        self._readying = Readying(self._nets, self._sources, self._stack, self._preparing, progress)
        self._clients: dict[str, _Client] = {}
        self._awaited: dict[str, Iterator[bool]] = {}
        """Clients whose job waits for ControlNets, and the pieces of work that are left; the first comes first."""
        self._nets.ensure([name for name in setup.controlnet_ids if name != ANY])
        # A rank of a CFG pair asks for its half, which is as large as an unguided forward.
        is_half = setup.topology == "decoupled_cfg2"
        for shape in setup.warm_shapes:
            key = ShapeKey(shape.n_images, shape.uses_cfg and not is_half, shape.height_px, shape.width_px)
            for name in self._nets.names:
                progress("compile")
                self._prepare(key, name)
        self._is_up = True

    def open(self, client: str, pair: PairOfControlNets) -> None:
        """See :class:`engine.workers.painter.ControlHost`; the transport is agreed on when the base asks."""
        self._clients[client] = _Client(pair)

    def close(self, client: str) -> None:
        """See :class:`engine.workers.painter.ControlHost`."""
        self._awaited.pop(client, None)
        gone = self._clients.pop(client, None)
        if gone is not None:
            gone.forget(self._stack)
            if gone.line is not None:
                gone.line.close()

    def begin(self, client: str, message: Mapping[str, Any]) -> None:
        """See :class:`engine.workers.painter.ControlHost`. What is wrong with the job is told to the client here."""
        served = self._clients[client]
        line = served.opened()
        served.forget(self._stack)
        try:
            header = JobHeader.from_plain(message)
        except (KeyError, TypeError, ValueError) as error:
            raise LineLostError(f"it announced a job that this code does not understand: {error!r}") from None
        line.accept(message["lanes"])
        served.refused = None
        tensors = self._inputs(line, header)
        served.opening = header
        names = [control.name for control in header.controls]
        work = self._opening(served, header, tensors)
        if not self._readying.is_ready(header.key, names):
            self._progress("load")
            served.pair.tell({"type": "busy", "job": header.job})
            self._awaited[client] = work
            return
        for _ in work:
            pass

    def _read_on(self, phase: str) -> None:
        """A read has moved on. One that nobody waits for any more must not look like work that then stands still."""
        if self._awaited or not self._is_up:
            self._progress(phase)

    def awaited(self) -> Collection[str]:
        """See :class:`engine.workers.painter.ControlHost`."""
        return self._awaited.keys()

    def advance(self) -> bool:
        """See :class:`engine.workers.painter.ControlHost`."""
        for place, client in enumerate(list(self._awaited)):
            # In turn, lest they push each other's ControlNets out; but while one is read, others may be captured.
            if (place == 0 or self._needs_no_read(client)) and self._piece(client):
                return True
        return False

    def _needs_no_read(self, client: str) -> bool:
        header = self._clients[client].opening
        return header is not None and all(control.name in self._nets.names for control in header.controls)

    def _piece(self, client: str) -> bool:
        """One piece of what a client waits for; False if a read is under way."""
        served, work = self._clients[client], self._awaited[client]
        try:
            return next(work)
        except StopIteration:
            del self._awaited[client]
        except JobError as error:
            del self._awaited[client]
            with contextlib.suppress(LineLostError):  # found again by whoever reads the line next
                served.refuse(error)
        return True

    def step(self, client: str, message: Mapping[str, Any]) -> None:
        """See :class:`engine.workers.painter.ControlHost`."""
        while client in self._awaited:  # the caller did not heed it
            if not self.advance():
                time.sleep(POLL_S)
        served = self._clients[client]
        if message.get("what") == "open":
            served.line = open_as_controlnets(
                served.pair, message, self._options.device, self._options.dtype, self._timeout_s
            )
            return
        if message.get("what") == "push":
            served.push(message, self._options)
            return
        if served.job is None:
            served.drop_latents(message, self._spec, self._options)
            return
        if message.get("job") != served.job.header.job:
            raise LineLostError(f"it asked for a step of job {message.get('job')!r}, which it never began")
        step = message.get("step")
        if not isinstance(step, int) or not 0 <= step < served.job.header.n_steps:
            raise LineLostError(f"it asked for step {step!r} of {served.job.header.n_steps}")
        with torch.no_grad():
            self._step(served, served.opened(), served.job, step)

    def admit(self, controlnet_id: str, source: Mapping[str, Any]) -> None:
        """See :class:`engine.workers.painter.ControlHost`."""
        self._sources.admit(controlnet_id, source)

    def memory(self) -> Mapping[str, int]:
        """See :class:`engine.workers.painter.ControlHost`."""
        return device_memory(self._options.device, lambda: self._nets.bytes)

    def resident(self) -> list[str]:
        """See :class:`engine.workers.painter.ControlHost`."""
        return self._nets.names

    def _inputs(self, line: TensorLine, header: JobHeader) -> list[torch.Tensor]:
        """What the client has sent: also of a job that will be refused it must be received."""
        places, _ = input_places(header, self._spec, self._options.dtype)
        tensors = [torch.empty(place.shape, device=self._options.device, dtype=place.dtype) for place in places]
        for place, tensor in zip(places, tensors, strict=True):
            line.read("inputs", place.at_bytes, tensor)
        return tensors

    def _opening(self, served: _Client, header: JobHeader, tensors: Sequence[torch.Tensor]) -> Iterator[bool]:
        """Makes a client's job ready to run, piece by piece; yields whether something was done."""
        key, names = header.key, [control.name for control in header.controls]
        n_misses, started = 0, time.perf_counter()
        is_ready = self._readying.is_ready(key, names)
        for is_done, n_loaded in self._readying.pieces(key, names, self._in_use):
            n_misses += n_loaded
            yield is_done
        timesteps, context, pooled, *images = tensors
        controls = [
            ControlInput(item.name, image, item.scale, item.start, item.end)
            for item, image in zip(header.controls, images, strict=True)
        ]
        with torch.no_grad():
            text = PromptEmbeddings(context, pooled)
            job = self._stack.open(ControlJob(key, controls, header.n_steps, timesteps, text))
        served.opening = None
        served.job = _Job(header, job, n_misses, 0.0 if is_ready else time.perf_counter() - started)

    def _in_use(self) -> set[str]:
        """ControlNets of the jobs of all clients."""
        headers = [client.job.header for client in self._clients.values() if client.job is not None]
        headers += [client.opening for client in self._clients.values() if client.opening is not None]
        return {control.name for header in headers for control in header.controls}

    def _prepare(self, key: ShapeKey, name: str) -> None:
        """Captures a ControlNet at a shape."""
        for _ in self._preparing(key, name):
            pass

    def _preparing(self, key: ShapeKey, name: str) -> Iterator[None]:
        """Captures a ControlNet at a shape, in pieces; the shape's static buffers are made with the first."""
        if self._stack.is_prepared(key, []):
            latents_in, flat = self._stack.latents_in(key), self._stack.flat(key)
        else:
            device, dtype = self._options.device, self._options.dtype
            layout = ResidualLayout.of(
                self._spec, key.batch, key.height, key.width, is_channels_last=self._options.channels_last
            )
            latents_in = torch.randn(key.latent_shape(self._spec), device=device, dtype=dtype)
            flat = torch.zeros(layout.n_elements, device=device, dtype=dtype)
        yield from self._stack.preparing(key, [name], latents_in, flat)

    def _step(self, served: _Client, line: TensorLine, job: _Job, step: int) -> None:
        key, header = job.header.key, job.header
        # Another client's job may have pushed one of these out of the device.
        names = job.open.active[step]
        if any(name not in self._nets.names or not self._stack.is_prepared(key, [name]) for name in names):
            n, seconds = self._nets.ensure(names, in_use=self._in_use())
            job.n_misses, job.load_s = job.n_misses + n, job.load_s + seconds
            for name in names:
                self._prepare_again(served, header, name)
        line.read("latents", 0, self._stack.latents_in(key))
        flat = self._stack.flat(key)
        ends = ResidualLayout.of(self._spec, key.batch, key.height, key.width, is_channels_last=False).stage_ends
        dtype = flat.dtype
        waiting: list[tuple[int, Written]] = []
        # Where the base's stream waits for the copies, telling of each would only cost messages.
        tells_once = line.is_stream_ordered and line.reads_any_range

        def tell_done(*, all_of_them: bool) -> None:
            while waiting and not tells_once and (all_of_them or line.is_stream_ordered or line.is_done(waiting[0][1])):
                part, written = waiting.pop(0)
                line.publish(written)
                self._tell_parts(served, job, step, part, part)

        def push(first: int, last: int) -> None:
            part = ends.index(last)
            at = residual_place(ends, part, dtype, is_fp8=header.is_fp8)
            source = to_fp8(flat[first:last]) if header.is_fp8 else flat[first:last]
            waiting.append((part, line.write("residuals", at, source)))
            tell_done(all_of_them=False)

        self._stack.run(job.open, step, after_stage=push)
        tell_done(all_of_them=True)
        if waiting:
            line.publish(waiting[-1][1])
            self._tell_parts(served, job, step, 0, waiting[-1][0])
        line.settle()

    def _prepare_again(self, served: _Client, header: JobHeader, name: str) -> None:
        if not self._stack.is_prepared(header.key, [name]):
            served.pair.tell({"type": "busy", "job": header.job})
            self._prepare(header.key, name)

    def _tell_parts(self, served: _Client, job: _Job, step: int, first: int, last: int) -> None:
        message: dict[str, Any] = {
            "type": "residuals", "job": job.header.job, "step": step, "first_part": first, "last_part": last
        }  # fmt: skip
        if job.n_misses or job.load_s:
            message |= {"n_misses": job.n_misses, "load_s": job.load_s}
            job.n_misses, job.load_s = 0, 0.0
        served.pair.tell(message)


class _Job:
    """A client's job."""

    def __init__(self, header: JobHeader, opened: OpenJob, n_misses: int, load_s: float) -> None:
        self.header = header
        self.open = opened
        self.n_misses = n_misses
        """Loads that the client has not been told of yet."""
        self.load_s = load_s


class _Client:
    """One attached base rank."""

    def __init__(self, pair: PairOfControlNets) -> None:
        self.pair = pair
        self.line: TensorLine | None = None
        self.job: _Job | None = None
        self.opening: JobHeader | None = None
        """The job that waits for ControlNets."""
        self.refused: JobHeader | None = None
        """The job that was begun last, if it was refused."""

    def push(self, message: Mapping[str, Any], options: EngineOptions) -> None:
        """Sends a buffer of ones through the lane of residuals, for measurements of the line."""
        line, n_elements = self.opened(), message.get("n_elements")
        if not isinstance(n_elements, int) or not 0 < n_elements <= PUSH_ELEMENTS_MAX:
            raise LineLostError(f"it asked for a push of {n_elements!r} elements, 1..{PUSH_ELEMENTS_MAX} are allowed")
        line.accept(message["lanes"])
        line.publish(line.write("residuals", 0, torch.ones(n_elements, device=options.device, dtype=options.dtype)))
        self.pair.tell({"type": "pushed"})
        line.settle()

    def drop_latents(self, message: Mapping[str, Any], spec: ModelSpec, options: EngineOptions) -> None:
        """Receives what the client sent before it heard that its job is refused."""
        if self.refused is None or message.get("job") != self.refused.job:
            raise LineLostError(f"it asked for a step of job {message.get('job')!r}, which it never began")
        latents = torch.empty(self.refused.key.latent_shape(spec), device=options.device, dtype=options.dtype)
        self.opened().read("latents", 0, latents)

    def refuse(self, error: JobError) -> None:
        """The job that is being opened cannot be done."""
        self.refused, self.opening = self.opening, None
        if self.refused is not None:
            self.pair.tell({"type": "refused", "job": self.refused.job, "reason": str(error)[:4000]})

    def opened(self) -> TensorLine:
        if self.line is None:
            raise LineLostError("it announced a job before it agreed on a transport")
        return self.line

    def forget(self, stack: ControlStack) -> None:
        self.opening = None
        if self.job is not None:
            stack.forget(self.job.open)
            self.job = None


def device_memory(device: str, weight_bytes: Callable[[], int]) -> dict[str, int]:
    """``device_bytes``, ``device_bytes_peak`` (what torch has taken from the device) and ``host_bytes`` of this process.

    ``weight_bytes`` stands in where torch does not count; to sum it up takes 10 ms and more, so a GPU worker does not ask.
    """
    import resource

    host_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.device(device).type != "cuda":
        held_bytes = weight_bytes()
        return {"device_bytes": held_bytes, "device_bytes_peak": held_bytes, "host_bytes": host_bytes}
    return {
        "device_bytes": torch.cuda.memory_reserved(device),
        "device_bytes_peak": torch.cuda.max_memory_reserved(device),
        "host_bytes": host_bytes,
    }
