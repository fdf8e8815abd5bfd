"""Imports GenTD26, the request log of a real text-to-image service (github.com/alibaba/clusterdata, cluster-trace-v2026-GenAI).

The timed log has no LoRA ids. A second table of the same folder has them without times; its last 26,823 rows are the
timed log row by row, which this importer verifies on every row before it believes it. The data has no licence for
redistribution: read it from where the user has it.
"""

from __future__ import annotations

import ast
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from traces.cells import Findings
from traces.files import DEFAULT_LIMITS, ReadLimits, checked_file, read_text
from traces.frame import checked_frame
from traces.problems import InputError, one_problem
from traces.reader import frame_of_csv
from traces.trace import Provenance, Trace

TIMED_FILE: Final = "lora_request_trace.csv"
DETAIL_FILES: Final = ("data_trace_processed.csv.gz", "data_trace_processed.csv", "data_trace_processed.tar.gz")
FIRST_DETAIL_ROW: Final = 41_372
"""Row of the detail table that belongs to the first timed row (found by matching; verified on every import)."""

SHARED_COLUMNS: Final = (
    "exec_time_seconds",
    "prompt_length",
    "negative_prompt_length",
    "num_images_per_prompt",
    "num_inference_steps",
)
TIMED_COLUMNS: Final = (
    "gmt_create",
    "predict_type",
    "predict_status",
    "groupId",
    "checkpoint_model_version_id",
    "num_lora",
    *SHARED_COLUMNS,
)
DETAIL_COLUMNS: Final = ("checkpoint_model_version_id", "lora_args", *SHARED_COLUMNS)
_LORA_TEXT_MAX: Final = 20_000


def import_gentd26(folder: Path | str, *, succeeded_only: bool = False, limits: ReadLimits = DEFAULT_LIMITS) -> Trace:
    """Reads the folder of the published data set.

    Every request that was asked for is kept, also those that failed or never finished: they are demand. Their
    ``predict_status`` is kept as a column and counted in the notes; ``succeeded_only`` leaves them out instead. Rows
    that name no checkpoint, steps and images cannot be planned for and are left out, counted. ``groupId`` is documented
    upstream as "user/group identifier" and becomes ``tenant_id``. ``exec_time_seconds`` (the log's own service time on
    its own hardware), ``predict_type`` and ``predict_status`` are kept as they are. Image size and guidance are not in
    the log and get the defaults of the columns, counted.

    Raises:
        InputError: a file or column is missing, a cell cannot be read, or the two tables do not agree in every row.
    """
    folder = Path(folder)
    timed = _numbers_read(_table(folder / TIMED_FILE, TIMED_COLUMNS, limits), (*SHARED_COLUMNS, "num_lora"), TIMED_FILE)
    detail_path = _detail_path(folder)
    detail = _detail_table(detail_path, limits)
    part = detail.iloc[FIRST_DETAIL_ROW : FIRST_DETAIL_ROW + len(timed)].reset_index(drop=True)
    part = _numbers_read(part, SHARED_COLUMNS, detail_path.name, FIRST_DETAIL_ROW)
    names, scales = _loras(part["lora_args"], detail_path.name)
    _check_same_rows(timed, part, names, detail_path.name)

    created = _times(timed["gmt_create"])
    status = timed["predict_status"]
    is_empty = timed[["checkpoint_model_version_id", "num_inference_steps", "num_images_per_prompt"]].isna().all(axis=1)
    left_out = {}
    for each, count in sorted(status[is_empty].value_counts().items()):
        left_out[f"{each}: the log names no checkpoint, steps and images"] = int(count)
    is_kept = ~is_empty
    failed = status[is_kept & (status != "SUCCEED")].value_counts().sort_index()
    notes = [
        "LoRA ids joined from data_trace_processed by row; execution time, prompt lengths, images, steps and number of "
        "LoRAs agree in every row and checkpoints map one to one",
        "tenant_id is the log's groupId (user or group)",
        "not in the log: ControlNets, image size, guidance, bytes and rank of LoRAs, bytes and architecture of checkpoints",
    ]
    if succeeded_only:
        left_out |= {f"{each}: did not succeed": int(count) for each, count in failed.items()}
        is_kept &= status == "SUCCEED"
    else:
        counted = ", ".join(f"{count} {each}" for each, count in failed.items())
        notes.append(f"kept as demand although they did not succeed: {counted or 'none'}")
    frame = pd.DataFrame(
        {
            "request_id": [f"gentd26-{row:05d}" for row in range(len(timed))],
            "arrival_s": (created - created.iloc[0]).dt.total_seconds(),
            "base_model_id": timed["checkpoint_model_version_id"],
            "n_steps": timed["num_inference_steps"],
            "n_images": timed["num_images_per_prompt"],
            "lora_ids": names,
            "lora_scales": scales,
            "tenant_id": timed["groupId"],
            "predict_type": timed["predict_type"],
            "predict_status": status,
            "exec_time_seconds": timed["exec_time_seconds"],
        }
    )
    duration_s = float(frame["arrival_s"].max())
    provenance = Provenance(
        source="GenTD26 (github.com/alibaba/clusterdata, cluster-trace-v2026-GenAI)",
        licence="none stated for this folder; for research and study, not redistributable",
        left_out=left_out,
        notes=tuple(notes),
    )
    return checked_frame(frame[is_kept].reset_index(drop=True), TIMED_FILE, provenance, duration_s)


