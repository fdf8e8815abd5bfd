"""Writes an export as one folder: all files beside it first, then one rename, so that nobody ever sees half an export."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from planner.export.provenance import Provenance
from traces.problems import one_problem

MANIFEST: Final = "export.json"
SCHEMA_VERSION: Final = 1
MANIFEST_BYTES_MAX: Final = 2**22


def manifest(provenance: Provenance, targets: tuple[str, ...], notes: tuple[str, ...], texts: Mapping[str, str]) -> str:
    """What the folder holds: provenance, targets, notes, and the SHA-256 of every other file."""
    plain = {
        "schema_version": SCHEMA_VERSION,
        "provenance": provenance.to_plain(),
        "targets": list(targets),
        "notes": list(notes),
        "files": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in sorted(texts.items())},
    }
    return json.dumps(plain, indent=2, ensure_ascii=True) + "\n"


def check_out(out: Path) -> None:
    """Raises :class:`InputError` if ``out`` holds anything that an earlier export did not write; nothing of a user's is lost."""
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise one_problem(f"--out {out}", "is not a folder", "a folder, or a path where nothing is")
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_symlink() or not path.is_dir()}
    strange = sorted(found - _listed(out))
    if strange:
        raise one_problem(
            f"--out {out}", f"holds {strange[0]!r}, which no export wrote or which was changed since" + (" (and more)" if len(strange) > 1 else ""),
            "an empty folder, an earlier export, or a path where nothing is", "Choose another folder",
        )  # fmt: skip


def write_tree(out: Path, texts: Mapping[str, str]) -> list[Path]:
    """Writes UTF-8 files with ``\\n`` line ends under ``out``, in place of an earlier export there.

    The files are complete under a temporary name beside ``out`` before it is renamed. Where an earlier export stood, a
    moment exists in which ``out`` is absent; it never holds a mixture.

    Raises:
        InputError: ``out`` holds something else, or cannot be written; then it is as it was.
    """
    check_out(out)
    beside = Path()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        fresh = beside / "new"
        for name, text in sorted(texts.items()):
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        _swap(fresh, out, beside / "old")
    except OSError as error:
        raise one_problem(
            f"--out {out}", f"cannot be written: {error.strerror}", "a folder that may be written"
        ) from None
    finally:
        if beside != Path():
            shutil.rmtree(beside, ignore_errors=True)
    return [out / name for name in sorted(texts)]


def _swap(fresh: Path, out: Path, old: Path) -> None:
    if not out.exists():
        fresh.replace(out)
        return
    out.replace(old)
    try:
        fresh.replace(out)
    except OSError:
        with contextlib.suppress(OSError):
            old.replace(out)
        raise


def _listed(out: Path) -> set[str]:
    """Files that the folder's manifest says an export wrote, unchanged since."""
    path = out / MANIFEST
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MANIFEST_BYTES_MAX:
        return set()
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {MANIFEST, *(name for name, sha in files.items() if _is_unchanged(out / name, sha))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()


def _is_unchanged(path: Path, sha256: str) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == sha256


def is_writable_parent(out: Path) -> bool:
    """Whether the folder that will hold ``out`` may be written; asked before any work is done."""
    parent = out.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    return os.access(parent, os.W_OK | os.X_OK)
