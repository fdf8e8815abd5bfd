"""Admission of LoRA files: everything is checked against the target network before a single weight is used.

safetensors itself accepts duplicate tensor names and NaN, and knows nothing of ranks and targets. The file is read once:
the bytes that are hashed are the bytes that are checked and used.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from traces.problems import InputError, Problem

FILE_BYTES_MAX: Final = 2 * 2**30
HEADER_BYTES_MAX: Final = 8 * 2**20
RANK_MAX: Final = 256
DTYPES: Final[Mapping[str, torch.dtype]] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TEXT_ENCODER_PREFIXES: Final = ("text_encoder.", "text_encoder_2.", "lora_te_", "lora_te1_", "lora_te2_")
# The three ways in which diffusers' own files spell the pair; the first is written today.
PAIR_SUFFIXES: Final = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_down.weight", ".lora_up.weight"),
)


class AddOnRefusedError(InputError):
    """An add-on file that must not be used. Carries every reason found."""


@dataclass(frozen=True, slots=True)
class LoraPair:
    """``W += scale · alpha / rank · up @ down`` for one layer."""

    layer: str
    down: torch.Tensor
    """``[rank, in]``, in the file's type."""
    up: torch.Tensor
    """``[out, rank]``."""
    alpha: float | None
    """None: equal to the rank, a factor of one."""

    @property
    def rank(self) -> int:
        """Rows of ``down``."""
        return self.down.shape[0]

    @property
    def factor(self) -> float:
        """``alpha / rank``."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA that passed every check."""

    add_on_id: str
    """sha256 of the file."""
    size_bytes: int
    pairs: tuple[LoraPair, ...]
    """Ordered by layer name."""

    @property
    def rank(self) -> int:
        """The largest rank of all layers."""
        return max(pair.rank for pair in self.pairs)


def lora_targets(network: nn.Module) -> dict[str, tuple[int, int]]:
    """The layers of a UNet that a LoRA may patch, the linear layers inside attention blocks, with ``(out, in)``."""
    return {
        name: (part.out_features, part.in_features)
        for name, part in network.named_modules()
        if isinstance(part, nn.Linear) and ".attentions." in name
    }


def read_lora(
    path: Path,
    targets: Mapping[str, tuple[int, int]],
    *,
    file_bytes_max: int = FILE_BYTES_MAX,
    rank_max: int = RANK_MAX,
) -> LoraFile:
    """Reads and checks a LoRA file in safetensors format with diffusers' key names.

    Args:
        path: the file.
        targets: from :func:`lora_targets`.
        file_bytes_max: refused above, before the file is opened.
        rank_max: refused above.

    Raises:
        AddOnRefusedError: with the reasons; nothing of the file has been used.
    """
    data = _read_bytes(path, file_bytes_max)
    header, body_at = _header(path, data)
    tensors = _tensors(path, header, data, body_at)
    pairs = _pairs(path, tensors, targets, rank_max)
    return LoraFile(hashlib.sha256(data).hexdigest(), len(data), pairs)


def _refuse(path: Path, what: str, allowed: str, repair: str = "Use another file") -> AddOnRefusedError:
    return AddOnRefusedError(Problem(str(path), what, allowed, repair))


def _read_bytes(path: Path, file_bytes_max: int) -> bytearray:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > file_bytes_max:
                raise _refuse(path, f"is oversized: {size} bytes", f"at most {file_bytes_max} bytes")
            data = bytearray(size)
            n_read = file.readinto(data)
    except OSError as error:
        raise _refuse(path, f"cannot be read: {error.strerror}", "a readable file", "Check the path") from None
    if n_read != size:
        raise _refuse(path, f"changed while it was read: {n_read} of {size} bytes", "a file at rest", "Try again")
    return data


def _header(path: Path, data: bytearray) -> tuple[dict[str, Any], int]:
    if len(data) < 8:
        raise _refuse(path, f"is truncated: {len(data)} bytes", "a safetensors file")
    if data[8:9] != b"{" and (data[:1] == b"\x80" or data[:2] == b"PK"):
        raise _refuse(path, "is a pickle or a zip archive, which can run code", "a safetensors file", "Convert it")
    length = int.from_bytes(data[:8], "little")
    if length > HEADER_BYTES_MAX:
        raise _refuse(path, f"says that its header has {length} bytes", f"a header of at most {HEADER_BYTES_MAX} bytes")
    if 8 + length > len(data):
        raise _refuse(path, f"is truncated inside its header: {len(data)} bytes", f"{8 + length} bytes or more")
    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _refuse(path, f"has a broken header: {error}", "a JSON object without duplicate keys") from None
    if not isinstance(header, dict):
        raise _refuse(path, f"has a header of type {type(header).__name__}", "a JSON object")
    return header, 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return table


