"""Datasheet rates of the GPUs a measured profile can be carried over to, each with its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from traces.problems import one_problem

GIB: Final = 2**30


@dataclass(frozen=True, slots=True)
class Datasheet:
    """Peak rates of one GPU: dense bf16 on tensor cores, device memory, and links in one direction."""

    gpu_kind: str
    """As in price tables and allocations."""
    names: tuple[str, ...]
    """Beginnings of what the driver calls it, in the spelling of ``calibrate.fingerprint.gpu_kind``."""
    architecture: str
    bf16_tflops: float
    memory_tb_per_s: float
    memory_gb: float
    """As sold, in 10**9 bytes."""
    pcie_gb_per_s: float
    nvlink_gb_per_s: float
    """0: it has none."""
    source: str


DATASHEETS: Final = (
    Datasheet("nvidia-h200", ("nvidia-h200",), "hopper", 989.0, 4.8, 141.0, 64.0, 450.0,
              "NVIDIA H200 datasheet (SXM): 1,979 TFLOPS bf16 with sparsity, so half dense; 141 GB at 4.8 TB/s; NVLink 900 GB/s both ways; PCIe Gen5"),
    Datasheet("nvidia-h100", ("nvidia-h100",), "hopper", 989.0, 3.35, 80.0, 64.0, 450.0,
              "NVIDIA H100 datasheet (SXM): 1,979 TFLOPS bf16 with sparsity, so half dense; 80 GB at 3.35 TB/s; NVLink 900 GB/s both ways; PCIe Gen5"),
    Datasheet("nvidia-h800", ("nvidia-h800",), "hopper", 989.0, 3.35, 80.0, 64.0, 200.0,
              "H800 SXM: the H100's die and memory with NVLink cut to 400 GB/s both ways (vendors' comparisons; NVIDIA publishes no separate datasheet)"),
    Datasheet("nvidia-a100-80gb", ("nvidia-a100-80gb", "nvidia-a100-sxm4-80gb"), "ampere", 312.0, 2.039, 80.0, 32.0, 300.0,
              "NVIDIA A100 80GB datasheet (SXM): 312 TFLOPS bf16 dense; 80 GB at 2,039 GB/s; NVLink 600 GB/s both ways; PCIe Gen4"),
    Datasheet("nvidia-l40s", ("nvidia-l40s",), "ada", 362.05, 0.864, 48.0, 32.0, 0.0,
              "NVIDIA L40S datasheet: 362.05 TFLOPS bf16 dense (733 with sparsity); 48 GB at 864 GB/s; no NVLink; PCIe Gen4"),
    Datasheet("nvidia-a10g", ("nvidia-a10g",), "ampere", 70.0, 0.6, 24.0, 32.0, 0.0,
              "A10G (AWS g5): 24 GB at 600 GB/s, 70 TFLOPS fp16 and bf16 dense as cloud vendors compare it with the A10's 125; PCIe Gen4"),
    Datasheet("nvidia-b200", ("nvidia-b200",), "blackwell", 2250.0, 8.0, 180.0, 64.0, 900.0,
              "NVIDIA HGX B200 figures: 4,500 TFLOPS bf16 with sparsity, so 2,250 dense; 180 GB at up to 8 TB/s; NVLink 1.8 TB/s both ways; PCIe Gen5"),
)  # fmt: skip


def datasheet_of(name: str) -> Datasheet:
    """The datasheet of a GPU by kind, or by the short name people use: ``nvidia-l40s``, ``L40S``, ``A100``.

    Raises:
        InputError: there is none.
    """
    plain = name.strip().lower().replace(" ", "-")
    wanted = plain if plain.startswith("nvidia-") else f"nvidia-{plain}"
    for sheet in DATASHEETS:
        if any(wanted == known or wanted.startswith(f"{known}-") for known in sheet.names):
            return sheet
    short = [sheet for sheet in DATASHEETS if sheet.gpu_kind.startswith(f"{wanted}-")]
    if len(short) == 1:
        return short[0]
    raise one_problem(
        "GPU", f"no datasheet of {name!r}", f"one of {', '.join(sheet.gpu_kind for sheet in DATASHEETS)}",
        "Measure that GPU with 'calibrate run', or add its datasheet with a source.",
    )  # fmt: skip
