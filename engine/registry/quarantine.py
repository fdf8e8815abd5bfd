"""Add-ons that were refused for good: why, and the file for inspection, in a folder outside the host tier. Torch-free.

While a record is there the add-on is not fetched again. Removing the record (:meth:`Quarantine.release`) gives it another chance.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engine.registry.store import Source, StoreError

FOLDER_BYTES_MAX: Final = 8 * 2**30
"""Files are kept up to this much in all; records always."""
REASON_CHARACTERS_MAX: Final = 4000


@dataclass(frozen=True, slots=True)
class Quarantined:
    """Why an add-on is refused."""

    add_on_id: str
    reason: str
    at_unix_s: float
    file: str
    """Its key in the store."""
    kept: str
    """Name of the kept file in the folder; empty if there was no room or the store did not give it again."""


@dataclass(frozen=True, slots=True)
class Quarantine:
    """A folder of records, one JSON file each; several processes may use it."""

    folder: Path
    folder_bytes_max: int = FOLDER_BYTES_MAX

    def find(self, add_on_id: str) -> Quarantined | None:
        """The record of an add-on; None if it is not in quarantine."""
        try:
            plain = json.loads(self._record(add_on_id).read_text(encoding="utf-8"))
            return Quarantined(**plain)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            return Quarantined(add_on_id, f"its quarantine record cannot be read: {error}", 0.0, "", "")

    def put(
        self,
        add_on_id: str,
        reason: str,
        file: str,
        open_again: Callable[[], AbstractContextManager[Source]] | None = None,
    ) -> Quarantined:
        """Records a refusal and keeps a copy of what the store holds now, if there is room.

        Raises:
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        kept = self._keep(add_on_id, open_again) if open_again is not None else ""
        entry = Quarantined(add_on_id, reason[:REASON_CHARACTERS_MAX], round(time.time(), 3), file, kept)
        path = self._record(add_on_id)
        beside = path.with_name(f"{path.name}.{os.getpid()}.part")
        plain = {name: getattr(entry, name) for name in entry.__slots__}
        beside.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        beside.replace(path)
        return entry

    def release(self, add_on_id: str) -> bool:
        """Forgets an add-on, its kept file included; False if it was not there."""
        with contextlib.suppress(FileNotFoundError):
            self._copy(add_on_id).unlink()
        try:
            self._record(add_on_id).unlink()
        except FileNotFoundError:
            return False
        return True

    def records(self) -> list[Quarantined]:
        """All records, by id."""
        found = []
        for path in sorted(self.folder.glob("*.json")):
            with contextlib.suppress(OSError, ValueError, TypeError):
                found.append(Quarantined(**json.loads(path.read_text(encoding="utf-8"))))
        return sorted(found, key=lambda entry: entry.add_on_id)

    def _keep(self, add_on_id: str, open_again: Callable[[], AbstractContextManager[Source]]) -> str:
        path = self._copy(add_on_id)
        beside = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with open_again() as source:
                used = sum(item.stat().st_size for item in self.folder.iterdir() if item.is_file())
                if used + source.size_bytes > self.folder_bytes_max:
                    return ""
                buffer = memoryview(bytearray(2**20))
                left = source.size_bytes
                with beside.open("wb") as file:
                    while left and (n := source.readinto(buffer[: min(left, len(buffer))])):
                        file.write(buffer[:n])
                        left -= n
            beside.replace(path)
        except (StoreError, OSError):
            # The record matters; a store that does not give the file a second time must not hide the reason.
            with contextlib.suppress(FileNotFoundError):
                beside.unlink()
            return ""
        return path.name

    def _record(self, add_on_id: str) -> Path:
        return self.folder / f"{_file_name(add_on_id)}.json"

    def _copy(self, add_on_id: str) -> Path:
        return self.folder / f"{_file_name(add_on_id)}.safetensors"


def _file_name(add_on_id: str) -> str:
    is_plain = len(add_on_id) == 64 and set(add_on_id) <= set("0123456789abcdef")
    return add_on_id if is_plain else hashlib.sha256(add_on_id.encode()).hexdigest()
