"""What a replay leaves beside its tables so that it can be simulated: the allocation, and what was where when the clock started.

``allocation.json`` is the allocation that ran. ``start.json`` says which models each worker held, and which LoRAs the host tier
held, after the warm-up; after the replay also the bytes of every LoRA that the tier then held. A simulation that begins empty would
load what the engine had.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from engine.allocation import Allocation, to_json
from traces.files import written_beside

SCHEMA_VERSION: Final = 1
ALLOCATION_FILE: Final = "allocation.json"
START_FILE: Final = "start.json"


def start_state(engine: object) -> dict[str, Any]:
    """What an engine holds now, as JSON values; of an engine that cannot be looked into, nothing.

    ``workers``: worker id to ``base_model_ids`` and ``controlnet_ids``, ``lora_ids``: of the host tier; all least recently used first.
    """
    state: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "workers": {}, "lora_ids": [], "lora_bytes": {}}
    replicas: Mapping[str, Any] = getattr(engine, "replicas", {})
    for worker_id, replica in sorted(replicas.items()):
        if replica.spec.role == "loader" or not replica.ranks:
            continue
        held = replica.ranks[0].resident
        state["workers"][worker_id] = {
            name: [str(each) for each in held.get(name, ())] for name in ("base_model_ids", "controlnet_ids")
        }
    dispatcher = getattr(engine, "dispatcher", None)
    if dispatcher is not None:
        state["lora_ids"] = list(dispatcher.loras.held())
        state["lora_bytes"] = dispatcher.loras.held()
    settings = getattr(engine, "settings", None)
    if settings is not None:
        state["model"] = settings.model
        state["n_loaders"] = settings.n_loaders
        state["has_store"] = bool(settings.store)
    return state


def with_later_sizes(state: Mapping[str, Any], engine: object) -> dict[str, Any]:
    """The state with the bytes of LoRAs that came in meanwhile."""
    later = start_state(engine)["lora_bytes"]
    return {**state, "lora_bytes": dict(sorted({**state["lora_bytes"], **later}.items()))}


def write_state(state: Mapping[str, Any], engine: object, folder: Path) -> None:
    """Writes ``start.json``, and ``allocation.json`` if the engine says what it runs."""
    allocation = getattr(engine, "allocation", None)
    texts = {START_FILE: json.dumps(state, indent=2, sort_keys=True, ensure_ascii=False) + "\n"}
    if isinstance(allocation, Allocation):
        texts[ALLOCATION_FILE] = to_json(allocation)
    for name, text in texts.items():
        with written_beside(folder / name) as beside:
            beside.write_text(text, encoding="utf-8")
