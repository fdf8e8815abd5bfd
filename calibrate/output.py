"""Writes a fit: the profile, the raw rows it came from, the comparison with whole images, and what held-out sizes say."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
from pathlib import Path

from calibrate.compose import CheckRow
from calibrate.fit import Fitted
from calibrate.heldout import held_out_json
from calibrate.measurement import write_measurements
from calibrate.profile_file import to_json


def check_csv(rows: tuple[CheckRow, ...]) -> str:
    """The comparison as CSV, one kind of image a line."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["topology", "mode", "n_controlnets", "n_loras", "variant", "n_images", "n_steps", "forward_batch", "megapixels",
         "n_repetitions", "measured_s", "predicted_s", "gap_ratio", "is_held_out"]
    )  # fmt: skip
    for row in rows:
        writer.writerow(
            [row.topology, row.mode, row.n_controlnets, row.n_loras, row.variant, row.n_images, row.n_steps,
             row.forward_batch, f"{row.megapixels:g}", row.n_repetitions,
             f"{row.measured_s:.6f}", f"{row.predicted_s:.6f}", f"{row.gap_ratio:.4f}", str(row.is_held_out).lower()]
        )  # fmt: skip
    return stream.getvalue()


def write_fit(fitted: Fitted, out: Path) -> list[Path]:
    """Writes the raw rows, the check and the profile that names the digest of the raw rows; returns the files.

    ``NAME.heldout.json`` says how the laws do at held-out sizes and why each form was chosen; where there are neither, an old
    one is removed, because it is another fit's.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    raw, check = out.with_suffix(".measurements.parquet"), out.with_suffix(".check.csv")
    write_measurements(fitted.measurements, raw)
    profile = dataclasses.replace(fitted.profile, raw_sha256=hashlib.sha256(raw.read_bytes()).hexdigest())
    replace_text(check, check_csv(fitted.check))
    held_out = out.with_suffix(".heldout.json")
    has_report = bool(fitted.held_out or fitted.forms)
    if has_report:
        replace_text(held_out, held_out_json(profile, profile.raw_sha256, fitted.held_out, fitted.forms))
    else:
        held_out.unlink(missing_ok=True)
    replace_text(out, to_json(profile))
    return [out, raw, check, *([held_out] if has_report else [])]


def replace_text(path: Path, text: str) -> None:
    """Writes beside the file, then renames."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
