"""Requests that run together on one base replica: who may, and how long their common forwards take."""

from __future__ import annotations

from planner.service import BatchTimes, ServiceTable
from planner.workload import Workload


def kinds_of(workload: Workload) -> list[int]:
    """Requests with the same number agree in everything that a batch shares: checkpoint, steps, resolution, guidance or not,
    ControlNets with their windows, LoRAs in their order. LoRA weights are not in the workload and count as equal."""
    numbers: dict[tuple[object, ...], int] = {}
    is_guided = (workload.forward_batch > workload.n_images).tolist()
    needs = zip(
        workload.checkpoint.tolist(), workload.n_steps.tolist(), workload.megapixels.tolist(), is_guided,
        workload.controlnets, workload.control_steps, workload.loras, strict=True,
    )  # fmt: skip
    return [numbers.setdefault(item, len(numbers)) for item in needs]


class BatchClock:
    """Stage times of a batch on one pool, read from its service table."""

    def __init__(self, service: ServiceTable, batch: BatchTimes, workload: Workload) -> None:
        self._text_s: list[float] = service.text_s.tolist()
        self._noise: list[float] = service.noise_ratio.tolist()
        self._shape: list[int] = batch.shape.tolist()
        self._plain_s = batch.plain_step_s.tolist()
        self._controlnet_s = batch.controlnet_forward_s.tolist()
        self._vae_s = batch.vae_s.tolist()
        self._n_forwards: list[float] = batch.n_forwards.tolist()
        self._n_steps: list[int] = workload.n_steps.tolist()

    def stages_s(self, lead: int, n_samples: int, n_images: int) -> tuple[float, float, float]:
        """Text, denoising, decoding of a batch led by a request, whose noise all share."""
        row, noise = self._shape[lead], self._noise[lead]
        denoise_s = self._n_steps[lead] * self._plain_s[row][n_samples]
        denoise_s += self._n_forwards[lead] * self._controlnet_s[row][n_samples]
        return self._text_s[lead], denoise_s * noise, self._vae_s[row][n_images] * noise
