"""``python -m kernels.bench``: microseconds and achieved rate of each kernel on SDXL's shapes, beside torch eager and torch.compile.

Each candidate runs inside a CUDA graph, as the engine runs it, so launch overhead does not count; inputs may lie in the L2
cache, as they do when the layer before has just written them. Two ceilings are measured first: a device-to-device copy and a
large bf16 matrix product. Rows are JSON, one a line, on stdout; the table is on stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
import triton
from torch.nn import functional
from triton.testing import do_bench_cudagraph

from kernels.add_channels import add_channels, concat_channels
from kernels.add_layer_norm import add_layer_norm, add_layer_norm_reference
from kernels.geglu_linear import geglu_linear, geglu_linear_reference
from kernels.group_norm_silu import group_norm_silu, group_norm_silu_reference
from kernels.upsample_nearest import upsample_nearest_2x

N_GROUPS: Final = 32
TOKENS: Final = ((4096, 640), (1024, 1280))
"""Tokens and width of the transformers at 1024 px, a forward sample."""
# (channels, side) of the commonest norms before a SiLU in SDXL's UNet at 1024 px …
UNET_SHAPES: Final = ((320, 128), (960, 128), (640, 64), (1920, 64), (1280, 32), (2560, 32))
# … and in the VAE's decoder, one image.
VAE_SHAPES: Final = ((512, 128), (512, 256), (512, 512), (256, 512), (256, 1024), (128, 1024))

Kernel = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one shape."""

    operation: str
    shape: str
    ours: Kernel
    reference: Kernel
    inputs: tuple[Any, ...]
    bound: Literal["bytes", "flops"]
    amount: float
    """Fewest bytes that must move through memory, or the floating-point operations."""


def cases(batches: list[int]) -> Iterator[Case]:
    """Everything that is measured; inputs are drawn when the case is reached."""
    for batch in batches:
        for channels, side in UNET_SHAPES:
            yield _group_norm(batch, channels, side)
    for channels, side in VAE_SHAPES:
        yield _group_norm(1, channels, side)
    for batch in batches:
        for tokens, width in TOKENS:
            rows = batch * tokens
            x, residual = _draw(rows, width), _draw(rows, width)
            yield Case(
                "add_layer_norm", f"{rows}×{width}",
                lambda *a: add_layer_norm(*a, path="triton"), add_layer_norm_reference,
                (x, residual, _draw(width), _draw(width)), "bytes", 4 * x.nbytes,
            )  # fmt: skip
            weight = _draw(8 * width, width) / width**0.5
            yield Case(
                "geglu_linear", f"{rows}×{width}→{4 * width}",
                lambda *a: geglu_linear(*a, path="triton"), geglu_linear_reference,
                (x, weight, _draw(8 * width)), "flops", 2.0 * rows * width * 8 * width,
            )  # fmt: skip
        for first, second, side in ((1280, 1280, 32), (640, 640, 64), (320, 320, 128)):
            a, b = _draw_image(batch, first, side), _draw_image(batch, second, side)
            yield Case(
                "concat_channels + residual", f"{batch}×({first}+{second})×{side}²",
                lambda *t: concat_channels(*t, path="triton"), _concat,
                (a, b, torch.randn_like(b)), "bytes", 2 * a.nbytes + 3 * b.nbytes,
            )  # fmt: skip
            yield Case(
                "add_channels", f"{batch}×{first}×{side}²",
                lambda x, bias, r: add_channels(x, bias, r, path="triton"), _add,
                (a, _draw(first), torch.randn_like(a)), "bytes", 3 * a.nbytes,
            )  # fmt: skip
    for channels, side in ((512, 128), (512, 256), (256, 512)):
        x = _draw_image(1, channels, side)
        yield Case(
            "upsample_nearest_2x", f"1×{channels}×{side}²",
            lambda x: upsample_nearest_2x(x, path="triton"), _upsample, (x,), "bytes", 5 * x.nbytes,
        )  # fmt: skip


def _group_norm(batch: int, channels: int, side: int) -> Case:
    x = _draw_image(batch, channels, side) + 1
    return Case(
        "group_norm_silu", f"{batch}×{channels}×{side}²",
        lambda *a: group_norm_silu(a[0], N_GROUPS, *a[1:], path="triton"),
        lambda *a: group_norm_silu_reference(a[0], N_GROUPS, *a[1:]),
        (x, _draw(channels), _draw(channels)), "bytes", 2 * x.nbytes,
    )  # fmt: skip


