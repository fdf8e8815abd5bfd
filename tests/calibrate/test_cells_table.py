"""The table of images per GPU-minute: stacks are compared within a session, and a faster peer is named."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from calibrate.measurement import Features, Measurement, read_measurements

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "cells_table.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Scripts are no package."""
    spec = importlib.util.spec_from_file_location("cells_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cells_table"] = module
    spec.loader.exec_module(module)
    return module


def _rows(
    session: str, quantity: str, values_s: list[float], c: int = 0, n: int = 0, variant: str = ""
) -> list[Measurement]:
    features = Features(2, 1, 1024, 1024, n_controlnets=c, n_loras=n, n_steps=50, variant=variant)
    stack = quantity.removeprefix("e2e.")
    return [Measurement(session, quantity, stack, stack, "", features, i, i, s) for i, s in enumerate(values_s)]


def test_a_ratio_is_of_one_session_the_one_with_most_of_both(script: ModuleType) -> None:
    rows = _rows("one", "e2e.colocated", [1.0] * 9) + _rows("one", "e2e.diffusers_tuned", [1.5])
    rows += _rows("two", "e2e.colocated", [1.1, 1.0, 1.2]) + _rows("two", "e2e.diffusers_tuned", [2.2, 2.2, 2.4])
    found, _ = script.seconds_of(rows)
    compared = script.compare(found, (0, 0), "tuned")
    assert (compared.session, compared.ratio) == ("two", pytest.approx(2.0))
    assert compared.ratio_range == (pytest.approx(2.2 / 1.2), pytest.approx(2.4 / 1.0))
    assert script.compare(found, (0, 0), "stock") is None


def test_where_a_peer_is_faster_the_table_says_so(script: ModuleType) -> None:
    rows = _rows("s", "e2e.colocated", [2.0, 2.0], c=1) + _rows("s", "e2e.diffusers_tuned", [1.5, 1.5], c=1)
    rows += _rows("s", "e2e.colocated", [1.0, 1.0]) + _rows("s", "e2e.diffusers", [3.0, 3.0])
    lines = {
        line.split("|")[1].strip(): line
        for line in script.table(script.seconds_of(rows)[0]).splitlines()
        if "|" in line
    }
    assert "0.75 (0.75–0.75) a **tuned is faster**" in lines["1C 0L"]
    assert "is faster" not in lines["0C 0L"]
    assert "60.0 (1.00 s, 1.00–1.00, 2×) | – | 20.0 (3.00 s, 3.00–3.00, 2×) | – | 3.00" in lines["0C 0L"]


def test_unfused_loras_of_a_peer_are_not_in_the_table(script: ModuleType) -> None:
    rows = _rows("s", "e2e.diffusers", [9.0], n=1) + _rows("s", "e2e.diffusers", [5.0], n=1, variant="fused")
    found, apart = script.seconds_of(rows)
    assert found == {("s", (0, 1), "stock"): [5.0]}
    assert apart == []


def test_the_first_image_with_loras_of_a_cold_process_is_set_apart_and_kept(script: ModuleType) -> None:
    session, stack = sorted(script.COLD)[0]
    quantity = next(name for name, short in script.STACKS.items() if short == stack)
    variant = "" if stack == "ours" else "fused"
    rows = _rows(session, quantity, [5.0, 1.0], n=1, variant=variant) + _rows(session, quantity, [1.0])
    found, apart = script.seconds_of(rows)
    assert [row.value_s for row in apart] == [5.0]
    assert found[session, (0, 1), stack] == [1.0]
    assert [item["value_s"] for item in script.plain(found, apart)["set_apart"]] == [5.0]


def test_the_table_of_the_docs_is_that_of_the_shipped_rows(script: ModuleType) -> None:
    rows = read_measurements(ROOT / "calibrate" / "profiles" / "h200.measurements.parquet").rows
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    lines = [line for line in script.table(script.seconds_of(rows)[0]).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 12
    assert [line for line in lines if line not in page] == []
