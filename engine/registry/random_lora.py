"""LoRAs with random weights, for tests, benchmarks and replays of traces whose files nobody has: a real safetensors file from a seed.

They pass through the same checks as any other file. Weights are drawn from one block of normal numbers, shifted for every
matrix, so that a file of 186 MB comes at memory speed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from engine.registry.safetensors_header import DTYPE_BYTES, LENGTH_BYTES
from engine.registry.shapes import Architecture

RANK_DEFAULT: Final = {"sdxl": 64}
"""By architecture; 4 for the others."""
PROJECTIONS: Final = (".to_q", ".to_k", ".to_v", ".to_out.0")
"""What training scripts patch by default."""
BLOCK_ELEMENTS: Final = 2**19


class RandomLora:
    """A source (``engine.registry.store.Source``) of a made-up fp16 file with diffusers' key names."""

    def __init__(self, architecture: Architecture, rank: int | None, seed: int) -> None:
        rank = rank or RANK_DEFAULT.get(architecture.name, 4)
        self._seed = seed
        self._shapes: list[tuple[str, tuple[int, int], float]] = []
        for layer, (n_out, n_in) in sorted(architecture.lora_targets.items()):
            if layer.endswith(PROJECTIONS):
                self._shapes.append((f"unet.{layer}.lora_A.weight", (rank, n_in), n_in**-0.5))
                self._shapes.append((f"unet.{layer}.lora_B.weight", (n_out, rank), 0.3 * rank**-0.5))
        table: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, shape, _ in self._shapes:
            n_bytes = shape[0] * shape[1] * DTYPE_BYTES["F16"]
            table[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + n_bytes]}
            at += n_bytes
        text = json.dumps(table, separators=(",", ":")).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        self._start = len(text).to_bytes(LENGTH_BYTES, "little") + text
        self.size_bytes = len(self._start) + at
        self._parts = self._bytes()
        self._rest = memoryview(b"")

    def readinto(self, view: memoryview, /) -> int:
        """See :class:`engine.registry.store.Source`."""
        if not self._rest:
            self._rest = next(self._parts, memoryview(b""))
        n = min(len(view), len(self._rest))
        view[:n] = self._rest[:n]
        self._rest = self._rest[n:]
        return n

    def _bytes(self) -> Iterator[memoryview]:
        yield memoryview(self._start)
        block = np.random.default_rng(self._seed).standard_normal(BLOCK_ELEMENTS, dtype=np.float32)
        scaled: dict[float, np.ndarray] = {}
        for i, (_, (n_rows, n_columns), scale) in enumerate(self._shapes):
            if scale not in scaled:
                scaled[scale] = (block * np.float32(scale)).astype(np.float16)
            values = scaled[scale]
            # an odd stride, so that no two matrices, and no two rows of one, begin at the same place of the block
            at, left = i * 40_503 % BLOCK_ELEMENTS, n_rows * n_columns
            while left:
                part = values[at : at + left]
                yield part.data.cast("B")
                at, left = 0, left - part.size


def seed_of(add_on_id: str) -> int:
    """The seed of an id that has no file: 63 bits of its sha256."""
    return int.from_bytes(hashlib.sha256(add_on_id.encode()).digest()[:8], "big") >> 1


def write_random_lora(path: Path, architecture: Architecture, rank: int | None = None, seed: int = 0) -> str:
    """Writes such a file and returns its sha256; the same arguments give the same bytes."""
    source = RandomLora(architecture, rank, seed)
    digest = hashlib.sha256()
    beside = path.with_name(path.name + ".part")
    buffer = memoryview(bytearray(2**20))
    with beside.open("wb") as file:
        while n := source.readinto(buffer):
            digest.update(buffer[:n])
            file.write(buffer[:n])
    beside.replace(path)
    return digest.hexdigest()
