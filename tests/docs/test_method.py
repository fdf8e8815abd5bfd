"""The page on the method: its table of measured parts says what the rows beside the shipped profile say."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from calibrate.profile_file import profile_path

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "method.md").read_text(encoding="utf-8")
SESSION = re.search(r"Medians of one session \(`([^`]+)`\)", PAGE)
PARTS: dict[str, tuple[str, dict[str, object]]] = {
    "UNet step": ("unet_step", {"forward_batch": 2}),
    "step with one ControlNet in the same process": ("step_with_controlnets", {"forward_batch": 2, "n_controlnets": 1}),
    "step with three": ("step_with_controlnets", {"forward_batch": 2, "n_controlnets": 3}),
    "VAE, one image": ("vae_decode", {"n_images": 1}),
    "text, two prompts": ("text_encode", {}),
    "LoRA of 186 MB, ready to denoise": ("lora_attach", {"variant": "rank64"}),
    "whole image of 50 steps, no add-ons": ("e2e", {"n_controlnets": 0, "n_loras": 0}),
    "with three ControlNets": ("e2e", {"n_controlnets": 3, "n_loras": 0}),
}
STACKS = (("diffusers", "diffusers"), ("diffusers_tuned", "diffusers_tuned"), ("engine", "colocated"))


def median_s(quantity: str, features: dict[str, object]) -> float:
    rows = pd.read_parquet(profile_path("h200").with_suffix(".measurements.parquet"))
    assert SESSION is not None
    chosen = rows[(rows["session"] == SESSION[1]) & (rows["quantity"] == quantity) & ~rows["is_held_out"]]
    for name, value in features.items():
        chosen = chosen[chosen[name] == value]
    # of one size of image, or of none
    chosen = chosen[chosen["width_px"].isin([0, 1024])]
    return float(chosen["value_s"].median())


@pytest.mark.parametrize("part", PARTS)
def test_every_number_of_the_table_is_in_the_rows(part: str) -> None:
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {part} |"))
    quantity, features = PARTS[part]
    for cell, (stack, topology) in zip(line.strip("|").split("|")[1:], STACKS, strict=True):
        measured = median_s(f"e2e.{topology}" if quantity == "e2e" else f"{stack}.{quantity}", features)
        if cell.strip() == "–":
            continue
        number, unit = cell.split()
        # as many digits as are printed
        half = 0.501 * 10.0 ** -len(number.partition(".")[2])
        assert float(number) == pytest.approx(measured * {"ms": 1e3, "s": 1.0}[unit], abs=half), (part, stack)


def test_no_part_is_left_out() -> None:
    table = next(block for block in PAGE.split("\n\n") if block.startswith("| part | stock |"))
    assert {line.split("|")[1].strip() for line in table.splitlines()[2:]} == set(PARTS)


def test_the_loads_are_those_of_the_rows() -> None:
    session = re.search(r"medians of five repetitions \(`([^`]+)`", PAGE)
    assert session is not None
    rows = pd.read_parquet(profile_path("h200").with_suffix(".measurements.parquet"))
    rows = rows[rows["session"] == session[1]]
    for kind, line in (("checkpoint", "| checkpoint, 6.94 GB |"), ("controlnet", "| ControlNet, 2.50 GB |")):
        cells = next(row for row in PAGE.splitlines() if row.startswith(line)).strip("|").split("|")[1:]
        for cell, part, ending in zip(cells, ("read", "load"), ("store", "host"), strict=True):
            taken = rows[(rows["quantity"] == f"engine.{kind}_{part}") & (rows["variant"] == f"{kind}_{ending}")][
                "value_s"
            ]
            number, unit = cell.split()
            scale = {"ms": 1e3, "s": 1.0}[unit]
            assert len(taken) == 5
            half = 0.501 * 10.0 ** -len(number.partition(".")[2])
            assert float(number) == pytest.approx(float(taken.median()) * scale, abs=half), (kind, part)


def test_gaps_of_whole_images_and_jobs_are_those_of_the_check() -> None:
    check = pd.read_csv(profile_path("h200").with_suffix(".check.csv"))
    gaps = {
        topology: 100
        * check[(check["topology"] == topology) & (check["is_held_out"] | (topology == "serving"))]["gap_ratio"]
        for topology in ("colocated", "diffusers_tuned", "diffusers", "serving")
    }
    text = " ".join(PAGE.split()).replace("−", "-")
    ours = -gaps["colocated"]
    assert f"take {ours.min():.1f} to {ours.max():.1f} % longer than the laws say for our engine" in text
    for topology, words in (
        ("diffusers_tuned", "Tuned Diffusers' differ by"),
        ("diffusers", "stock's by"),
        ("serving", "differ by"),
    ):
        assert f"{words} {gaps[topology].min():.1f} to {gaps[topology].max():+.1f} %" in text
