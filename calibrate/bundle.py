"""``calibrate bundle``: an offline kit for a GPU host without network — code, wheels, design, one script. The same inputs give the same bytes.

On the host: ``sh run.sh RESULT_FOLDER``. What comes back is one file, ``result.zip``, for ``calibrate ingest``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from calibrate.extent import extent_for
from calibrate.measurement import PARQUET_FILE, holds_run, read_measurements, write_measurements
from calibrate.passes import passes
from calibrate.points import PARTS, schedule
from traces.problems import InputError, Problem, one_problem

PACKAGES: Final = ("traces", "kernels", "engine", "calibrate")
"""What a GPU host runs; neither the planner nor the dashboard."""
CODE_ENDINGS: Final = (".py", ".json", ".typed")
SKIPPED: Final = frozenset({"__pycache__", "profiles"})
MANIFEST: Final = "manifest.json"
RESULT_FILE: Final = "result.zip"
WHEELS_BYTES_MAX: Final = 2 * 2**30
FORMAT: Final = 1
EPOCH: Final = (1980, 1, 1, 0, 0, 0)
"""Zip's oldest date: an archive is to depend on its contents only."""


@dataclass(frozen=True, slots=True)
class Kit:
    """What a bundle is to measure, as the options of ``calibrate run``."""

    model: str = "sdxl"
    device: str = "cuda"
    n_gpus: int = 1
    budget_minutes: float = 15.0
    compile_minutes: float = 4.0
    tuned_batches: str = "2"
    parts: tuple[str, ...] = PARTS
    passes: str = ""
    """Instead of parts in the standard order: see :mod:`calibrate.passes`."""

    def arguments(self) -> list[str]:
        """For the script."""
        what = ["--passes", self.passes] if self.passes else ["--parts", ",".join(self.parts)]
        return [
            "--model", self.model, "--device", self.device, "--gpus", str(self.n_gpus),
            "--budget-minutes", f"{self.budget_minutes:g}", "--compile-seconds", f"{60 * self.compile_minutes:g}",
            "--tuned-batches", self.tuned_batches, *what,
        ]  # fmt: skip


def write_bundle(kit: Kit, out: Path, wheels: Path | None) -> dict[str, int]:
    """Writes the kit; returns its parts and their files.

    Raises:
        InputError: ``out`` is not a new .zip, a wheel's name is none, the wheels are too large, or the passes name what there is not.
    """
    if out.suffix != ".zip" or out.exists():
        what = "exists already" if out.exists() else f"got {str(out)!r}"
        raise one_problem("OUT", what, "the name of a new .zip file", "Name another one.")
    root = Path(__file__).resolve().parent.parent
    files: dict[str, bytes] = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            inside = path.relative_to(root)
            if path.is_file() and path.suffix in CODE_ENDINGS and not SKIPPED & set(inside.parts):
                files[f"code/{inside.as_posix()}"] = path.read_bytes()
    n_code = len(files)
    wheel_files = _wheels(wheels) if wheels is not None else {}
    files |= wheel_files
    files["design.json"] = _json(_design(kit))
    files["run.sh"] = _script(kit).encode()
    files["README.txt"] = README.encode()
    files[MANIFEST] = _json(_manifest("bundle", files))
    write_zip(out, files, executable=("run.sh",))
    return {"code": n_code, "wheels": len(wheel_files), "tasks": len(_design(kit)["tasks"])}


def write_result(run: Path, log: Path | None = None) -> Path:
    """Packs a run's measurements beside it as ``result.zip``, and the end of its log; also of a run that was cut short.

    Raises:
        InputError: the folder holds no run.
    """
    if not run.is_dir() or not holds_run(run):
        raise one_problem(str(run), "holds no run", "the folder of 'calibrate run'")
    if not (run / PARQUET_FILE).exists():
        write_measurements(read_measurements(run), run / PARQUET_FILE)
    files = {PARQUET_FILE: (run / PARQUET_FILE).read_bytes()}
    if log is not None and log.is_file():
        files["run.log"] = log.read_bytes()[-(2**20) :]
    files[MANIFEST] = _json(_manifest("result", files))
    out = run / RESULT_FILE
    out.unlink(missing_ok=True)
    write_zip(out, files)
    return out


