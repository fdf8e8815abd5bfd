"""GroupNorm followed by SiLU in NHWC memory: three short passes over the data in place of torch's layout changes.

1. ``_partial_moments``: each program reduces one slice of pixels for one tile of channels to a mean and a sum of squared
   deviations per channel, tile by tile (two-pass inside a tile, Chan's formula between tiles), into a workspace. Slices
   fill the GPU where ``batch × groups`` programs alone would not. No atomics: the same input gives the same bits.
2. ``_fold``: per image and group, combines the slices and folds statistics and affine weights to one scale and shift a channel.
3. ``_apply``: ``y = silu(x · scale + shift)``.

Channels are tiled without regard to groups, so that group widths such as 10 or 20 waste no lanes.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Final, Literal

import torch
from torch.nn import functional

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the reference serves
    triton = None

DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
# 64 rows × 64 channels of bf16 is 8 KiB a program with whole 128-byte lines; chosen by reasoning, to be confirmed or
# replaced with `python -m kernels.bench`.
BLOCK_ROWS: Final = 64
BLOCK_CHANNELS: Final = 64
PROGRAMS_WANTED: Final = 1056
"""Eight waves' worth of programs on the 132 multiprocessors of an H200."""
FOLD_ROWS: Final = 16

Path = Literal["auto", "triton", "torch"]


def group_norm_silu(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    channel_add: torch.Tensor | None = None,
    path: Path = "auto",
) -> torch.Tensor:
    """Group normalisation with affine weights, then SiLU.

    Args:
        x: ``[N, C, H, W]`` in float32, float16 or bfloat16. The kernel needs NHWC memory (``torch.channels_last``).
        num_groups: divides C.
        weight: ``[C]`` or None for ones.
        bias: ``[C]`` or None for zeros.
        eps: added to the variance.
        silu: False leaves the activation out.
        channel_add: ``[N, C]`` or ``[1, C]``, added to every pixel of ``x`` before the norm: a convolution's bias, a time
            embedding. It costs no pass over the data: it moves the channels' means, not their spreads.
        path: ``auto`` takes the kernel where :func:`chosen_path` allows it; ``triton`` insists on it; ``torch`` is the reference.

    Returns:
        A tensor with the shape, type and memory order of ``x``; statistics are computed in fp32.

    Raises:
        ValueError: a shape or type does not fit, or ``path="triton"`` is impossible here; says which and what is allowed.
    """
    _check(x, num_groups, weight, bias, eps, channel_add)
    if path == "auto":
        path = chosen_path(x)
    if path == "torch":
        return group_norm_silu_reference(x, num_groups, weight, bias, eps, silu=silu, channel_add=channel_add)
    refusal = _refusal(x)
    if refusal:
        raise ValueError(f"group_norm_silu: {refusal}. Use path='auto'.")
    # Triton launches on the current device, which need not be the one of x.
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        return _launch(x, num_groups, weight, bias, eps, silu, channel_add)


