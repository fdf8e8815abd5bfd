"""The catalogue file while a server runs: read again when it has changed; a broken change keeps the last good one in use."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Final

from engine.catalogue import Catalogue, read_catalogue
from traces.problems import InputError

LOG: Final = logging.getLogger(__name__)


class CatalogueFile:
    """Used from threads, so that a large file does not hold requests up."""

    def __init__(self, path: Path) -> None:
        """Reads the file; raises :class:`InputError` as :func:`engine.catalogue.read_catalogue` does."""
        self._path = path
        self._lock = threading.Lock()
        self._stamp = self._look()  # before reading: a change in between is seen the next time
        self._catalogue = read_catalogue(path)

    def now(self) -> Catalogue:
        """The catalogue: the same object until the file has changed into another good one. What is wrong with it is logged once."""
        with self._lock:
            stamp = self._look()
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._catalogue = read_catalogue(self._path)
                except InputError as error:
                    LOG.warning("the catalogue has changed and cannot be used, the last good one stays: %s", error)
            return self._catalogue

    def reread(self) -> Catalogue:
        """The file as it is; raises :class:`InputError` if it cannot be used."""
        with self._lock:
            self._stamp = self._look()
            self._catalogue = read_catalogue(self._path)
            return self._catalogue

    def _look(self) -> tuple[int, int, int]:
        try:
            state = self._path.stat()
        except OSError:
            return (0, 0, 0)
        return (state.st_ino, state.st_mtime_ns, state.st_size)
