"""What may be loaded (Catalogue): every base model, ControlNet and LoRA with its identity, versions, owner and tenants. Plain JSON.

Torch-free and pydantic-free, because the planner and the GPU host both read it. Changing it: ``engine.registry.changes``;
what a name means to a tenant: ``engine.registry.resolve``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

from engine.json_records import RecordReader, read_json
from traces.problems import InputError, Problem

SCHEMA_VERSION: Final = 2
SCHEMA_VERSIONS_READ: Final = (1, 2)
"""1 had neither names, stages, licences, sources nor files: its ids are names of what the planner knows by size only."""
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+-]{0,199}")
"""Ids, names and versions. No ``@`` (it parts name and version), no space or control character."""
SEED_PREFIX: Final = "seed:"
SHA256: Final = re.compile(r"[0-9a-f]{64}")

AddOnKind = Literal["base", "controlnet", "lora"]
Stage = Literal["trial", "production", "retired"]
"""``trial``: only by ``name@version`` or id. ``production``: a plain name may mean it. ``retired``: refused, kept for the record."""


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One version of one base model, ControlNet or LoRA that may be used."""

    id: str
    """sha256 of its file in lower-case hex, or a name of its own where there is no single file (folders, random weights)."""
    kind: AddOnKind
    architecture: str = "sdxl"
    bytes: int = 0
    rank: int | None = None
    targets: tuple[str, ...] = ()
    """LoRA: the parts of the network it patches, such as ``attn1.to_q``."""
    version: str = ""
    owner: str = ""
    tenants: tuple[str, ...] = ()
    """Who may use it; (), everybody."""
    name: str = ""
    """What requests call it; empty: its id. Versions share a name."""
    licence: str = ""
    source: str = ""
    """Where it came from, for people: an address, a training run."""
    stage: Stage = "production"
    file: str = ""
    """Key in the store (``loras/style.safetensors``; a folder in diffusers' layout for a checkpoint), or ``seed:N`` for random weights."""

    @property
    def title(self) -> str:
        """``name@version``, as people write it."""
        return f"{self.name or self.id}{'@' + self.version if self.version else ''}"

    @property
    def seed(self) -> int | None:
        """Seed of random weights; None if it has a file."""
        return int(self.file.removeprefix(SEED_PREFIX)) if self.file.startswith(SEED_PREFIX) else None