def group_norm_silu_reference(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    channel_add: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain torch."""
    if channel_add is not None:
        x = x + channel_add.to(x.dtype)[:, :, None, None]
    y = functional.group_norm(x, num_groups, weight, bias, eps)
    return functional.silu(y) if silu else y


def chosen_path(x: torch.Tensor) -> Literal["triton", "torch"]:
    """Which implementation ``path="auto"`` takes for this input: the kernel on CUDA in NHWC memory, outside torch.compile."""
    if not x.is_cuda or torch.compiler.is_compiling():
        return "torch"
    return "torch" if _refusal(x) else "triton"


def _check(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    channel_add: torch.Tensor | None,
) -> None:
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"group_norm_silu: x has shape {tuple(x.shape)}, needs [N, C, H, W] with no side 0.")
    if x.dtype not in DTYPES:
        raise ValueError(f"group_norm_silu: x is {x.dtype}, needs float32, float16 or bfloat16.")
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"group_norm_silu: num_groups is {num_groups}, needs a divisor of the {channels} channels.")
    for name, values in (("weight", weight), ("bias", bias)):
        if values is None:
            continue
        if tuple(values.shape) != (channels,):
            raise ValueError(f"group_norm_silu: {name} has shape {tuple(values.shape)}, needs ({channels},).")
        if values.device != x.device or values.dtype not in DTYPES:
            raise ValueError(
                f"group_norm_silu: {name} is {values.dtype} on {values.device}, needs a float type on {x.device}."
            )
    if channel_add is not None:
        if channel_add.ndim != 2 or channel_add.shape[0] not in (1, x.shape[0]) or channel_add.shape[1] != channels:
            raise ValueError(
                f"group_norm_silu: channel_add has shape {tuple(channel_add.shape)}, needs ({x.shape[0]} or 1, {channels})."
            )
        if channel_add.device != x.device or channel_add.dtype not in DTYPES:
            raise ValueError(
                f"group_norm_silu: channel_add is {channel_add.dtype} on {channel_add.device}, needs a float type on {x.device}."
            )
    if not eps >= 0.0:
        raise ValueError(f"group_norm_silu: eps is {eps}, needs 0 or more.")


def _refusal(x: torch.Tensor) -> str:
    """Why the kernel cannot take this input; empty if it can."""
    if triton is None:
        return "Triton is not installed"
    if not x.is_cuda and not _is_interpreted():
        return f"x is on {x.device}, the kernel needs CUDA (or TRITON_INTERPRET=1)"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "x is not in NHWC memory (torch.channels_last)"
    if x.shape[1] * x.shape[2] * x.shape[3] >= 2**31:
        return "one image has 2**31 elements or more"
    return ""


def _is_interpreted() -> bool:
    return not isinstance(_apply, triton.runtime.JITFunction)


def _launch(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    silu: bool,
    channel_add: torch.Tensor | None,
) -> torch.Tensor:
    if channel_add is not None and channel_add.stride(1) != 1:
        channel_add = channel_add.contiguous()
    n, channels, height, width = x.shape
    n_rows = height * width
    n_tiles = triton.cdiv(channels, BLOCK_CHANNELS)
    # Slices are whole blocks of rows, and as many as give the GPU enough programs.
    n_blocks = triton.cdiv(n_rows, BLOCK_ROWS)
    blocks_per_slice = triton.cdiv(n_blocks, max(1, min(n_blocks, PROGRAMS_WANTED // (n * n_tiles))))
    rows_per_slice = blocks_per_slice * BLOCK_ROWS
    n_slices = triton.cdiv(n_rows, rows_per_slice)
    moments = torch.empty((2, n, n_slices, channels), dtype=torch.float32, device=x.device)
    folded = torch.empty((2, n, channels), dtype=torch.float32, device=x.device)
    y = torch.empty_like(x)  # keeps the NHWC memory of x
    group_width = channels // num_groups
    _partial_moments[(n_slices, n_tiles, n)](
        x, moments[0], moments[1], n_rows, channels, rows_per_slice, BLOCK_ROWS, BLOCK_CHANNELS, num_warps=4
    )
    _fold[(num_groups, n)](
        moments[0],
        moments[1],
        folded[0],
        folded[1],
        weight if weight is not None else x,
        bias if bias is not None else x,
        channel_add if channel_add is not None else x,
        n_rows,
        channels,
        n_slices,
        rows_per_slice,
        group_width,
        eps,
        weight is not None,
        bias is not None,
        0 if channel_add is None else channel_add.shape[0],
        0 if channel_add is None else channel_add.stride(0),
        FOLD_ROWS,
        triton.next_power_of_2(group_width),
        num_warps=1 if group_width <= 32 else 4,
    )
    _apply[(n_blocks, n_tiles, n)](
        x, y, folded[0], folded[1], n_rows, channels, silu, BLOCK_ROWS, BLOCK_CHANNELS, num_warps=4
    )
    return y


if triton is not None:

    @triton.jit
    def _partial_moments(
        x_ptr,
        mean_ptr,
        m2_ptr,
        n_rows,
        n_channels,
        rows_per_slice,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_CHANNELS: tl.constexpr,
    ):
        """Mean and sum of squared deviations of each channel over one slice of pixels."""
        i_slice = tl.program_id(0)
        image = tl.program_id(2)
        channels = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
        is_channel = channels < n_channels
        x_ptr += image.to(tl.int64) * n_rows * n_channels  # several images may exceed 2**31 elements, one may not
        first = i_slice * rows_per_slice
        last = tl.minimum(first + rows_per_slice, n_rows)
        mean = tl.zeros([BLOCK_CHANNELS], dtype=tl.float32)
        m2 = tl.zeros([BLOCK_CHANNELS], dtype=tl.float32)
        for start in range(first, last, BLOCK_ROWS):
            rows = start + tl.arange(0, BLOCK_ROWS)
            is_inside = (rows < last)[:, None] & is_channel[None, :]
            tile = tl.load(x_ptr + rows[:, None] * n_channels + channels[None, :], mask=is_inside, other=0.0)
            tile = tile.to(tl.float32)
            n_new = tl.minimum(last - start, BLOCK_ROWS).to(tl.float32)
            n_old = (start - first).to(tl.float32)
            mean_new = tl.sum(tile, axis=0) / n_new
            deviation = tl.where(is_inside, tile - mean_new[None, :], 0.0)
            m2_new = tl.sum(deviation * deviation, axis=0)
            delta = mean_new - mean
            n_both = n_old + n_new
            mean += delta * (n_new / n_both)
            m2 += m2_new + delta * delta * (n_old * n_new / n_both)
        place = (image * tl.num_programs(0) + i_slice) * n_channels + channels
        tl.store(mean_ptr + place, mean, mask=is_channel)
        tl.store(m2_ptr + place, m2, mask=is_channel)

    @triton.jit
    def _fold(
        mean_ptr,
        m2_ptr,
        scale_ptr,
        shift_ptr,
        weight_ptr,
        bias_ptr,
        add_ptr,
        n_rows,
        n_channels,
        n_slices,
        rows_per_slice,
        group_width,
        eps,
        HAS_WEIGHT: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        N_ADD_ROWS: tl.constexpr,
        add_stride,
        BLOCK_SLICES: tl.constexpr,
        BLOCK_WIDTH: tl.constexpr,
    ):
        """Statistics of one group of one image from all its slices, folded with the affine weights."""
        group = tl.program_id(0)
        image = tl.program_id(1)
        lanes = tl.arange(0, BLOCK_WIDTH)
        is_lane = lanes < group_width
        channels = group * group_width + lanes
        base = image * n_slices * n_channels
        n_elements = n_rows * group_width * 1.0  # not .to(): Triton makes an argument that equals 1 a plain constant
        added = tl.zeros([BLOCK_WIDTH], dtype=tl.float32)
        if N_ADD_ROWS > 0:
            row = image % N_ADD_ROWS
            added = tl.load(add_ptr + row * add_stride + channels, mask=is_lane, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK_SLICES, BLOCK_WIDTH], dtype=tl.float32)
        for start in range(0, n_slices, BLOCK_SLICES):
            slices = start + tl.arange(0, BLOCK_SLICES)
            is_inside = (slices < n_slices)[:, None] & is_lane[None, :]
            counts = tl.minimum(n_rows - slices * rows_per_slice, rows_per_slice).to(tl.float32)
            means = tl.load(
                mean_ptr + base + slices[:, None] * n_channels + channels[None, :], mask=is_inside, other=0.0
            )
            total += tl.where(is_inside, (means + added[None, :]) * counts[:, None], 0.0)
        mean = tl.sum(tl.sum(total, axis=1), axis=0) / n_elements
        spread = tl.zeros([BLOCK_SLICES, BLOCK_WIDTH], dtype=tl.float32)
        for start in range(0, n_slices, BLOCK_SLICES):
            slices = start + tl.arange(0, BLOCK_SLICES)
            is_inside = (slices < n_slices)[:, None] & is_lane[None, :]
            counts = tl.minimum(n_rows - slices * rows_per_slice, rows_per_slice).to(tl.float32)
            place = base + slices[:, None] * n_channels + channels[None, :]
            means = tl.load(mean_ptr + place, mask=is_inside, other=0.0)
            m2 = tl.load(m2_ptr + place, mask=is_inside, other=0.0)
            delta = means + added[None, :] - mean
            spread += tl.where(is_inside, m2 + delta * delta * counts[:, None], 0.0)
        variance = tl.sum(tl.sum(spread, axis=1), axis=0) / n_elements
        scale = tl.zeros([BLOCK_WIDTH], dtype=tl.float32) + 1.0 / tl.sqrt(variance + eps)
        if HAS_WEIGHT:
            scale *= tl.load(weight_ptr + channels, mask=is_lane, other=0.0).to(tl.float32)
        shift = (added - mean) * scale
        if HAS_BIAS:
            shift += tl.load(bias_ptr + channels, mask=is_lane, other=0.0).to(tl.float32)
        tl.store(scale_ptr + image * n_channels + channels, scale, mask=is_lane)
        tl.store(shift_ptr + image * n_channels + channels, shift, mask=is_lane)

    @triton.jit
    def _apply(
        x_ptr,
        y_ptr,
        scale_ptr,
        shift_ptr,
        n_rows,
        n_channels,
        SILU: tl.constexpr,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_CHANNELS: tl.constexpr,
    ):
        """Scale, shift, activation."""
        image = tl.program_id(2)
        rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        channels = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
        is_channel = channels < n_channels
        is_inside = (rows < n_rows)[:, None] & is_channel[None, :]
        scale = tl.load(scale_ptr + image * n_channels + channels, mask=is_channel, other=0.0)
        shift = tl.load(shift_ptr + image * n_channels + channels, mask=is_channel, other=0.0)
        offset = image.to(tl.int64) * n_rows * n_channels
        place = rows[:, None] * n_channels + channels[None, :]
        x = tl.load(x_ptr + offset + place, mask=is_inside, other=0.0).to(tl.float32)
        y = x * scale[None, :] + shift[None, :]
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        tl.store(y_ptr + offset + place, y.to(y_ptr.dtype.element_ty), mask=is_inside)
