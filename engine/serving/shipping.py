"""Copies checked LoRA files to base workers of other hosts, which cannot map this host's tier: once a worker, before it is patched in."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from engine.serving.supervisor import Replica
from engine.serving.worker_handle import WorkerHandle

IN_TIER: Final = "tier:"
"""Begins the path of a file that lies in the worker's own tier under this name."""


class Shipping:
    """Copies that are under way; which worker has which is kept with its handle and ends with it."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def path_for(self, rank: WorkerHandle, lora_id: str, path: str | None) -> str | None:
        """Where a rank finds a LoRA that lies at ``path`` here; None if it has to be copied first: ``lora_ready`` follows."""
        if path is None or not rank.host:
            return path
        if rank.files.get(lora_id):
            return IN_TIER + Path(path).name
        if lora_id not in rank.files:
            rank.files[lora_id] = False
            task = asyncio.get_running_loop().create_task(self._copy(rank, lora_id, Path(path)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return None

    def drop(self, replicas: Iterable[Replica], lora_id: str, path: str) -> None:
        """The file is removed from this host's tier: so are its copies."""
        for replica in replicas:
            for rank in replica.ranks:
                if rank.files.pop(lora_id, False):
                    rank.send({"type": "lora_drop", "name": Path(path).name})

    def close(self) -> None:
        """Gives up what is under way."""
        for task in self._tasks:
            task.cancel()

    async def _copy(self, rank: WorkerHandle, lora_id: str, file: Path) -> None:
        try:
            data = await asyncio.to_thread(file.read_bytes)
        except OSError as error:
            rank.files.pop(lora_id, None)
            rank.send(
                {"type": "lora_refused", "lora_id": lora_id, "reason": f"its file cannot be read: {error.strerror}"}
            )
            return
        rank.files[lora_id] = True
        rank.send({"type": "lora_file", "lora_id": lora_id, "name": file.name}, [data])
        rank.send({"type": "lora_ready", "lora_id": lora_id, "path": IN_TIER + file.name})