def _detail_path(folder: Path) -> Path:
    for name in DETAIL_FILES:
        if (folder / name).exists():
            return folder / name
    raise one_problem(
        str(folder), f"has none of {', '.join(DETAIL_FILES)}", repair="Give the folder cluster-trace-v2026-GenAI"
    )


def _detail_table(path: Path, limits: ReadLimits) -> pd.DataFrame:
    if not path.name.endswith(".tar.gz"):
        return _table(path, DETAIL_COLUMNS, limits)
    checked_file(path, limits)  # as published upstream: one CSV in an archive
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                if not (member.isfile() and member.name.endswith(".csv")) or Path(member.name).name.startswith("."):
                    continue
                if member.size > limits.decompressed_bytes:
                    raise one_problem(
                        str(path), f"unpacks to {member.size} bytes", f"at most {limits.decompressed_bytes}"
                    )
                stream = archive.extractfile(member) or io.BytesIO()
                text = stream.read().decode("utf-8-sig")
                return _with_columns(frame_of_csv(text, path.name, limits), DETAIL_COLUMNS, path.name)
    except (tarfile.TarError, EOFError, OSError, UnicodeDecodeError) as error:
        raise one_problem(str(path), f"is not a readable archive: {error}", repair="Fetch it again") from error
    raise one_problem(str(path), "holds no CSV file", "one CSV file")


def _table(path: Path, columns: Sequence[str], limits: ReadLimits) -> pd.DataFrame:
    return _with_columns(frame_of_csv(read_text(path, limits), path.name, limits), columns, path.name)


def _with_columns(frame: pd.DataFrame, columns: Sequence[str], where: str) -> pd.DataFrame:
    lacking = [name for name in columns if name not in frame.columns]
    if lacking:
        raise one_problem(where, f"has no column {', '.join(lacking)}", f"the columns {', '.join(columns)}")
    return frame[list(columns)]


def _numbers_read(frame: pd.DataFrame, columns: Sequence[str], where: str, first_row: int = 0) -> pd.DataFrame:
    """The frame with these columns as float64; an empty cell is NaN."""
    findings = Findings(where)
    out = frame.copy()
    for name in columns:
        numbers = pd.to_numeric(frame[name], errors="coerce").astype(np.float64)
        for row in np.flatnonzero((numbers.isna() & frame[name].notna()).to_numpy()).tolist():
            findings.cell(first_row + row, name, f"got {frame[name].iloc[row]!r}", "a number or nothing")
        out[name] = numbers
    if findings.problems:
        raise InputError(findings.all_problems())
    return out


