"""Add-on files that are corrupt, truncated, NaN, oversized, mislabelled or missing cost their own request and nothing else.

Real processes with the tiny model: base worker, loader, host tier, quarantine.
"""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from types import MappingProxyType

import numpy as np

from engine.allocation import Allocation, Policies, Pool
from engine.catalogue import Catalogue, CatalogueEntry
from engine.registry.quarantine import Quarantine
from engine.serving.engine import Engine
from engine.serving.job import Job, LoraUse
from engine.serving.settings import EngineSettings
from tests.engine.registry.files import file_of, lora_bytes, tensors_of

LIMIT_S = 120.0


def with_nan(data: bytes) -> bytes:
    tensors = tensors_of(data)
    tensors[list(tensors)[-1]][-1, -1] = np.nan
    return file_of(tensors)


FILES = {
    "good": lora_bytes(seed=0),
    "nan": with_nan(lora_bytes(seed=1)),
    "truncated": lora_bytes(seed=2)[:-100],
    "corrupt": b"\xff" * 5000,
    "oversized": lora_bytes(rank=64, seed=3),
    "mislabelled": lora_bytes(seed=4),
    "missing": lora_bytes(seed=5),
}
REASONS = {
    "nan": "holds NaN",
    "truncated": "is truncated",
    "corrupt": "says that its header has",
    "oversized": "is oversized",
    "mislabelled": "as the catalogue says",
    "missing": "cannot be opened",
}


def entries(store: Path) -> dict[str, CatalogueEntry]:
    """Fills the store; name to entry."""
    found = {}
    for name, data in FILES.items():
        (store / f"{name}.safetensors").write_bytes(data)
        lora_id = hashlib.sha256(data).hexdigest()
        found[name] = CatalogueEntry(lora_id, "lora", architecture="tiny", name=name, file=f"{name}.safetensors")
    (store / "mislabelled.safetensors").write_bytes(lora_bytes(seed=6))
    (store / "missing.safetensors").unlink()
    return found


def test_a_bad_file_costs_its_own_request_and_is_quarantined(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    listed = entries(store)
    catalogue = Catalogue(MappingProxyType({entry.id: entry for entry in listed.values()}))
    # patched in before the first step, so that a LoRA gives the same image whether it had to be fetched or not
    allocation = Allocation((Pool("solo", "base", 1, "cpu"),), policies=Policies(lora_patch_by_step=0))
    settings = EngineSettings(
        tmp_path / "run",
        model="tiny",
        store=str(store),
        options={"loader_file_bytes_max": len(FILES["oversized"]) - 1},
        environment={"OMP_NUM_THREADS": "1"},
    )

    def job(name: str) -> Job:
        loras = (LoraUse(listed[name].id),) if name != "none" else ()
        return Job(name, prompt="a fox", n_steps=4, width_px=64, height_px=64, loras=loras, seed=1)

    async def test() -> None:
        engine = Engine(allocation, settings, catalogue=catalogue)
        try:
            await engine.start()
            before = {
                worker_id: [rank.pid for rank in replica.ranks] for worker_id, replica in engine.fleet.replicas.items()
            }
            outcomes = await asyncio.gather(*(engine.submit(job(name)) for name in ["none", *FILES]))
            by_name = {outcome.request_id: outcome for outcome in outcomes}
            assert {name: outcome.status for name, outcome in by_name.items() if name not in REASONS} == {
                "none": "done", "good": "done"
            }  # fmt: skip
            for name, reason in REASONS.items():
                assert by_name[name].status in {"failed", "rejected"}, by_name[name]
                assert reason in by_name[name].reason, by_name[name]
            none, good = by_name["none"].result, by_name["good"].result
            assert none is not None
            assert good is not None
            assert none.images != good.images
            again = await engine.submit(job("good"))
            assert again.result is not None
            assert again.result.images == good.images
            after = {
                worker_id: [rank.pid for rank in replica.ranks] for worker_id, replica in engine.fleet.replicas.items()
            }
            assert after == before
        finally:
            await engine.stop()

    asyncio.run(asyncio.wait_for(test(), LIMIT_S))
    held = {record.add_on_id: record for record in Quarantine(tmp_path / "run" / "quarantine").records()}
    assert set(held) == {listed[name].id for name in REASONS if name != "missing"}
    for name in REASONS:
        if name != "missing":
            kept = (tmp_path / "run" / "quarantine" / held[listed[name].id].kept).read_bytes()
            assert kept == (store / f"{name}.safetensors").read_bytes()
