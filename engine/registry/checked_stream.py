"""Reads a safetensors file once, in bounded memory: hashed, checked and converted while it streams in.

The bytes that are hashed are the bytes that are checked and used; nobody can swap the file in between. Hashing runs on one
thread, checking and converting on others (hashlib and numpy release the GIL).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from engine.registry.float_bits import as_bits, is_finite, to_floats
from engine.registry.safetensors_header import (
    INTEGER_BYTES,
    ITEM_BYTES,
    LENGTH_BYTES,
    SafetensorsHeader,
    TensorSpan,
    header_bytes,
    parse_header,
    refuse,
)
from engine.registry.store import Source, StoreError
from traces.problems import Problem

CHUNK_BYTES: Final = 2 * 2**20
N_BUFFERS: Final = 6
"""Chunks in memory at once."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive elements of one tensor, as they stream in."""

    span: TensorSpan
    first: int
    """Index of the first element."""
    n_bytes: int


Consume = Callable[[Piece, memoryview], None]


class CheckedStream:
    """One pass over a file: :meth:`open` reads the header, :meth:`body` the rest."""

    def __init__(self, source: Source, where: str, progress: Callable[[], None] = lambda: None) -> None:
        """Reads nothing yet.

        Args:
            source: the file.
            where: names it in messages.
            progress: called at every chunk.
        """
        self._source = source
        self._where = where
        self._progress = progress
        self._hash = hashlib.sha256()

    def open(self, *, file_bytes_max: int, n_dims_max: int, allows_integers: bool = False) -> SafetensorsHeader:
        """The header, checked; the size is checked before anything is read.

        Raises:
            AddOnRefusedError: with the reason.
            StoreError: the store does not give what it promised.
        """
        size = self._source.size_bytes
        if size > file_bytes_max:
            raise refuse(self._where, f"is oversized: {size} bytes", f"at most {file_bytes_max} bytes")
        start = self._read(min(LENGTH_BYTES + 1, size))
        length = header_bytes(self._where, start, size)
        text = start[LENGTH_BYTES:] + self._read(max(0, LENGTH_BYTES + length - len(start)))
        return parse_header(self._where, text[:length], size, n_dims_max=n_dims_max, allows_integers=allows_integers)

    def body(self, header: SafetensorsHeader, consume: Consume) -> list[Problem]:
        """Streams the tensors through ``consume``, which runs on several threads; every value is checked to be finite before.

        Returns:
            What is wrong with the values, by tensor name.
        """
        problems: dict[str, Problem] = {}

        def check(pieces: list[Piece], chunk: memoryview) -> None:
            at = 0
            for piece in pieces:
                raw = chunk[at : at + piece.n_bytes]
                at += piece.n_bytes
                if piece.span.dtype in INTEGER_BYTES or is_finite(as_bits(raw, piece.span.dtype), piece.span.dtype):
                    consume(piece, raw)
                else:
                    what = f"tensor {piece.span.name!r} holds NaN or infinity"
                    problems[piece.span.name] = Problem(self._where, what, "finite values", "Use another file")

        n_threads = min(4, os.cpu_count() or 1)
        buffers = [bytearray(CHUNK_BYTES) for _ in range(min(N_BUFFERS, 1 + header.body_bytes // CHUNK_BYTES))]
        pending: list[tuple[Future[None], ...]] = [() for _ in buffers]
        with ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(n_threads) as checkers:
            try:
                for i, pieces in enumerate(_chunks(header)):
                    place = i % len(buffers)
                    for future in pending[place]:
                        future.result()
                    chunk = memoryview(buffers[place])[: sum(piece.n_bytes for piece in pieces)]
                    self._fill(chunk)
                    pending[place] = (hasher.submit(self._hash.update, chunk), checkers.submit(check, pieces, chunk))
                for futures in pending:
                    for future in futures:
                        future.result()
            except BaseException:
                hasher.shutdown(cancel_futures=True)
                checkers.shutdown(cancel_futures=True)
                raise
        if self._source.readinto(memoryview(bytearray(1))):
            raise refuse(self._where, "goes on after its end", f"{self._source.size_bytes} bytes")
        return [problems[name] for name in sorted(problems)]

    def sha256(self) -> str:
        """Of everything read so far: of the file, once :meth:`body` has returned."""
        return self._hash.hexdigest()

    def _read(self, n_bytes: int) -> bytes:
        data = bytearray(n_bytes)
        self._fill(memoryview(data))
        self._hash.update(data)
        return bytes(data)

    def _fill(self, view: memoryview) -> None:
        at = 0
        while at < len(view):
            n_read = self._source.readinto(view[at:])
            if n_read <= 0:
                raise StoreError(f"{self._where}: the store ended {len(view) - at} bytes early. Try again.")
            at += n_read
            self._progress()


def scalar(raw: memoryview, dtype: str) -> float:
    """The value of a tensor of one element."""
    return float(to_floats(as_bits(raw, dtype), dtype)[0])


def _chunks(header: SafetensorsHeader) -> Iterator[list[Piece]]:
    """The body cut into runs of whole elements of at most ``CHUNK_BYTES``."""
    pieces: list[Piece] = []
    room = CHUNK_BYTES
    for span in header.spans:
        item = ITEM_BYTES[span.dtype]
        first = 0
        while first < span.n_elements:
            n = min(span.n_elements - first, room // item)
            if n:
                pieces.append(Piece(span, first, n * item))
                first, room = first + n, room - n * item
            if room < 4:
                yield pieces
                pieces, room = [], CHUNK_BYTES
    if pieces:
        yield pieces
