"""The Euler schedule of a request as tables on the device, so that no step waits for the host.

``EulerDiscreteScheduler`` looks its step up with ``.item()`` and keeps its sigmas on the CPU; here every scalar that a step
needs is a row of a table. The arithmetic of a step is the scheduler's, operation by operation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import EulerDiscreteScheduler

N_STEP_SCALARS = 4


@dataclass(frozen=True, slots=True)
class Schedule:
    """Timesteps and scalars of every step."""

    timesteps: torch.Tensor
    """``[n_steps]``, fp32, on the device."""
    scalars: torch.Tensor
    """``[n_steps, 4]``, fp32, on the device: input scale, sigma, sigma of the next step − sigma, guidance."""
    initial_sigma: float
    """Factor of the starting noise."""

    @classmethod
    def of(
        cls, scheduler: EulerDiscreteScheduler, n_steps: int, guidance: float, device: torch.device | str
    ) -> Schedule:
        """Reads the tables from a real scheduler."""
        scheduler.set_timesteps(n_steps, device="cpu")
        sigmas = scheduler.sigmas
        scale = (sigmas[:-1] ** 2 + 1) ** 0.5
        scalars = torch.stack([scale, sigmas[:-1], sigmas[1:] - sigmas[:-1], torch.full_like(scale, guidance)], dim=1)
        return cls(
            scheduler.timesteps.to(device=device, dtype=torch.float32),
            scalars.to(device=device),
            float(scheduler.init_noise_sigma),
        )


def scaled_input(latents: torch.Tensor, scalars: torch.Tensor) -> torch.Tensor:
    """What the networks see of the latents, before it is doubled for guidance."""
    return latents / scalars[0]


def guide(prediction: torch.Tensor, scalars: torch.Tensor) -> torch.Tensor:
    """Combines the halves of a guided prediction (unconditional first): ``[2n, …] -> [n, …]``."""
    unconditional, conditional = prediction.chunk(2)
    return unconditional + scalars[3] * (conditional - unconditional)


def euler_step(latents: torch.Tensor, prediction: torch.Tensor, scalars: torch.Tensor) -> torch.Tensor:
    """One Euler step for epsilon prediction, computed in fp32 and rounded to the latents' type."""
    sample = latents.to(torch.float32)
    sigma = scalars[1]
    original = sample - sigma * prediction
    derivative = (sample - original) / sigma
    return (sample + derivative * scalars[2]).to(prediction.dtype)
