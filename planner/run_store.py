"""Runs that were simulated once: SQLite for figures, Parquet beside it for logs, so that nothing is simulated twice.

A run is found by the digest of everything that decides its result. A killed process leaves a readable store: a row is written in
one transaction after its log has been renamed into place, and a log without a row is overwritten by the next attempt.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from engine.allocation import Allocation, to_json
from planner import __version__
from planner.replication import Inputs
from planner.scenario import Scenario
from planner.service import Sizes
from planner.statistics import Metrics
from traces.problems import InputError, Problem
from traces.records import REQUEST_RECORD_COLUMNS, WORKER_INTERVAL_COLUMNS
from traces.writer import write_table

SCHEMA_VERSION: Final = 1
BUSY_TIMEOUT_S: Final = 30.0
"""How long a writer waits for another process's transaction."""
FILE: Final = "runs.sqlite"
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS store (schema_version INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS runs (
    key TEXT PRIMARY KEY, scenario TEXT NOT NULL, allocation TEXT NOT NULL, repetition INTEGER, n_gpus INTEGER NOT NULL,
    in_slo_images_per_s REAL NOT NULL, metrics TEXT NOT NULL, identity TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, kind TEXT NOT NULL, value TEXT NOT NULL) WITHOUT ROWID;
"""


class StoreError(InputError):
    """The store cannot be read or written; what was stored stays."""


@functools.cache
def code_sha256() -> str:
    """Digest of the sources that decide a run: a changed simulator finds none of the old one's runs."""
    root = Path(__file__).resolve().parent
    files = [
        *sorted((root / "simulator").glob("*.py")), *sorted((root.parent / "engine" / "policies").glob("*.py")),
        *(root / f"{name}.py" for name in ("replication", "service", "statistics", "traffic", "workload")),
        root.parent / "engine" / "allocation.py", root.parent / "calibrate" / "profile.py", root.parent / "traces" / "scaling.py",
    ]  # fmt: skip
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class RunKey:
    """Everything that decides a run's result."""

    scenario_sha256: str
    trace_digest: str
    profile_id: str
    allocation_json: str
    repetition: int | None
    """None: the traffic as stated, with the fitted profile."""
    sizes_sha256: str = ""
    """Bytes of models and add-ons, the catalogue's included."""
    diffplan_version: str = __version__
    code: str = field(default_factory=code_sha256)
    """Digest of the sources that ran it."""

    @property
    def digest(self) -> str:
        """Identity of the run."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def sizes_sha256(sizes: Sizes) -> str:
    """Digest of every size that a run reads."""
    plain = f"{sizes.lora_bytes} {sizes.controlnet_bytes} {sizes.checkpoint_bytes}\n{to_json(sizes.catalogue)}"
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def question_sha256(scenario: Scenario) -> str:
    """Digest of the fields that decide a run; those that only decide what is searched, shown or paid for are left out."""
    plain = scenario.model_dump(mode="json", exclude={"name", "description", "topologies", "search", "prices"})
    plain["simulation"].pop("replications", None)
    return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class StoredRun:
    """Figures of one run."""

    scenario: str
    n_gpus: int
    in_slo_images_per_s: float
    metrics: Metrics


class RunStore:
    """A folder with ``runs.sqlite`` and ``logs/``. Several processes may write at once; each opens its own."""

    def __init__(self, folder: Path) -> None:
        """Opens or makes a store.

        Raises:
            InputError: the folder cannot be used, or holds a store of another version or a file that is none.
        """
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(folder / FILE, timeout=BUSY_TIMEOUT_S, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            with self._transaction():
                for statement in _SCHEMA.strip().split(";"):
                    if statement.strip():
                        self._connection.execute(statement)
                found = self._connection.execute("SELECT schema_version FROM store").fetchall()
                if not found:
                    self._connection.execute("INSERT INTO store VALUES (?)", (SCHEMA_VERSION,))
        except (OSError, sqlite3.Error) as error:
            raise _store_error(
                f"run store {folder}",
                f"cannot be opened: {error}",
                "a folder that may be written, or one that diffplan made",
            ) from None
        version = found[0][0] if found else SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            self.close()
            raise _store_error(
                f"run store {folder}", f"has schema version {version}", f"{SCHEMA_VERSION}", "Name another folder"
            )

    def close(self) -> None:
        """Closes the connection; what was written stays."""
        self._connection.close()

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def find(self, key: RunKey) -> StoredRun | None:
        """The run's figures if it was simulated before."""
        row = self._connection.execute(
            "SELECT scenario, n_gpus, in_slo_images_per_s, metrics FROM runs WHERE key = ?", (key.digest,)
        ).fetchone()
        return StoredRun(row[0], row[1], row[2], metrics_of(json.loads(row[3]))) if row else None

    def add(self, key: RunKey, scenario_name: str, n_gpus: int, run: Any, *, keep_logs: bool = False) -> StoredRun:
        """Stores a :class:`planner.replication.Run`; one that is there already stays as it is.

        Raises:
            InputError: the disk is full or the folder cannot be written. What was stored before stays readable.
        """
        stored = StoredRun(scenario_name, n_gpus, float(run.in_slo_images_per_s), run.metrics)
        try:
            if keep_logs:
                logs = self.log_folder(key)
                logs.mkdir(parents=True, exist_ok=True)
                write_table(run.result.requests, REQUEST_RECORD_COLUMNS, logs / "requests.parquet")
                write_table(run.result.workers, WORKER_INTERVAL_COLUMNS, logs / "workers.parquet")
            with self._transaction():
                self._connection.execute(
                    "INSERT OR IGNORE INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        key.digest, scenario_name, key.allocation_json, key.repetition, n_gpus, stored.in_slo_images_per_s,
                        json.dumps(run.metrics.to_plain(), sort_keys=True),
                        json.dumps({k: v for k, v in asdict(key).items() if k != "allocation_json"}, sort_keys=True),
                    ),
                )  # fmt: skip
        except (OSError, sqlite3.Error, InputError) as error:
            raise self._unwritable(error) from None
        return stored

    def recall(self, key: str) -> Any | None:
        """What was kept under a key, as decoded JSON; None if nothing was."""
        row = self._connection.execute("SELECT value FROM answers WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else None

    def keep(self, key: str, kind: str, plain: Any) -> None:
        """Keeps an answer that is no run of the SimPy model; one that is there already stays as it is.

        Args:
            plain: JSON-ready; numbers that are not finite are kept, too.

        Raises:
            InputError: as :meth:`add`.
        """
        try:
            with self._transaction():
                self._connection.execute(
                    "INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", (key, kind, json.dumps(plain, sort_keys=True))
                )
        except (OSError, sqlite3.Error) as error:
            raise self._unwritable(error) from None

    def log_folder(self, key: RunKey) -> Path:
        """Where the run's logs are if they were kept."""
        return self.folder / "logs" / key.digest

    def __len__(self) -> int:
        return int(self._connection.execute("SELECT COUNT(*) FROM runs").fetchone()[0])

    def _unwritable(self, error: Exception) -> StoreError:
        return _store_error(
            f"run store {self.folder}",
            f"cannot be written: {error}",
            "free space in a folder that may be written",
            "Make room and run the same command again: stored runs are kept",
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")


def _store_error(where: str, what: str, allowed: str, repair: str = "") -> StoreError:
    return StoreError(Problem(where, what, allowed, repair))


def metrics_of(plain: Mapping[str, Any]) -> Metrics:
    """The inverse of ``Metrics.to_plain``: None was NaN."""
    values: dict[str, Any] = {name: float("nan") if value is None else value for name, value in plain.items()}
    return Metrics(**values)


def run_key(
    scenario: Scenario, inputs: Inputs, trace_digest: str, allocation: Allocation, repetition: int | None
) -> RunKey:
    """The key of one run of a scenario."""
    return RunKey(
        question_sha256(scenario), trace_digest, inputs.profile_id, to_json(allocation), repetition, sizes_sha256(inputs.sizes)
    )  # fmt: skip
