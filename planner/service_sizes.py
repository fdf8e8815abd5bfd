"""Bytes of models and add-ons, as the simulated caches count them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from calibrate.profile import LatencyProfile
from engine.allocation import GIB, Catalogue
from planner.workload import Ints


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of models and add-ons: the catalogue's where it lists them, else the default of their kind."""

    lora_bytes: int
    controlnet_bytes: int
    checkpoint_bytes: int
    catalogue: Catalogue = field(default_factory=Catalogue)

    @classmethod
    def from_profile(cls, profile: LatencyProfile, *, lora_bytes: int, catalogue: Catalogue | None = None) -> Sizes:
        """Checkpoint and ControlNet defaults from the profile's facts; raises :class:`InputError` if it lacks them."""
        fact = profile.predictor().fact
        return cls(
            lora_bytes=lora_bytes,
            controlnet_bytes=round(fact("controlnet_gib") * GIB),
            checkpoint_bytes=round(fact("checkpoint_gib") * GIB),
            catalogue=catalogue if catalogue is not None else Catalogue(),
        )

    def of_loras(self, names: Sequence[str]) -> Ints:
        """Bytes of each LoRA."""
        return self._of(names, self.lora_bytes)

    def of_controlnets(self, names: Sequence[str]) -> Ints:
        """Bytes of each ControlNet."""
        return self._of(names, self.controlnet_bytes)

    def of_checkpoints(self, names: Sequence[str]) -> Ints:
        """Bytes of each checkpoint."""
        return self._of(names, self.checkpoint_bytes)

    def _of(self, names: Sequence[str], default_bytes: int) -> Ints:
        return np.array([self.catalogue.bytes_of(name, default_bytes) for name in names], dtype=np.int64)