def write_zip(out: Path, files: Mapping[str, bytes], executable: Iterable[str] = ()) -> None:
    """Writes beside ``out`` and renames; names sorted, dates fixed."""
    runnable = set(executable)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(out.name + ".part")
    with zipfile.ZipFile(beside, "w") as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, EPOCH)
            info.external_attr = (0o755 if name in runnable else 0o644) << 16
            # wheels are zip files themselves
            info.compress_type = zipfile.ZIP_STORED if name.endswith(".whl") else zipfile.ZIP_DEFLATED
            archive.writestr(info, files[name])
    beside.replace(out)


def _wheels(folder: Path) -> dict[str, bytes]:
    if not folder.is_dir():
        raise one_problem("--wheels", f"{str(folder)!r} is no folder", "a folder of .whl files", "Check the path.")
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    problems = [
        Problem(f"--wheels {path.name}", "is no wheel", "files that end in .whl only", "Move it elsewhere.")
        for path in paths
        if path.suffix != ".whl"
    ]
    total = sum(path.stat().st_size for path in paths)
    if total > WHEELS_BYTES_MAX:
        problems.append(Problem("--wheels", f"has {total} bytes", f"at most {WHEELS_BYTES_MAX}", "Leave torch out."))
    if problems:
        raise InputError(problems)
    return {f"wheels/{path.name}": path.read_bytes() for path in paths}


def _design(kit: Kit) -> dict[str, Any]:
    """What will be measured, for whoever has to agree to it; the code draws the same from the same options."""
    batches = tuple(int(batch) for batch in kit.tuned_batches.split(",") if batch)
    extent = extent_for(kit.model, kit.device, n_gpus=kit.n_gpus, tuned_batches=batches)
    blocks = passes(extent, kit.passes) if kit.passes else schedule(extent, kit.parts)
    tasks = {task.key: task for block in blocks for task in block}
    return {
        "format": FORMAT,
        "kit": dataclasses.asdict(kit),
        "tasks": [
            {"task": task.name, "part": task.part, "n_repeats": task.n_repeats, "is_held_out": task.is_held_out}
            for task in tasks.values()
        ],
    }


def _manifest(kind: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    return {"format": FORMAT, "kind": kind, "sha256": digests}


def _json(plain: Mapping[str, Any]) -> bytes:
    return (json.dumps(plain, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _script(kit: Kit) -> str:
    options = " ".join(f"'{argument}'" for argument in kit.arguments())
    return f"""#!/bin/sh
# Measures this machine and packs the result. Needs Python 3.11 or 3.12 with torch for its GPU; writes only below the folder named.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${{1:?usage: sh run.sh RESULT_FOLDER [--resume] [options of calibrate run]}}
shift
python=${{PYTHON:-python3}}
mkdir -p "$out"
out=$(cd "$out" && pwd)
target="--out"
if [ "${{1:-}}" = "--resume" ]; then target="--resume"; shift; fi
if [ -d "$here/wheels" ] && [ ! -d "$here/site" ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$here/site.part" "$here"/wheels/*.whl
  mv "$here/site.part" "$here/site"
fi
PYTHONPATH="$here/code:$here/site${{PYTHONPATH:+:$PYTHONPATH}}"
export PYTHONPATH PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
cd "$here/code"
# the pack step runs also if measuring was cut short: every row that was taken is kept
"$python" -m calibrate run "$target" "$out/run" {options} "$@" 2>>"$out/run.log" || echo "measuring ended early: see $out/run.log" >&2
"$python" -m calibrate pack "$out/run" --log "$out/run.log"
"""


README: Final = """Calibration kit
===============
On the GPU host (no network needed):
    unzip kit.zip -d kit && sh kit/run.sh /path/to/results
Interrupted? The same again with --resume as second argument.
Bring back results/run/result.zip, and there: diffplan calibrate ingest result.zip --out measured
design.json lists every point that is measured; manifest.json has the sha256 of every file.
"""
