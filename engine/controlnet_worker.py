"""A process that holds ControlNets and serves one base worker: ``python -m engine.controlnet_worker --settings JSON``.

Under torchrun (RANK=1, WORLD_SIZE=2) the settings need no port. The base paces everything: the worker acts on messages,
and within a request both sides derive from the same message which steps exchange what.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any, Final

import torch

from engine.control_stack import ControlJob, ControlStack, ShapeKey, active_names
from engine.models import ModelSpec, build_controlnet, load_local_controlnet
from engine.options import ControlInput, EngineOptions, PromptEmbeddings
from engine.parts import NetworkParts
from engine.remote import options_from_plain
from engine.transport import (
    ARRIVAL_KEY,
    EXCHANGE_TIMEOUT_S,
    WORKER_RANK,
    Link,
    LinkError,
    join_store,
    store_from_environment,
)

IDLE_POLL_S: Final = 5.0
IDLE_MAX_S: Final = 3600.0
"""A worker that no base talks to for this long ends itself."""
EXIT_TIMEOUT_S: Final = 15.0


class ControlNetWorker:
    """Serves one link until it is told to stop."""

    def __init__(self, link: Link, spec: ModelSpec, stack: ControlStack, options: EngineOptions) -> None:
        self._link = link
        self._spec = spec
        self._stack = stack
        self._options = options
        self._inputs: dict[ShapeKey, tuple[torch.Tensor, torch.Tensor]] = {}

    def serve(self) -> None:
        """Handles messages until ``stop``, a lost line, or an hour without any."""
        idle_s = 0.0
        while idle_s < IDLE_MAX_S:
            message = self._link.hear(IDLE_POLL_S)
            if message is None:
                idle_s += IDLE_POLL_S
                continue
            idle_s = 0.0
            if message["kind"] == "stop":
                self._link.tell({"kind": "stopped"})
                return
            try:
                self._handle(message)
            except Exception as error:
                self._link.tell({"kind": "failed", "reason": f"{type(error).__name__}: {error}"[:1000]})
                raise

    def _handle(self, message: dict[str, Any]) -> None:
        if message["kind"] == "prepare":
            self._prepare(ShapeKey(**message["key"]), message["names"])
            self._link.tell({"kind": "prepared"})
        elif message["kind"] == "begin":
            self._run(message)
        elif message["kind"] == "push":
            buffer = torch.ones(message["n_elements"], device=self._options.device, dtype=self._options.dtype)
            self._link.send(buffer).wait()
        else:
            raise LinkError(f"unknown message {message['kind']!r}")

    def _prepare(self, key: ShapeKey, names: list[str]) -> None:
        if key not in self._inputs:
            latents_in = torch.randn(
                key.latent_shape(self._spec), device=self._options.device, dtype=self._options.dtype
            )
            self._inputs[key] = (latents_in, torch.empty(0))
        latents_in, _ = self._inputs[key]
        self._inputs[key] = (latents_in, self._stack.prepare(key, names, latents_in))

    def _run(self, message: dict[str, Any]) -> None:
        key, n_steps = ShapeKey(**message["key"]), message["n_steps"]
        device, dtype = self._options.device, self._options.dtype

        def receive(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            tensor = torch.empty(shape, device=device, dtype=dtype)
            self._link.receive(tensor)
            return tensor

        timesteps = receive(n_steps, dtype=torch.float32)
        text = PromptEmbeddings(
            receive(key.batch, 77, self._spec.context_width), receive(key.batch, self._spec.pooled_width)
        )
        controls = [
            ControlInput(
                item["name"],
                receive(item["n_images"], 3, key.height, key.width),
                item["scale"],
                item["start"],
                item["end"],
            )
            for item in message["controls"]
        ]
        self._stack.begin(ControlJob(key, controls, n_steps, timesteps, text))
        latents_in, flat = self._inputs[key]
        for step, names in enumerate(active_names(controls, n_steps)):
            if not names:
                continue
            self._link.receive(latents_in)
            self._stack.finish_step(step)
            # On CUDA this makes the stream wait, so that the next step cannot overwrite what is still being sent.
            self._link.send(flat).wait()


def main(arguments: list[str] | None = None) -> None:
    """Builds the ControlNets, connects, serves, and ends in bounded time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", required=True, help="JSON: spec, controlnets, options, port")
    settings = json.loads(parser.parse_args(arguments).settings)
    spec, options = ModelSpec.named(settings["spec"]), options_from_plain(settings["options"])
    if options.is_cuda:
        torch.cuda.set_device(options.device)
    if "port" in settings:
        store: Any = join_store("127.0.0.1", settings["port"])
        rank = WORKER_RANK
        store.set(ARRIVAL_KEY, "yes")
    else:
        store, rank = store_from_environment()
        if rank != WORKER_RANK:
            raise LinkError(f"RANK is {rank}, the ControlNet worker is rank {WORKER_RANK}")
    link = Link(store, rank, options.device, settings.get("exchange_timeout_s", EXCHANGE_TIMEOUT_S))
    try:
        nets = {
            name: build_controlnet(spec, options.device, options.dtype, source)
            if isinstance(source, int)
            else load_local_controlnet(Path(source), options.device, options.dtype)
            for name, source in settings["controlnets"].items()
        }
        parts = NetworkParts(options, tuple(nets.values()))
        stack = ControlStack(spec, nets, options, parts.recorder, parts.residuals_of)
        link.tell({"kind": "ready", "spec": spec.name, "names": list(nets)})
        link.greet()
        ControlNetWorker(link, spec, stack, options).serve()
    except LinkError as error:
        sys.stderr.write(f"ControlNet worker ends: {error}\n")
    finally:
        # A process group that hangs while it is torn down must not keep the process and its GPU.
        last_resort = threading.Timer(EXIT_TIMEOUT_S, os._exit, (1,))
        last_resort.daemon = True
        last_resort.start()
        link.close()


if __name__ == "__main__":
    main()
