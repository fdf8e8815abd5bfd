"""The layout in which a checked LoRA lies in the host tier: one file that workers map and copy to a device as it is.

    magic (8 bytes) · header length (8 bytes, little endian) · JSON header · spaces up to a page · matrices

The matrices are in the network's type, each at a multiple of 16 bytes (tensor cores load aligned), so nothing is left to parse,
check or convert when a request needs them. A file is written beside and renamed: under its final name it is whole.
Torch-free; ``FlatLayer`` has the fields of ``engine.lora.PinnedLayer``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from traces.problems import InputError, Problem

MAGIC: Final = b"dplora\x00\x01"
"""The last byte is the version of the layout."""
ALIGN_BYTES: Final = 16
PAGE_BYTES: Final = 4096
HEADER_BYTES_MAX: Final = 8 * 2**20
ITEM_BYTES: Final[Mapping[str, int]] = {"F32": 4, "F16": 2, "BF16": 2}
"""Types a network's weights may have, by safetensors' names."""
PART_SUFFIX: Final = ".part"
_PREFIX_BYTES: Final = len(MAGIC) + 8
_LAYER_FIELDS: Final = ("name", "rank", "n_out", "n_in", "down_at", "up_at", "factor")


class FlatLayoutError(InputError):
    """A file of the host tier that is not in this layout."""


@dataclass(frozen=True, slots=True)
class FlatLayer:
    """Where one layer's pair lies: ``W += scale · factor · up @ down``."""

    name: str
    """The module's name in the UNet."""
    rank: int
    n_out: int
    n_in: int
    down_at: int
    """Index of the first element of ``down`` ``[rank, in]``, counted in elements of the body."""
    up_at: int
    """Likewise of ``up`` ``[out, rank]``."""
    factor: float
    """``alpha / rank``."""


@dataclass(frozen=True, slots=True)
class FlatHeader:
    """What a file says of itself."""

    add_on_id: str
    """sha256 of the safetensors file it was made from, or the catalogue's id of random weights."""
    architecture: str
    dtype: str
    """``BF16``, ``F16`` or ``F32``."""
    n_elements: int
    """Of the whole body, gaps for alignment included."""
    layers: tuple[FlatLayer, ...]
    """Ordered by name."""

    @property
    def rank(self) -> int:
        """The largest rank of all layers."""
        return max(layer.rank for layer in self.layers)

    @property
    def body_bytes(self) -> int:
        """Bytes to copy to the device."""
        return self.n_elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, eq=False)
class FlatLora:
    """A mapped file. The mapping lives as long as :attr:`body` or a view of it, also after the file is unlinked."""

    header: FlatHeader
    body: np.ndarray
    """uint8 ``[header.body_bytes]``, at a page boundary. numpy has no bf16: torch views it as the type in the header."""

    @property
    def bytes(self) -> int:
        """Bytes to copy to the device."""
        return self.header.body_bytes


