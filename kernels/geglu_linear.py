"""The first half of a transformer's feed-forward in one kernel: both projections of GEGLU and their product.

Diffusers computes ``h, g = (x @ W.T + b).chunk(2, -1); h * gelu(g)``: a GEMM that writes twice as much as anybody needs, and a
pass that reads it again. Here a program holds the tile of ``h`` and the tile of ``g`` beside each other in registers and
writes their product only. Exact (erf) GELU in fp32 on the unrounded sums.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Final, Literal

import torch
from torch.nn import functional

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton on this platform: the reference serves
    triton = None

DTYPES: Final = (torch.float16, torch.bfloat16)
# H200, 2048 × 1280 → 5120 in bf16: 91 µs with two persistent programs a multiprocessor of this tile; 94 with one of 128 × 128 × 64;
# 101 without persistence; 112 with plain loads in place of the tensor copy engine. The linear alone takes cuBLAS 86, and
# Inductor's GEGLU after it 17 more.
BLOCK_M: Final = 128
BLOCK_N: Final = 64
BLOCK_K: Final = 64
GROUP_M: Final = 4
Path = Literal["auto", "triton", "torch"]


def geglu_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, path: Path = "auto") -> torch.Tensor:
    """``h * gelu(g)`` with ``h, g = linear(x, weight, bias).chunk(2, -1)``.

    Args:
        x: ``[..., K]``, contiguous; the kernel takes float16 and bfloat16.
        weight: ``[2 N, K]``, contiguous: the rows of ``h``, then those of ``g``.
        bias: ``[2 N]``.
        path: ``auto`` takes the kernel where :func:`chosen_path` allows it; ``triton`` insists on it; ``torch`` is the reference.

    Returns:
        ``[..., N]`` in the type of ``x``. The kernel rounds once, at the end; the reference rounds ``h`` and ``g`` as well.

    Raises:
        ValueError: a shape or type does not fit, or ``path="triton"`` is impossible here.
    """
    if x.ndim < 2 or weight.ndim != 2 or weight.shape[0] % 2 or x.shape[-1] != weight.shape[1] or x.numel() == 0:
        raise ValueError(
            f"geglu_linear: x is {tuple(x.shape)}, weight {tuple(weight.shape)}, needs [..., K] and [2 N, K] with no side 0."
        )
    if tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"geglu_linear: bias has shape {tuple(bias.shape)}, needs ({weight.shape[0]},).")
    if path == "auto":
        path = chosen_path(x, weight)
    if path == "torch":
        return geglu_linear_reference(x, weight, bias)
    refusal = _refusal(x, weight)
    if refusal:
        raise ValueError(f"geglu_linear: {refusal}. Use path='auto'.")
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        return _launch(x, weight, bias)


def geglu_linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The same in plain torch, as diffusers computes it."""
    hidden, gate = functional.linear(x, weight, bias).chunk(2, dim=-1)
    return hidden * functional.gelu(gate)


def chosen_path(x: torch.Tensor, weight: torch.Tensor) -> Literal["triton", "torch"]:
    """Which implementation ``path="auto"`` takes: the kernel on CUDA, outside torch.compile, for shapes it takes."""
    if not x.is_cuda or torch.compiler.is_compiling():
        return "torch"
    return "torch" if _refusal(x, weight) else "triton"


def _refusal(x: torch.Tensor, weight: torch.Tensor) -> str:
    """Why the kernel cannot take this input; empty if it can."""
    if triton is None:
        return "Triton is not installed"
    if not x.is_cuda and isinstance(_geglu, triton.runtime.JITFunction):
        return f"x is on {x.device}, the kernel needs CUDA (or TRITON_INTERPRET=1)"
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        return f"x is {x.dtype} and weight {weight.dtype}, the kernel needs both float16 or both bfloat16"
    if not (x.is_contiguous() and weight.is_contiguous()):
        return "x or weight is not contiguous"
    n_out = weight.shape[0] // 2
    if x.shape[-1] % 64 or n_out % 64:
        return f"K is {x.shape[-1]} and N {n_out}, the kernel needs multiples of 64"
    return ""


