"""The work path of a loader: fetches one LoRA after the other and says how it went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.workers.harness import Harness
from engine.workers.setup import Fetcher, RefusedError, WorkerSetup, make_fetcher


class LoaderProcess:
    """Serves until told to stop."""

    def __init__(self, harness: Harness, setup: WorkerSetup) -> None:
        self._harness = harness
        harness.listen()
        self._fetcher: Fetcher = make_fetcher(setup, harness.progress)

    def run(self) -> None:
        """Serves until told to stop."""
        harness = self._harness
        harness.ready({}, {})
        while True:
            harness.idle()
            frame = harness.take()
            if frame is None:
                continue
            message = frame[0]
            if message["type"] == "fetch":
                harness.progress("fetch")
                self._fetch(message["lora_id"], message["source"])
            elif message["type"] == "stop":
                return

    def _fetch(self, lora_id: str, source: Mapping[str, Any]) -> None:
        try:
            path = self._fetcher.fetch(lora_id, source)
            n_bytes = path.stat().st_size
        except RefusedError as error:
            self._harness.send({
                "type": "lora_refused", "lora_id": lora_id, "reason": str(error), "is_final": error.is_final
            })  # fmt: skip
            return
        self._harness.send({"type": "lora_fetched", "lora_id": lora_id, "path": str(path), "n_bytes": n_bytes})