def _concat(first: torch.Tensor, second: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    return torch.cat([first, second + added], dim=1)


def _add(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return x + bias[None, :, None, None] + residual


def _upsample(x: torch.Tensor) -> torch.Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _draw_image(batch: int, channels: int, side: int) -> torch.Tensor:
    return _draw(batch, channels, side, side).to(memory_format=torch.channels_last)


def ceilings() -> dict[str, float]:
    """Bytes a second of a 4 GiB copy (read and write counted) and FLOP a second of an 8192³ bf16 product, on random data."""
    source = _draw(2**30)
    target = torch.empty_like(source)
    copy_ms = do_bench_cudagraph(lambda: target.copy_(source), return_mode="median")
    a, b = _draw(8192, 8192), _draw(8192, 8192)
    product_ms = do_bench_cudagraph(lambda: a @ b, return_mode="median")
    return {"bytes": 2 * 2**31 / copy_ms * 1e3, "flops": 2 * 8192.0**3 / product_ms * 1e3}


def measure(case: Case, ceiling: dict[str, float]) -> dict[str, Any]:
    """Times the three implementations of one case and their distance from fp64."""
    torch._dynamo.reset()
    candidates: dict[str, Kernel] = {
        "ours": case.ours,
        "eager": case.reference,
        "compiled": torch.compile(case.reference, dynamic=False),
    }
    exact = _first(case.reference(*(item.double() for item in case.inputs)))
    row: dict[str, Any] = {
        "operation": case.operation,
        "shape": case.shape,
        "dtype": "bfloat16",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "bound": case.bound,
    }
    for name, run in candidates.items():
        y = _first(run(*case.inputs))
        row[f"{name}_relative_l2"] = float((y.double() - exact).norm() / exact.norm())
        timed = do_bench_cudagraph(lambda run=run: run(*case.inputs), rep=10, quantiles=[0.5, 0.2, 0.8])
        p50, p20, p80 = (1000 * ms for ms in timed)
        row |= {f"{name}_us": p50, f"{name}_p20_us": p20, f"{name}_p80_us": p80}
        row[f"{name}_share_of_ceiling"] = case.amount / (p50 * 1e-6) / ceiling[case.bound]
    row["ours_rate"] = case.amount / (row["ours_us"] * 1e-6)
    row["eager_over_ours"] = row["eager_us"] / row["ours_us"]
    row["compiled_over_ours"] = row["compiled_us"] / row["ours_us"]
    return row


def _first(result: Any) -> torch.Tensor:
    """The norm of :func:`add_layer_norm`, which returns the sum as well."""
    return result[1] if isinstance(result, tuple) else result


def main() -> int:
    """Measures all cases."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[2], help="forward batches of the UNet's shapes")
    parser.add_argument("--only", default="", help="operations whose name starts with this")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("kernels.bench measures on an NVIDIA GPU; there is none here.\n")
        return 2
    torch.manual_seed(0)
    ceiling = ceilings()
    sys.stdout.write(json.dumps({"operation": "ceilings", "gpu": torch.cuda.get_device_name(), **ceiling}) + "\n")
    sys.stderr.write(f"copy {ceiling['bytes'] / 1e12:.2f} TB/s, bf16 product {ceiling['flops'] / 1e12:.0f} TFLOP/s\n")
    sys.stderr.write(
        f"{'operation':<28}{'shape':<20}{'ours µs':>9}{'rate':>12}{'ceiling':>9}{'eager ×':>9}{'compiled ×':>12}\n"
    )
    for case in cases(arguments.batch):
        if not case.operation.startswith(arguments.only):
            continue
        row = measure(case, ceiling)
        sys.stdout.write(json.dumps(row, sort_keys=True) + "\n")
        sys.stdout.flush()
        rate = (
            f"{row['ours_rate'] / 1e9:.0f} GB/s" if case.bound == "bytes" else f"{row['ours_rate'] / 1e12:.0f} TFLOP/s"
        )
        sys.stderr.write(
            f"{case.operation:<28}{case.shape:<20}{row['ours_us']:>9.1f}{rate:>12}{row['ours_share_of_ceiling']:>9.0%}"
            f"{row['eager_over_ours']:>9.2f}{row['compiled_over_ours']:>12.2f}\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
