"""LoRAs: weights come back to the last bit, keep their addresses, and files that must not be used are refused with the reason."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.lora import AddOnRefusedError, LoraPatcher, PinnedLora, lora_targets, pin_lora, read_lora
from engine.models import ModelSpec, SdxlModels, build_models, write_random_lora

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(models: SdxlModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    for i in range(2):
        write_random_lora(folder / f"{i}.safetensors", models.unet, rank=4 * (i + 1), seed=i)
    return folder


@pytest.fixture(scope="module")
def pinned(models: SdxlModels, folder: Path) -> list[PinnedLora]:
    return [pin_lora(folder / f"{i}.safetensors", models.unet) for i in range(2)]


@pytest.mark.parametrize("n_loras", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_restore_brings_every_bit_back_and_addresses_never_change(
    folder: Path, dtype: torch.dtype, n_loras: int
) -> None:
    unet = build_models(ModelSpec.tiny(), dtype=dtype).unet
    loras = [(pin_lora(folder / f"{i}.safetensors", unet), 0.7) for i in range(n_loras)]
    before = {name: weight.detach().clone() for name, weight in unet.named_parameters()}
    addresses = {name: weight.data_ptr() for name, weight in unet.named_parameters()}
    patcher = LoraPatcher(unet)
    for _ in range(3):
        patcher.patch(loras)
        changed = {name for name, weight in unet.named_parameters() if not torch.equal(weight, before[name])}
        assert changed == {f"{layer.name}.weight" for layer in loras[0][0].layers}
        patcher.restore()
        assert all(torch.equal(weight, before[name]) for name, weight in unet.named_parameters())
    assert {name: weight.data_ptr() for name, weight in unet.named_parameters()} == addresses


def test_what_is_written_is_pristine_plus_every_scaled_product(models: SdxlModels, pinned: list[PinnedLora]) -> None:
    layer = pinned[0].layers[0].name
    weight = models.unet.get_submodule(layer).weight
    expected = weight.detach().double()
    for lora, scale in zip(pinned, (0.5, -2.0), strict=True):
        pair = next(item for item in lora.layers if item.name == layer)
        expected = expected + scale * pair.up(lora.flat).double() @ pair.down(lora.flat).double()
    patcher = LoraPatcher(models.unet)
    patcher.patch([(pinned[0], 0.5), (pinned[1], -2.0)])
    written = weight.detach().double()
    patcher.restore()
    # fp32 sums of 12 products of magnitude below 1: some 12 roundings of 6e-8
    assert float((written - expected).abs().max()) <= 2e-6


def test_a_second_patch_replaces_the_first(models: SdxlModels, pinned: list[PinnedLora]) -> None:
    weight = models.unet.get_submodule(pinned[0].layers[0].name).weight
    patcher = LoraPatcher(models.unet)
    patcher.patch([(pinned[1], 1.0)])
    alone = weight.detach().clone()
    patcher.patch([(pinned[0], 1.0)])
    assert patcher.active == ((pinned[0].add_on_id, 1.0),)
    patcher.patch([(pinned[1], 1.0)])
    assert torch.equal(weight, alone)
    patcher.patch([])
    assert patcher.active == ()
    assert not torch.equal(weight, alone)


def test_a_layer_that_only_the_earlier_lora_patched_is_restored(
    models: SdxlModels, folder: Path, tmp_path: Path
) -> None:
    whole = load_file(folder / "0.safetensors")
    part = {name: tensor for name, tensor in whole.items() if "attn1.to_q" in name}
    save_file(part, tmp_path / "part.safetensors")
    patcher = LoraPatcher(models.unet)
    other = models.unet.get_submodule(
        next(name for name in lora_targets(models.unet) if name.endswith("attn2.to_v"))
    ).weight
    before = other.detach().clone()
    patcher.patch([(pin_lora(folder / "0.safetensors", models.unet), 1.0)])
    assert not torch.equal(other, before)
    patcher.patch([(pin_lora(tmp_path / "part.safetensors", models.unet), 1.0)])
    assert torch.equal(other, before)
    patcher.restore()


def test_a_lora_of_another_network_is_refused_before_any_weight_changes(
    models: SdxlModels, pinned: list[PinnedLora]
) -> None:
    with pytest.raises(ValueError, match="pinned for another network"):
        LoraPatcher(models.text_encoder).patch([(pinned[0], 1.0)])


def test_alpha_and_older_key_names_are_understood(models: SdxlModels, folder: Path, tmp_path: Path) -> None:
    tensors = {}
    for name, tensor in load_file(folder / "0.safetensors").items():
        layer = name.removeprefix("unet.").removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
        role = "down" if name.endswith("lora_A.weight") else "up"
        tensors[f"{layer}.lora.{role}.weight"] = tensor
        tensors[f"{layer}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "old.safetensors")
    lora = pin_lora(tmp_path / "old.safetensors", models.unet)
    assert {layer.factor for layer in lora.layers} == {0.5}  # alpha 2 over rank 4


def test_the_identity_of_a_lora_is_the_sha256_of_its_file(pinned: list[PinnedLora], folder: Path) -> None:
    assert pinned[0].add_on_id == hashlib.sha256((folder / "0.safetensors").read_bytes()).hexdigest()


def some_pair(tensors: Tensors) -> str:
    return next(name for name in tensors if name.endswith("lora_A.weight"))


def with_nan(tensors: Tensors) -> None:
    tensors[some_pair(tensors)][0, 0] = float("nan")


def with_infinity(tensors: Tensors) -> None:
    tensors[some_pair(tensors)][0, 0] = float("inf")


def with_wrong_shape(tensors: Tensors) -> None:
    name = some_pair(tensors)
    tensors[name] = torch.zeros(tensors[name].shape[0], tensors[name].shape[1] + 1)


def without_its_partner(tensors: Tensors) -> None:
    del tensors[some_pair(tensors)]


def with_a_huge_rank(tensors: Tensors) -> None:
    name = some_pair(tensors)
    partner = name.replace("lora_A", "lora_B")
    tensors[name] = torch.zeros(300, tensors[name].shape[1])
    tensors[partner] = torch.zeros(tensors[partner].shape[0], 300)


def with_text_encoder_keys(tensors: Tensors) -> None:
    tensors["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 32)


def with_an_unknown_layer(tensors: Tensors) -> None:
    for side, shape in (("A", (4, 8)), ("B", (8, 4))):
        tensors[f"unet.nowhere.to_q.lora_{side}.weight"] = torch.zeros(shape)


def with_a_strange_key(tensors: Tensors) -> None:
    tensors["lora_unet_input_blocks_4_1_proj_in.hada_w1_a"] = torch.zeros(4, 4)


def with_integers(tensors: Tensors) -> None:
    name = some_pair(tensors)
    tensors[name] = tensors[name].to(torch.int32)


def empty(tensors: Tensors) -> None:
    tensors.clear()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (with_nan, "NaN or infinity"),
        (with_infinity, "NaN or infinity"),
        (with_wrong_shape, "has shapes"),
        (without_its_partner, "is unpaired"),
        (with_a_huge_rank, "rank 300, needs at most 256"),
        (with_text_encoder_keys, "'text_encoder.text_model.*patches a text encoder"),
        (with_an_unknown_layer, "'nowhere.to_q' does not exist"),
        (with_a_strange_key, "is not understood"),
        (with_integers, "dtype 'I32'"),
        (empty, "holds no tensor"),
    ],
)
def test_spoilt_tensors_are_refused(
    models: SdxlModels, folder: Path, tmp_path: Path, spoil: Callable[[Tensors], None], reason: str
) -> None:
    tensors = load_file(folder / "0.safetensors")
    spoil(tensors)
    save_file(tensors, tmp_path / "spoilt.safetensors")
    with pytest.raises(AddOnRefusedError, match=reason):
        read_lora(tmp_path / "spoilt.safetensors", lora_targets(models.unet))


def truncated_body(data: bytes) -> bytes:
    return data[:-10]


def truncated_header(data: bytes) -> bytes:
    return data[:40]


def nearly_nothing(data: bytes) -> bytes:
    return data[:4]


def pickled(_: bytes) -> bytes:
    return pickle.dumps({"a": 1})


def huge_header(data: bytes) -> bytes:
    return struct.pack("<Q", 2**60) + data[8:]


def trailing_bytes(data: bytes) -> bytes:
    return data + b"hidden"


def with_header(change: Callable[[str], str]) -> Callable[[bytes], bytes]:
    def spoil(data: bytes) -> bytes:
        length = struct.unpack("<Q", data[:8])[0]
        header = change(data[8 : 8 + length].decode()).encode()
        return struct.pack("<Q", len(header)) + header + data[8 + length :]

    return spoil


def duplicate_key(header: str) -> str:
    table = json.loads(header)
    name = next(key for key in table if key != "__metadata__")
    return header.rstrip()[:-1] + f",{json.dumps(name)}:{json.dumps(table[name])}}}"


def overlapping(header: str) -> str:
    table = json.loads(header)
    names = [key for key in table if key != "__metadata__"]
    table[names[1]]["data_offsets"] = table[names[0]]["data_offsets"]
    return json.dumps(table)


def negative_offset(header: str) -> str:
    table = json.loads(header)
    table[next(key for key in table if key != "__metadata__")]["data_offsets"][0] = -8
    return json.dumps(table)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (truncated_body, "is truncated"),
        (truncated_header, "is truncated inside its header"),
        (nearly_nothing, "is truncated: 4 bytes"),
        (pickled, "is a pickle"),
        (huge_header, "says that its header has 1152921504606846976 bytes"),
        (trailing_bytes, "6 bytes that no tensor owns"),
        (with_header(duplicate_key), "duplicate key"),
        (with_header(lambda header: header.rstrip()[:-1]), "broken header"),
        (with_header(lambda _: "[1, 2]"), "header of type list"),
        (with_header(lambda _: "[" * 100_000), "broken header"),
        (with_header(overlapping), "lies at"),
        (with_header(negative_offset), "offsets"),
    ],
)
def test_spoilt_files_are_refused(
    models: SdxlModels, folder: Path, tmp_path: Path, spoil: Callable[[bytes], bytes], reason: str
) -> None:
    path = tmp_path / "spoilt.safetensors"
    path.write_bytes(spoil((folder / "0.safetensors").read_bytes()))
    with pytest.raises(AddOnRefusedError, match=reason):
        read_lora(path, lora_targets(models.unet))


@pytest.mark.parametrize("first_byte", [0x80, ord("P")])
def test_a_header_length_that_looks_like_the_start_of_a_pickle_or_zip_is_accepted(
    models: SdxlModels, folder: Path, tmp_path: Path, first_byte: int
) -> None:
    data = (folder / "0.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length].rstrip()
    # spaces after the JSON until the length's first byte, and for a zip's "PK" its second, is the one wanted
    wanted = 0x80 if first_byte == 0x80 else int.from_bytes(b"PK", "little")
    span = 0x100 if first_byte == 0x80 else 0x10000
    padded = header.ljust(len(header) + (wanted - len(header)) % span)
    path = tmp_path / "padded.safetensors"
    path.write_bytes(struct.pack("<Q", len(padded)) + padded + data[8 + length :])
    assert path.read_bytes()[0] == first_byte
    assert read_lora(path, lora_targets(models.unet)).pairs


def test_an_oversized_file_is_refused_and_a_missing_one_too(models: SdxlModels, folder: Path) -> None:
    targets = lora_targets(models.unet)
    with pytest.raises(AddOnRefusedError, match="is oversized"):
        read_lora(folder / "0.safetensors", targets, file_bytes_max=1000)
    with pytest.raises(AddOnRefusedError, match="cannot be read"):
        read_lora(folder / "none.safetensors", targets)


def test_all_reasons_are_given_together(models: SdxlModels, folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "0.safetensors")
    with_nan(tensors)
    with_an_unknown_layer(tensors)
    save_file(tensors, tmp_path / "spoilt.safetensors")
    with pytest.raises(AddOnRefusedError) as refused:
        read_lora(tmp_path / "spoilt.safetensors", lora_targets(models.unet))
    assert len(refused.value.problems) >= 2
