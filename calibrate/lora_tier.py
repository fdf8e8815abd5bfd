"""LoRAs on the way that the serving engine takes them: checked out of a store into the host tier, mapped and registered, patched.

The loader's and the worker's own classes (``engine.workers.loader``, ``engine.workers.lora_files``), without their processes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

import torch

from calibrate.clock import DeviceClock
from calibrate.rig import RigSetup
from calibrate.storage import host_tier_parent, lora_file
from engine.lora import PinnedLora
from engine.registry.store import FolderStore
from engine.workers.loader import Loader
from engine.workers.lora_files import DTYPES, LoraFiles
from engine.workers.painter import LoadedLora

KEPT_MAX: Final = 16


class LoraTier:
    """One host tier, and the files that stay mapped, as one worker has them."""

    def __init__(self, setup: RigSetup, dtype: torch.dtype, clock: DeviceClock) -> None:
        self._setup, self._clock = setup, clock
        self._folder = Path(tempfile.mkdtemp(prefix="calibrate-tier-", dir=host_tier_parent(setup)))
        self._files = LoraFiles(dtype, KEPT_MAX, is_cuda=clock.is_cuda)
        self._dtype = next(name for name, kind in DTYPES.items() if kind == dtype)
        self._loaded: dict[tuple[int, int], LoadedLora] = {}

    def get(self, rank: int, index: int) -> PinnedLora:
        """A LoRA with random weights, ready for one copy to the device; fetched and mapped on its first use."""
        key = (rank, index)
        if key not in self._loaded:
            self._loaded[key] = self._fetched(rank, index)
        return self._files.get(self._loaded[key])

    def file(self, rank: int, index: int) -> Path:
        """Its file in the store."""
        return lora_file(self._setup, rank, index)

    def time_fetches(self, rank: int, n_repeats: int, *, is_cold: bool = False) -> list[float]:
        """Seconds from the file of the store to a checked file in the host tier.

        ``is_cold``: the file is dropped from the page cache before each; empty where this file system keeps it there.
        """
        path, values = self.file(rank, 0), []
        loader, lora_id = self._loader(path), _sha256(path)
        for index in range(n_repeats + (not is_cold)):
            if is_cold and not drop_from_page_cache(path):
                return []
            kept = loader.host_tier.glob("*")
            for file in kept:
                file.unlink()
            seconds = self._clock.wall(lambda: loader.fetch(lora_id, {"file": path.name}))
            if index or is_cold:  # the first one imports
                values.append(seconds)
        shutil.rmtree(loader.host_tier)
        return values

    def time_maps(self, rank: int, n_repeats: int) -> list[float]:
        """Seconds from a file in the host tier to weights that the device can copy: mapped, and registered with CUDA."""
        loaded, values = self._fetched(rank, 0), []
        for _ in range(n_repeats):
            files = LoraFiles(DTYPES[self._dtype], KEPT_MAX, is_cuda=self._clock.is_cuda)
            values.append(self._clock.wall(lambda held=files: held.get(loaded)))  # type: ignore[misc]
            files.close()
        return values

    def close(self) -> None:
        """Lets the files go and removes the tier."""
        self._files.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _loader(self, path: Path, tier: Path | None = None) -> Loader:
        tier = tier or Path(tempfile.mkdtemp(dir=self._folder))
        return Loader(tier, self._setup.model, self._dtype, FolderStore(path.parent))

    def _fetched(self, rank: int, index: int) -> LoadedLora:
        path = self.file(rank, index)
        lora_id = _sha256(path)
        return LoadedLora(lora_id, str(self._loader(path, self._folder).fetch(lora_id, {"file": path.name})))


def drop_from_page_cache(path: Path) -> bool:
    """Writes a file out and asks the kernel to forget it; whether it has (not on tmpfs, nor where it is in use)."""
    if not all(hasattr(os, name) for name in ("posix_fadvise", "preadv", "RWF_NOWAIT")):
        return False
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            # a read that must not wait for the disk: it fails if the page is not in memory
            os.preadv(file.fileno(), [bytearray(1)], path.stat().st_size // 2, os.RWF_NOWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