def _tensors(path: Path, header: dict[str, Any], data: bytearray, body_at: int) -> dict[str, torch.Tensor]:
    """The tensors as views of ``data``; spans must tile the body without gap or overlap."""
    entries = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        entries.append((*_entry(path, name, entry), name))
    expected = 0
    tensors = {}
    for first, last, dtype, shape, name in sorted(entries, key=lambda item: (item[0], item[1], item[4])):
        if first != expected or last - first != math.prod(shape) * dtype.itemsize:
            raise _refuse(path, f"tensor {name!r} lies at {first}..{last}", f"{shape} of {dtype} from {expected} on")
        if body_at + last > len(data):
            raise _refuse(path, f"is truncated: {len(data)} bytes", f"{body_at + last} bytes for tensor {name!r}")
        expected = last
        if last == first:
            raise _refuse(path, f"tensor {name!r} is empty", "at least one element")
        flat = torch.frombuffer(data, dtype=torch.uint8, count=last - first, offset=body_at + first)
        # The body need not be aligned for the type; the copy is.
        tensors[name] = flat.clone().view(dtype).view(shape)
    if body_at + expected != len(data):
        raise _refuse(path, f"has {len(data) - body_at - expected} bytes that no tensor owns", "none")
    if not tensors:
        raise _refuse(path, "holds no tensor", "LoRA weights")
    return tensors


def _entry(path: Path, name: str, entry: Any) -> tuple[int, int, torch.dtype, tuple[int, ...]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _refuse(path, f"tensor {name!r} is described by {str(entry)[:80]}", "dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise _refuse(path, f"tensor {name!r} has dtype {str(entry['dtype'])[:20]!r}", f"one of {sorted(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _is_naturals(shape) or len(shape) > 2 or not _is_naturals(offsets) or len(offsets) != 2:
        raise _refuse(path, f"tensor {name!r} has shape {shape}, offsets {offsets}"[:200], "a scalar or a matrix")
    if offsets[0] > offsets[1]:
        raise _refuse(path, f"tensor {name!r} has offsets {offsets}", "the first at most the second")
    return offsets[0], offsets[1], DTYPES[entry["dtype"]], tuple(shape)


def _is_naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)


def _pairs(
    path: Path, tensors: dict[str, torch.Tensor], targets: Mapping[str, tuple[int, int]], rank_max: int
) -> tuple[LoraPair, ...]:
    problems: list[Problem] = []

    def refuse(what: str, allowed: str, repair: str = "Use another file") -> None:
        problems.append(Problem(str(path), what, allowed, repair))

    downs: dict[str, torch.Tensor] = {}
    ups: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    for name, tensor in tensors.items():
        if name.startswith(TEXT_ENCODER_PREFIXES):
            refuse(f"key {name!r} patches a text encoder", "keys of the UNet only", "Export the UNet's part alone")
            continue
        if not bool(torch.isfinite(tensor).all()):
            refuse(f"tensor {name!r} holds NaN or infinity", "finite values")
            continue
        role, layer = _role(name.removeprefix("unet."))
        if role == "alpha" and tensor.numel() == 1:
            alphas[layer] = float(tensor)
        elif role in {"down", "up"} and tensor.ndim == 2:
            kept = downs if role == "down" else ups
            if layer in kept:
                refuse(f"key {name!r} gives layer {layer!r} twice", "one pair a layer")
            kept[layer] = tensor
        else:
            refuse(
                f"key {name!r} of shape {tuple(tensor.shape)} is not understood",
                f"a matrix <layer>{PAIR_SUFFIXES[0][0]} or <layer>{PAIR_SUFFIXES[0][1]}, or a scalar <layer>.alpha",
                "Convert the file to diffusers' key names",
            )
    for layer in sorted({*downs, *ups, *alphas}):
        if layer not in targets:
            refuse(f"layer {layer!r} does not exist in the target", "a linear layer inside an attention block")
        elif layer not in downs or layer not in ups:
            refuse(f"layer {layer!r} is unpaired", "both the down and the up matrix")
        else:
            rank, (n_out, n_in) = downs[layer].shape[0], targets[layer]
            shapes = (tuple(downs[layer].shape), tuple(ups[layer].shape))
            if shapes != ((rank, n_in), (n_out, rank)):
                refuse(f"layer {layer!r} has shapes {shapes}", f"((rank, {n_in}), ({n_out}, rank))")
            elif rank > rank_max:
                refuse(f"layer {layer!r} has rank {rank}", f"at most {rank_max}")
    if problems:
        raise AddOnRefusedError(problems)
    if not downs:
        raise _refuse(path, "holds no LoRA pair", "at least one")
    return tuple(LoraPair(layer, downs[layer], ups[layer], alphas.get(layer)) for layer in sorted(downs))


def _role(name: str) -> tuple[str, str]:
    for down, up in PAIR_SUFFIXES:
        if name.endswith(down):
            return "down", name.removesuffix(down)
        if name.endswith(up):
            return "up", name.removesuffix(up)
    if name.endswith(".alpha"):
        return "alpha", name.removesuffix(".alpha")
    return "", name
