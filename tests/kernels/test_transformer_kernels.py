"""The fused kernels of transformers, skips and upsampling against fp64, under Triton's interpreter on a CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from kernels import geglu_linear as geglu_module
from kernels.add_channels import add_channels, concat_channels
from kernels.add_layer_norm import add_layer_norm, add_layer_norm_reference
from kernels.geglu_linear import geglu_linear, geglu_linear_reference
from kernels.group_norm_silu import group_norm_silu, group_norm_silu_reference
from kernels.lora_patch import lora_patch
from kernels.upsample_nearest import upsample_nearest_2x

# One rounding of the result: 2^-9 relative in bf16 (the interpreter truncates: 2^-8 = 4e-3), 2^-11 = 5e-4 in fp16; fp32 as in
# test_group_norm_silu. The norm is taken of the rounded sum, whose own rounding (2^-9 of up to 30) divides by a spread of 1.
LIMITS = {torch.bfloat16: 6e-3, torch.float16: 7e-4, torch.float32: 1e-5}


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def draw(*shape: int, mean: float = 0.0, dtype: torch.dtype = torch.float32, seed: int = 3) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean).to(dtype)


def image(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> torch.Tensor:
    return draw(*shape, dtype=dtype, seed=seed).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("mean", [0.0, 3.0, 30.0])
@pytest.mark.parametrize("shape", [(2, 4, 128), (3, 100), (1, 7, 1), (5, 1280)], ids=str)
def test_sum_and_norm_agree_with_fp64(shape: tuple[int, ...], mean: float, dtype: torch.dtype) -> None:
    x, residual = draw(*shape, mean=mean, dtype=dtype), draw(*shape, dtype=dtype, seed=4)
    weight, bias = draw(shape[-1], dtype=dtype, seed=5), draw(shape[-1], dtype=dtype, seed=6)
    total, normed = add_layer_norm(x, residual, weight, bias, path="triton")
    assert relative_error(total, x.double() + residual.double()) <= LIMITS[dtype]
    # the norm of the sum as it was rounded: what the next layers and the reference see
    _, exact = add_layer_norm_reference(total.double(), None, weight.double(), bias.double())
    # a single column has no spread: the norm is the bias, whatever the rounding
    assert relative_error(normed, exact) <= LIMITS[dtype]


def test_without_a_residual_the_sum_is_the_input_itself() -> None:
    x = draw(4, 40)
    total, normed = add_layer_norm(x, None, torch.ones(40), torch.zeros(40), path="triton")
    assert total is x
    assert relative_error(normed, functional.layer_norm(x.double(), (40,))) <= LIMITS[torch.float32]


@pytest.mark.parametrize("is_hopper", [False, True], ids=["plain loads", "tensor copies"])
@pytest.mark.parametrize("rows", [128, 130, 1], ids=str)
def test_geglu_agrees_with_fp64(rows: int, is_hopper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float16  # the interpreter's matrix product takes bf16 for integers; bf16 is tested on the GPU
    monkeypatch.setattr(geglu_module, "_has_tensor_copies", lambda _: is_hopper)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=1))
    x, weight, bias = draw(rows, 64, dtype=dtype), draw(256, 64, dtype=dtype) / 8, draw(256, mean=1.0, dtype=dtype)
    exact = geglu_linear_reference(x.double(), weight.double(), bias.double())
    assert relative_error(geglu_linear(x, weight, bias, path="triton"), exact) <= LIMITS[dtype]


def test_geglu_refuses_shapes_its_tiles_do_not_fit_and_falls_back() -> None:
    x, weight, bias = draw(3, 30), draw(40, 30), draw(40)
    with pytest.raises(ValueError, match="both float16 or both bfloat16"):
        geglu_linear(x, weight, bias, path="triton")
    with pytest.raises(ValueError, match="multiples of 64"):
        geglu_linear(x.bfloat16(), weight.bfloat16(), bias, path="triton")
    with pytest.raises(ValueError, match=r"needs \(40,\)"):
        geglu_linear(x, weight, bias[:5])
    assert torch.equal(geglu_linear(x, weight, bias), geglu_linear_reference(x, weight, bias))


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 8, 8), (3, 7, 5, 3), (1, 1, 1, 1)], ids=str)
def test_bias_and_residual_join_in_one_pass(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    x, residual, bias = image(*shape, dtype=dtype), image(*shape, dtype=dtype, seed=4), draw(shape[1], dtype=dtype)
    for used in (bias, None):
        exact = x.double() + residual.double() + (0 if used is None else used.double()[None, :, None, None])
        y = add_channels(x, used, residual, path="triton")
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(y, exact) <= LIMITS[dtype]


@pytest.mark.parametrize("widths", [(64, 64), (10, 7), (1, 33)], ids=str)
def test_skips_are_concatenated_bit_by_bit(widths: tuple[int, int]) -> None:
    first, second = image(2, widths[0], 5, 4), image(2, widths[1], 5, 4, seed=4)
    y = concat_channels(first, second, path="triton")
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, torch.cat([first, second], dim=1))
    added = torch.randn_like(second)
    assert torch.equal(concat_channels(first, second, added, path="triton"), torch.cat([first, second + added], dim=1))


@pytest.mark.parametrize("shape", [(2, 64, 4, 4), (3, 5, 3, 7), (1, 33, 9, 2)], ids=str)
def test_upsampling_repeats_pixels_bit_by_bit(shape: tuple[int, int, int, int]) -> None:
    x = image(*shape)
    exact = functional.interpolate(x, scale_factor=2.0, mode="nearest")
    assert torch.equal(upsample_nearest_2x(x, path="triton"), exact)


@pytest.mark.parametrize("n_rows", [1, 2])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_a_channel_add_before_the_group_norm_costs_no_accuracy(n_rows: int, mean: float) -> None:
    x, weight, bias = image(2, 40, 6, 5) + mean, draw(40), draw(40, seed=8)
    wide = draw(n_rows, 80, mean=3.0, seed=9)
    added = wide[:, 40:]  # a slice of something wider, as the engine passes it
    exact = group_norm_silu_reference(
        x.double(), 8, weight.double(), bias.double(), channel_add=added.double().expand(2, -1)
    )
    y = group_norm_silu(x, 8, weight, bias, channel_add=added, path="triton")
    assert relative_error(y, exact) <= LIMITS[torch.float32]
    with pytest.raises(ValueError, match="channel_add"):
        group_norm_silu(x, 8, weight, bias, channel_add=draw(3, 40))


def test_memory_order_and_shape_are_checked_before_anything_is_launched() -> None:
    plain = draw(2, 8, 4, 4)
    for call in (
        lambda: upsample_nearest_2x(plain, path="triton"),
        lambda: add_channels(plain, None, plain, path="triton"),
        lambda: concat_channels(plain, plain, path="triton"),
    ):
        with pytest.raises(ValueError, match="NHWC"):
            call()
    with pytest.raises(ValueError, match="not contiguous"):
        add_layer_norm(draw(8, 4).t(), None, torch.ones(8), torch.ones(8), path="triton")
    with pytest.raises(ValueError, match="residual"):
        add_layer_norm(draw(8, 4), draw(4, 4), torch.ones(4), torch.ones(4))


def layer(
    n_out: int, n_in: int, ranks: tuple[int, ...], dtype: torch.dtype, seed: int
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor, float]]]:
    terms = [
        (draw(rank, n_in, dtype=dtype, seed=seed + rank), draw(n_out, rank, dtype=dtype, seed=rank) / rank, 0.7 + rank)
        for rank in ranks
    ]
    return draw(n_out, n_in, dtype=dtype, seed=seed), terms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_launch_patches_layers_of_any_shape_with_any_number_of_loras(dtype: torch.dtype) -> None:
    layers = [
        layer(*shape, dtype, seed)
        for seed, shape in enumerate([(130, 64, (8,)), (64, 200, (4, 40)), (16, 16, ()), (1, 300, (1,))])
    ]
    pristine, terms = [before for before, _ in layers], [uses for _, uses in layers]
    kept = [before.clone() for before in pristine]
    weights = [torch.full_like(before, float("nan")) for before in pristine]
    lora_patch(weights, pristine, terms, path="triton")
    for weight, before, uses in zip(weights, kept, terms, strict=True):
        exact = before.double() + sum(scale * (up.double() @ down.double()) for down, up, scale in uses)
        assert relative_error(weight, exact) <= LIMITS[dtype]
    assert all(torch.equal(before, copy) for before, copy in zip(pristine, kept, strict=True))
    again = [torch.empty_like(before) for before in pristine]
    lora_patch(again, pristine, terms, path="torch")
    assert all(relative_error(a, b.double()) <= LIMITS[dtype] for a, b in zip(again, weights, strict=True))


def test_a_patch_that_does_not_fit_is_refused_before_anything_is_written() -> None:
    before, terms = layer(8, 16, (4,), torch.float32, 1)
    weight = torch.full_like(before, 5.0)
    down, up, scale = terms[0]
    with pytest.raises(ValueError, match="as many of each"):
        lora_patch([weight], [before], [])
    with pytest.raises(ValueError, match=r"up .* and down"):
        lora_patch([weight], [before], [[(down[:, :3].contiguous(), up, scale)]])
    with pytest.raises(ValueError, match=r"torch\.float16"):
        lora_patch([weight], [before], [[(down.half(), up, scale)]])
    assert torch.equal(weight, torch.full_like(before, 5.0))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2048, 1280, 5120), (300, 640, 2560), (77, 64, 192)], ids=str)
def test_geglu_agrees_with_fp64_on_the_gpu(shape: tuple[int, int, int]) -> None:
    rows, width, n_out = shape
    for dtype in (torch.bfloat16, torch.float16):
        x, bias = draw(rows, width, dtype=dtype).cuda(), draw(2 * n_out, mean=1.0, dtype=dtype).cuda()
        weight = (draw(2 * n_out, width, dtype=dtype) / width**0.5).cuda()
        exact = geglu_linear_reference(x.double(), weight.double(), bias.double())
        assert relative_error(geglu_linear(x, weight, bias, path="triton"), exact) <= LIMITS[dtype]
