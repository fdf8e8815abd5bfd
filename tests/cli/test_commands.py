"""plan, simulate and compare from the command line: exit codes, streams, files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from planner.plan_record import read_plan


def test_plan_prints_the_answer_writes_the_files_and_ends_with_zero(
    diffplan: Callable, question: Path, tmp_path: Path
) -> None:
    done = diffplan("plan", question, "--out", tmp_path / "out", "--jobs", 1)
    assert done.code == 0, done.err
    record = read_plan(tmp_path / "out")
    assert " ".join(done.out.split()).startswith(record.sentence)
    for row in record.topologies:
        assert row.topology in done.out
    assert "Where the saving comes from" in done.out
    assert "searching 4 topologies" in done.err


def test_plan_as_json_puts_only_the_plan_on_stdout(diffplan: Callable, question: Path, tmp_path: Path) -> None:
    done = diffplan("plan", question, "--out", tmp_path / "out", "--jobs", 1, "--json")
    assert done.out == (tmp_path / "out" / "plan.json").read_text(encoding="utf-8")


def test_an_infeasible_plan_ends_with_three_and_says_what_binds(
    diffplan: Callable, question: Path, tmp_path: Path
) -> None:
    question.write_text(question.read_text().replace("latency_s: 10", "latency_s: 0.01"))
    done = diffplan("plan", question, "--out", tmp_path / "out", "--jobs", 1)
    assert done.code == 3
    assert "slo.latency_s binds" in " ".join(done.out.split())
    assert read_plan(tmp_path / "out").verdict == "infeasible"


def test_simulate_runs_the_allocation_of_a_plan(diffplan: Callable, question: Path, tmp_path: Path) -> None:
    diffplan("plan", question, "--out", tmp_path / "out", "--jobs", 1)
    done = diffplan(
        "simulate", question, "--allocation", tmp_path / "out" / "allocation.json", "--out", tmp_path / "sim", "--json"
    )
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said["allocation"] == json.loads((tmp_path / "out" / "allocation.json").read_text())
    # the trace's 120 requests come every 2 s; warm-up is a fifth of the 238 s to the last one, so the first 24 do not count
    assert said["metrics"]["n_offered"] == 96
    assert {path.name for path in (tmp_path / "sim").iterdir()} == {
        "metrics.json", "allocation.json", "requests.parquet", "workers.parquet",
    }  # fmt: skip


def test_simulate_takes_a_topology_and_a_number_of_replicas(diffplan: Callable, question: Path, tmp_path: Path) -> None:
    done = diffplan("simulate", question, "--topology", "colocated", "--replicas", 2, "--out", tmp_path / "sim")
    assert done.code == 0, done.err
    assert done.out.startswith("2 GPUs serve")


def test_simulate_needs_an_allocation_or_a_topology(diffplan: Callable, question: Path, tmp_path: Path) -> None:
    done = diffplan("simulate", question, "--out", tmp_path / "sim")
    assert done.code == 2
    assert "--allocation, --topology: got neither" in done.err


def test_an_allocation_of_another_gpu_kind_is_refused(diffplan: Callable, question: Path, tmp_path: Path) -> None:
    allocation = tmp_path / "allocation.json"
    pool = {"name": "base", "role": "base", "n_replicas": 2, "gpu_kind": "abacus", "topology": "colocated"}
    allocation.write_text(json.dumps({"schema_version": 1, "pools": [pool]}))
    done = diffplan("simulate", question, "--allocation", allocation, "--out", tmp_path / "sim")
    assert done.code == 2
    assert "got abacus, needs nvidia-h200" in done.err
    allocation.write_text("[" * 100_000)
    done = diffplan("simulate", question, "--allocation", allocation, "--out", tmp_path / "sim")
    assert done.code == 2
    assert "nested too deeply" in done.err


def test_a_command_keeps_its_own_exit_code(monkeypatch: pytest.MonkeyPatch, diffplan: Callable) -> None:
    monkeypatch.setattr("planner.cli.root.main", lambda **_: sys.exit(7))
    assert diffplan("plan").code == 7


def test_compare_puts_plans_side_by_side(diffplan: Callable, question: Path, tmp_path: Path) -> None:
    diffplan("plan", question, "--out", tmp_path / "one", "--jobs", 1)
    question.write_text(question.read_text().replace("latency_s: 10", "latency_s: 0.01"))
    diffplan("plan", question, "--out", tmp_path / "two", "--jobs", 1)
    done = diffplan("compare", tmp_path / "one", tmp_path / "two" / "plan.json", "--json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)["rows"]
    assert rows["verdict"] == ["recommended", "infeasible"]
    assert rows["binds"] == ["–", "slo.latency_s"]
    assert rows["GPUs"][0] == str(read_plan(tmp_path / "one").row(read_plan(tmp_path / "one").recommended).n_gpus)


def test_a_stale_price_is_warned_of_and_changes_no_file(diffplan: Callable, question: Path, tmp_path: Path) -> None:
    table = {
        "schema_version": 1, "table_id": "old", "as_of": "2020-01-01", "currency": "USD",
        "rows": [{"gpu_kind": "nvidia-h200", "purchase": "on_demand", "price_usd_per_gpu_hour": 4.0, "source": "a test"}],
    }  # fmt: skip
    (tmp_path / "old.json").write_text(json.dumps(table))
    question.write_text(question.read_text() + "prices:\n  table: old.json\n")
    done = diffplan("plan", question, "--out", tmp_path / "out", "--jobs", 1)
    assert done.code == 0, done.err
    assert "days old" in done.err
    assert "days old" not in (tmp_path / "out" / "plan.json").read_text()
    assert read_plan(tmp_path / "out").ids.price_usd_per_gpu_hour == 4.0


def _as_process(*arguments: str, stdout: int, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "planner", *arguments]
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, env=os.environ | environment, timeout=120, check=False
    )


def test_a_reader_that_goes_away_is_no_fault() -> None:
    for arguments in (["calibrate", "show", "h200"], ["trace", "describe", "sample:katz_a_hour", "--json"], ["--help"]):
        reader, writer = os.pipe()
        os.close(reader)
        done = _as_process(*arguments, stdout=writer)
        os.close(writer)
        assert (done.returncode, done.stderr) == (0, b"")


def test_a_terminal_without_unicode_still_gets_the_answer() -> None:
    done = _as_process("calibrate", "show", "h200", stdout=subprocess.PIPE, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"engine.unet_step" in done.stdout
