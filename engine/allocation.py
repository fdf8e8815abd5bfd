"""What exists (Catalogue) and which GPUs run what (Allocation): plain JSON that the engine starts and the simulator simulates.

Torch-free and pydantic-free, because the planner and the GPU host both read it. Files are checked field by field; all
problems are reported together as :class:`traces.problems.InputError`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

from traces.problems import InputError, Problem, one_problem

SCHEMA_VERSION: Final = 1
FILE_BYTES_MAX: Final = 16 * 2**20
GIB: Final = 2**30

Topology = Literal["diffusers", "diffusers_tuned", "colocated", "decoupled", "decoupled_cfg2"]
TOPOLOGIES: Final[tuple[Topology, ...]] = get_args(Topology)
PoolRole = Literal["base", "controlnet"]
LinkKind = Literal["local", "nvlink", "pcie", "network"]
AddOnKind = Literal["base", "controlnet", "lora"]
ANY: Final = "*"
"""In a list of ids: whatever the requests ask for, loaded on demand within the device's memory."""


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One base model, ControlNet or LoRA that may be used."""

    id: str
    kind: AddOnKind
    architecture: str = "sdxl"
    bytes: int = 0
    rank: int | None = None
    targets: tuple[str, ...] = ()
    version: str = ""
    owner: str = ""
    tenants: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Every model and add-on by id. What is not listed has the default bytes of its kind."""

    entries: Mapping[str, CatalogueEntry] = field(default_factory=lambda: MappingProxyType({}))

    def bytes_of(self, entry_id: str, default_bytes: int) -> int:
        """Size of an entry in bytes, or ``default_bytes`` where the catalogue does not list it or gives no size."""
        entry = self.entries.get(entry_id)
        return entry.bytes if entry is not None and entry.bytes > 0 else default_bytes


@dataclass(frozen=True, slots=True)
class Pool:
    """Replicas of one worker."""

    name: str
    role: PoolRole
    n_replicas: int
    gpu_kind: str
    n_gpus_per_replica: int = 1
    topology: Topology = "colocated"
    """Of a base pool; a ControlNet pool carries the topology of the bases it serves."""
    base_model_ids: tuple[str, ...] = (ANY,)
    """Checkpoints a base replica may hold."""
    controlnet_ids: tuple[str, ...] = (ANY,)
    """ControlNet pool: what each replica hosts. Base pool: which ControlNets run in process ((), none)."""

    @property
    def n_gpus(self) -> int:
        """GPUs the whole pool occupies."""
        return self.n_replicas * self.n_gpus_per_replica


@dataclass(frozen=True, slots=True)
class Link:
    """How a base pool reaches a ControlNet pool."""

    base_pool: str
    controlnet_pool: str
    kind: LinkKind = "nvlink"


