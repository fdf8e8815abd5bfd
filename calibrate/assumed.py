"""What is not measured: laws taken over from another stack, and figures published elsewhere. Each with its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MIB: Final = 2**20
# One step's residuals of one CFG half of SDXL at 1024 x 1024 in bf16: what the published transfer times are for.
RESIDUAL_BYTES: Final = 53_739_520

TAKEN_OVER: Final[dict[str, tuple[str, str]]] = {
    "diffusers_tuned.controlnet_step": (
        "engine.controlnet_step",
        "composed from parts: a compiled ControlNet costs what ours does; the stock ControlNet pipeline does not run with "
        "UNet and ControlNets under reduce-overhead (diffusers 0.42, torch 2.11)",
    ),
    "diffusers_tuned.text_encode": ("diffusers.text_encode", "the same code as the stock pipeline"),
    "diffusers_tuned.vae_decode": ("diffusers.vae_decode", "not measured compiled: as the stock pipeline"),
    "diffusers_tuned.checkpoint_load": ("diffusers.checkpoint_load", "the same code as the stock pipeline"),
    "diffusers_tuned.controlnet_load": ("diffusers.controlnet_load", "the same code as the stock pipeline"),
    "diffusers_tuned.worker_start": (
        "engine.worker_start",
        "a worker that loads the same compile artefacts: as ours starts",
    ),
    "diffusers_tuned.request_overhead": ("diffusers.request_overhead", "as the stock pipeline"),
    "engine.controlnet_load": ("engine.checkpoint_load", "the same code as for a checkpoint"),
    "engine.controlnet_read": ("engine.checkpoint_read", "the same code as for a checkpoint"),
}
"""Law to (the law it is taken from, why)."""


@dataclass(frozen=True, slots=True)
class Published:
    """An affine law, or a constant one, from somebody else's numbers."""

    fixed_s: float
    per_byte_s: float | None
    source: str


PUBLISHED: Final[dict[str, Published]] = {
    "engine.residual_transfer.nvlink": Published(
        2.0e-5,
        1.45e-4 / RESIDUAL_BYTES,
        "not measured in these sessions: 145 us per 53.7 MB between two H200 through symmetric memory, 20 us a barrier",
    ),
    "engine.residual_transfer.pcie": Published(
        2.0e-5, 1.1e-3 / RESIDUAL_BYTES, "1.1 ms per 53.7 MB, the rate of PCIe 5 x16 (about 50 GB/s), and 20 us latency"
    ),
    "engine.residual_transfer.network": Published(
        5.0e-5, 4.3e-3 / RESIDUAL_BYTES, "4.3 ms per 53.7 MB, the rate of 100 Gb/s, and 50 us latency"
    ),
    "engine.remote_join": Published(
        3.0e-4, None, "not measured in these sessions: two waits and a flag on a link of 145 us per message"
    ),
    "lora_fetch.remote": Published(
        0.0,
        1.0 / (800 * MIB),
        "Katz, USENIX ATC '25: two LoRAs, about 800 MiB, take more than 1 s from a remote cache; a lower bound",
    ),
    "model_fetch.remote": Published(
        0.0,
        1.0 / (800 * MIB),
        "the bandwidth of lora_fetch.remote, 800 MiB/s: nothing published on checkpoints at hand",
    ),
}
