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
