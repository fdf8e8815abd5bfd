"""The folder in shared memory that holds checked LoRA files: private to one engine, removed with it, or by the next one."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

from traces.problems import one_problem

PREFIX: Final = "diffplan-tier-"
LOCK: Final = ".in-use"
ROOM_RATIO: Final = 0.9


class HostTier:
    """Holds a lock for as long as the engine's process lives; folders whose lock nobody holds are left-overs."""

    def __init__(self, parent: Path) -> None:
        """Makes the folder, after removing those of engines that were killed. Raises :class:`InputError`."""
        try:
            remove_left_overs(parent)
            self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            self._lock = _locked(self.folder)
        except OSError as error:
            raise one_problem(
                "host tier", f"{parent} cannot be used: {error.strerror}", "a writable folder", "Choose another."
            ) from None

    def room_bytes(self) -> int:
        """What may be filled of the file system: the rest is for fetches under way and for others."""
        return int(shutil.disk_usage(self.folder).free * ROOM_RATIO)

    def close(self) -> None:
        """Removes the folder; may be called twice."""
        if self._lock is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def remove_left_overs(parent: Path) -> list[Path]:
    """Removes folders of engines of this user that are gone; returns them."""
    removed = []
    for folder in sorted(parent.glob(f"{PREFIX}*")):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = _locked(folder)
        except OSError:
            continue  # another engine made, locked or removed it at this moment
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
            removed.append(folder)
    return removed


def _locked(folder: Path) -> int | None:
    """Takes the folder's lock; None if an engine that lives holds it. Children do not inherit it."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
