"""The commands as a user types them: results on stdout, exit code 2 and a sentence for a mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from traces.reader import read_trace


def diffplan(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = "from planner.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_a_sample_is_described_as_tables_and_as_json(tmp_path: Path) -> None:
    tables = diffplan("trace", "describe", "sample:katz_a_hour", cwd=tmp_path)
    assert tables.returncode == 0, tables.stderr
    for words in ("inter-arrival CV", "Loads per request", "ControlNets", "assumed, arrivals"):
        assert words in tables.stdout
    plain = diffplan("trace", "describe", "sample:katz_a_hour", "--instances", "4", "--json", cwd=tmp_path)
    found = json.loads(plain.stdout)
    assert plain.stderr == ""
    assert found["n_instances"] == 4
    assert found["rates"]["n_requests"] == 7960
    assert found["loras"]["loads"]["loads_per_request"] == sorted(
        found["loras"]["loads"]["loads_per_request"], reverse=True
    )


def test_synthesis_and_csv_import_write_a_trace(tmp_path: Path) -> None:
    made = diffplan("trace", "synth", "--service", "B", "--requests", "50", "--instances", "2", "--hours", "0.5",
                    "--seed", "3", "--out", "b.parquet", cwd=tmp_path)  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "50 requests in 0.50 h" in made.stdout
    assert len(read_trace(tmp_path / "b.parquet")) == 50
    (tmp_path / "log.csv").write_text("TIME,steps\n2026-03-01 12:00:00,30\n2026-03-01 12:01:00,20\n")
    imported = diffplan("trace", "import", "csv", "log.csv", "--map", "arrival_s=TIME", "--map", "n_steps=steps",
                        "--out", "c.parquet", cwd=tmp_path)  # fmt: skip
    assert imported.returncode == 0, imported.stderr
    assert "default: n_images=1 in 2 rows" in imported.stdout
    assert read_trace(tmp_path / "c.parquet").requests["n_steps"].tolist() == [30, 20]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["describe", "none.csv"], "none.csv: there is no such file"),
        (["describe", "bad.csv"], "bad.csv row 1 column arrival_s: got 'x', needs a finite number, at least 0."),
        (["describe"], "Missing argument"),
        (["describe", "sample:katz_a_hour", "--instances", "0"], "number of instances: got 0"),
        (["import", "csv", "bad.csv", "--out", "o.parquet"], "row 1 column arrival_s: got 'x'"),
        (["import", "gentd26", ".", "--out", "o.parquet"], "lora_request_trace.csv: there is no such file"),
        (["synth", "--service", "A", "--hours", "0", "--out", "o.parquet"], "duration: got 0 s"),
        (["synth", "--service", "A", "--requests", "10", "--instances", "2", "--out", "o.csv"], "ending in .parquet"),
    ],
)
def test_a_mistake_gives_exit_code_2_and_a_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    (tmp_path / "bad.csv").write_text("request_id,arrival_s\na,x\n")
    done = diffplan("trace", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "o.parquet").exists()