def _times(texts: pd.Series[Any]) -> pd.Series[Any]:
    times = pd.to_datetime(texts, format="%Y-%m-%d %H:%M:%S", errors="coerce")
    findings = Findings(TIMED_FILE)
    for row in np.flatnonzero(times.isna().to_numpy()).tolist():
        findings.cell(row, "gmt_create", f"got {texts.iloc[row]!r}", "a time like 2024-11-15 16:57:50")
    if findings.problems:
        raise InputError(findings.all_problems())
    if not times.is_monotonic_increasing:
        row = int(np.flatnonzero((times.diff() < pd.Timedelta(0)).to_numpy())[0])
        what = f"got {texts.iloc[row]!r}, before the row above"
        raise one_problem(f"{TIMED_FILE} row {row + 1} column gmt_create", what, "times in order")
    return times


def _loras(texts: pd.Series[Any], where: str) -> tuple[pd.Series[Any], pd.Series[Any]]:
    """Ids and weights from Python literals like ``[{'modelVersionId': '9232…', 'scale': 0.8}]``."""
    findings = Findings(where)
    known: dict[str, tuple[tuple[str, ...], tuple[float, ...]] | None] = {}
    names = np.empty(len(texts), dtype=object)
    scales = np.empty(len(texts), dtype=object)
    for row, cell in enumerate(texts):
        text = cell or "[]"
        if text not in known:
            known[text] = _parsed_loras(text)
        parsed = known[text]
        if parsed is None:
            what = f"got {text[:60]!r}"
            findings.cell(
                FIRST_DETAIL_ROW + row, "lora_args", what, "a list like [{'modelVersionId': 'x', 'scale': 0.8}]"
            )
            parsed = ((), ())
        names[row], scales[row] = parsed
    if findings.problems:
        raise InputError(findings.all_problems())
    return pd.Series(names, dtype=object), pd.Series(scales, dtype=object)


def _parsed_loras(text: str) -> tuple[tuple[str, ...], tuple[float, ...]] | None:
    if len(text) > _LORA_TEXT_MAX:
        return None
    try:
        items = ast.literal_eval(text)
        return tuple(str(item["modelVersionId"]) for item in items), tuple(float(item["scale"]) for item in items)
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError):
        return None


def _check_same_rows(timed: pd.DataFrame, part: pd.DataFrame, names: pd.Series[Any], detail_name: str) -> None:
    """The two tables are the same requests in the same order, or the LoRA ids belong to others."""
    repair = "Use both files of the same published version"
    if len(part) != len(timed):
        what = f"has {len(part)} rows from row {FIRST_DETAIL_ROW + 1} on"
        raise one_problem(detail_name, what, f"{len(timed)}, as many as {TIMED_FILE}", repair)
    findings = Findings(TIMED_FILE)
    for name in SHARED_COLUMNS:
        ours, theirs = timed[name], part[name]
        for row in np.flatnonzero(((ours != theirs) & ~(ours.isna() & theirs.isna())).to_numpy()).tolist():
            what = (
                f"got {ours.iloc[row]:g}, but {detail_name} row {FIRST_DETAIL_ROW + row + 1} has {theirs.iloc[row]:g}"
            )
            findings.cell(row, name, what, "the same value in both", repair)
    counted = names.map(len)
    for row in np.flatnonzero((timed["num_lora"] != counted).to_numpy()).tolist():
        what = f"got {timed['num_lora'].iloc[row]:g}, but {detail_name} lists {counted.iloc[row]} LoRAs"
        findings.cell(row, "num_lora", what, "the same number in both", repair)
    pairs = pd.DataFrame({"ours": timed["checkpoint_model_version_id"], "theirs": part["checkpoint_model_version_id"]})
    if (pairs["ours"].isna() != pairs["theirs"].isna()).any():
        findings.table(f"names a checkpoint in rows where {detail_name} has none, or the reverse", repair=repair)
    pairs = pairs.dropna().drop_duplicates()
    for side, other in (("ours", "theirs"), ("theirs", "ours")):
        for name in sorted(set(pairs.loc[pairs[side].duplicated(), side])):
            several = sorted(pairs.loc[pairs[side] == name, other])
            findings.table(f"checkpoint {name} goes with {', '.join(several)}", "one partner each", repair)
    if findings.problems:
        raise InputError(findings.all_problems())
