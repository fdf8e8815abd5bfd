"""LoRA files as torch tensors: the checks of ``engine.registry``, which needs no torch, over a file that is read once.

Workers of the serving engine map files that a loader has checked (``engine.registry.flat_lora``); this is for a single process.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import nn

from engine.registry.float_bits import as_bits, is_finite, to_floats
from engine.registry.lora_check import (
    FILE_BYTES_MAX,
    PAIR_SUFFIXES,
    RANK_MAX,
    TEXT_ENCODER_PREFIXES,
    examine,
)
from engine.registry.safetensors_header import (
    LENGTH_BYTES,
    AddOnRefusedError,
    TensorSpan,
    header_bytes,
    parse_header,
    refuse,
)
from traces.problems import Problem

__all__ = [
    "FILE_BYTES_MAX",
    "PAIR_SUFFIXES",
    "RANK_MAX",
    "TEXT_ENCODER_PREFIXES",
    "AddOnRefusedError",
    "LoraFile",
    "LoraPair",
    "lora_targets",
    "read_lora",
]

DTYPES: Final[Mapping[str, torch.dtype]] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class LoraPair:
    """``W += scale · factor · up @ down`` for one layer."""

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
    """Reads and checks a LoRA file in safetensors format; key names as in ``engine.registry.lora_check``.

    Args:
        path: the file.
        targets: from :func:`lora_targets`.
        file_bytes_max: refused above, before the file is opened.
        rank_max: refused above.

    Raises:
        AddOnRefusedError: with the reasons; nothing of the file has been used.
    """
    where = str(path)
    data = _read_bytes(path, file_bytes_max)
    length = header_bytes(where, bytes(data[: LENGTH_BYTES + 1]), len(data))
    header = parse_header(where, bytes(data[LENGTH_BYTES : LENGTH_BYTES + length]), len(data), n_dims_max=2)
    planned, problems = examine(where, header, targets, rank_max)
    body = memoryview(data)[header.body_at :]
    for span in header.spans:
        if not is_finite(as_bits(body[span.start : span.stop], span.dtype), span.dtype):
            problems.append(
                Problem(where, f"tensor {span.name!r} holds NaN or infinity", "finite values", "Use another file")
            )
    if problems:
        raise AddOnRefusedError(problems)
    pairs = []
    for pair in planned:
        alpha = pair.alpha_said if pair.alpha is None else _scalar(body, pair.alpha)
        pairs.append(LoraPair(pair.layer, _tensor(body, pair.down), _tensor(body, pair.up), alpha))
    return LoraFile(hashlib.sha256(data).hexdigest(), len(data), tuple(pairs))


def _read_bytes(path: Path, file_bytes_max: int) -> bytearray:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > file_bytes_max:
                raise refuse(str(path), f"is oversized: {size} bytes", f"at most {file_bytes_max} bytes")
            data = bytearray(size)
            n_read = file.readinto(data)
    except OSError as error:
        raise refuse(str(path), f"cannot be read: {error.strerror}", "a readable file", "Check the path") from None
    if n_read != size:
        raise refuse(str(path), f"changed while it was read: {n_read} of {size} bytes", "a file at rest", "Try again")
    return data


def _tensor(body: memoryview, span: TensorSpan) -> torch.Tensor:
    # The body need not be aligned for the type; the copy is.
    flat = torch.frombuffer(body[span.start : span.stop], dtype=torch.uint8)
    return flat.clone().view(DTYPES[span.dtype]).view(span.shape)


def _scalar(body: memoryview, span: TensorSpan) -> float:
    return float(to_floats(as_bits(body[span.start : span.stop], span.dtype), span.dtype)[0])
