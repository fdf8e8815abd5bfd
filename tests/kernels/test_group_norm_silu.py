"""The fused GroupNorm + SiLU against fp64, under Triton's interpreter on a CPU (``TRITON_INTERPRET`` is set in conftest)."""

from __future__ import annotations

import pytest
import torch

from kernels import group_norm_silu as module
from kernels.group_norm_silu import chosen_path, group_norm_silu, group_norm_silu_reference

SHAPES = {
    "friendly": ((2, 64, 8, 8), 32),
    "groups of 10, as SDXL's first level": ((1, 320, 8, 9), 32),
    "a channel tile and a row tile cut short": ((2, 100, 9, 13), 2),
    "odd everything": ((3, 30, 5, 7), 3),
    "one pixel": ((2, 8, 1, 1), 2),
}
# bf16 keeps 8 bits: rounding the result alone is 2^-9 relative at most, and the interpreter truncates (2^-8 = 4e-3). fp16 has
# 11 bits: 2^-11 = 5e-4. fp32: statistics of up to 1e3 elements in fp32, 6e-8 a rounding, times the mean of 30 in x - mean.
LIMITS = {torch.bfloat16: 6e-3, torch.float16: 7e-4, torch.float32: 1e-5}


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def make(shape: tuple[int, ...], mean: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = (torch.randn(shape, generator=generator) + mean).to(dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(shape[1], generator=generator).to(dtype)
    bias = torch.randn(shape[1], generator=generator).to(dtype)
    return x, weight, bias


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("mean", [0.0, 3.0, 30.0])
@pytest.mark.parametrize("name", list(SHAPES))
def test_the_kernel_agrees_with_fp64(name: str, mean: float, dtype: torch.dtype) -> None:
    shape, groups = SHAPES[name]
    x, weight, bias = make(shape, mean, dtype)
    exact = group_norm_silu_reference(x.double(), groups, weight.double(), bias.double())
    y = group_norm_silu(x, groups, weight, bias, path="triton")
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y, exact) <= LIMITS[dtype]


def test_many_slices_are_combined_like_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = make((1, 16, 24, 24), 30.0, torch.float32)
    results = []
    for wanted in (1, 10_000):
        monkeypatch.setattr(module, "PROGRAMS_WANTED", wanted)
        results.append(group_norm_silu(x, 4, weight, bias, path="triton"))
    exact = group_norm_silu_reference(x.double(), 4, weight.double(), bias.double())
    assert all(relative_error(y, exact) <= LIMITS[torch.float32] for y in results)


def test_without_affine_weights_and_without_the_activation() -> None:
    x, _, _ = make((2, 12, 6, 6), 3.0, torch.float32)
    exact = group_norm_silu_reference(x.double(), 3, None, None, 1e-6, silu=False)
    y = group_norm_silu(x, 3, None, None, 1e-6, silu=False, path="triton")
    assert relative_error(y, exact) <= LIMITS[torch.float32]


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(*args: object, **options: object) -> torch.Tensor:
        return torch.full(*args, fill_value=float("nan"), **options)  # type: ignore[call-overload]

    x, weight, bias = make((2, 100, 9, 13), 3.0, torch.float32)
    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda like: torch.full_like(like, float("nan")))
    y = group_norm_silu(x, 2, weight, bias, path="triton")
    assert bool(torch.isfinite(y).all())


def test_a_constant_input_gives_the_bias() -> None:
    x = torch.full((1, 8, 4, 4), 5.0).to(memory_format=torch.channels_last)
    bias = torch.arange(8.0)
    y = group_norm_silu(x, 2, torch.ones(8), bias, path="triton", silu=False)
    assert torch.equal(y, bias.view(1, 8, 1, 1).expand_as(y))


def test_the_reference_is_chosen_on_a_cpu() -> None:
    x, weight, bias = make((1, 8, 4, 4), 0.0, torch.float32)
    assert chosen_path(x) == "torch"
    assert torch.equal(group_norm_silu(x, 2, weight, bias), group_norm_silu_reference(x, 2, weight, bias))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 8, 4), 2, None, None), "needs \\[N, C, H, W\\]"),
        ((torch.zeros(0, 8, 4, 4), 2, None, None), "no side 0"),
        ((torch.zeros(1, 8, 4, 4, dtype=torch.int32), 2, None, None), "needs float32"),
        ((torch.zeros(1, 8, 4, 4), 3, None, None), "divisor of the 8 channels"),
        ((torch.zeros(1, 8, 4, 4), 2, torch.ones(7), None), "weight has shape \\(7,\\)"),
        ((torch.zeros(1, 8, 4, 4), 2, None, torch.ones(8, dtype=torch.int64)), "bias is torch.int64"),
        ((torch.zeros(1, 8, 4, 4), 2, None, None, -1.0), "eps is -1.0"),
    ],
)
def test_a_wrong_input_is_named(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_norm_silu(*arguments)  # type: ignore[arg-type]


def test_the_kernel_refuses_memory_that_is_not_nhwc() -> None:
    with pytest.raises(ValueError, match="NHWC"):
        group_norm_silu(torch.zeros(1, 8, 4, 4), 2, None, None, path="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("mean", [0.0, 3.0, 30.0])
@pytest.mark.parametrize("shape", [(2, 320, 128, 128), (2, 2560, 32, 32), (1, 960, 33, 47), (3, 30, 5, 7)], ids=str)
def test_on_a_gpu_the_kernel_is_as_exact_as_torch(shape: tuple[int, ...], mean: float) -> None:
    groups = 32 if shape[1] % 32 == 0 else 3
    x, weight, bias = (tensor.cuda() for tensor in make(shape, mean, torch.bfloat16))
    assert chosen_path(x) == "triton"
    exact = group_norm_silu_reference(x.double(), groups, weight.double(), bias.double())
    assert relative_error(group_norm_silu(x, groups, weight, bias), exact) <= 1e-2
