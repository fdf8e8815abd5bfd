"""LoRAs in pinned host memory, patched into a UNet's weights in place, and restored to the last bit.

Weights keep their addresses, so captured CUDA graphs go on working. What is written is always ``pristine + Σ scale · up @ down``,
accumulated in fp32 and rounded once: adding and subtracting in bf16 would drift (after 50 swaps 23 % of the elements differ).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import nn

from engine.lora_file import AddOnRefusedError, LoraFile, LoraPair, lora_targets, read_lora
from kernels.lora_patch import LayerTables, Term, lora_patch, takes_kernel

__all__ = [
    "AddOnRefusedError",
    "LoraFile",
    "LoraPair",
    "LoraPatcher",
    "PinnedLayer",
    "PinnedLora",
    "lora_targets",
    "pin_lora",
    "read_lora",
]


TABLES_MAX: Final = 16
"""Sets of layers whose addresses are remembered; LoRAs of one kind patch the same set."""


@dataclass(frozen=True, slots=True)
class PinnedLayer:
    """Where one layer's pair lies in the flat buffer."""

    name: str
    rank: int
    n_out: int
    n_in: int
    down_at: int
    up_at: int
    factor: float
    """``alpha / rank``."""

    def down(self, flat: torch.Tensor) -> torch.Tensor:
        """``[rank, in]`` inside ``flat``."""
        return flat[self.down_at : self.down_at + self.rank * self.n_in].view(self.rank, self.n_in)

    def up(self, flat: torch.Tensor) -> torch.Tensor:
        """``[out, rank]`` inside ``flat``."""
        return flat[self.up_at : self.up_at + self.n_out * self.rank].view(self.n_out, self.rank)


@dataclass(frozen=True, slots=True, eq=False)
class PinnedLora:
    """A checked LoRA in host memory, in the network's type, ready for one copy to the device."""

    add_on_id: str
    rank: int
    flat: torch.Tensor
    """All matrices one after the other; pinned where there is a GPU."""
    layers: tuple[PinnedLayer, ...]

    @property
    def bytes(self) -> int:
        """Bytes to copy to the device."""
        return self.flat.numel() * self.flat.element_size()


def pin_lora(path: Path, unet: nn.Module) -> PinnedLora:
    """Checks a LoRA file against ``unet`` and puts it into host memory.

    Raises:
        AddOnRefusedError: see :func:`engine.lora_file.read_lora`.
    """
    weight = next(unet.parameters())
    return pin_pairs(read_lora(path, lora_targets(unet)), weight.dtype, is_pinned=weight.is_cuda)


