"""The dashboard's page of the documentation: its figures are the benchmark's, its pictures are there and small, no page is left out."""

from __future__ import annotations

import json
import re
from pathlib import Path

from dashboards.catalogue import CATALOGUE
from dashboards.frame import PAGES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "dashboard.md").read_text(encoding="utf-8")
PICTURE_BYTES_MAX = 150_000


def test_the_figures_are_those_of_the_benchmark() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "dashboard.json").read_text(encoding="utf-8"))
    median_ms = {(row["what"], row["scenario"]): row["median_ms"] for row in found["rows"]}
    said = re.search(r"GenTD26 \(26,798 requests\) (\d+) ms for traffic, (\d+) ms for the promise; `provider` \(30,616 requests, most with ControlNets\) (\d+) ms and (\d+) ms", PAGE)  # fmt: skip
    assert said is not None
    wanted = [
        round(median_ms[f"move of the slider: {slider}", scenario])
        for scenario in ("examples/gentd26.yaml", "sample:provider")
        for slider in ("traffic", "promise")
    ]
    assert [int(text) for text in said.groups()] == wanted
    first_page_ms = median_ms["first page of a fresh server, from request to usable", "provider"]
    assert f"could be used {first_page_ms / 1000:.1f} s after it was asked for" in PAGE
    assert f"(load {found['machine']['load_before']:.1f};" in PAGE


def test_the_measured_times_meet_their_targets() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "dashboard.json").read_text(encoding="utf-8"))["rows"]
    with_target = [row for row in rows if "target_ms" in row]
    assert with_target
    assert not [row["what"] for row in with_target if row["median_ms"] > row["target_ms"]]


def test_every_page_is_told_of() -> None:
    rows = [line.split("|")[1].strip() for line in PAGE.splitlines() if line.startswith("| ")]
    assert [CATALOGUE[f"{name}.nav"][0] for name in PAGES] == rows[2:]


def test_the_pictures_are_there_and_small() -> None:
    names = re.findall(r"\]\((screenshots/[^)]+)\)", PAGE)
    assert sorted(names) == sorted(f"screenshots/{path.name}" for path in (ROOT / "docs" / "screenshots").iterdir())
    for name in names:
        assert (ROOT / "docs" / name).stat().st_size <= PICTURE_BYTES_MAX, name
