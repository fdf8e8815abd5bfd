"""LoRA files that the front copied to a worker of another host: a tier of its own, removed with it or by the next worker there."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

from engine.serving.host_tier import HostTier
from traces.problems import InputError

SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - a private folder is made in it


class LocalTier:
    """Made when the first file comes."""

    def __init__(self) -> None:
        self._tier: HostTier | None = None

    def store(self, name: str, data: bytes) -> str:
        """Keeps a file; empty, or why it cannot be kept."""
        if name != Path(name).name or name.startswith("."):
            return f"its name {name!r} is not allowed"
        try:
            if self._tier is None:
                self._tier = HostTier(SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir()))
            beside = self._tier.folder / f"{name}.part"
            beside.write_bytes(data)
            beside.replace(self._tier.folder / name)
        except (OSError, InputError) as error:
            return f"this host cannot keep it: {error}"
        return ""

    def path(self, name: str) -> str:
        """Where a kept file lies."""
        return str(self._tier.folder / name) if self._tier is not None else name

    def drop(self, name: str) -> None:
        """Removes a file; weights that are mapped stay until they are let go."""
        if self._tier is not None and name == Path(name).name:
            (self._tier.folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Removes everything."""
        if self._tier is not None:
            self._tier.close()