def _launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    n_out, n_in = weight.shape[0] // 2, weight.shape[1]
    flat = x.view(-1, n_in)
    rows = flat.shape[0]
    y = torch.empty((rows, n_out), dtype=x.dtype, device=x.device)
    n_tiles = triton.cdiv(rows, BLOCK_M) * triton.cdiv(n_out, BLOCK_N)
    if _has_tensor_copies(x):
        n_programs = min(n_tiles, 2 * torch.cuda.get_device_properties(x.device).multi_processor_count)
        _geglu_tma[(n_programs,)](
            TensorDescriptor.from_tensor(flat, [BLOCK_M, BLOCK_K]),
            TensorDescriptor.from_tensor(weight, [BLOCK_N, BLOCK_K]),
            bias,
            TensorDescriptor.from_tensor(y, [BLOCK_M, BLOCK_N]),
            rows, n_out, n_in, n_programs, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, num_warps=4, num_stages=3,
        )  # fmt: skip
    else:
        _geglu[(n_tiles,)](
            flat, weight, bias, y, rows, n_out, n_in, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, num_warps=4, num_stages=3
        )
    return y.view(*x.shape[:-1], n_out)


def _has_tensor_copies(x: torch.Tensor) -> bool:
    """Whether the GPU has Hopper's tensor copy engine (TMA)."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9


if triton is not None:

    @triton.jit
    def _geglu(
        x_ptr,
        w_ptr,
        b_ptr,
        y_ptr,
        n_rows,
        n_out,
        n_in,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        GROUP_M: tl.constexpr,
    ):
        """One tile of the product; tiles of GROUP_M row blocks follow one another so that weights stay in the L2 cache."""
        pid = tl.program_id(0)
        n_m = tl.cdiv(n_rows, BLOCK_M)
        n_n = tl.cdiv(n_out, BLOCK_N)
        per_group = GROUP_M * n_n
        first_m = (pid // per_group) * GROUP_M
        group_m = tl.minimum(n_m - first_m, GROUP_M)
        i_m = first_m + (pid % per_group) % group_m
        i_n = (pid % per_group) // group_m
        rows = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        inner = tl.arange(0, BLOCK_K)
        x_at = x_ptr + (rows % n_rows)[:, None].to(tl.int64) * n_in + inner[None, :]
        h_at = w_ptr + (cols % n_out)[None, :].to(tl.int64) * n_in + inner[:, None]
        g_at = h_at + n_out.to(tl.int64) * n_in
        hidden = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for _ in range(0, n_in, BLOCK_K):
            x = tl.load(x_at)
            hidden = tl.dot(x, tl.load(h_at), hidden)
            gate = tl.dot(x, tl.load(g_at), gate)
            x_at += BLOCK_K
            h_at += BLOCK_K
            g_at += BLOCK_K
        is_col = cols < n_out
        hidden += tl.load(b_ptr + cols, mask=is_col, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(b_ptr + n_out + cols, mask=is_col, other=0.0).to(tl.float32)[None, :]
        product = hidden * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
        at = y_ptr + rows[:, None].to(tl.int64) * n_out + cols[None, :]
        tl.store(at, product.to(y_ptr.dtype.element_ty), mask=(rows < n_rows)[:, None] & is_col[None, :])

    @triton.jit
    def _geglu_tma(
        x_tiles,
        w_tiles,
        b_ptr,
        y_tiles,
        n_rows,
        n_out,
        n_in,
        n_programs,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        GROUP_M: tl.constexpr,
    ):
        """The same over the tensor copy engine, several tiles a program. What lies outside reads as 0 and is not written."""
        n_m = tl.cdiv(n_rows, BLOCK_M)
        n_n = n_out // BLOCK_N
        per_group = GROUP_M * n_n
        for tile in tl.range(tl.program_id(0), n_m * n_n, n_programs):
            first_m = (tile // per_group) * GROUP_M
            group_m = tl.minimum(n_m - first_m, GROUP_M)
            row = (first_m + (tile % per_group) % group_m) * BLOCK_M
            col = ((tile % per_group) // group_m) * BLOCK_N
            hidden = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for k in range(0, n_in, BLOCK_K):
                x = x_tiles.load([row, k])
                hidden = tl.dot(x, w_tiles.load([col, k]).T, hidden)
                gate = tl.dot(x, w_tiles.load([n_out + col, k]).T, gate)
            cols = col + tl.arange(0, BLOCK_N)
            hidden += tl.load(b_ptr + cols).to(tl.float32)[None, :]
            gate += tl.load(b_ptr + n_out + cols).to(tl.float32)[None, :]
            product = hidden * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
            y_tiles.store([row, col], product.to(b_ptr.dtype.element_ty))
