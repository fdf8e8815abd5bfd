"""Faults that a test tells featherweight workers to have, by making files in a folder."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engine.workers.setup import WorkerSetup

POLL_S: Final = 0.005


@dataclass(slots=True)
class ToldFaults:
    """Faults that a test asks for by making files in a folder; without the folder there are none."""

    folder: Path | None
    worker_id: str

    def start(self) -> None:
        """``WORKER.crash``: dies instead of getting ready. ``WORKER.never_ready``: hangs instead."""
        if self._has("crash"):
            raise RuntimeError("told to crash")
        while self._has("never_ready"):
            time.sleep(POLL_S)

    def step(self) -> None:
        """``WORKER.stuck``: the work path stands still, the heartbeat does not."""
        while self._has("stuck"):
            time.sleep(POLL_S)

    def _has(self, fault: str) -> bool:
        return self.folder is not None and (self.folder / f"{self.worker_id}.{fault}").exists()


def told_faults(setup: WorkerSetup) -> ToldFaults:
    """Those of a worker."""
    folder = setup.options.get("faults_dir")
    return ToldFaults(Path(folder) if folder else None, setup.worker_id)
