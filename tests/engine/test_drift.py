"""The drift report: nothing for a patch in time, more the later it lands, and never past the image without the LoRA by surprise."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.drift import NUMERICAL, DriftSetup, default_patch_steps, run_drift, table
from traces.problems import InputError


def test_a_patch_in_time_does_not_drift_and_a_late_one_ends_near_the_image_without_the_lora() -> None:
    result = run_drift(DriftSetup(n_steps=4, patch_steps=(0, 1, 3), size_px=32, n_seeds=2, lora_rank=4), lambda _: None)
    rows = {row["patch_step"]: row["latents_relative_l2"] for row in result["rows"]}
    assert list(rows) == [0, 1, 3, None]
    assert rows[0] == {"median": 0.0, "min": 0.0, "max": 0.0}
    assert 0 < rows[1]["median"] < rows[3]["median"] <= rows[None]["median"]
    assert result["label"] == NUMERICAL
    text = table(result)
    assert "never" in text
    assert "says nothing about image quality" in text


def test_the_default_patch_steps_are_dense_at_the_start() -> None:
    assert default_patch_steps(30) == (0, 1, 2, 3, 5, 6, 9, 12, 15, 18, 21, 24, 27)
    assert default_patch_steps(2) == (0, 1)


def test_wrong_settings_are_named_together(tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        run_drift(DriftSetup(n_steps=4, patch_steps=(4,), n_seeds=0, prompt="x"), lambda _: None)
    assert all(part in str(refused.value) for part in ("--patch-steps", "--n-seeds", "--prompt"))
    with pytest.raises(InputError, match="is no file"):
        run_drift(DriftSetup(n_steps=1, lora=tmp_path / "none"), lambda _: None)
