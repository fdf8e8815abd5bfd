"""Opening a user's file within limits, and writing one beside the target so that it is either whole or not there."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from traces.problems import one_problem

MIB: Final = 1024**2


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """How much of a file is accepted; checked before its content is interpreted."""

    file_bytes: int = 1024 * MIB
    decompressed_bytes: int = 4096 * MIB
    rows: int = 10_000_000


DEFAULT_LIMITS: Final = ReadLimits()


def checked_file(path: Path, limits: ReadLimits = DEFAULT_LIMITS) -> Path:
    """The path, if it is a readable file that is not too large.

    Raises:
        InputError: it is missing, a folder, empty, unreadable or larger than ``limits.file_bytes``.
    """
    try:
        if not path.exists():
            raise one_problem(str(path), "there is no such file", repair="Check the path")
        if not path.is_file():
            raise one_problem(str(path), "is not a file", "a file")
        size = path.stat().st_size
        if size == 0:
            raise one_problem(str(path), "is empty (0 bytes)", "a file with requests")
        if size > limits.file_bytes:
            raise one_problem(str(path), f"has {size} bytes", f"at most {limits.file_bytes} bytes", "Split the file")
        with path.open("rb"):
            pass
    except OSError as error:
        raise one_problem(str(path), f"cannot be opened: {error.strerror or error}") from error
    return path


def read_bytes(path: Path, limits: ReadLimits = DEFAULT_LIMITS) -> bytes:
    """Content of a file, decompressed if its name ends in ``.gz``; stops at the limit instead of filling the memory.

    Raises:
        InputError: see :func:`checked_file`; also a damaged gzip stream, and more than ``limits.decompressed_bytes``.
    """
    checked_file(path, limits)
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path, "rb") as stream:
            content = stream.read(limits.decompressed_bytes + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise one_problem(
            str(path), f"is not a whole gzip file: {error}", repair="Fetch or compress it again"
        ) from error
    except OSError as error:
        raise one_problem(str(path), f"cannot be read: {error.strerror or error}") from error
    if len(content) > limits.decompressed_bytes:
        allowed = f"at most {limits.decompressed_bytes} bytes"
        raise one_problem(str(path), "is too large once decompressed", allowed, "Split the file")
    return content


def read_text(path: Path, limits: ReadLimits = DEFAULT_LIMITS) -> str:
    """Like :func:`read_bytes`, decoded from UTF-8 (a byte order mark is dropped).

    Raises:
        InputError: also where the content is not UTF-8, naming the line.
    """
    content = read_bytes(path, limits)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"byte 0x{content[error.start]:02x} is not UTF-8 text"
        raise one_problem(f"{path} line {line}", what, "UTF-8", "Save the file as UTF-8") from error


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Gives a temporary path in the same folder; renames it to ``path`` on success, removes it otherwise.

    Raises:
        InputError: the folder is missing or nothing can be written there.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        beside.replace(path)
    except OSError as error:
        raise one_problem(
            str(path),
            f"cannot be written: {error.strerror or error}",
            repair="Check that the folder exists and is yours",
        ) from error
    finally:
        with suppress(OSError):  # on a read-only disk nothing is left to remove, and what is wrong is said above
            beside.unlink(missing_ok=True)
