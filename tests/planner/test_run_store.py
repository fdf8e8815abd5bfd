"""Runs are simulated once, whatever happens to the process or the disk in between."""

from __future__ import annotations

import json
import resource
import shlex
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from planner.cli import main
from planner.replication import load_inputs, repeat_allocation
from planner.run_store import FILE, RunStore, question_sha256, run_key
from planner.scenario import load_scenario
from planner.sweep import parse_range, points_of, rows_of, sweep
from planner.traffic import build_traffic
from traces.problems import InputError


@pytest.fixture
def asked(tmp_path: Path, write_scenario: Callable[..., Path]) -> Path:
    return write_scenario(tmp_path / "question")


def test_a_second_sweep_simulates_nothing_and_says_the_same(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario, folder = load_scenario(str(asked))
    points = points_of(scenario, folder, ["colocated"], range(3, 5), range(1, 2))
    first = sweep(scenario, folder, points, tmp_path / "store", jobs=1, keep_logs=True)
    monkeypatch.setattr("planner.stored_runs.repeat_allocation", lambda *_: pytest.fail("simulated again"))
    second = sweep(scenario, folder, points, tmp_path / "store", jobs=1)
    assert [result.n_reused for result in second] == [3, 3]
    assert rows_of(first, 0.95) == rows_of(second, 0.95)
    assert len(list((tmp_path / "store" / "logs").glob("*/requests.parquet"))) == 6


def test_what_decides_a_run_is_in_its_key_and_what_does_not_is_not(asked: Path) -> None:
    scenario, folder = load_scenario(str(asked))
    same = scenario.model_copy(update={"name": "other", "topologies": ("colocated",)})
    assert question_sha256(scenario) == question_sha256(same)
    other = scenario.model_copy(update={"slo": scenario.slo.model_copy(update={"latency_s": 3.0})})
    assert question_sha256(scenario) != question_sha256(other)  # attainment is among the figures
    inputs = load_inputs(scenario, folder)
    point = points_of(scenario, folder, ["colocated"], range(3, 4), range(1, 2))[0]
    keys = {
        run_key(scenario, inputs, digest, point.allocation, k).digest for digest in ("a", "b") for k in (None, 0, 1)
    }
    assert len(keys) == 6


def test_a_full_disk_is_said_and_leaves_what_was_stored(asked: Path, tmp_path: Path) -> None:
    scenario, folder = load_scenario(str(asked))
    inputs = load_inputs(scenario, folder)
    points = points_of(scenario, folder, ["colocated"], range(3, 5), range(1, 2))
    traffic = build_traffic(scenario, folder, 0)
    runs = [repeat_allocation(scenario, inputs, traffic.workload, p.topology, p.allocation, 0) for p in points]
    keys = [run_key(scenario, inputs, traffic.digest, p.allocation, 0) for p in points]
    with RunStore(tmp_path / "store") as store:
        store.add(keys[0], "tiny", 3, runs[0])
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # no file may grow past this: what a full disk does
        try:
            with pytest.raises(InputError, match="stored runs are kept"):
                store.add(keys[1], "tiny", 4, runs[1], keep_logs=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert store.find(keys[0]) is not None
        assert store.find(keys[1]) is None
        store.add(keys[1], "tiny", 4, runs[1], keep_logs=True)  # room again: the same call goes on
    with RunStore(tmp_path / "store") as store:
        found = store.find(keys[1])
        assert found is not None
        assert repr(found.metrics.numbers()) == repr(runs[1].metrics.numbers())
        assert len(pd.read_parquet(store.log_folder(keys[1]) / "requests.parquet")) == len(traffic.workload)


def test_a_killed_sweep_goes_on_where_it_was(asked: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    command = [sys.executable, "-m", "planner", "sweep", str(asked), "--store", str(store), "--topology", "colocated",
               "--replicas", "2:40", "--jobs", "1"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    n_before = 0
    while n_before < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
        if (store / FILE).exists():
            try:
                with RunStore(store) as kept:
                    n_before = len(kept)
            except InputError:
                continue
    process.kill()
    process.wait(timeout=10)
    with RunStore(store) as kept:
        n_before = len(kept)
    assert 3 <= n_before < 39 * 3
    scenario, folder = load_scenario(str(asked))
    points = points_of(scenario, folder, ["colocated"], range(2, 5), range(1, 2))
    resumed = sweep(scenario, folder, points, store, jobs=1)
    fresh = sweep(scenario, folder, points, tmp_path / "fresh", jobs=1)
    assert sum(result.n_reused for result in resumed) >= 3
    assert rows_of(resumed, 0.95) == rows_of(fresh, 0.95)


def test_a_crash_is_told_and_is_no_missed_promise(asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario, folder = load_scenario(str(asked))
    points = points_of(scenario, folder, ["colocated"], range(3, 5), range(1, 2))
    real = repeat_allocation

    def crashes(*arguments: object) -> object:
        if arguments[4] == points[0].allocation:
            raise RuntimeError("a fault of ours")
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("planner.stored_runs.repeat_allocation", crashes)
    rows = rows_of(sweep(scenario, folder, points, tmp_path / "store", jobs=1), 0.95)
    assert "RuntimeError: a fault of ours" in rows[0]["fault"]
    assert rows[0]["slo_attainment_ratio"] is None
    assert rows[1]["fault"] == ""
    assert rows[1]["n_runs"] == 3


def test_a_crash_comes_with_the_command_that_replays_it_alone(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = repeat_allocation

    def crashes(*arguments: Any) -> object:
        if arguments[4].n_gpus == 5 and arguments[5] == 1:
            raise RuntimeError("a fault of ours")
        return real(*arguments)

    def diffplan(*words: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["diffplan", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capsys.readouterr()

    monkeypatch.setattr("planner.stored_runs.repeat_allocation", crashes)
    code, _, said = diffplan("sweep", str(asked), "--store", str(tmp_path / "s p"), "--topology", "decoupled", "--replicas", "2:3",
                             "--controlnet-replicas", "1:2", "--jobs", "1")  # fmt: skip
    assert code == 1
    assert "RuntimeError: a fault of ours" in said
    told = shlex.split(said.partition("To replay it: diffplan ")[2].splitlines()[0])
    code, _, said = diffplan(*told)  # still broken: the one point fails, alone
    assert (code, said.count("could not be simulated")) == (1, 1)
    monkeypatch.setattr("planner.stored_runs.repeat_allocation", real)
    code, rows, _ = diffplan(*told, "--json")
    assert code in (0, None)
    assert [(row["counts"], row["n_runs"]) for row in json.loads(rows)] == [([3, 2], 3)]


def test_files_that_are_no_store_and_bad_ranges_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / FILE).write_bytes(b"not a database" * 100)
    with pytest.raises(InputError, match="cannot be opened"):
        RunStore(tmp_path / "x")
    RunStore(tmp_path / "y").close()
    with sqlite3.connect(tmp_path / "y" / FILE) as connection:
        connection.execute("UPDATE store SET schema_version = 99")
    with pytest.raises(InputError, match="schema version 99"):
        RunStore(tmp_path / "y")
    assert list(parse_range("2:8:3", "--replicas")) == [2, 5, 8]
    assert list(parse_range("4", "--replicas")) == [4]
    for text in ("", "0", "5:2", "1:x", "1:2:3:4"):
        with pytest.raises(InputError):
            parse_range(text, "--replicas")
