"""Which models and add-ons a tenant may name, and what a name means now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.catalogue import AddOnKind, Catalogue, CatalogueEntry
from engine.registry.resolve import resolve, usable


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One entry as ``GET /v1/models`` shows it."""

    name: str
    entry: CatalogueEntry

    def to_plain(self) -> dict[str, Any]:
        """The fields of OpenAI's model object, and ours."""
        entry = self.entry
        return {
            "id": self.name, "object": "model", "created": 0, "owned_by": entry.owner or "local",
            "kind": entry.kind, "version": entry.version, "architecture": entry.architecture, "stage": entry.stage,
            "digest": entry.id,
        }  # fmt: skip


class CatalogueAccess:
    """The catalogue as the front door asks it. Holds the one in force; replacing it is atomic."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue

    def resolve(self, kind: AddOnKind, text: str, tenant_id: str) -> CatalogueEntry:
        """The entry that ``name``, ``name@version`` or an id means to a tenant.

        Raises:
            InputError: it is not listed, not for this tenant, of another kind or retired.
        """
        return resolve(self.catalogue, text, tenant_id, kind)

    def models(self, tenant_id: str) -> Sequence[ModelCard]:
        """What a tenant may name: plain names, and ``name@version`` for versions that no plain name means."""
        entries = usable(self.catalogue, tenant_id)
        in_production: dict[str, list[str]] = {}
        for entry in entries:
            if entry.stage == "production":
                in_production.setdefault(entry.name or entry.id, []).append(entry.version)
        cards = []
        for entry in entries:
            name = entry.name or entry.id
            versions = in_production.get(name, [])
            meant = self.catalogue.current.get(name, versions[0] if len(versions) == 1 else None)
            is_meant = entry.stage == "production" and entry.version == meant
            cards.append(ModelCard(name if is_meant else entry.title, entry))
        return cards
