"""What is worked out from a plan's folder outside the server: the phases of its introduction, and its export as one archive."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dashboards.plan_folder import plan_folder
from dashboards.plan_job import Plan, Store, Waiting, in_process, turn
from dashboards.uploads import session_folder
from planner.files import write_texts
from planner.plan_record import PhaseRow, to_json

ZIP_DATE: Final = (1980, 1, 1, 0, 0, 0)
"""Of every member, so that the same files give the same archive."""


@dataclass(frozen=True, slots=True)
class Archive:
    """An export: its files as one archive, and each by name."""

    content: bytes
    texts: dict[str, str]
    notes: tuple[str, ...]


def compute_roadmap(store: Store, plan: Plan, assumptions: str, waiting: Waiting) -> tuple[PhaseRow, ...]:
    """The phases from today's fleet to the recommendation; raises like ``plan_job.compute``.

    Args:
        assumptions: YAML, as ``diffplan roi --assumptions`` takes it.
    """
    folder = plan_folder(plan)
    write_texts(folder, {"assumptions.yaml": assumptions})
    options = ["--plan", str(folder), "--assumptions", str(folder / "assumptions.yaml")]

    def read(out: Path) -> tuple[PhaseRow, ...]:
        return tuple(
            PhaseRow.model_validate(row) for row in json.loads((out / "roadmap.json").read_text(encoding="utf-8"))
        )

    with turn(store, waiting):
        return in_process("dashboards.roadmap_process", options, plan.scenario, session_folder(), waiting, read)


@dataclass(frozen=True, slots=True)
class ExportWish:
    """What the visitor wants exported."""

    targets: tuple[str, ...]
    cluster: str | None
    """YAML; None for targets that need no cluster."""
    phase: int | None
    phases: tuple[PhaseRow, ...]
    """The roadmap that ``phase`` is of."""
    is_forced: bool
    checks_pods: bool


def compute_export(store: Store, plan: Plan, wish: ExportWish, waiting: Waiting) -> Archive:
    """The files of an export; raises like ``plan_job.compute``."""
    folder = exported_folder(plan, wish.phases)
    options = ["--plan", str(folder)]
    for target in wish.targets:
        options += ["--to", target]
    if wish.cluster is not None:
        write_texts(folder, {"cluster.yaml": wish.cluster})
        options += ["--cluster", str(folder / "cluster.yaml")]
    options += ["--phase", str(wish.phase)] if wish.phase is not None else []
    options += ["--force"] if wish.is_forced else []
    options += ["--check-pods"] if wish.checks_pods else []
    with turn(store, waiting):
        return in_process("dashboards.export_process", options, plan.scenario, session_folder(), waiting, _archive)


def exported_folder(plan: Plan, phases: Sequence[PhaseRow]) -> Path:
    """The plan's folder, its ``plan.json`` with these phases if there are any."""
    folder = plan_folder(plan)
    record = plan.record.model_copy(update={"roadmap": tuple(phases)}) if phases else plan.record
    write_texts(folder, {"plan.json": to_json(record)})
    return folder


def _archive(out: Path) -> Archive:
    files = out / "files"
    paths = sorted(path for path in files.rglob("*") if path.is_file())
    texts = {path.relative_to(files).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    notes = json.loads((out / "answer.json").read_text(encoding="utf-8")).get("notes", [])
    return Archive(zipped(texts), texts, tuple(notes))


def zipped(texts: dict[str, str]) -> bytes:
    """One archive; the same texts give the same bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in sorted(texts.items()):
            archive.writestr(zipfile.ZipInfo(name, ZIP_DATE), text.encode("utf-8"), zipfile.ZIP_DEFLATED)
    return stream.getvalue()
