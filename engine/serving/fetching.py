"""Hands LoRA fetches to loader processes, and to another one if a loader is lost under them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from engine.serving.supervisor import Replica

ATTEMPTS_MAX: Final = 2


class FetchListener(Protocol):
    """Who asked: the dispatcher."""

    def lora_fetched(self, lora_id: str, path: str, n_bytes: int) -> None: ...
    def lora_refused(self, lora_id: str, reason: str, *, is_final: bool) -> None: ...


@dataclass(slots=True)
class _Fetch:
    lora_id: str
    n_attempts: int = 0
    worker_id: str = ""
    """Empty: waits for a loader."""


class Fetches:
    """Fetches that have been asked for and not answered."""

    def __init__(
        self,
        replicas: Mapping[str, Replica],
        listener: FetchListener,
        host_tier: Path,
        sources: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._replicas = replicas
        self._listener = listener
        self._host_tier = host_tier
        self._sources = sources
        self._fetches: dict[str, _Fetch] = {}

    def ask(self, lora_id: str) -> None:
        """Fetches a LoRA; one that is on its way is not asked for twice."""
        if lora_id not in self._fetches:
            self._fetches[lora_id] = _Fetch(lora_id)
            self.hand_out()

    def hand_out(self) -> None:
        """Gives what waits to the ready loader with the fewest fetches."""
        loaders = [r for r in self._replicas.values() if r.spec.role == "loader" and r.is_ready]
        if not loaders:
            return
        counts = {r.worker_id: 0 for r in loaders}
        for fetch in self._fetches.values():
            if fetch.worker_id in counts:
                counts[fetch.worker_id] += 1
        for fetch in self._fetches.values():
            if fetch.worker_id:
                continue
            loader = min(loaders, key=lambda r: (counts[r.worker_id], r.worker_id))
            counts[loader.worker_id] += 1
            fetch.worker_id = loader.worker_id
            fetch.n_attempts += 1
            source = dict(self._sources.get(fetch.lora_id, {}))
            loader.send({"type": "fetch", "lora_id": fetch.lora_id, "source": source})

    def said(self, worker_id: str, message: Mapping[str, Any]) -> None:
        """``lora_fetched`` or ``lora_refused`` of a loader."""
        lora_id = message["lora_id"]
        fetch = self._fetches.get(lora_id)
        if fetch is None or fetch.worker_id != worker_id:
            return
        del self._fetches[lora_id]
        if message["type"] == "lora_fetched":
            self._listener.lora_fetched(lora_id, message["path"], message["n_bytes"])
        else:
            self._listener.lora_refused(lora_id, message["reason"], is_final=message["is_final"])

    def loader_gone(self, worker_id: str, reason: str) -> None:
        """Its fetches are tried once more, by whichever loader is ready next."""
        for fetch in [fetch for fetch in self._fetches.values() if fetch.worker_id == worker_id]:
            fetch.worker_id = ""
            if fetch.n_attempts >= ATTEMPTS_MAX:
                del self._fetches[fetch.lora_id]
                self._listener.lora_refused(
                    fetch.lora_id, f"{ATTEMPTS_MAX} loaders were lost while fetching it: {reason}", is_final=False
                )
        self.hand_out()

    def forget(self, lora_id: str) -> None:
        """Nobody waits for it any more."""
        self._fetches.pop(lora_id, None)

    def drop(self, path: str) -> None:
        """Removes a file from the host tier; it may be gone already. Nothing outside the tier is ever removed."""
        file = Path(path)
        if file.parent == self._host_tier:
            file.unlink(missing_ok=True)
