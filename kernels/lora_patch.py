"""Writes ``pristine + Σ scale · up @ down`` into all layers of a network with one launch.

A layer's own matrix product is short (rank 16..128), so 560 launches cost more than the arithmetic: together they read the
pristine weights and write the patched ones once, which is all that must move. Layers are found through tables of addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Final, Literal

import numpy as np
import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the reference serves
    triton = None

DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_OUT: Final = 128
BLOCK_IN: Final = 128
BLOCK_RANK: Final = 32
LAYER_COLUMNS: Final = 6
"""Address of weight, of pristine weight, rows, columns, first term, number of terms."""
TERM_COLUMNS: Final = 4
"""Address of up, of down, rank, scale (the bits of a float64)."""

Term = tuple[torch.Tensor, torch.Tensor, float]
Path = Literal["auto", "triton", "torch"]


def lora_patch(
    weights: Sequence[torch.Tensor],
    pristine: Sequence[torch.Tensor],
    terms: Sequence[Sequence[Term]],
    *,
    path: Path = "auto",
) -> None:
    """Patches layers in place.

    Args:
        weights: what is written, ``[out, in]`` each, contiguous, all of one type and device.
        pristine: like ``weights``; never written.
        terms: for every layer its ``(down [rank, in], up [out, rank], scale)``, contiguous, in the weights' type.
        path: ``auto`` takes the kernel on CUDA; ``triton`` insists on it; ``torch`` is the reference.

    The products and their sum are fp32 and rounded once. Kernels and reference order the sum differently, so they agree to
    fp32 rounding before that.

    Raises:
        ValueError: a shape, type or place does not fit, or ``path="triton"`` is impossible here.
    """
    _check(weights, pristine, terms)
    if not weights:
        return
    refusal = _refusal(weights[0])
    if path == "triton" and refusal:
        raise ValueError(f"lora_patch: {refusal}. Use path='auto'.")
    if path == "torch" or (path == "auto" and not takes_kernel(weights[0])):
        lora_patch_reference(weights, pristine, terms)
        return
    with torch.cuda.device(weights[0].device) if weights[0].is_cuda else nullcontext():
        _launch(weights, pristine, terms)


def lora_patch_reference(
    weights: Sequence[torch.Tensor], pristine: Sequence[torch.Tensor], terms: Sequence[Sequence[Term]]
) -> None:
    """The same, layer by layer in plain torch."""
    for weight, before, uses in zip(weights, pristine, terms, strict=True):
        if len(uses) == 1:
            down, up, scale = uses[0]
            # one GEMM whose fp32 accumulator takes the pristine weight in and is rounded once
            torch.addmm(before, up, down, alpha=scale, out=weight)
            continue
        total = before.to(torch.float32, copy=True)
        for down, up, scale in uses:
            total.addmm_(up.to(torch.float32), down.to(torch.float32), alpha=scale)
        weight.copy_(total)


def _check(weights: Sequence[torch.Tensor], pristine: Sequence[torch.Tensor], terms: Sequence[Sequence[Term]]) -> None:
    if not len(weights) == len(pristine) == len(terms):
        raise ValueError(
            f"lora_patch: got {len(weights)} weights, {len(pristine)} pristine, {len(terms)} terms, needs as many of each."
        )
    for place, (weight, before, uses) in enumerate(zip(weights, pristine, terms, strict=True)):
        for other, shape in ((before, weight.shape), *((t, None) for down, up, _ in uses for t in (down, up))):
            if other.dtype != weights[0].dtype or other.device != weights[0].device or not other.is_contiguous():
                raise ValueError(
                    f"lora_patch: layer {place} has a tensor of {other.dtype} on {other.device}, needs contiguous ones of"
                    f" {weights[0].dtype} on {weights[0].device}."
                )
            if shape is not None and other.shape != shape:
                raise ValueError(f"lora_patch: layer {place}: pristine {tuple(other.shape)}, weight {tuple(shape)}.")
        if weight.ndim != 2 or not weight.is_contiguous() or weight.dtype not in DTYPES:
            raise ValueError(
                f"lora_patch: layer {place} is {weight.dtype} {tuple(weight.shape)}, needs contiguous [out, in]."
            )
        for down, up, _ in uses:
            if (up.shape[0], down.shape[1]) != tuple(weight.shape) or up.shape[1] != down.shape[0]:
                raise ValueError(
                    f"lora_patch: layer {place} is {tuple(weight.shape)}, got up {tuple(up.shape)} and down {tuple(down.shape)}."
                )


def takes_kernel(weight: torch.Tensor) -> bool:
    """Whether ``path="auto"`` takes the kernel for layers like this one."""
    return weight.is_cuda and not _refusal(weight)


def _refusal(weight: torch.Tensor) -> str:
    """Why the kernel cannot take these layers; empty if it can."""
    if triton is None:
        return "Triton is not installed"
    if not weight.is_cuda and isinstance(_patch, triton.runtime.JITFunction):
        return f"the layers are on {weight.device}, the kernel needs CUDA (or TRITON_INTERPRET=1)"
    return ""


def _launch(weights: Sequence[torch.Tensor], pristine: Sequence[torch.Tensor], terms: Sequence[Sequence[Term]]) -> None:
    n_terms = np.array([len(uses) for uses in terms], dtype=np.int64)
    flat = [use for uses in terms for use in uses]
    table = np.empty((len(flat), TERM_COLUMNS), dtype=np.int64)
    table[:, 0] = [up.data_ptr() for _, up, _ in flat]
    table[:, 1] = [down.data_ptr() for down, _, _ in flat]
    table[:, 2] = [down.shape[0] for down, _, _ in flat]
    table[:, 3] = np.array([scale for _, _, scale in flat], dtype=np.float64).view(np.int64)
    LayerTables(weights, pristine).patch(table, n_terms)


class LayerTables:
    """Where some layers lie: for callers that patch the same layers again and again, by addresses instead of tensors."""

    def __init__(self, weights: Sequence[torch.Tensor], pristine: Sequence[torch.Tensor]) -> None:
        """Layers as :func:`lora_patch` takes them; the tensors stay where they are for as long as this is used."""
        self.device, self.dtype = weights[0].device, weights[0].dtype
        self._tiles = _tiles(tuple(tuple(weight.shape) for weight in weights), str(self.device))
        self._layers = np.zeros((len(weights), LAYER_COLUMNS), dtype=np.int64)
        self._layers[:, 0] = [weight.data_ptr() for weight in weights]
        self._layers[:, 1] = [before.data_ptr() for before in pristine]
        self._layers[:, 2] = [weight.shape[0] for weight in weights]
        self._layers[:, 3] = [weight.shape[1] for weight in weights]

    def patch(self, terms: np.ndarray, n_terms: np.ndarray) -> None:
        """Patches all layers.

        Args:
            terms: int64 ``[n, 4]``, those of the first layer first: address of up, address of down, rank, bits of the float64
                scale. The tensors are contiguous, of the layers' type, on their device. Nothing checks that.
            n_terms: int64, how many terms each layer has.
        """
        layers = self._layers
        layers[:, 4] = np.cumsum(n_terms) - n_terms
        layers[:, 5] = n_terms
        both = torch.from_numpy(np.concatenate([layers.ravel(), terms.ravel()])).to(self.device)
        rank_max = int(terms[:, 2].max()) if len(terms) else 1
        block_rank = max(16, min(BLOCK_RANK, triton.next_power_of_2(rank_max)))
        _patch[(len(self._tiles),)](
            self._tiles, both, both[layers.size :], _type_of(self.dtype), LAYER_COLUMNS, TERM_COLUMNS,
            BLOCK_OUT, BLOCK_IN, block_rank, self.dtype == torch.float32, num_warps=8,
        )  # fmt: skip


@lru_cache(maxsize=16)
def _tiles(shapes: tuple[tuple[int, int], ...], device: str) -> torch.Tensor:
    """Every tile's layer, first row and first column, int32 ``[n_tiles, 3]``."""
    rows = []
    for layer, (n_out, n_in) in enumerate(shapes):
        first_out, first_in = np.meshgrid(np.arange(0, n_out, BLOCK_OUT), np.arange(0, n_in, BLOCK_IN), indexing="ij")
        rows.append(np.stack([np.full(first_out.size, layer), first_out.ravel(), first_in.ravel()], axis=1))
    return torch.from_numpy(np.concatenate(rows).astype(np.int32)).to(device)


