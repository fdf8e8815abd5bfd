"""What a loader process does: a LoRA from the store, through every check, into the host tier as a flat file that workers map."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from engine.catalogue import SHA256, CatalogueEntry
from engine.registry.flat_lora import ITEM_BYTES, PART_SUFFIX, FlatLayoutError, flat_name, read_flat_header
from engine.registry.lora_admission import Expected, FlatPlace, Limits, check_lora
from engine.registry.quarantine import Quarantine
from engine.registry.random_lora import RandomLora, seed_of
from engine.registry.safetensors_header import AddOnRefusedError
from engine.registry.shapes import architecture
from engine.registry.store import CHUNK_TIMEOUT_S, TOTAL_TIMEOUT_S, Store, StoreError, make_store
from engine.workers.setup import RefusedError, WorkerSetup
from traces.problems import InputError, one_problem

DTYPE_OF_DEVICE: Final = {"cpu": "F32", "cuda": "BF16"}
"""The type in which networks run where no option says it (``EngineOptions.fast``)."""
DTYPE_OF_OPTION: Final = {"float32": "F32", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True)
class Loader:
    """Fetches LoRAs into one host tier; see :class:`engine.workers.setup.Fetcher`. Several may share a tier."""

    host_tier: Path
    model: str
    """Architecture of the networks that files must fit."""
    dtype: str
    """Of those networks: ``BF16``, ``F16`` or ``F32``."""
    store: Store | None = None
    quarantine: Quarantine | None = None
    limits: Limits = field(default_factory=Limits)
    progress: Callable[[], None] = lambda: None

    def fetch(self, lora_id: str, source: Mapping[str, Any]) -> Path:
        """Brings a checked LoRA into the host tier.

        Args:
            lora_id: the catalogue's id.
            source: its entry as JSON values; empty: random weights drawn from the id.

        Returns:
            The file, in the layout of ``engine.registry.flat_lora``.

        Raises:
            RefusedError: with the reason; final if the file is at fault.
        """
        try:
            entry = _entry(lora_id, source, self.model)
            known = self.quarantine.find(lora_id) if self.quarantine is not None else None
            if known is not None:
                raise RefusedError(f"LoRA {lora_id} is in quarantine: {known.reason}", is_final=True)
            path = self.host_tier / _flat_name(lora_id, self.model, self.dtype)
            if not self._is_there(path, lora_id):
                self._bring(entry, path)
            return path
        except InputError as error:
            self._quarantine(lora_id, source, str(error), is_file_at_fault=isinstance(error, AddOnRefusedError))
            raise RefusedError(f"LoRA {lora_id} is refused: {error}", is_final=True) from None
        except StoreError as error:
            raise RefusedError(f"LoRA {lora_id}: {error}", is_final=error.is_final) from None
        except OSError as error:
            # clients see reasons: no path of this host is in one
            reason = f"LoRA {lora_id}: the host tier cannot take it: {error.strerror}. Make room."
            raise RefusedError(reason, is_final=False) from None

    def _bring(self, entry: CatalogueEntry, path: Path) -> None:
        place = FlatPlace(path, self.dtype, entry.id)
        shapes = architecture(self.model)
        if entry.seed is not None or not entry.file:
            seed = entry.seed if entry.seed is not None else seed_of(entry.id)
            made_up = RandomLora(shapes, entry.rank, seed)
            check_lora(made_up, entry.id, shapes, limits=self.limits, flat=place, progress=self.progress)
            return
        if self.store is None:
            raise StoreError(f"{entry.file}: this engine has no store. Start it with one.")
        expected = Expected(entry.id if SHA256.fullmatch(entry.id) else None, entry.bytes or None)
        with self.store.open(entry.file) as source:
            check_lora(
                source, entry.file, shapes, expected=expected, limits=self.limits, flat=place, progress=self.progress
            )

    def _is_there(self, path: Path, lora_id: str) -> bool:
        # A loader that died after its rename, before its answer: the file is whole and of this content.
        if not path.exists():
            return False
        try:
            header = read_flat_header(path)
        except FlatLayoutError:
            return False
        return header.add_on_id == lora_id and header.dtype == self.dtype

    def _quarantine(self, lora_id: str, source: Mapping[str, Any], reason: str, *, is_file_at_fault: bool) -> None:
        if self.quarantine is None or not is_file_at_fault:
            return
        file = str(source.get("file", ""))
        store = self.store
        again = (lambda: store.open(file)) if store is not None and file else None
        with contextlib.suppress(OSError):  # a full disk must not hide the refusal, which the front remembers as well
            self.quarantine.put(lora_id, reason, file, again)


def make_fetcher(setup: WorkerSetup, progress: Callable[[str], None]) -> Loader:
    """The loader of a worker process; removes what dead loaders left half-written in the host tier.

    Options (``setup.options``): ``loader_dtype`` (BF16, F16, F32), ``loader_quarantine`` (folder; none: refusals are only
    reported), ``loader_chunk_timeout_s``, ``loader_total_timeout_s``, ``loader_file_bytes_max``, ``loader_rank_max``,
    ``loader_token_file`` (bearer token of an HTTP store), ``loader_token_over_http``; and the networks' own ``dtype``, which
    counts before ``loader_dtype``.

    Raises:
        InputError: the store, or an option, is not what it should be.
    """
    options = setup.options
    stated = DTYPE_OF_OPTION.get(str(options.get("dtype", "")))
    dtype = stated or str(options.get("loader_dtype") or DTYPE_OF_DEVICE[setup.device.partition(":")[0]])
    if dtype not in ITEM_BYTES:
        raise one_problem("option loader_dtype", f"got {dtype!r}", f"one of {', '.join(sorted(ITEM_BYTES))}", "Set it.")
    store = None
    if setup.store:
        store = make_store(
            setup.store,
            chunk_timeout_s=float(options.get("loader_chunk_timeout_s", CHUNK_TIMEOUT_S)),
            total_timeout_s=float(options.get("loader_total_timeout_s", TOTAL_TIMEOUT_S)),
            token_file=Path(str(token)) if (token := options.get("loader_token_file")) else None,
            may_send_plainly=bool(options.get("loader_token_over_http", False)),
        )
    host_tier = Path(setup.host_tier)
    host_tier.mkdir(parents=True, exist_ok=True, mode=0o700)
    remove_stale_parts(host_tier)
    limits = Limits(
        int(options.get("loader_file_bytes_max", Limits().file_bytes)),
        int(options.get("loader_rank_max", Limits().rank)),
    )
    folder = options.get("loader_quarantine")
    quarantine = Quarantine(Path(str(folder))) if folder else None
    return Loader(host_tier, setup.model, dtype, store, quarantine, limits, lambda: progress("fetch"))


def remove_stale_parts(host_tier: Path) -> list[str]:
    """Removes files that were being written by processes which are gone; returns their names. Whole files stay."""
    removed = []
    for path in sorted(host_tier.glob(f"*{PART_SUFFIX}")):
        writer = path.name.removesuffix(PART_SUFFIX).rpartition(".")[2]
        if writer.isdigit() and int(writer) != os.getpid() and _is_alive(int(writer)):
            continue
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            removed.append(path.name)
    return removed


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _entry(lora_id: str, source: Mapping[str, Any], model: str) -> CatalogueEntry:
    known = {item.name for item in fields(CatalogueEntry)}
    unknown = sorted(set(source) - known)
    if unknown:
        raise one_problem(f"LoRA {lora_id}", f"has the fields {unknown}", f"those of the catalogue, {sorted(known)}")
    values = {"id": lora_id, "kind": "lora", "architecture": model, **source}
    for name in ("targets", "tenants"):
        values[name] = tuple(values.get(name, ()))
    entry = CatalogueEntry(**values)
    if entry.id != lora_id or entry.kind != "lora":
        raise one_problem(f"LoRA {lora_id}", f"is the {entry.kind} {entry.id!r}", "the LoRA of this id")
    # "sdxl" is also what an entry says that says nothing; the shapes decide then.
    if entry.architecture not in {model, "sdxl"}:
        raise one_problem(f"LoRA {lora_id}", f"is made for {entry.architecture}", f"{model}, which this engine runs")
    return entry


def _flat_name(lora_id: str, architecture_name: str, dtype: str) -> str:
    is_digest = SHA256.fullmatch(lora_id) is not None
    return flat_name(lora_id if is_digest else hashlib.sha256(lora_id.encode()).hexdigest(), architecture_name, dtype)
