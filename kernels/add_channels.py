"""Sums and concatenations over channels in NHWC memory, one pass each: what lies between a UNet's convolutions and its norms.

``add_channels``: a convolution's output without its bias, the bias, and the residual it joins, in one pass (cuDNN's bias is a
pass of its own). ``concat_channels``: ``cat([a, b + c])`` for the skips of the decoder, with a ControlNet's residual added on
the way.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Final, Literal

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the reference serves
    triton = None

DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
BLOCK: Final = 2048
Path = Literal["auto", "triton", "torch"]


def add_channels(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, *, path: Path = "auto"
) -> torch.Tensor:
    """``x + bias[None, :, None, None] + residual``, summed in fp32 and rounded once.

    Args:
        x: ``[N, C, H, W]``; the kernel needs NHWC memory.
        bias: ``[C]`` or None.
        residual: like ``x``.
        path: ``auto`` takes the kernel where it can; ``triton`` insists on it; ``torch`` is the reference.

    Raises:
        ValueError: a shape or type does not fit, or ``path="triton"`` is impossible here.
    """
    if x.ndim != 4 or x.numel() == 0 or x.dtype not in DTYPES or residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"add_channels: x is {x.dtype} {tuple(x.shape)}, residual {residual.dtype} {tuple(residual.shape)}, needs two"
            " alike [N, C, H, W] of a float type with no side 0."
        )
    if bias is not None and tuple(bias.shape) != (x.shape[1],):
        raise ValueError(f"add_channels: bias has shape {tuple(bias.shape)}, needs ({x.shape[1]},).")
    if _takes_torch(path, "add_channels", x, residual):
        total = x.float() + residual.float()
        return (total if bias is None else total + bias.float()[None, :, None, None]).to(x.dtype)
    y = torch.empty_like(x)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _add[(triton.cdiv(x.numel(), BLOCK),)](
            x, x if bias is None else bias, residual, y, x.numel(), x.shape[1], bias is not None, BLOCK, num_warps=4
        )
    return y


def concat_channels(
    first: torch.Tensor, second: torch.Tensor, added: torch.Tensor | None = None, *, path: Path = "auto"
) -> torch.Tensor:
    """``cat([first, second + added], dim=1)``.

    Args:
        first: ``[N, C1, H, W]``; the kernel needs NHWC memory.
        second: ``[N, C2, H, W]``.
        added: like ``second``, or None.
        path: ``auto`` takes the kernel where it can; ``triton`` insists on it; ``torch`` is the reference.

    Raises:
        ValueError: a shape or type does not fit, or ``path="triton"`` is impossible here.
    """
    shapes_fit = first.ndim == 4 and second.ndim == 4 and first.shape[0] == second.shape[0]
    if not shapes_fit or first.shape[2:] != second.shape[2:] or first.dtype != second.dtype or first.numel() == 0:
        raise ValueError(
            f"concat_channels: got {first.dtype} {tuple(first.shape)} and {second.dtype} {tuple(second.shape)}, needs"
            " [N, C1, H, W] and [N, C2, H, W] of one type."
        )
    if added is not None and (added.shape != second.shape or added.dtype != second.dtype):
        raise ValueError(f"concat_channels: added is {added.dtype} {tuple(added.shape)}, needs {tuple(second.shape)}.")
    others = (second,) if added is None else (second, added)
    if _takes_torch(path, "concat_channels", first, *others):
        return torch.cat([first, second if added is None else second + added], dim=1)
    n, c1, height, width = first.shape
    c2 = second.shape[1]
    y = torch.empty(
        (n, c1 + c2, height, width), dtype=first.dtype, device=first.device, memory_format=torch.channels_last
    )
    n_rows = n * height * width
    rows = max(1, BLOCK // triton.next_power_of_2(c1 + c2))
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        _concat[(triton.cdiv(n_rows, rows),)](
            first, second, second if added is None else added, y, n_rows, c1, c2, added is not None,
            rows, triton.next_power_of_2(c1 + c2), num_warps=4,
        )  # fmt: skip
    return y


def _takes_torch(path: Path, name: str, *tensors: torch.Tensor) -> bool:
    refusal = _refusal(tensors)
    if path == "triton" and refusal:
        raise ValueError(f"{name}: {refusal}. Use path='auto'.")
    if path == "auto":
        return bool(refusal) or not tensors[0].is_cuda or torch.compiler.is_compiling()
    return path == "torch"


def _refusal(tensors: tuple[torch.Tensor, ...]) -> str:
    """Why the kernels cannot take these tensors; empty if they can."""
    if triton is None:
        return "Triton is not installed"
    kernel: Any = _add
    if not tensors[0].is_cuda and isinstance(kernel, triton.runtime.JITFunction):
        return f"the tensors are on {tensors[0].device}, the kernel needs CUDA (or TRITON_INTERPRET=1)"
    if any(not tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors):
        return "a tensor is not in NHWC memory (torch.channels_last)"
    return ""


if triton is not None:

    @triton.jit
    def _add(x_ptr, b_ptr, r_ptr, y_ptr, n_elements, n_channels, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
        """BLOCK elements in memory order; the channel is the fastest index."""
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        is_inside = at < n_elements
        total = tl.load(x_ptr + at, mask=is_inside, other=0.0).to(tl.float32)
        total += tl.load(r_ptr + at, mask=is_inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            total += tl.load(b_ptr + at % n_channels, mask=is_inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=is_inside)

    @triton.jit
    def _concat(
        a_ptr,
        b_ptr,
        c_ptr,
        y_ptr,
        n_rows,
        n_a,
        n_b,
        HAS_ADDED: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK_CHANNELS: tl.constexpr,
    ):
        """ROWS pixels, all channels."""
        rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        channels = tl.arange(0, BLOCK_CHANNELS)
        is_row = (rows < n_rows)[:, None]
        is_a = is_row & (channels < n_a)[None, :]
        is_b = is_row & (channels >= n_a)[None, :] & (channels < n_a + n_b)[None, :]
        values = tl.load(a_ptr + rows[:, None] * n_a + channels[None, :], mask=is_a, other=0.0).to(tl.float32)
        b_at = rows[:, None] * n_b + (channels - n_a)[None, :]
        values += tl.load(b_ptr + b_at, mask=is_b, other=0.0).to(tl.float32)
        if HAS_ADDED:
            values += tl.load(c_ptr + b_at, mask=is_b, other=0.0).to(tl.float32)
        y_at = rows[:, None] * (n_a + n_b) + channels[None, :]
        tl.store(y_ptr + y_at, values.to(y_ptr.dtype.element_ty), mask=is_a | is_b)
