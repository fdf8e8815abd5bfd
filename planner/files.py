"""Writes a plan's files: each beside its place first, then renamed, so that a reader never sees half a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from traces.problems import one_problem


def make_folder(path: Path) -> Path:
    """The folder, made if it is not there; raises :class:`InputError` if it cannot be made or written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise one_problem(
            f"--out {path}", f"cannot be made: {error.strerror}", "a folder that may be written"
        ) from None
    if not os.access(path, os.W_OK | os.X_OK):  # said before minutes of planning, not after
        raise one_problem(f"--out {path}", "cannot be written", "a folder that may be written")
    return path


def write_texts(folder: Path, texts: Mapping[str, str]) -> list[Path]:
    """Writes UTF-8 files with ``\\n`` line ends; raises :class:`InputError` if the folder cannot be written."""
    written = []
    for name, text in texts.items():
        path = folder / name
        handle, beside = -1, ""
        try:
            handle, beside = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
                stream.write(text)
            Path(beside).chmod(0o644)
            Path(beside).replace(path)
        except OSError as error:
            if beside:
                Path(beside).unlink(missing_ok=True)
            raise one_problem(
                str(path), f"cannot be written: {error.strerror}", "a folder that may be written"
            ) from None
        written.append(path)
    return written