@dataclass(frozen=True, slots=True)
class LogHead:
    """How far the log beside the file reached when the file was written (``engine.registry.audit_log``)."""

    n_lines: int
    n_bytes: int
    sha256: str
    """Of the last line."""


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Every model and add-on by id. What is not listed has the default bytes of its kind; the engine loads nothing else."""

    entries: Mapping[str, CatalogueEntry] = field(default_factory=lambda: MappingProxyType({}))
    current: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Name to the version that the plain name means. A name that is absent means its only version in production."""
    log: LogHead | None = field(default=None, compare=False)
    """Where its file's log stands; None if there is none. Says nothing about what may be loaded."""
    _by_name: Mapping[str, tuple[CatalogueEntry, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_name: dict[str, tuple[CatalogueEntry, ...]] = {}
        for entry in self.entries.values():
            name = entry.name or entry.id
            by_name[name] = (*by_name.get(name, ()), entry)
        object.__setattr__(self, "_by_name", MappingProxyType(by_name))

    def bytes_of(self, entry_id: str, default_bytes: int) -> int:
        """Size of an entry in bytes, or ``default_bytes`` where the catalogue does not list it or gives no size."""
        entry = self.entries.get(entry_id)
        return entry.bytes if entry is not None and entry.bytes > 0 else default_bytes

    def versions(self, name: str) -> tuple[CatalogueEntry, ...]:
        """Every version of a name, in the order of the entries; an entry without a name is called by its id."""
        return self._by_name.get(name, ())


def read_catalogue(path: Path) -> Catalogue:
    """Reads a catalogue file.

    Raises:
        InputError: the file is missing, too large, not JSON, a field is unknown, missing, of the wrong type or out of range,
            or a rule of :func:`check_catalogue` is broken.
    """
    return catalogue_from_plain(read_json(path), str(path))


def catalogue_from_plain(plain: object, where: str) -> Catalogue:
    """Builds a catalogue from decoded JSON; raises :class:`InputError` with every problem found."""
    reader = RecordReader(where, {"AddOnKind": get_args(AddOnKind), "Stage": get_args(Stage)})
    top = reader.table(plain, {"schema_version", "entries", "current", "log"}, "")
    reader.version(top, SCHEMA_VERSIONS_READ)
    entries: dict[str, CatalogueEntry] = {}
    for index, item in enumerate(reader.items(top.get("entries", []), "entries")):
        place = f"entries[{index}]"
        entry = reader.record(CatalogueEntry, item, place)
        if entry is None:
            continue
        if entry.id in entries:
            reader.problem(f"{place}.id", f"got {entry.id!r} a second time", "every id once", "Remove one of the two.")
        entries[entry.id] = entry
    current = top.get("current", {})
    if not isinstance(current, dict) or not all(isinstance(version, str) for version in current.values()):
        reader.problem("current", f"got {str(current)[:80]!r}", "a JSON object of name to version")
        current = {}
    head = reader.record(LogHead, top["log"], "log") if "log" in top else None
    if head is not None and not SHA256.fullmatch(head.sha256):
        reader.problem("log.sha256", f"got {head.sha256[:80]!r}", "64 digits of lower-case hex")
    reader.finish()
    catalogue = Catalogue(MappingProxyType(entries), MappingProxyType(dict(current)), head)
    if top.get("schema_version") != 1:
        problems = list(check_catalogue(catalogue, where))
        if problems:
            raise InputError(problems)
    return catalogue


def catalogue_to_plain(catalogue: Catalogue) -> dict[str, Any]:
    """JSON values, entries by id; ``log`` only where there is one."""
    return {
        "schema_version": SCHEMA_VERSION,
        "entries": [entry_to_plain(catalogue.entries[key]) for key in sorted(catalogue.entries)],
        "current": {name: catalogue.current[name] for name in sorted(catalogue.current)},
        **({"log": dataclasses.asdict(catalogue.log)} if catalogue.log is not None else {}),
    }


def entry_to_plain(entry: CatalogueEntry) -> dict[str, Any]:
    """JSON values by field. Entries are flat, so nothing is copied deeply: ``asdict`` takes seconds for 10,000 of them."""
    return {name: getattr(entry, name) for name in _ENTRY_FIELDS}


_ENTRY_FIELDS: Final = tuple(item.name for item in dataclasses.fields(CatalogueEntry))


def check_catalogue(catalogue: Catalogue, where: str = "catalogue") -> Iterator[Problem]:
    """Rules that span fields; nothing if all hold."""
    seen: dict[tuple[str, str], CatalogueEntry] = {}
    for entry in catalogue.entries.values():
        place = f"{where} entry {entry.id[:80]!r}"
        for field_name in ("id", "name", "version"):
            text = getattr(entry, field_name)
            if (text or field_name == "id") and not NAME.fullmatch(text):
                yield Problem(
                    f"{place} {field_name}", f"got {text[:80]!r}", f"a text like {NAME.pattern}", "Rename it."
                )
        yield from _check_file(entry, place)
        name = entry.name or entry.id
        other = seen.setdefault((name, entry.version), entry)
        if other is not entry:
            yield Problem(
                place, f"is a second {entry.title!r}", "every name and version once", "Give it another version."
            )
        if name != entry.id and name in catalogue.entries:
            yield Problem(
                f"{place} name", f"got {name!r}, which is an id", "a name that no entry has as id", "Rename it."
            )
    for name in sorted({entry.name or entry.id for entry in catalogue.entries.values()}):
        yield from _check_name(catalogue, name, where)
    for name in sorted(set(catalogue.current) - {entry.name or entry.id for entry in catalogue.entries.values()}):
        yield Problem(f"{where} current", f"names {name[:80]!r}", "a name of an entry", "Remove it.")


def _check_file(entry: CatalogueEntry, place: str) -> Iterator[Problem]:
    if entry.file.startswith(SEED_PREFIX):
        digits = entry.file.removeprefix(SEED_PREFIX)
        if not (digits.isascii() and digits.isdigit() and len(digits) <= 18):
            yield Problem(f"{place} file", f"got {entry.file[:80]!r}", "seed:N with N below 10^18", "Correct it.")
        return
    problem = key_problem(entry.file) if entry.file else None
    if problem:
        yield Problem(
            f"{place} file", f"got {entry.file[:80]!r}, {problem}", "a relative key in the store", "Correct it."
        )
    if entry.kind == "lora" and entry.file and not SHA256.fullmatch(entry.id):
        yield Problem(f"{place} id", f"got {entry.id[:80]!r}", "the sha256 of its file", "Admit the file to learn it.")


def _check_name(catalogue: Catalogue, name: str, where: str) -> Iterator[Problem]:
    versions = catalogue.versions(name)
    place = f"{where} name {name[:80]!r}"
    kinds = sorted({entry.kind for entry in versions})
    if len(kinds) > 1:
        yield Problem(place, f"is used for {' and '.join(kinds)}", "one kind a name", "Rename one.")
    in_production = [entry.version for entry in versions if entry.stage == "production"]
    if name in catalogue.current:
        if catalogue.current[name] not in in_production:
            yield Problem(
                f"{where} current", f"says that {name[:80]!r} is version {catalogue.current[name][:80]!r}",
                f"one of its versions in production: {in_production}", "Choose one, or remove the line.",
            )  # fmt: skip
    elif len(in_production) > 1:
        yield Problem(
            place, f"has {len(in_production)} versions in production", "a line in current that says which the plain name means",
            f"Add one of {sorted(in_production)} to current.",
        )  # fmt: skip


def key_problem(key: str) -> str | None:
    """Why a text is not a key in a store (a relative POSIX path without tricks); None if it is one."""
    if len(key) > 1024 or not key.isprintable() or "\\" in key:
        return "which is too long or has characters that no key has"
    if key.startswith("/") or "://" in key or ":" in key.split("/", 1)[0]:
        return "which is not relative"
    if any(part in {"", ".", ".."} for part in key.split("/")) or str(PurePosixPath(key)) != key:
        return "which has an empty, '.' or '..' part"
    return None
