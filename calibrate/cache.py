"""Takes Inductor's compile cache from one machine to the next as a few small files."""

from __future__ import annotations

import io
import lzma
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from traces.problems import one_problem

PIECE_BYTES: Final = 15 * 2**20
PIECES_MAX: Final = 5
STREAM_BYTES: Final = 16 * 2**20
PASSING: Final = frozenset({".ttir", ".ttgir", ".llir", ".ptx", ".source"})
STEM: Final = "inductor-cache.tar.xz"


def pack_cache(cache: Path, out: Path, pieces_max: int = PIECES_MAX) -> list[Path]:
    """Writes ``inductor-cache.tar.xz.0`` … into ``out``.

    Triton's intermediate code is left out, only its binaries are loaded; if that is still too much, so is Triton's whole
    folder, because Inductor's entries bundle their kernels.

    Raises:
        InputError: the cache needs more than ``pieces_max`` pieces even so; nothing is left behind.
    """
    packed = b""
    for keeps_triton in (True, False):
        packed = _compressed(_archive(cache, keeps_triton=keeps_triton))
        if len(packed) <= pieces_max * PIECE_BYTES:
            break
    count = -(-len(packed) // PIECE_BYTES)
    if count > pieces_max:
        raise one_problem(
            str(out), f"the compile cache packs to {len(packed)} bytes", f"at most {pieces_max} x {PIECE_BYTES}"
        )
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for index in range(count):
        path = out / f"{STEM}.{index}"
        path.write_bytes(packed[index * PIECE_BYTES : (index + 1) * PIECE_BYTES])
        written.append(path)
    return written


def _archive(cache: Path, *, keeps_triton: bool) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(cache.rglob("*")):
            inside = path.relative_to(cache)
            in_triton = inside.parts[0] == "triton"
            # locks and half-written files are of no use elsewhere
            is_passing = path.suffix in PASSING or path.suffix == ".lock" or ".tmp" in path.name
            if path.is_file() and not is_passing and (keeps_triton or not in_triton):
                archive.add(path, arcname=str(inside), recursive=False)
    return buffer.getvalue()


def _compressed(data: bytes) -> bytes:
    """One xz stream after the other, compressed on all cores (lzma releases the interpreter lock)."""
    parts = [data[at : at + STREAM_BYTES] for at in range(0, len(data), STREAM_BYTES)]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return b"".join(pool.map(lambda part: lzma.compress(part, preset=4), parts))


def unpack_cache(source: Path, cache: Path) -> int:
    """Restores a packed cache into the folder ``cache``; returns the number of files.

    ``source`` is the folder with the pieces, or one file that holds all of them.

    Raises:
        InputError: there are no pieces, one is missing, or they are damaged.
    """
    pieces = [source] if source.is_file() else sorted(source.glob(f"{STEM}.*"), key=lambda path: int(path.suffix[1:]))
    if not pieces:
        raise one_problem(
            str(source), "holds no compile cache", f"files named {STEM}.0 …", "Name the folder they are in."
        )
    if source.is_dir() and [path.suffix for path in pieces] != [f".{index}" for index in range(len(pieces))]:
        raise one_problem(str(source), f"has the pieces {[path.name for path in pieces]}", "every piece from 0")
    packed = b"".join(path.read_bytes() for path in pieces)
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(fileobj=io.BytesIO(lzma.decompress(packed)), mode="r") as archive:
            archive.extractall(cache, filter="data")
            return len(archive.getnames())
    except (lzma.LZMAError, tarfile.TarError) as error:
        raise one_problem(str(source), f"is damaged: {error}", "every piece as it was written") from None
