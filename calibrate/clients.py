"""One ControlNet worker shared by several base workers, under the clock: whole jobs through the real engine's processes.

What a sharing law must say: how much longer a job takes when others ask the same ControlNet worker at the same time, of equal size or not.
Every base worker and the ControlNet worker have a GPU of their own; on a CPU they share its cores, which shows the path and no law.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from calibrate.measurement import Features
from calibrate.rig import Timed
from calibrate.serving import JOB_TIMEOUT_S, ServingRig
from engine.allocation import Allocation, Link, Policies, Pool

UNEQUAL: Final = "_unequal"
"""Ending of a ``variant``: all clients but the first ask for one ControlNet only."""


class ClientsRig(ServingRig):
    """One to ``n_sharing`` base replicas without ControlNets, and one worker that has them all."""

    def run(self, method: str, features: Features, n_repeats: int) -> list[Timed]:
        """``client_jobs``: as many clients at once as ``variant`` says: ``clients2``, ``clients3_unequal``; one job of each a turn."""
        if method != "client_jobs":
            raise ValueError(f"a station of clients times only 'client_jobs', asked for {method!r}")
        n = int(features.variant.removeprefix("clients").removesuffix(UNEQUAL))
        fewer = dataclasses.replace(features, n_controlnets=1) if features.variant.endswith(UNEQUAL) else features
        clients = [features] + [fewer] * (n - 1)
        self._started(n)
        self._warmed(clients)
        turns = [self._do(self._together(clients), JOB_TIMEOUT_S) for _ in range(n_repeats)]
        found = []
        for kind in dict.fromkeys(clients):
            jobs = [job for turn in turns for client, job in zip(clients, turn, strict=True) if client == kind]
            found += self._rows("serving.", kind, jobs)
        return found

    def _allocation(self, n_replicas: int, checkpoints: tuple[str, ...]) -> Allocation:
        nets = tuple(f"controlnet{i}" for i in range(self.setup.n_controlnets))
        bases = Pool("bases", "base", n_replicas, "any", 1, "decoupled", base_model_ids=checkpoints, controlnet_ids=())
        worker = Pool("controlnets", "controlnet", 1, "any", 1, "decoupled", controlnet_ids=nets)
        return Allocation(
            pools=(worker, bases),
            links=(Link("bases", "controlnets", "nvlink" if self._has_gpus else "local"),),
            policies=Policies(lora_patch_by_step=0),
        )

    @property
    def _has_gpus(self) -> bool:
        return self.setup.device.startswith("cuda")

    def _devices(self) -> tuple[str, ...]:
        n = 1 + self.setup.n_sharing
        return tuple(f"cuda:{i}" for i in range(n)) if self._has_gpus else ("cpu",) * n
