"""ControlNet workers of the featherweight model."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.allocation import ANY
from engine.links.protocol import PairOfControlNets
from engine.workers.featherweight_arithmetic import N_VALUES, SAMPLE_BYTES, Array, residual
from engine.workers.painter import JobError
from engine.workers.setup import Progress, WorkerSetup
from engine.workers.told_faults import told_faults


@dataclass(slots=True)
class _Client:
    pair: PairOfControlNets
    batch: int = -1
    prompts: Array = field(default_factory=lambda: np.zeros((0, 1), dtype=np.uint64))
    controls: list[tuple[str, float, Array]] = field(default_factory=list)


class FeatherweightControlHost:
    """See :class:`engine.workers.painter.ControlHost`. Options: ``service_s``, ``controlnet_load_s``, ``faults_dir``."""

    def __init__(self, setup: WorkerSetup, progress: Progress) -> None:
        self._faults = told_faults(setup)
        self._faults.start()
        self._service_s = float(setup.options.get("service_s", 0.0))
        self._load_s = float(setup.options.get("controlnet_load_s", 0.0))
        self._awaited: dict[str, float] = {}
        """Client to when what its job needs is loaded."""
        self._clients: dict[str, _Client] = {}
        self._may_host = set(setup.controlnet_ids)
        self._resident = {i for i in setup.controlnet_ids if i != ANY}
        self._progress = progress
        progress("load")

    def open(self, client: str, pair: PairOfControlNets) -> None:
        """See :class:`engine.workers.painter.ControlHost`."""
        self._clients[client] = _Client(pair)

    def close(self, client: str) -> None:
        """See :class:`engine.workers.painter.ControlHost`."""
        self._clients.pop(client, None)
        self._awaited.pop(client, None)

    def begin(self, client: str, message: Mapping[str, Any]) -> None:
        """See :class:`engine.workers.painter.ControlHost`."""
        state = self._clients[client]
        state.batch = message["batch"]
        state.prompts = np.array(message["prompts"], dtype=np.uint64).reshape(-1, 1)
        state.controls = []
        for control in message["controls"]:
            if ANY not in self._may_host and control["id"] not in self._may_host:
                raise JobError(f"ControlNet {control['id']} is not hosted here")
            if control["id"] not in self._resident and self._load_s:
                self._awaited[client] = time.monotonic() + self._load_s
            self._resident.add(control["id"])
            images = np.array(control["images"], dtype=np.uint64).reshape(-1, 1)
            state.controls.append((control["id"], control["scale"], images))

    def awaited(self) -> Collection[str]:
        """See :class:`engine.workers.painter.ControlHost`."""
        return self._awaited.keys()

    def advance(self) -> bool:
        """See :class:`engine.workers.painter.ControlHost`."""
        self._progress("load")
        now_s = time.monotonic()
        loaded = [client for client, at_s in self._awaited.items() if at_s <= now_s]
        for client in loaded:
            del self._awaited[client]
        return bool(loaded)

    def step(self, client: str, message: Mapping[str, Any]) -> None:
        """See :class:`engine.workers.painter.ControlHost`."""
        self._faults.step()
        state = self._clients[client]
        if self._service_s:
            time.sleep(self._service_s)
        n_bytes = len(state.prompts) * SAMPLE_BYTES
        x = state.pair.buffer("latents")[:n_bytes].copy().view(np.uint64).reshape(-1, N_VALUES)
        total = np.zeros_like(x)
        for k in message["used"]:
            controlnet_id, scale, images = state.controls[k]
            total = total + residual(controlnet_id, images, x, state.prompts, scale)
        state.pair.buffer("residuals")[:n_bytes] = total.view(np.uint8).ravel()
        state.pair.push("residuals", 0, n_bytes)
        state.pair.tell({"type": "residuals", "batch": message["batch"], "i": message["i"]})

    def admit(self, controlnet_id: str, source: Mapping[str, Any]) -> None:
        """See :class:`engine.workers.painter.ControlHost`."""
        self._may_host.add(controlnet_id)

    def memory(self) -> Mapping[str, int]:
        """It weighs nothing."""
        return {"device_bytes": 0, "device_bytes_peak": 0, "host_bytes": 0}

    def resident(self) -> list[str]:
        """See :class:`engine.workers.painter.ControlHost`."""
        return sorted(self._resident)
