"""What stands behind a shipped profile, read from the files beside it: whole images held against the laws, and a validation if there is one."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd
import streamlit as st

from calibrate.profile_file import shipped_profiles
from dashboards.words import language, say

FILE_BYTES_MAX: Final = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Check:
    """One kind of whole image: timed, and composed from the fitted laws."""

    topology: str
    n_controlnets: int
    n_loras: int
    variant: str
    """Empty, or what was done by hand, such as ``fused``."""
    n_repetitions: int
    measured_s: float
    predicted_s: float
    is_held_out: bool
    """No law or overhead was fitted to it."""
    size: str
    """``1024², 50 steps``; with more than one image or without guidance that too; empty where the file does not say."""

    @property
    def gap_ratio(self) -> float:
        """(composed − measured) / measured."""
        return self.predicted_s / self.measured_s - 1


def beside(profile: str, ending: str) -> Path | None:
    """A file that travels with a shipped profile (``h200`` and ``check.csv``: ``h200.check.csv``); None if there is none."""
    shipped = shipped_profiles().get(profile)
    path = shipped.with_name(f"{shipped.stem}.{ending}") if shipped is not None else None
    return path if path is not None and path.is_file() and path.stat().st_size <= FILE_BYTES_MAX else None


def checks_of(profile: str) -> list[Check]:
    """Whole images timed beside a shipped profile; none for others."""
    path = beside(profile, "check.csv")
    return _checks(str(path), path.stat().st_mtime_ns, language()) if path is not None else []


@st.cache_data(max_entries=4, show_spinner=False)
def _checks(path: str, mtime_ns: int, words: str) -> list[Check]:
    frame = pd.read_csv(path, keep_default_na=False)
    return [
        Check(
            str(row["topology"]), int(row["n_controlnets"]), int(row["n_loras"]), str(row["variant"]), int(row["n_repetitions"]),
            float(row["measured_s"]), float(row["predicted_s"]), str(row["is_held_out"]).lower() == "true", _size(row),
        )
        for row in frame.to_dict("records")
    ]  # fmt: skip


def _size(row: Mapping[Any, Any]) -> str:
    if "megapixels" not in row:
        return ""
    n_images, forward = int(row["n_images"]), int(row["forward_batch"])
    parts = [f"{round(math.sqrt(float(row['megapixels'])) * 1024)}²", say("evidence.steps", n=int(row["n_steps"]))]
    if n_images > 1:
        parts.append(say("evidence.images", n=n_images))
    if forward == n_images:  # with guidance every image is denoised twice
        parts.append(say("evidence.unguided"))
    return ", ".join(parts)


def usual_size(checks: Sequence[Check]) -> str:
    """The size that most kinds of images were timed at; the first of several; empty if there are no checks."""
    sizes = Counter(check.size for check in checks)
    return max(sizes, key=lambda size: sizes[size], default="")


def report_of(profile: str, kind: str) -> dict[str, Any] | None:
    """A JSON report shipped beside a profile: ``heldout`` (sizes that no law was fitted to) or ``validation`` (engine replays held
    against simulations of the same traffic). None if there is none."""
    path = beside(profile, f"{kind}.json")
    return _report(str(path), path.stat().st_mtime_ns) if path is not None else None


@st.cache_data(max_entries=8, show_spinner=False)
def _report(path: str, mtime_ns: int) -> dict[str, Any] | None:
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else None
