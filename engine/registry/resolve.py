"""What a name in a request means to a tenant, and why it may not be used. Nothing outside the catalogue can be loaded."""

from __future__ import annotations

from typing import Final

from engine.catalogue import NAME, AddOnKind, Catalogue, CatalogueEntry
from traces.problems import InputError, one_problem

KIND_WORDS: Final = {"base": "base model", "controlnet": "ControlNet", "lora": "LoRA"}


def resolve(catalogue: Catalogue, text: str, tenant_id: str, kind: AddOnKind) -> CatalogueEntry:
    """The one version that ``name``, ``name@version`` or an id means to a tenant.

    A plain name means the version that the catalogue states in ``current``, else its only version in production; a version in
    trial is used only by those who name it.

    Raises:
        InputError: unknown, of another kind, not for this tenant, retired, or no version is in production. An entry of other
            tenants gets the same words as one that does not exist.
    """
    name, at, version = text.partition("@")
    if not NAME.fullmatch(name) or (at and not NAME.fullmatch(version)):
        raise _unknown(catalogue, kind, text[:200], tenant_id)
    entry = catalogue.entries.get(name) if not at else None
    if entry is not None and _is_usable_by(entry, tenant_id):
        candidates = [entry]
    else:
        candidates = [item for item in catalogue.versions(name) if _is_usable_by(item, tenant_id)]
        if at:
            candidates = [item for item in candidates if item.version == version]
        elif any(item.name for item in candidates):
            candidates = _meant(catalogue, kind, name, candidates)
    candidates = [item for item in candidates if item.kind == kind]
    if not candidates:
        raise _unknown(catalogue, kind, text, tenant_id)
    if candidates[0].stage == "retired":
        others = [item.title for item in catalogue.versions(candidates[0].name) if item.stage == "production"]
        raise one_problem(
            f"{KIND_WORDS[kind]} {text!r}", "is retired", f"one of {others}" if others else "a version in production",
            "Choose another version.",
        )  # fmt: skip
    return candidates[0]


def usable(catalogue: Catalogue, tenant_id: str = "") -> list[CatalogueEntry]:
    """What a tenant may use, retired versions left out, by kind, name and version."""
    entries = [
        item for item in catalogue.entries.values() if item.stage != "retired" and _is_usable_by(item, tenant_id)
    ]
    return sorted(entries, key=lambda item: (item.kind, item.name or item.id, item.version))


def _meant(catalogue: Catalogue, kind: AddOnKind, name: str, candidates: list[CatalogueEntry]) -> list[CatalogueEntry]:
    stated = catalogue.current.get(name)
    in_production = [item for item in candidates if item.stage == "production"]
    meant = [item for item in in_production if item.version == stated] if stated is not None else in_production
    if len(meant) == 1:
        return meant
    if meant:
        raise one_problem(
            f"{KIND_WORDS[kind]} {name!r}", f"has {len(meant)} versions in production", "one, stated in the catalogue",
            f"Ask for one of {[item.title for item in meant]}.",
        )  # fmt: skip
    if all(item.kind == kind for item in candidates):
        in_trial = [item.title for item in candidates if item.stage == "trial"]
        raise one_problem(
            f"{KIND_WORDS[kind]} {name!r}", "has no version in production for you", "a version in production",
            f"Ask for one of {in_trial}." if in_trial else "Choose another.",
        )  # fmt: skip
    return []


def _is_usable_by(entry: CatalogueEntry, tenant_id: str) -> bool:
    return not entry.tenants or tenant_id in entry.tenants


def _unknown(catalogue: Catalogue, kind: AddOnKind, text: str, tenant_id: str) -> InputError:
    names = sorted({item.name or item.id for item in usable(catalogue, tenant_id) if item.kind == kind})
    shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    return one_problem(
        f"{KIND_WORDS[kind]} {text!r}",
        "is not in the catalogue, or not for you",
        f"one of {shown}" if names else f"a {KIND_WORDS[kind]} of the catalogue, which has none for you",
        "Choose one of them.",
    )