if triton is not None:

    def _type_of(dtype: torch.dtype) -> tl.dtype:
        return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]

    @triton.jit
    def _patch(
        tiles_ptr,
        layers_ptr,
        terms_ptr,
        TYPE: tl.constexpr,
        LAYER_COLUMNS: tl.constexpr,
        TERM_COLUMNS: tl.constexpr,
        BLOCK_OUT: tl.constexpr,
        BLOCK_IN: tl.constexpr,
        BLOCK_RANK: tl.constexpr,
        IS_FP32: tl.constexpr,
    ):
        """One tile of one layer."""
        tile = tiles_ptr + tl.program_id(0) * 3
        layer = layers_ptr + tl.load(tile).to(tl.int64) * LAYER_COLUMNS
        first_out = tl.load(tile + 1)
        first_in = tl.load(tile + 2)
        weight_ptr = tl.load(layer).to(tl.pointer_type(TYPE))
        pristine_ptr = tl.load(layer + 1).to(tl.pointer_type(TYPE))
        n_out = tl.load(layer + 2)
        n_in = tl.load(layer + 3)
        first_term = tl.load(layer + 4)
        n_terms = tl.load(layer + 5)
        outs = first_out + tl.arange(0, BLOCK_OUT)
        ins = first_in + tl.arange(0, BLOCK_IN)
        is_out = (outs < n_out)[:, None]
        is_in = (ins < n_in)[None, :]
        at = outs[:, None] * n_in + ins[None, :]
        total = tl.load(pristine_ptr + at, mask=is_out & is_in, other=0.0).to(tl.float32)
        for index in range(first_term, first_term + n_terms):
            term = terms_ptr + index * TERM_COLUMNS
            up_ptr = tl.load(term).to(tl.pointer_type(TYPE))
            down_ptr = tl.load(term + 1).to(tl.pointer_type(TYPE))
            rank = tl.load(term + 2)
            scale = tl.load(term + 3).to(tl.float64, bitcast=True).to(tl.float32)
            product = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
            for first in range(0, rank, BLOCK_RANK):
                ranks = first + tl.arange(0, BLOCK_RANK)
                is_rank = ranks < rank
                up = tl.load(up_ptr + outs[:, None] * rank + ranks[None, :], mask=is_out & is_rank[None, :], other=0.0)
                down = tl.load(
                    down_ptr + ranks[:, None] * n_in + ins[None, :], mask=is_rank[:, None] & is_in, other=0.0
                )
                if IS_FP32:  # noqa: SIM108, decided while the kernel compiles
                    product = tl.dot(up, down, product, input_precision="ieee")
                else:
                    product = tl.dot(up, down, product)
            total += scale * product
        tl.store(weight_ptr + at, total.to(TYPE), mask=is_out & is_in)
