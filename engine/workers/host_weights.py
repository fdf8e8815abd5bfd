"""The weights of one model in host memory, as its device wants them: in that type and memory order, so that a load only copies.

They are written once, by the check that found them right or from freshly drawn weights, and never again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import nn

from engine.options import EngineOptions
from engine.registry.checked_stream import Consume, Piece
from engine.registry.checkpoint_check import plain_name
from engine.registry.float_bits import as_bits, convert
from engine.registry.safetensors_header import DTYPE_BYTES, INTEGER_BYTES, SafetensorsHeader, TensorSpan
from engine.workers.host_segments import PageLocker, Segment, segments_for

NAMES_OF: Final[Mapping[torch.dtype, str]] = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, slots=True)
class HostLayout:
    """How a process's networks lie on their device."""

    dtype: torch.dtype = torch.float32
    is_channels_last: bool = False
    """Convolutions in NHWC memory."""
    locker: PageLocker | None = None
    """Page-locks what is read; None: nothing is."""


def host_layout(options: EngineOptions) -> HostLayout:
    """What a worker with these options wants."""
    locker = PageLocker(options.device) if options.is_cuda else None
    return HostLayout(options.dtype, options.channels_last, locker)


class HostWeights:
    """One model: its parts (``unet`` …, or ``controlnet`` alone), each a table of tensors by plain name."""

    def __init__(self, layout: HostLayout) -> None:
        self._layout = layout
        self._segments: list[Segment] = []
        self._parts: dict[str, dict[str, torch.Tensor]] = {}
        self._adding = threading.Lock()
        if layout.locker is not None:
            # Nobody copies from them any more: whoever does holds this object until the device has finished.
            weakref.finalize(self, layout.locker.release, self._segments).atexit = False

    @property
    def bytes(self) -> int:
        """Host memory that it takes."""
        return sum(segment.n_bytes for segment in self._segments)

    @property
    def locked_bytes(self) -> int:
        """How much of it is page-locked by now."""
        return sum(segment.n_bytes for segment in self._segments if segment.is_locked)

    def keep(self, part: str, header: SafetensorsHeader) -> Consume:
        """Makes room for a file's tensors; returns what takes its values, in any order, on several threads.

        They are converted and re-laid as they come; what is kept are the bytes that the caller has hashed and checked.
        """
        spans = {plain_name(part, span.name): span for span in header.spans if span.dtype not in INTEGER_BYTES}
        rooms = self._add(part, {name: span.shape for name, span in spans.items()})
        takers = {
            span.name: _Taker(span, rooms[name], NAMES_OF[self._layout.dtype], is_relaid=self._is_relaid(span.shape))
            for name, span in spans.items()
        }

        def take(piece: Piece, raw: memoryview) -> None:
            taker = takers.get(piece.span.name)
            if taker is not None:
                taker.take(piece, raw)

        return take

    @torch.no_grad()
    def copy_from(self, part: str, module: nn.Module) -> None:
        """Takes over a network's weights; when the device has been waited for, they are here."""
        state = module.state_dict().items()
        held = {plain_name(part, name): tensor for name, tensor in state if tensor.is_floating_point()}
        self._add(part, {name: tuple(tensor.shape) for name, tensor in held.items()})
        for name, room in self._parts[part].items():
            # re-laid where it is: the device does that quickly
            order = torch.channels_last if self._is_relaid(tuple(room.shape)) else torch.contiguous_format
            room.copy_(held[name].to(self._layout.dtype).contiguous(memory_format=order), non_blocking=True)

    @torch.no_grad()
    def copy_into(self, part: str, module: nn.Module) -> None:
        """Writes the weights over a network's own, in its type and memory order; waited for by the caller."""
        held = {plain_name(part, name): tensor for name, tensor in module.state_dict().items()}
        for name, tensor in self._parts[part].items():
            into = held[name]
            # Old files keep the autoencoder's attention as 1x1 convolutions.
            into.copy_(tensor if tensor.shape == into.shape else tensor.view(into.shape), non_blocking=True)

    def _is_relaid(self, shape: tuple[int, ...]) -> bool:
        """Whether the memory order of a tensor is not that of a file: with one column or one pixel it is the same."""
        return self._layout.is_channels_last and len(shape) == 4 and shape[1] > 1 and shape[2:] != (1, 1)

    def _add(self, part: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        """Room for tensors; the bits of each, flat, in its memory order."""
        item = self._layout.dtype.itemsize
        segments, places = segments_for([int(np.prod(shape, dtype=np.int64)) * item for shape in shapes.values()])
        tensors, rooms = {}, {}
        for (name, shape), (number, at) in zip(shapes.items(), places, strict=True):
            n_bytes = int(np.prod(shape, dtype=np.int64)) * item
            raw = segments[number].bytes[at : at + n_bytes]
            rooms[name] = raw.view(np.uint32 if item == 4 else np.uint16)
            flat = torch.from_numpy(raw).view(self._layout.dtype)
            if self._is_relaid(shape):
                rows, columns, height, width = shape
                tensors[name] = flat.view(rows, height, width, columns).permute(0, 3, 1, 2)
            else:
                tensors[name] = flat.view(shape)
        with self._adding:  # parts are read at the same time
            self._segments += segments
            self._parts[part] = tensors
        if self._layout.locker is not None:
            self._layout.locker.lock(segments)
        return rooms


class _Taker:
    """Puts the elements of one tensor where they belong."""

    def __init__(self, span: TensorSpan, room: np.ndarray, wanted: str, *, is_relaid: bool) -> None:
        self._shape = span.shape
        self._n_elements = span.n_elements
        self._wanted = wanted
        self._room = room
        self._is_relaid = is_relaid
        self._lock = threading.Lock()
        self._staged: np.ndarray | None = None
        self._n_taken = 0

    def take(self, piece: Piece, raw: memoryview) -> None:
        dtype = piece.span.dtype
        n = piece.n_bytes // DTYPE_BYTES[dtype]
        into = self._room
        if self._is_relaid:
            with self._lock:
                if self._staged is None:
                    self._staged = np.empty_like(self._room)
                into = self._staged
        into[piece.first : piece.first + n] = convert(as_bits(raw, dtype), dtype, self._wanted)
        if not self._is_relaid:
            return
        with self._lock:
            self._n_taken += n
            is_whole = self._n_taken == self._n_elements
        if is_whole:
            rows, columns, *window = self._shape
            n_pixels = int(np.prod(window))
            self._room.reshape(rows, n_pixels, columns)[:] = into.reshape(rows, columns, n_pixels).transpose(0, 2, 1)
            self._staged = None
