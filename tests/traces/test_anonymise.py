"""An anonymised trace names nobody and asks the same of a service."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from planner.workload import build_workload
from traces.anonymise import Anonymity, anonymise
from traces.problems import InputError
from traces.reader import read_trace
from traces.samples import load_sample
from traces.writer import write_trace

KEY = b"0123456789abcdef"


def test_nothing_of_the_names_is_left_and_everything_of_their_use_is() -> None:
    trace = load_sample("katz_b_hour")
    hidden = anonymise(trace, Anonymity(KEY))
    before, after = build_workload(trace), build_workload(hidden)
    # codes are given in order of first use: equal codes are equal popularity, reuse and order
    assert before.loras == after.loras
    assert before.controlnets == after.controlnets
    assert before.checkpoint.tolist() == after.checkpoint.tolist()
    assert before.tenant.tolist() == after.tenant.tolist()
    assert after.arrival_s[0] == 0.0
    np.testing.assert_allclose(np.diff(before.arrival_s), np.diff(after.arrival_s), atol=1e-9)  # one subtraction each
    names = {*before.lora_names, *before.controlnet_names, *before.request_ids} - {""}
    text = hidden.requests.to_csv() + repr(hidden.provenance)
    assert not [name for name in sorted(names)[:200] if name in text]


def test_the_same_key_gives_the_same_names_and_another_key_others() -> None:
    trace = load_sample("katz_a_hour")
    one, same = (anonymise(trace, Anonymity(KEY)).requests["lora_ids"].tolist() for _ in range(2))
    assert one == same
    other = anonymise(trace, Anonymity(KEY[::-1])).requests["lora_ids"].tolist()
    unkeyed = [anonymise(trace, Anonymity()).requests["lora_ids"].tolist() for _ in range(2)]
    assert len({str(item) for item in (one, other, *unkeyed)}) == 4
    with pytest.raises(InputError, match="16 or more"):
        anonymise(trace, Anonymity(b"short"))


def test_further_columns_tenants_and_seconds_go_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("request_id,arrival_s,tenant_id,prompt\nbob-1,100.7,bob,my secret\nbob-2,103.2,bob,more\n")
    hidden = anonymise(read_trace(path), Anonymity(KEY, time_step_s=2.0, keeps_tenants=False))
    assert "prompt" not in hidden.requests.columns
    assert hidden.requests["tenant_id"].tolist() == ["", ""]
    assert hidden.requests["arrival_s"].tolist() == [0.0, 2.0]
    again = read_trace(write_trace(hidden, tmp_path / "h.parquet"))
    assert again.requests["request_id"].tolist() == ["r0", "r1"]
    assert b"bob" not in (tmp_path / "h.parquet").read_bytes()


def test_the_command_writes_what_can_be_read(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from traces.cli import app

    done = CliRunner().invoke(app, ["anonymise", "sample:katz_a_hour", "--out", str(tmp_path / "a.parquet")])
    assert done.exit_code == 0, done.output
    assert len(read_trace(tmp_path / "a.parquet")) == len(load_sample("katz_a_hour"))
