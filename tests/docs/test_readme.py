"""The README is run: its console blocks in an empty folder, in order; its figures against the files they come from."""

from __future__ import annotations

import csv
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECOMMENDATION = re.compile(r"Use \d+ GPUs? as \w+ \(.*?\)")


def console_commands() -> list[tuple[list[str], str]]:
    """Every ``$ diffplan …`` of the console blocks, with the output that the README shows under it."""
    found: list[tuple[list[str], str]] = []
    for block in re.findall(r"```console\n(.*?)```", README, flags=re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            line, _, shown = part.partition("\n")
            found.append((shlex.split(line), shown))
    return found


def test_every_command_of_the_readme_runs_and_gives_the_recommendation_that_it_shows(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    commands = console_commands()
    assert len(commands) >= 6
    for words, shown in commands:
        assert words[0] == "diffplan", words
        done = subprocess.run(
            [sys.executable, "-m", "planner", *words[1:]],
            cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stderr}"
        for sentence in RECOMMENDATION.findall(shown):
            assert sentence in done.stdout, f"{words}: the README shows {sentence!r}\n{done.stdout[:400]}"


def test_make_plan_is_the_command_that_the_readme_says() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "diffplan plan sample:provider --out" in makefile
    assert "make plan" in README
    assert "make test" in README


CHECKED = ("topology", "n_controlnets", "n_loras", "variant", "n_steps")


@pytest.mark.parametrize(
    ("label", "n_controlnets", "n_loras"),
    [
        ("none", 0, 0),
        ("1 ControlNet", 1, 0),
        ("2 ControlNets", 2, 0),
        ("3 ControlNets", 3, 0),
        ("1 LoRA", 0, 1),
        ("1 ControlNet, 1 LoRA", 1, 1),
        ("3 ControlNets, 2 LoRAs", 3, 2),
    ],
)
def test_the_accuracy_table_shows_the_rows_of_the_check(label: str, n_controlnets: int, n_loras: int) -> None:
    line = next(row for row in README.splitlines() if row.startswith(f"| {label} |"))
    cells = [cell.strip().rstrip("*") for cell in line.strip("|").split("|")[1:]]
    with (ROOT / "calibrate" / "profiles" / "h200.check.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    for topology, cell in zip(("diffusers", "diffusers_tuned", "colocated"), cells, strict=True):
        variant = "fused" if n_loras and topology != "colocated" else ""
        wanted = (topology, str(n_controlnets), str(n_loras), variant, "50")
        found = [r for r in rows if tuple(r[name] for name in CHECKED) == wanted]
        shown = f"{float(found[0]['measured_s']):.2f} / {float(found[0]['predicted_s']):.2f}" if found else "–"
        assert cell == shown, f"{label}, {topology}"


def test_every_file_that_the_readme_links_to_exists() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert not missing
