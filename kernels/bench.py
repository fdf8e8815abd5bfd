"""``python -m kernels.bench``: microseconds and GB/s of each kernel on SDXL's shapes, beside torch eager and torch.compile.

Each candidate runs inside a CUDA graph, as the engine runs it, so launch overhead does not count; inputs may lie in the L2
cache, as they do when the layer before has just written them. Rows are JSON, one a line, on stdout; the table is on stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any, Final

import torch
import triton
from triton.testing import do_bench_cudagraph

from kernels.group_norm_silu import group_norm_silu, group_norm_silu_reference

N_GROUPS: Final = 32
# (channels, side) of every norm before a SiLU in SDXL's UNet at 1024 px, skip concatenations included …
UNET_SHAPES: Final = (
    (320, 128), (640, 128), (960, 128), (320, 64), (640, 64), (960, 64), (1280, 64), (1920, 64),
    (640, 32), (1280, 32), (1920, 32), (2560, 32),
)  # fmt: skip
# … and in the VAE's decoder, one image.
VAE_SHAPES: Final = ((512, 128), (512, 256), (512, 512), (256, 512), (256, 1024), (128, 1024))


def measure(batch: int, channels: int, side: int, dtype: torch.dtype) -> dict[str, Any]:
    """Times the three implementations on one shape and checks that they agree."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn((batch, channels, side, side), device="cuda", dtype=dtype, generator=generator) + 1
    x = x.to(memory_format=torch.channels_last)
    weight = torch.randn(channels, device="cuda", dtype=dtype, generator=generator)
    bias = torch.randn(channels, device="cuda", dtype=dtype, generator=generator)
    torch._dynamo.reset()
    compiled = torch.compile(group_norm_silu_reference, dynamic=False)
    candidates: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: group_norm_silu(x, N_GROUPS, weight, bias, path="triton"),
        "eager": lambda: group_norm_silu_reference(x, N_GROUPS, weight, bias),
        "compiled": lambda: compiled(x, N_GROUPS, weight, bias),
    }
    exact = group_norm_silu_reference(x.double(), N_GROUPS, weight.double(), bias.double())
    # Two passes must read the input twice and write once; less than that only with the L2 cache's help.
    n_bytes = 3 * x.numel() * x.element_size()
    row: dict[str, Any] = {
        "operation": "group_norm_silu",
        "shape": [batch, channels, side, side],
        "dtype": str(dtype).removeprefix("torch."),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    for name, run in candidates.items():
        y = run()
        row[f"{name}_relative_l2"] = float((y.double() - exact).norm() / exact.norm())
        p50, p20, p80 = (1000 * ms for ms in do_bench_cudagraph(run, quantiles=[0.5, 0.2, 0.8]))
        row |= {f"{name}_us": p50, f"{name}_p20_us": p20, f"{name}_p80_us": p80}
        row[f"{name}_gb_per_s"] = n_bytes / p50 / 1000
    row["eager_over_ours"] = row["eager_us"] / row["ours_us"]
    row["compiled_over_ours"] = row["compiled_us"] / row["ours_us"]
    return row


def main() -> int:
    """Measures all shapes."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[2], help="forward batches of the UNet's shapes")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("kernels.bench measures on an NVIDIA GPU; there is none here.\n")
        return 2
    shapes = [(batch, *shape) for batch in arguments.batch for shape in UNET_SHAPES]
    shapes += [(1, *shape) for shape in VAE_SHAPES]
    sys.stderr.write(f"{'shape':<22}{'ours µs':>9}{'GB/s':>7}{'eager ×':>9}{'compiled ×':>11}\n")
    for batch, channels, side in shapes:
        row = measure(batch, channels, side, torch.bfloat16)
        sys.stdout.write(json.dumps(row, sort_keys=True) + "\n")
        sys.stdout.flush()
        sys.stderr.write(
            f"{f'{batch}×{channels}×{side}²':<22}{row['ours_us']:>9.1f}{row['ours_gb_per_s']:>7.0f}"
            f"{row['eager_over_ours']:>9.2f}{row['compiled_over_ours']:>11.2f}\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
