"""``diffplan observe`` on an engine's files: whole lines count, torn and hostile ones do not break it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from planner.observe.ask import ObserveQuestion, observe
from planner.observe.run_folder import read_observed
from tests.operate.records import records
from traces.problems import InputError
from traces.reader import read_table, read_trace
from traces.records import REQUEST_RECORD_COLUMNS

HOSTILE = 'r"\n{{x}}\u202e'


def row(**other: Any) -> dict[str, Any]:
    return {
        "table": "requests",
        "request_id": "a",
        "arrival_s": 1.0,
        "status": "done",
        "end_s": 3.0,
        "latency_s": 2.0,
    } | other


def write_lines(folder: Path, *lines: bytes, number: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"records-{number:06d}.jsonl").write_bytes(b"".join(lines))
    return folder


def line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def test_torn_lines_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    span = {
        "table": "workers",
        "worker_id": "w",
        "pool": "p",
        "role": "base",
        "state": "busy",
        "start_s": 1.0,
        "end_s": 9.0,
    }
    write_lines(tmp_path, line(row()), line(span), b"[1]\n", b'{"table": "requests", "requ', number=1)
    write_lines(tmp_path, line(row(request_id=HOSTILE, arrival_s=0.5)), number=10)
    write_lines(tmp_path, line(row(request_id="b", arrival_s=0.7)), number=9)
    found = read_observed(tmp_path)
    assert found.requests["request_id"].tolist() == [HOSTILE, "b", "a"]
    assert (found.n_torn_lines, len(found.workers), found.seen_until_s) == (2, 1, 9.0)


def test_the_latest_start_is_read_unless_one_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "records" / "20260101T000000Z", line(row(request_id="old")))
    write_lines(tmp_path / "records" / "20260102T000000Z", line(row(request_id="new")))
    assert read_observed(tmp_path).requests["request_id"].tolist() == ["new"]
    assert read_observed(tmp_path, "20260101T000000Z").requests["request_id"].tolist() == ["old"]
    with pytest.raises(InputError, match="--start"):
        read_observed(tmp_path, "../../etc")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (row(status="great"), "done, rejected, expired, failed"),
        (row(end_s=0.5), "before it arrived"),
        (row(arrival_s="soon"), "arrival_s"),
        (row(arrival_s=-1.0), "arrival_s"),
        (row(request_id=7), "no whole record"),
    ],
)  # fmt: skip
def test_a_wrong_record_gets_a_sentence_and_nothing_is_written(
    tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    write_lines(tmp_path / "run", line(wrong))
    with pytest.raises(InputError, match=said):
        observe(ObserveQuestion(str(tmp_path / "run")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_records_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds neither"):
        read_observed(tmp_path)


def test_records_survive_the_round_trip_to_the_byte(tmp_path: Path) -> None:
    frame = records(1, 600.0)
    lines = [line({"table": "requests", **each}) for each in frame.to_dict("records")]
    write_lines(tmp_path / "run", *lines)
    observe(ObserveQuestion(str(tmp_path / "run")), tmp_path / "a")
    observe(ObserveQuestion(str(tmp_path / "a" / "requests.parquet")), tmp_path / "b")
    again = read_table(tmp_path / "b" / "requests.parquet", REQUEST_RECORD_COLUMNS)
    pd.testing.assert_frame_equal(again[frame.columns], frame, check_dtype=False)
    observe(ObserveQuestion(str(tmp_path / "a" / "requests.parquet")), tmp_path / "c")
    assert (tmp_path / "b" / "requests.parquet").read_bytes() == (tmp_path / "c" / "requests.parquet").read_bytes()


def test_the_request_log_gives_the_requests_with_their_add_ons(tmp_path: Path) -> None:
    write_lines(tmp_path / "run", line(row()))
    job = {
        "base_model_id": "sdxl",
        "n_steps": 30,
        "width_px": 512,
        "height_px": 512,
        "n_images": 2,
        "controlnet_ids": ["canny"],
        "lora_ids": ["ink", HOSTILE],
    }
    log = [
        {"time": "2026-01-01T00:00:03.000+00:00", "request_id": "a", "latency_s": 2.0, "tenant_id": "acme", "job": job},
        {"time": "2026-01-01T00:00:06.500+00:00", "request_id": "b", "latency_s": 0.5, "job": {**job, "lora_ids": []}},
        {"time": "2026-01-01T00:00:07.000+00:00", "request_id": "c", "latency_s": 0.1, "code": "invalid_value"},
        {"time": "yesterday", "request_id": "d", "latency_s": 0.1},
    ]  # fmt: skip
    (tmp_path / "log.jsonl").write_bytes(b"".join(map(line, log)))
    observe(ObserveQuestion(str(tmp_path / "run"), tmp_path / "log.jsonl"), tmp_path / "out")
    trace = read_trace(tmp_path / "out" / "trace.parquet")
    first, second = list(trace)
    assert (first.arrival_s, first.lora_ids, first.controlnet_ids, first.n_images) == (
        1.0,
        ("ink", HOSTILE),
        ("canny",),
        2,
    )
    assert (second.request_id, second.arrival_s) == ("b", 6.0)  # 5 s after the first by the log's clock
    assert trace.provenance.left_out == {"refused before it was a job": 1, "not a whole line": 1}