def layout(
    add_on_id: str, architecture: str, dtype: str, pairs: Sequence[tuple[str, int, int, int, float]]
) -> FlatHeader:
    """Places ``(layer, rank, n_out, n_in, factor)`` one after the other, by layer name, ``down`` before ``up``."""
    step = ALIGN_BYTES // ITEM_BYTES[dtype]
    layers, at = [], 0
    for name, rank, n_out, n_in, factor in sorted(pairs):
        down_at = at
        up_at = down_at + -(-rank * n_in // step) * step
        at = up_at + -(-n_out * rank // step) * step
        layers.append(FlatLayer(name, rank, n_out, n_in, down_at, up_at, factor))
    return FlatHeader(add_on_id, architecture, dtype, at, tuple(layers))


class FlatWriter:
    """A file that is being written under a name of its own; see :func:`write_flat_lora`."""

    def __init__(self, descriptor: int, header: FlatHeader) -> None:
        # Factors (alpha / rank) may be known only when the last tensor has been read: room for the longest float is kept.
        longest = _encode(header, factor=-math.pi * 1e-300)
        self._header = header
        self._descriptor = descriptor
        self._body_at = -(-(_PREFIX_BYTES + len(longest)) // PAGE_BYTES) * PAGE_BYTES
        os.ftruncate(descriptor, self._body_at + header.body_bytes)

    def put(self, at_bytes: int, values: np.ndarray) -> None:
        """Writes a contiguous piece at ``at_bytes`` of the body. Raises OSError, for example if the host tier is full."""
        view = values.data.cast("B")
        at = self._body_at + at_bytes
        while view:
            n_written = os.pwrite(self._descriptor, view, at)
            view, at = view[n_written:], at + n_written

    def finish(self, factors: Mapping[str, float] | None = None, add_on_id: str = "") -> None:
        """Writes the header; call it last.

        Args:
            factors: layer to ``alpha / rank`` where it differs from the layout's.
            add_on_id: if it was not known before.
        """
        factors = factors or {}
        header = dataclasses.replace(
            self._header,
            add_on_id=add_on_id or self._header.add_on_id,
            layers=tuple(
                dataclasses.replace(layer, factor=factors.get(layer.name, layer.factor))
                for layer in self._header.layers
            ),
        )
        room = self._body_at - _PREFIX_BYTES
        text = _encode(header).ljust(room)
        if len(text) > room:
            raise ValueError(f"header of {len(text)} bytes, room for {room}: the id is longer than the layout's")
        os.pwrite(self._descriptor, MAGIC + room.to_bytes(8, "little") + text, 0)


@contextmanager
def write_flat_lora(path: Path, header: FlatHeader) -> Iterator[FlatWriter]:
    """Opens a new file beside ``path`` and renames it when the block ends well; otherwise it is removed.

    Raises:
        OSError: the folder is missing, or the host tier is full.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}{PART_SUFFIX}")
    descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            yield FlatWriter(descriptor, header)
        finally:
            os.close(descriptor)
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
        raise


def map_flat_lora(path: Path, *, is_writable: bool = False) -> FlatLora:
    """Maps a file without copying it; pages are shared by all workers of the host.

    Args:
        path: the file.
        is_writable: map it so that CUDA can register (pin) the pages without copying them and torch accepts the array
            without a warning; nobody writes to it.

    Raises:
        FlatLayoutError: the file is missing, or not in this layout.
    """
    try:
        with path.open("r+b" if is_writable else "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < PAGE_BYTES:
                raise _wrong(path, f"is {size} bytes", "a whole file")
            access = mmap.ACCESS_WRITE if is_writable else mmap.ACCESS_READ
            mapping = mmap.mmap(file.fileno(), size, access=access)
    except OSError as error:
        raise _wrong(path, f"cannot be mapped: {error.strerror}", "a readable file") from None
    header, body_at = _decode(path, mapping, size)
    body = np.frombuffer(mapping, dtype=np.uint8, count=header.body_bytes, offset=body_at)
    return FlatLora(header, body)


def read_flat_header(path: Path) -> FlatHeader:
    """The header alone; raises as :func:`map_flat_lora` does."""
    return map_flat_lora(path).header


def flat_name(add_on_id: str, architecture: str, dtype: str) -> str:
    """The file's name in the host tier; it carries the identity, so a name never means two contents."""
    return f"{add_on_id}.{architecture}.{dtype.lower()}.flat"


def _encode(header: FlatHeader, factor: float | None = None) -> bytes:
    plain: dict[str, Any] = {
        "add_on_id": header.add_on_id,
        "architecture": header.architecture,
        "dtype": header.dtype,
        "n_elements": header.n_elements,
        "layers": [
            [*(getattr(layer, name) for name in _LAYER_FIELDS[:-1]), layer.factor if factor is None else factor]
            for layer in header.layers
        ],
    }
    return json.dumps(plain, separators=(",", ":")).encode()


def _decode(path: Path, mapping: mmap.mmap, size: int) -> tuple[FlatHeader, int]:
    if mapping[: len(MAGIC)] != MAGIC:
        raise _wrong(path, f"begins with {mapping[: len(MAGIC)]!r}", f"{MAGIC!r}")
    length = int.from_bytes(mapping[len(MAGIC) : _PREFIX_BYTES], "little")
    body_at = _PREFIX_BYTES + length
    if length > HEADER_BYTES_MAX or body_at > size or body_at % PAGE_BYTES:
        raise _wrong(path, f"says that its header has {length} bytes", f"at most {HEADER_BYTES_MAX}, up to a page")
    try:
        plain = json.loads(mapping[_PREFIX_BYTES:body_at])
        header = FlatHeader(
            plain["add_on_id"],
            plain["architecture"],
            plain["dtype"],
            int(plain["n_elements"]),
            tuple(FlatLayer(*item) for item in plain["layers"]),
        )
        is_inside = all(
            at >= 0 and n > 0 and at + n <= header.n_elements and at * ITEM_BYTES[header.dtype] % ALIGN_BYTES == 0
            for layer in header.layers
            for at, n in ((layer.down_at, layer.rank * layer.n_in), (layer.up_at, layer.n_out * layer.rank))
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _wrong(path, f"has a broken header: {error!r}", "the header that write_flat_lora writes") from None
    if not is_inside or not header.layers or body_at + header.body_bytes != size:
        raise _wrong(path, f"is {size} bytes", f"{body_at + header.body_bytes}, every matrix inside and aligned")
    return header, body_at


def _wrong(path: Path, what: str, allowed: str) -> FlatLayoutError:
    return FlatLayoutError(Problem(str(path), what, allowed, "Fetch the LoRA again"))
