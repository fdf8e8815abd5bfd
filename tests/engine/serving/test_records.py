"""What the engine writes down of requests and workers, and that a kill loses none but the last line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from engine.allocation import Pool
from engine.serving.engine_view import WorkerView
from engine.serving.events import Event
from engine.serving.job import ControlUse, Job, Outcome, StageSeconds, WorkerResult
from engine.serving.line_file import LineFiles, LineFileSettings, ReadReport, line_files, read_lines
from engine.serving.ports import BaseReplicaInfo, BatchSpan
from engine.serving.record_log import RecordLog
from engine.serving.record_rows import request_row
from engine.serving.record_tables import read_record_log, write_record_tables
from traces.reader import read_table
from traces.records import REQUEST_RECORD_COLUMNS, WORKER_INTERVAL_COLUMNS, column_names

POOLS = (Pool("base", "base", 2, "h200", topology="decoupled"), Pool("nets", "controlnet", 1, "h200"))
STAGES = ("switch_s", "controlnet_load_s", "lora_wait_s", "text_s", "denoise_s", "decode_s")


def done(name: str = "r1", *, start_s: float = 1.0, end_s: float = 4.0, **stages: float) -> Outcome:
    return Outcome(
        name, "done", worker_id="b0", n_attempts=1, arrival_s=0.5, start_s=start_s, end_s=end_s, topology="decoupled",
        result=WorkerResult(StageSeconds(**stages), lora_patch_step=3, is_switch=True),
    )  # fmt: skip


def info(worker_id: str) -> BaseReplicaInfo:
    return BaseReplicaInfo(worker_id, "base", "decoupled", ("*",), (), ())


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_stages_of_a_done_request_fill_start_to_end_and_say_what_was_added() -> None:
    row = request_row(Job("r1"), done(text_s=0.5, denoise_s=2.0, decode_s=0.25))
    # sums of six doubles near 3
    assert sum(row[name] for name in STAGES) == pytest.approx(3.0, abs=1e-14)
    assert row["decode_s"] == 0.5
    assert row["overhead_s"] == 0.25
    assert (row["queue_wait_s"], row["latency_s"], row["is_switch"], row["lora_patch_step"]) == (0.5, 3.5, 1, 3)


def test_stages_that_are_longer_than_the_engine_saw_shrink_together() -> None:
    row = request_row(Job("r1"), done(text_s=1.0, denoise_s=5.0))
    assert (row["text_s"], row["denoise_s"], row["overhead_s"]) == (0.5, 2.5, -3.0)


def test_time_alone_is_known_only_where_nobody_shared() -> None:
    with_net = Job("r1", controls=(ControlUse("n"),))
    assert request_row(with_net, done(denoise_s=2.0))["denoise_alone_s"] == 2.0
    shared = replace(done(denoise_s=2.0), had_company=True)
    assert request_row(with_net, shared)["denoise_alone_s"] is None


def test_a_request_that_was_not_done_has_no_latency_and_no_stages() -> None:
    outcome = Outcome("r1", "expired", "its deadline passed", arrival_s=3.0, start_s=4.0, end_s=9.0, code="deadline")
    row = request_row(Job("r1"), outcome, origin_s=2.0)
    assert (row["arrival_s"], row["start_s"], row["end_s"], row["queue_wait_s"]) == (1.0, 2.0, 7.0, 1.0)
    assert row["latency_s"] is None
    assert sum(row[name] for name in STAGES) == 0.0


def test_tables_of_a_log_read_back_with_the_declared_columns(tmp_path: Path) -> None:
    clock = Clock()
    log = RecordLog(tmp_path / "log", clock, POOLS)
    log.ended(Job("r2"), done("r2", start_s=4.0, end_s=6.0))
    log.ended(Job("r1"), done("r1"))
    log.ended(Job("r3"), Outcome("r3", "rejected", "queue is full", arrival_s=0.1, end_s=0.1, code="queue_full"))
    log.batch_ended(BatchSpan(info("b0"), 1.0, 4.0, 0.5))
    log.batch_ended(BatchSpan(info("b0"), 4.0, 6.0, 0.0))
    log.close()
    tables = read_record_log(tmp_path / "log")
    assert tables.requests["request_id"].tolist() == ["r3", "r1", "r2"]
    assert read_record_log(tmp_path / "log", ["r2", "r1"]).requests["request_id"].tolist() == ["r2", "r1"]
    requests, workers = write_record_tables(tables, tmp_path / "out")
    again = read_table(requests, REQUEST_RECORD_COLUMNS)
    assert again.columns.tolist()[: len(REQUEST_RECORD_COLUMNS)] == column_names(REQUEST_RECORD_COLUMNS)
    assert again["code"].tolist() == ["queue_full", "", ""]
    spans = read_table(workers, WORKER_INTERVAL_COLUMNS)
    assert spans[["state", "start_s", "end_s", "busy_s"]].to_numpy().tolist() == [
        ["loading", 1.0, 1.5, 0.0],
        ["busy", 1.5, 6.0, 4.5],
    ]
    assert spans["gpu_kind"].tolist() == ["h200", "h200"]


def test_the_same_log_gives_the_same_bytes(tmp_path: Path) -> None:
    log = RecordLog(tmp_path / "log", Clock(), POOLS)
    log.ended(Job("r1"), done())
    log.close()
    first, second = (
        [path.read_bytes() for path in write_record_tables(read_record_log(tmp_path / "log"), tmp_path / name)]
        for name in ("a", "b")
    )
    assert first == second


def spans_of(log: RecordLog) -> pd.DataFrame:
    log.close()
    return read_record_log(log.folder).workers


def test_a_worker_is_down_until_it_starts_again_and_loading_until_it_is_ready(tmp_path: Path) -> None:
    clock = Clock()
    log = RecordLog(tmp_path, clock, POOLS)
    log.event(Event(2.0, "ready", "b0", "base", duration_s=2.0))
    log.batch_ended(BatchSpan(info("b0"), 3.0, 5.001, 0.0))  # lost while it ran; noticed a moment after it went down
    log.event(Event(5.0, "down", "b0", "base", detail="killed"))
    log.event(Event(9.0, "ready", "b0", "base", duration_s=1.0))
    log.event(Event(9.5, "down", "b1", "base"))
    log.event(Event(1.0, "ready", "loader-0", "loaders", duration_s=1.0))  # no GPU, no row
    clock.now_s = 12.0
    spans = spans_of(log)
    assert spans[["worker_id", "state", "start_s", "end_s"]].to_numpy().tolist() == [
        ["b0", "loading", 0.0, 2.0],
        ["b0", "busy", 3.0, 5.001],
        ["b0", "down", 5.001, 8.0],
        ["b0", "loading", 8.0, 9.0],
        ["b1", "down", 9.5, 12.0],
    ]


def test_busy_time_of_a_controlnet_worker_is_what_it_reports_and_never_more_than_its_span(tmp_path: Path) -> None:
    clock = Clock()
    log = RecordLog(tmp_path, clock, POOLS)
    for now_s, busy_s in ((0.0, 7.0), (1.0, 7.0), (2.0, 7.6), (3.0, 9.0), (4.0, 9.0), (5.0, 9.0), (6.0, 9.2)):
        clock.now_s = now_s
        log.sample([WorkerView("c0", "nets", "controlnet", "ready", busy_s=busy_s)])
    spans = spans_of(log)
    assert spans[["state", "start_s", "end_s"]].to_numpy().tolist() == [["busy", 1.0, 3.0], ["busy", 5.0, 6.0]]
    assert spans["busy_s"].tolist() == pytest.approx([2.0, 0.2], abs=1e-12)


def test_a_worker_that_never_worked_is_idle_for_the_whole_log(tmp_path: Path) -> None:
    clock = Clock()
    log = RecordLog(tmp_path, clock, POOLS)
    log.sample([WorkerView("b1", "base", "base", "ready"), WorkerView("c0", "nets", "controlnet", "ready")])
    log.batch_ended(BatchSpan(info("b0"), 3.0, 5.0, 0.0))
    spans = spans_of(log)
    assert spans[["worker_id", "state", "start_s", "end_s"]].to_numpy().tolist() == [
        ["b0", "busy", 3.0, 5.0],
        ["b1", "idle", 0.0, 5.0],
        ["c0", "idle", 0.0, 5.0],
    ]


# lines


def test_files_rotate_by_size_and_only_so_many_are_kept(tmp_path: Path) -> None:
    lines = LineFiles(tmp_path, "log", Clock(), LineFileSettings(file_bytes_max=50, n_files_max=2))
    for number in range(12):
        lines.write({"number": number, "text": "x" * 10})
    lines.close()
    assert [path.name for path in line_files(tmp_path, "log")] == ["log-000011.jsonl", "log-000012.jsonl"]
    assert all(path.stat().st_size <= 50 for path in line_files(tmp_path, "log"))
    assert [row["number"] for row in read_lines(tmp_path, "log", ReadReport())] == [10, 11]


def test_the_next_process_begins_a_file_of_its_own_and_a_torn_line_is_counted(tmp_path: Path) -> None:
    first = LineFiles(tmp_path, "log", Clock())
    first.write({"number": 0})
    first.close()
    with line_files(tmp_path, "log")[0].open("ab") as file:
        file.write(b'{"number": 1')
    second = LineFiles(tmp_path, "log", Clock())
    second.write({"number": 2})
    second.close()
    report = ReadReport()
    assert [row["number"] for row in read_lines(tmp_path, "log", report)] == [0, 2]
    assert report.n_torn == 1


def test_a_disk_that_fails_loses_lines_and_says_so_but_stops_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    lines = LineFiles(tmp_path / "file" / "log", "log", Clock())
    lines.write({"number": 0})
    lines.write({"number": 1})
    assert lines.n_lost == 2
    assert capsys.readouterr().err.count("cannot be written") == 1


WRITER = """
import sys
from dataclasses import replace
from pathlib import Path
from engine.serving.line_file import LineFiles
lines = LineFiles(Path(sys.argv[1]), "log", lambda: 0.0)
for number in range(10**9):
    lines.write({"number": number})
    if number == 200:
        print("running", flush=True)
"""


def test_a_killed_writer_leaves_every_line_but_the_last(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "running\n"
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait(10)
    report = ReadReport()
    numbers = [row["number"] for row in read_lines(tmp_path, "log", report)]
    assert len(numbers) > 200
    assert numbers == list(range(len(numbers)))
    assert report.n_torn <= 1


def test_a_line_is_one_json_object(tmp_path: Path) -> None:
    log = RecordLog(tmp_path, Clock(), POOLS)
    log.ended(Job("r1", tenant_id="two\nlines"), done())
    log.close()
    text = line_files(tmp_path, "records")[0].read_text()
    assert text.count("\n") == 1
    assert json.loads(text)["tenant_id"] == "two\nlines"
