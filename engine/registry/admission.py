"""From a file of the store to an entry for the catalogue: what an operator runs before anybody may use an add-on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.catalogue import SHA256, AddOnKind, CatalogueEntry, Stage
from engine.registry.checkpoint_check import check_checkpoint
from engine.registry.controlnet_check import check_controlnet
from engine.registry.lora_admission import Expected, Limits, check_lora
from engine.registry.safetensors_header import AddOnRefusedError
from engine.registry.shapes import architecture
from engine.registry.store import Store
from traces.problems import InputError


@dataclass(frozen=True, slots=True)
class Label:
    """What people say of an add-on; the file says the rest."""

    name: str
    version: str
    owner: str = ""
    licence: str = ""
    source: str = ""
    tenants: tuple[str, ...] = ()
    stage: Stage = "trial"


def admit(
    store: Store,
    key: str,
    kind: AddOnKind,
    architecture_name: str,
    label: Label,
    *,
    limits: Limits | None = None,
    progress: Callable[[], None] = lambda: None,
) -> CatalogueEntry:
    """Checks a LoRA's file, or the folder of a ControlNet or a checkpoint, and describes it for ``engine.registry.changes.add``.

    Raises:
        AddOnRefusedError: it must not be used; with the reasons.
        StoreError: the store does not give it.
        InputError: there is no such architecture.
    """
    shapes = architecture(architecture_name)
    rank: int | None = None
    targets: tuple[str, ...] = ()
    if kind == "lora":
        with store.open(key) as source:
            facts = check_lora(source, key, shapes, limits=limits, progress=progress)
        add_on_id, n_bytes, rank, targets = facts.add_on_id, facts.file_bytes, facts.rank, facts.targets
    elif kind == "controlnet":
        found = check_controlnet(store, key, shapes, progress=progress)
        add_on_id, n_bytes = found.add_on_id, found.file_bytes
    else:
        checkpoint = check_checkpoint(store, key, shapes, progress=progress)
        add_on_id, n_bytes = checkpoint.checkpoint_id, checkpoint.file_bytes
    return CatalogueEntry(
        id=add_on_id, kind=kind, architecture=architecture_name, bytes=n_bytes, rank=rank, targets=targets,
        version=label.version, owner=label.owner, tenants=label.tenants, name=label.name, licence=label.licence,
        source=label.source, stage=label.stage, file=key,
    )  # fmt: skip


def verify(store: Store, entry: CatalogueEntry, *, progress: Callable[[], None] = lambda: None) -> InputError | None:
    """Whether the store still holds the files that were admitted; None if so, else why not.

    Entries without a file (random weights, sizes only) have nothing to verify.

    Raises:
        StoreError: the store does not give the file.
        InputError: the entry's architecture has no table.
    """
    if not entry.file or entry.seed is not None:
        return None
    try:
        shapes = architecture(entry.architecture)
        if entry.kind == "lora":
            with store.open(entry.file) as source:
                check_lora(
                    source, entry.file, shapes, expected=Expected(entry.id, entry.bytes or None), progress=progress
                )
        else:
            digest = entry.id if SHA256.fullmatch(entry.id) else None
            check = check_checkpoint if entry.kind == "base" else check_controlnet
            check(store, entry.file, shapes, expected_sha256=digest, progress=progress)
    except AddOnRefusedError as error:
        return error
    return None
