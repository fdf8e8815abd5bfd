"""Takes a visitor's files in: checked by size and content, kept under names made here in a folder of the session.

Nothing of the upload decides a path: the kept name is a digest of the content, and a scenario that came through the browser may
name shipped things only, so that it cannot make this machine read files of its own choosing.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Final, Protocol

import streamlit as st

from calibrate.profile import LatencyProfile
from calibrate.profile_file import load_profile
from planner.prices import shipped_tables
from planner.scenario import SAMPLE_PREFIX, Scenario
from planner.strict_yaml import parse_strict
from traces.files import MIB, ReadLimits
from traces.problems import InputError, Problem, one_problem
from traces.reader import read_trace

SCENARIO_BYTES_MAX: Final = MIB
PROFILE_BYTES_MAX: Final = 32 * MIB
TRACE_LIMITS: Final = ReadLimits(file_bytes=64 * MIB, decompressed_bytes=512 * MIB, rows=1_000_000)
TRACE_SUFFIXES: Final = (".parquet", ".csv", ".jsonl")
PARQUET_MAGIC: Final = b"PAR1"
_FOLDER_KEY: Final = "_session_folder"


class Upload(Protocol):
    """What is used of Streamlit's uploaded file."""

    name: str
    size: int

    def getvalue(self) -> bytes:
        """The whole content."""
        ...


def session_folder() -> Path:
    """The session's folder; it goes away with the session."""
    if _FOLDER_KEY not in st.session_state:
        st.session_state[_FOLDER_KEY] = tempfile.TemporaryDirectory(prefix="diffplan-dashboard-")
    return Path(st.session_state[_FOLDER_KEY].name)


def shown_name(upload: Upload) -> str:
    """The upload's name fit for a sentence: no folders, no control characters, 80 characters at most."""
    name = upload.name.replace("\\", "/").rpartition("/")[2]
    return "".join(c for c in name if c.isprintable())[:80] or "upload"


def scenario_of(upload: Upload, *, brings_trace: bool) -> Scenario:
    """The uploaded scenario.

    Args:
        brings_trace: a trace was uploaded as well and will stand in for the one the scenario names.

    Raises:
        InputError: not a scenario, or it names files of its author's machine.
    """
    name = shown_name(upload)
    content = _content(upload, SCENARIO_BYTES_MAX)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise one_problem(
            name, f"byte 0x{content[error.start]:02x} is not UTF-8 text", "a scenario in YAML", "Save it as UTF-8"
        ) from None
    scenario = parse_strict(text, Scenario, name)
    problems = []
    trace = scenario.traffic.trace
    if not brings_trace and not trace.startswith(SAMPLE_PREFIX):
        problems.append(
            Problem(
                f"{name} traffic.trace",
                f"names the file {trace[:80]!r}",
                f"{SAMPLE_PREFIX}NAME here",
                "Upload that trace as well",
            )
        )
    if scenario.prices.table not in shipped_tables():
        problems.append(
            Problem(
                f"{name} prices.table", f"names the file {scenario.prices.table[:80]!r}", f"one of {', '.join(shipped_tables())} here",
                "Give the price in the field below, and take prices.table out",
            )
        )  # fmt: skip
    if scenario.add_ons.catalogue is not None:
        problems.append(
            Problem(
                f"{name} add_ons.catalogue", f"names the file {scenario.add_ons.catalogue[:80]!r}", "none here",
                "Take it out, or start the dashboard with --scenario and this file",
            )
        )  # fmt: skip
    if problems:
        raise InputError(problems)
    return scenario


def keep_profile(upload: Upload, folder: Path) -> tuple[str, LatencyProfile]:
    """Checks and keeps a profile; gives its file name in ``folder``. Raises :class:`InputError`."""
    content = _content(upload, PROFILE_BYTES_MAX)
    path = _keep(content, folder, "profile", ".json")
    try:
        return path.name, load_profile(str(path))
    except InputError as error:
        path.unlink(missing_ok=True)
        raise _under_shown_name(error, path, upload) from None


def keep_trace(upload: Upload, folder: Path) -> str:
    """Checks and keeps a trace; gives its file name in ``folder``. Raises :class:`InputError`."""
    name = shown_name(upload)
    suffix = next((suffix for suffix in TRACE_SUFFIXES if name.lower().endswith(suffix)), "")
    if not suffix:
        raise one_problem(name, "is not a kind of file that is read here", f"one of {', '.join(TRACE_SUFFIXES)}")
    content = _content(upload, TRACE_LIMITS.file_bytes)
    if content.startswith(PARQUET_MAGIC) != (suffix == ".parquet"):
        what = "holds Parquet" if suffix != ".parquet" else "does not hold Parquet"
        raise one_problem(
            name, f"{what}, its name ends in {suffix}", "a name that fits the content", "Rename it, or write it again"
        )
    path = _keep(content, folder, "trace", suffix)
    try:
        read_trace(path, TRACE_LIMITS)
    except InputError as error:
        path.unlink(missing_ok=True)
        raise _under_shown_name(error, path, upload) from None
    return path.name


def _content(upload: Upload, bytes_max: int) -> bytes:
    if upload.size > bytes_max:
        raise one_problem(
            shown_name(upload),
            f"has {upload.size:,} bytes",
            f"at most {bytes_max:,} bytes",
            "Check that it is the right file",
        )
    if upload.size == 0:
        raise one_problem(
            shown_name(upload), "is empty (0 bytes)", "a file with content", "Check that it is the right file"
        )
    return upload.getvalue()


def _keep(content: bytes, folder: Path, kind: str, suffix: str) -> Path:
    path = folder / f"{kind}-{hashlib.sha256(content).hexdigest()[:16]}{suffix}"
    if not path.exists():
        handle, beside = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        Path(beside).replace(path)
    return path


def _under_shown_name(error: InputError, path: Path, upload: Upload) -> InputError:
    def renamed(text: str) -> str:
        return text.replace(str(path), shown_name(upload)).replace(path.name, shown_name(upload))

    return InputError([Problem(renamed(p.where), renamed(p.what), p.allowed, p.repair) for p in error.problems])
