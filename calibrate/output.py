"""Writes a fit: the profile, the raw rows it came from, and the comparison with whole images."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
from pathlib import Path

from calibrate.compose import CheckRow
from calibrate.fit import Fitted
from calibrate.measurement import write_measurements
from calibrate.profile_file import to_json


def check_csv(rows: tuple[CheckRow, ...]) -> str:
    """The comparison as CSV, one kind of image a line."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["topology", "mode", "n_controlnets", "n_loras", "variant", "n_repetitions", "measured_s", "predicted_s",
         "gap_ratio", "is_held_out"]
    )  # fmt: skip
    for row in rows:
        writer.writerow(
            [row.topology, row.mode, row.n_controlnets, row.n_loras, row.variant, row.n_repetitions,
             f"{row.measured_s:.6f}", f"{row.predicted_s:.6f}", f"{row.gap_ratio:.4f}", str(row.is_held_out).lower()]
        )  # fmt: skip
    return stream.getvalue()


def write_fit(fitted: Fitted, out: Path) -> list[Path]:
    """Writes the raw rows, the check and the profile that names the digest of the raw rows; returns the files."""
    out.parent.mkdir(parents=True, exist_ok=True)
    raw, check = out.with_suffix(".measurements.parquet"), out.with_suffix(".check.csv")
    write_measurements(fitted.measurements, raw)
    profile = dataclasses.replace(fitted.profile, raw_sha256=hashlib.sha256(raw.read_bytes()).hexdigest())
    _replace(check, check_csv(fitted.check))
    _replace(out, to_json(profile))
    return [out, raw, check]


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