@dataclass(frozen=True, slots=True)
class Policies:
    """Settings of the shared decision functions in ``engine/policies``."""

    queue_limit: int | None = None
    """Requests that may wait at a base pool; the next is rejected. None: unbounded."""
    lora_cache_gib: float = 64.0
    """Host memory for LoRAs, per base replica."""
    lora_patch_by_step: int = 10
    """Bounded asynchronous loading: denoising starts at once, the patch lands before this step at the latest. 0: synchronous."""
    controlnet_host_cache_gib: float = 256.0
    """Host memory for ControlNets that are not resident on the device, per replica."""
    checkpoint_host_cache_gib: float = 256.0
    """Host memory for checkpoints that are not resident on the device, per base replica."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """Pools, how they are linked, and the policies. The engine starts exactly this; the simulator simulates exactly this."""

    pools: tuple[Pool, ...]
    links: tuple[Link, ...] = ()
    policies: Policies = field(default_factory=Policies)
    schema_version: int = SCHEMA_VERSION

    @property
    def n_gpus(self) -> int:
        """GPUs in all pools."""
        return sum(pool.n_gpus for pool in self.pools)

    def pools_of(self, role: PoolRole) -> tuple[Pool, ...]:
        """The pools with this role, in order."""
        return tuple(pool for pool in self.pools if pool.role == role)

    def link_kind(self, base_pool: str, controlnet_pool: str) -> LinkKind:
        """The link between two pools; NVLink where none is named."""
        for link in self.links:
            if link.base_pool == base_pool and link.controlnet_pool == controlnet_pool:
                return link.kind
        return "nvlink"


def to_json(record: Allocation | Catalogue) -> str:
    """JSON with sorted keys and a final newline; the same record always gives the same bytes."""
    if isinstance(record, Catalogue):
        plain: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "entries": [dataclasses.asdict(record.entries[key]) for key in sorted(record.entries)],
        }
    else:
        plain = dataclasses.asdict(record)
    return json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read_allocation(path: Path) -> Allocation:
    """Reads an allocation file.

    Raises:
        InputError: the file is missing, too large, not JSON, or a field is unknown, missing, of the wrong type or out of range.
    """
    return allocation_from_plain(_read_json(path), str(path))


def read_catalogue(path: Path) -> Catalogue:
    """Reads a catalogue file; raises :class:`InputError` as :func:`read_allocation` does, and for an id listed twice."""
    plain = _read_json(path)
    reader = _Reader(str(path))
    top = reader.table(plain, {"schema_version", "entries"}, "")
    reader.version(top)
    entries: dict[str, CatalogueEntry] = {}
    for index, item in enumerate(reader.items(top.get("entries", []), "entries")):
        where = f"entries[{index}]"
        entry = reader.record(CatalogueEntry, item, where)
        if entry is None:
            continue
        if entry.id in entries:
            reader.problem(f"{where}.id", f"got {entry.id!r} a second time", "every id once", "Remove one of the two.")
        entries[entry.id] = entry
    reader.finish()
    return Catalogue(MappingProxyType(entries))


def allocation_from_plain(plain: object, where: str) -> Allocation:
    """Builds an allocation from decoded JSON; raises :class:`InputError` with every problem found."""
    reader = _Reader(where)
    top = reader.table(plain, {"schema_version", "pools", "links", "policies"}, "")
    reader.version(top)
    pools = [reader.record(Pool, item, f"pools[{i}]") for i, item in enumerate(reader.items(top.get("pools"), "pools"))]
    links = [
        reader.record(Link, item, f"links[{i}]") for i, item in enumerate(reader.items(top.get("links", []), "links"))
    ]
    policies = reader.record(Policies, top.get("policies", {}), "policies")
    reader.finish()
    allocation = Allocation(
        pools=tuple(pool for pool in pools if pool is not None),
        links=tuple(link for link in links if link is not None),
        policies=policies if policies is not None else Policies(),
    )
    problems = list(check_allocation(allocation, where))
    if problems:
        raise InputError(problems)
    return allocation


def check_allocation(allocation: Allocation, where: str = "allocation") -> list[Problem]:
    """Rules that span fields; an empty list if all hold."""
    problems = []
    names = [pool.name for pool in allocation.pools]
    if not allocation.pools_of("base"):
        problems.append(Problem(f"{where} pools", "got no base pool", "at least one", "Add a pool with role 'base'."))
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(Problem(f"{where} pools", f"got two pools named {name!r}", "unique names", "Rename one."))
    for pool in allocation.pools:
        place = f"{where} pool {pool.name!r}"
        if not 0 < pool.n_replicas <= 100_000:
            problems.append(
                Problem(place, f"n_replicas is {pool.n_replicas}", "1..100000", "Set it or remove the pool.")
            )
        if not 0 < pool.n_gpus_per_replica <= 64:
            problems.append(Problem(place, f"n_gpus_per_replica is {pool.n_gpus_per_replica}", "1..64", "Set it."))
        if pool.topology == "decoupled_cfg2" and pool.role == "base" and pool.n_gpus_per_replica != 2:
            problems.append(
                Problem(place, f"n_gpus_per_replica is {pool.n_gpus_per_replica}", "2 for decoupled_cfg2", "Set it.")
            )
        if pool.role == "controlnet" and not pool.controlnet_ids:
            problems.append(Problem(place, "hosts no ControlNet", "at least one id", "Name them or remove the pool."))
    for link in allocation.links:
        for name in (link.base_pool, link.controlnet_pool):
            if name not in names:
                problems.append(
                    Problem(f"{where} links", f"names the pool {name!r}", f"one of {sorted(names)}", "Repair it.")
                )
    return problems


def _read_json(path: Path) -> object:
    try:
        size = path.stat().st_size
        if size > FILE_BYTES_MAX:
            raise one_problem(
                str(path), f"is {size} bytes", f"at most {FILE_BYTES_MAX}", "Check that it is the right file."
            )
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, UnicodeDecodeError) as error:
        raise one_problem(
            str(path), f"cannot be read: {error}", "a readable UTF-8 JSON file", "Check the path."
        ) from None
    except RecursionError:
        raise one_problem(str(path), "is nested too deeply", "an allocation or catalogue", "Repair the file.") from None
    except ValueError as error:
        raise one_problem(str(path), f"is not JSON: {error}", "JSON", "Repair the file.") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number JSON knows")


class _Reader:
    """Checks decoded JSON against a dataclass' own annotations and collects problems."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._problems: list[Problem] = []

    def problem(self, field_name: str, what: str, allowed: str, repair: str = "") -> None:
        self._problems.append(Problem(f"{self._where} {field_name}".rstrip(), what, allowed, repair))

    def finish(self) -> None:
        if self._problems:
            raise InputError(self._problems)

    def table(self, plain: object, known: set[str], where: str) -> Mapping[str, Any]:
        if not isinstance(plain, dict):
            self.problem(where, f"got {type(plain).__name__}", "a JSON object")
            return {}
        for key in sorted(set(plain) - known):
            self.problem(
                f"{where}.{key}".lstrip("."), "is not a known field", f"one of {sorted(known)}", "Remove or rename it."
            )
        return plain

    def items(self, plain: object, where: str) -> list[Any]:
        if isinstance(plain, list):
            return plain
        self.problem(where, f"got {type(plain).__name__ if plain is not None else 'nothing'}", "a list")
        return []

    def version(self, top: Mapping[str, Any]) -> None:
        version = top.get("schema_version")
        if version != SCHEMA_VERSION:
            self.problem(
                "schema_version", f"got {version!r}", str(SCHEMA_VERSION), "Use the diffplan that wrote the file."
            )

    def record(self, cls: type[Any], plain: object, where: str) -> Any:
        fields = {item.name: item for item in dataclasses.fields(cls)}
        table = self.table(plain, set(fields), where)
        values: dict[str, Any] = {}
        n_before = len(self._problems)
        for name, item in fields.items():
            if name in table:
                values[name] = self._value(str(item.type), table[name], f"{where}.{name}")
            elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
                self.problem(f"{where}.{name}", "is missing", _allowed(str(item.type)), "Add it.")
        return cls(**values) if len(self._problems) == n_before and isinstance(plain, dict) else None

    def _value(self, annotation: str, value: object, where: str) -> Any:
        if annotation.endswith("| None"):
            if value is None:
                return None
            annotation = annotation.removesuffix("| None").strip()
        if annotation == "str" and isinstance(value, str) and value:
            return value
        if annotation == "str" and value == "" and where.rsplit(".", 1)[-1] in {"version", "owner"}:
            return value
        if annotation == "int" and isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        if (
            annotation == "float"
            and isinstance(value, int | float)
            and not isinstance(value, bool)
            and 0 <= value < float("inf")
        ):
            return float(value)
        if annotation == "tuple[str, ...]" and isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        if annotation in _CHOICES and value in _CHOICES[annotation]:
            return value
        self.problem(where, f"got {value!r}", _allowed(annotation))
        return None


_CHOICES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({
    "Topology": TOPOLOGIES,
    "PoolRole": get_args(PoolRole),
    "LinkKind": get_args(LinkKind),
    "AddOnKind": get_args(AddOnKind),
})  # fmt: skip


def _allowed(annotation: str) -> str:
    if annotation in _CHOICES:
        return "one of " + ", ".join(_CHOICES[annotation])
    return {
        "str": "a text that is not empty",
        "int": "a whole number, 0 or more",
        "float": "a finite number, 0 or more",
        "tuple[str, ...]": "a list of texts",
    }.get(annotation, annotation)
