"""The flat layout: what workers map is what the in-process engine pins, to the bit; and nothing half-written is ever there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from engine.lora import pin_pairs
from engine.lora_file import lora_targets, read_lora
from engine.models import SdxlModels
from engine.registry import checked_stream
from engine.registry.flat_lora import (
    ALIGN_BYTES,
    MAGIC,
    PAGE_BYTES,
    FlatLayoutError,
    layout,
    map_flat_lora,
    write_flat_lora,
)
from engine.registry.float_bits import BITS, convert, is_finite, to_floats
from engine.registry.lora_admission import FlatPlace, check_lora
from engine.registry.safetensors_header import AddOnRefusedError
from tests.engine.registry.files import Bytes, file_of, lora_bytes, tensors_of, tiny

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def flat_of(data: bytes, folder: Path, dtype: str) -> Path:
    path = folder / f"{dtype}.flat"
    check_lora(Bytes(data, at_once=7777), "file", tiny(), flat=FlatPlace(path, dtype))
    return path


def in_type(data: bytes, dtype: str) -> bytes:
    """The fp16 file in another type, with an alpha of 2 on every layer."""
    tensors = {}
    for name, values in tensors_of(data).items():
        bits = convert(np.ascontiguousarray(values).view(np.uint16).ravel(), "F16", dtype)
        tensors[name] = (bits if dtype == "BF16" else bits.view({"F32": np.float32, "F16": np.float16}[dtype])).reshape(
            values.shape
        )
        tensors[name.removeprefix("unet.").split(".lora_")[0] + ".alpha"] = np.array([2.0], np.float16)
    return file_of(tensors)


@pytest.mark.parametrize("chunk_bytes", [100, 2 * 2**20])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("file_dtype", ["F32", "F16", "BF16"])
def test_the_mapped_file_is_what_the_in_process_engine_pins(
    models: SdxlModels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file_dtype: str,
    dtype: str,
    chunk_bytes: int,
) -> None:
    monkeypatch.setattr(checked_stream, "CHUNK_BYTES", chunk_bytes)
    data = in_type(lora_bytes(rank=1 if chunk_bytes == 100 else 3), file_dtype)
    (tmp_path / "a.safetensors").write_bytes(data)
    pinned = pin_pairs(read_lora(tmp_path / "a.safetensors", lora_targets(models.unet)), DTYPES[dtype], is_pinned=False)
    flat = map_flat_lora(flat_of(data, tmp_path, dtype), is_writable=True)
    assert flat.header.add_on_id == pinned.add_on_id
    assert flat.header.rank == pinned.rank
    assert [tuple(getattr(layer, name) for name in layer.__slots__) for layer in flat.header.layers] == [
        tuple(getattr(layer, name) for name in layer.__slots__) for layer in pinned.layers
    ]
    assert torch.equal(torch.from_numpy(flat.body), pinned.flat.view(torch.uint8))


def test_every_matrix_is_aligned_and_the_body_begins_at_a_page(tmp_path: Path) -> None:
    flat = map_flat_lora(flat_of(lora_bytes(rank=3), tmp_path, "BF16"))
    assert flat.body.ctypes.data % PAGE_BYTES == 0
    assert all(at * 2 % ALIGN_BYTES == 0 for layer in flat.header.layers for at in (layer.down_at, layer.up_at))


def test_a_mapped_file_stays_readable_after_it_was_dropped(tmp_path: Path) -> None:
    path = flat_of(lora_bytes(), tmp_path, "F32")
    flat = map_flat_lora(path)
    before = flat.body.copy()
    path.unlink()
    assert np.array_equal(flat.body, before)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    header = layout("a", "tiny", "F32", [("layer", 1, 2, 3, 1.0)])

    def write() -> None:
        with write_flat_lora(tmp_path / "a.flat", header) as writer:
            writer.put(0, np.ones(3, np.float32))
            assert len(list(tmp_path.iterdir())) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_file_whose_last_value_is_wrong_leaves_nothing(tmp_path: Path) -> None:
    tensors = tensors_of(lora_bytes())
    tensors[list(tensors)[-1]][-1, -1] = np.nan
    with pytest.raises(AddOnRefusedError, match="NaN"):
        flat_of(file_of(tensors), tmp_path, "F32")
    assert list(tmp_path.iterdir()) == []


def test_values_that_the_networks_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    tensors = {name: values.astype(np.float32) for name, values in tensors_of(lora_bytes()).items()}
    tensors[next(iter(tensors))][0, 0] = 1e6
    with pytest.raises(AddOnRefusedError, match="too large for F16"):
        flat_of(file_of(tensors), tmp_path, "F16")
    assert map_flat_lora(flat_of(file_of(tensors), tmp_path, "BF16")).header.rank == 4


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("wanted", ["F32", "F16", "BF16"])
def test_numbers_are_rounded_as_torch_rounds_them(dtype: str, wanted: str) -> None:
    if dtype == "F32":
        bits = np.random.default_rng(0).integers(0, 2**32, 200_001, dtype=np.uint32)
        bits = np.append(bits, np.arange(0x3F80_0000, 0x3F83_0000, 37, dtype=np.uint32))  # near ties around 1
    else:
        bits = np.arange(65536, dtype=np.uint16)
    bits = bits[np.isfinite(to_floats(bits, dtype))]
    signed = {np.uint16: np.int16, np.uint32: np.int32}
    expected = torch.from_numpy(bits.view(signed[BITS[dtype]])).view(DTYPES[dtype]).to(DTYPES[wanted])
    with np.errstate(over="ignore"):
        got = convert(bits, dtype, wanted)
    assert torch.equal(
        torch.from_numpy(got.view(signed[BITS[wanted]])), expected.view({2: torch.int16, 4: torch.int32}[got.itemsize])
    )
    assert is_finite(bits, dtype)


def damaged(data: bytes) -> dict[str, bytes]:
    at = data.index(b'"layers"')
    return {
        "is 0 bytes": b"",
        "is 100 bytes": data[:100],
        "begins with": b"dplora\x00\x02" + data[8:],
        "says that its header has": data[:8] + (2**40).to_bytes(8, "little") + data[16:],
        "broken header": data[:at] + b"'" + data[at + 1 :],
        "every matrix inside": data[:-16],
    }


@pytest.mark.parametrize(
    "reason",
    ["is 0 bytes", "is 100 bytes", "begins with", "says that its header has", "broken header", "every matrix inside"],
)
def test_a_damaged_file_is_not_mapped(tmp_path: Path, reason: str) -> None:
    path = flat_of(lora_bytes(), tmp_path, "F32")
    assert path.read_bytes()[:8] == MAGIC
    path.write_bytes(damaged(path.read_bytes())[reason])
    with pytest.raises(FlatLayoutError, match=reason):
        map_flat_lora(path)


def test_a_missing_file_is_not_mapped(tmp_path: Path) -> None:
    with pytest.raises(FlatLayoutError, match="cannot be mapped: No such file"):
        map_flat_lora(tmp_path / "none.flat")


def test_the_targets_of_the_table_are_those_of_the_network(models: SdxlModels) -> None:
    assert isinstance(models.unet, nn.Module)
    assert dict(tiny().lora_targets) == lora_targets(models.unet)
