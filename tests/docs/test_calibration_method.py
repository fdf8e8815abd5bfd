"""The page on fitting says what the code does: its forms, its commands, its GPUs and the widths it states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from calibrate.cli import app
from calibrate.profile import FORM_PARAMETERS
from calibrate.profile_file import profile_path
from calibrate.roofline import ANY_GPU, OTHER_ARCHITECTURE, SAME_ARCHITECTURE, SPLIT_SPREAD
from calibrate.roofline_gpus import DATASHEETS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "calibration-method.md").read_text(encoding="utf-8")


def test_every_form_and_every_gpu_is_on_the_page() -> None:
    table = next(part for part in PAGE.split("\n\n") if part.startswith("| form |"))
    assert [form for form in FORM_PARAMETERS if f"`{form}`" not in table] == []
    line = next(part for part in PAGE.split("\n\n") if part.startswith("`calibrate transfer` splits"))
    assert [s.gpu_kind for s in DATASHEETS if s.gpu_kind.split("-")[1].upper() not in line] == []


def test_the_stated_widths_are_those_of_the_code() -> None:
    text = " ".join(PAGE.split())
    assert f"×/÷ {SAME_ARCHITECTURE['compute']:g} (arithmetic) and {SAME_ARCHITECTURE['memory']:g} (memory)" in text
    assert f"{OTHER_ARCHITECTURE['compute']:g} and {OTHER_ARCHITECTURE['memory']:g} across" in text
    assert (
        f"launches by {ANY_GPU['launch']:g}, host by {ANY_GPU['host']:g}, and each law's split by {SPLIT_SPREAD:g}"
        in text
    )


@pytest.mark.parametrize("command", ["fit", "show", "diff", "transfer"])
def test_every_command_of_the_page_exists_and_has_help(command: str) -> None:
    assert f"diffplan calibrate {command} " in PAGE
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0


def test_the_table_of_held_out_sizes_is_that_of_the_shipped_report() -> None:
    report = json.loads(profile_path("h200").with_suffix(".heldout.json").read_text(encoding="utf-8"))
    groups = {group["name"]: group for group in report["summary"]}
    table = next(part for part in PAGE.split("\n\n") if part.startswith("| held-out sizes of |"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert {"all laws", "steps", "loads, transfers and the rest"} <= {row[0] for row in rows}
    for name, n, *ratios, p_value in rows:
        group = groups[name]
        shown = [100 * group[key] for key in ("mape", "bias_ratio", "worst_ratio")]
        assert (int(n), [float(cell.rstrip(" %")) for cell in ratios[:3]]) == (
            group["n_points"],
            pytest.approx(shown, abs=0.051),
        )
        if group["coverage_ratio"] is None:
            assert (ratios[3], p_value) == ("–", "–")
        else:
            assert float(ratios[3].rstrip(" %")) == pytest.approx(100 * group["coverage_ratio"], abs=0.51)
            assert float(p_value) == pytest.approx(group["coverage_p_value"], rel=0.06)