def pin_pairs(file: LoraFile, dtype: torch.dtype, *, is_pinned: bool) -> PinnedLora:
    """Lays the matrices of a checked file out in one buffer, each at a multiple of 16 bytes (tensor cores load aligned)."""
    step = 16 // dtype.itemsize
    layers, parts, at = [], [], 0
    for pair in file.pairs:
        places = []
        for matrix in (pair.down, pair.up):
            places.append(at)
            parts.append((at, matrix))
            at += -(-matrix.numel() // step) * step
        (rank, n_in), n_out = pair.down.shape, pair.up.shape[0]
        layers.append(PinnedLayer(pair.layer, rank, n_out, n_in, *places, pair.factor))
    flat = torch.zeros(at, dtype=dtype, pin_memory=is_pinned)
    for place, matrix in parts:
        flat[place : place + matrix.numel()].copy_(matrix.reshape(-1))
    return PinnedLora(file.add_on_id, file.rank, flat, tuple(layers))


class LoraPatcher:
    """Patches LoRAs into one UNet. Keeps a pristine copy of every layer that it has ever patched (SDXL attention: 1.9 GB in bf16)."""

    def __init__(self, unet: nn.Module) -> None:
        self._targets = {
            name: part for name, part in unet.named_modules() if isinstance(part, nn.Linear) and ".attentions." in name
        }
        self._pristine: dict[str, torch.Tensor] = {}
        self._patched: set[str] = set()
        self._staging: list[torch.Tensor] = []
        self._active: tuple[tuple[str, float], ...] = ()
        self._tables: dict[tuple[str, ...], LayerTables] = {}

    @property
    def active(self) -> tuple[tuple[str, float], ...]:
        """``(add_on_id, scale)`` of what the weights hold now, in order."""
        return self._active

    def misfit(self, lora: PinnedLora) -> str:
        """The first layer of a LoRA that this network does not have, with its shape; empty if all are there."""
        for layer in lora.layers:
            part = self._targets.get(layer.name)
            if part is None or tuple(part.weight.shape) != (layer.n_out, layer.n_in):
                return f"layer {layer.name} of ({layer.n_out}, {layer.n_in})"
        return ""

    @torch.no_grad()
    def patch(self, loras: Sequence[tuple[PinnedLora, float]]) -> None:
        """Makes the weights ``pristine + Σ scale · alpha/rank · up @ down``; what was patched before is gone.

        Everything is enqueued on the current stream; nothing waits for the host. An empty list restores.
        """
        for lora, _ in loras:
            wrong = self.misfit(lora)
            if wrong:
                raise ValueError(f"LoRA {lora.add_on_id[:12]} was pinned for another network: {wrong}")
        on_device = [self._to_device(place, lora) for place, (lora, _) in enumerate(loras)]
        names = list(dict.fromkeys(layer.name for lora, _ in loras for layer in lora.layers))
        self._copy_back(sorted(self._patched - set(names)))
        for name in names:
            if name not in self._pristine:
                self._pristine[name] = self._weight(name).clone()
        self._patched.update(names)  # before anything is written, so that a failure midway can be restored
        if names:
            self._write(names, on_device, loras)
        self._patched = set(names)
        self._active = tuple((lora.add_on_id, scale) for lora, scale in loras)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the pristine weights back, bit by bit."""
        self._copy_back(sorted(self._patched))
        self._patched = set()
        self._active = ()

    def _copy_back(self, names: Sequence[str]) -> None:
        if names:
            torch._foreach_copy_([self._weight(name) for name in names], [self._pristine[name] for name in names])

    def forget(self) -> None:
        """Drops the pristine copies: the weights now in the network, another checkpoint's for example, become the pristine ones."""
        if self._patched:
            raise RuntimeError("LoraPatcher.forget: LoRAs are patched in. Restore first.")
        self._pristine.clear()
        self._tables.clear()

    def _to_device(self, place: int, lora: PinnedLora) -> torch.Tensor:
        """Copies a LoRA into a staging buffer that the next patch reuses."""
        device = next(iter(self._targets.values())).weight.device
        if len(self._staging) <= place:
            self._staging.append(torch.empty(0, dtype=lora.flat.dtype, device=device))
        if self._staging[place].numel() < lora.flat.numel() or self._staging[place].dtype != lora.flat.dtype:
            self._staging[place] = torch.empty_like(lora.flat, device=device, pin_memory=False)
        return self._staging[place][: lora.flat.numel()].copy_(lora.flat, non_blocking=True)

    def _weight(self, name: str) -> torch.Tensor:
        """Looked up anew each time: fusing may have moved it."""
        return self._targets[name].weight.data

    def _write(
        self, names: Sequence[str], on_device: Sequence[torch.Tensor], loras: Sequence[tuple[PinnedLora, float]]
    ) -> None:
        if takes_kernel(self._weight(names[0])):
            self._write_by_address(tuple(names), on_device, loras)
            return
        uses: dict[str, list[Term]] = {name: [] for name in names}
        for flat, (lora, scale) in zip(on_device, loras, strict=True):
            for layer in lora.layers:
                uses[layer.name].append((layer.down(flat), layer.up(flat), scale * layer.factor))
        lora_patch(
            [self._weight(name) for name in names], [self._pristine[name] for name in names], list(uses.values())
        )

    def _write_by_address(
        self, names: tuple[str, ...], on_device: Sequence[torch.Tensor], loras: Sequence[tuple[PinnedLora, float]]
    ) -> None:
        """As :meth:`_write`, without a tensor object for each of a thousand matrices."""
        if names not in self._tables:
            if len(self._tables) >= TABLES_MAX:
                self._tables.clear()
            weights, pristine = [self._weight(name) for name in names], [self._pristine[name] for name in names]
            self._tables[names] = LayerTables(weights, pristine)
        place_of = {name: place for place, name in enumerate(names)}
        layer_of, rows = [], []
        for flat, (lora, scale) in zip(on_device, loras, strict=True):
            at = np.array([(layer.up_at, layer.down_at, layer.rank) for layer in lora.layers], dtype=np.int64)
            factors = np.array([scale * layer.factor for layer in lora.layers], dtype=np.float64)
            places = flat.data_ptr() + at[:, :2] * flat.element_size()
            rows.append(np.column_stack([places, at[:, 2], factors.view(np.int64)]))
            layer_of += [place_of[layer.name] for layer in lora.layers]
        order = np.argsort(layer_of, kind="stable")
        n_terms = np.bincount(layer_of, minlength=len(names)).astype(np.int64)
        self._tables[names].patch(np.concatenate(rows)[order], n_terms)
