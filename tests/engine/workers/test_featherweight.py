"""The model that weighs nothing must tell every mix-up apart, or the fault tests prove nothing."""

from __future__ import annotations

import dataclasses
import io

import pytest
from PIL import Image

from engine.serving.job import ControlUse, Job, LoraUse
from engine.workers.featherweight_arithmetic import reference_images

JOB = Job(
    "a",
    prompt="p",
    negative_prompt="n",
    n_images=2,
    n_steps=6,
    width_px=16,
    height_px=24,
    controls=(ControlUse("c", 0.5, 0.0, 0.6), ControlUse("d")),
    loras=(LoraUse("l", 0.8), LoraUse("m")),
    seed=3,
)


@pytest.mark.parametrize(
    "other",
    [
        {"base_model_id": "other"},
        {"prompt": "q"},
        {"negative_prompt": "q"},
        {"n_steps": 7},
        {"guidance_scale": 5.5},
        {"guidance_scale": 1.0},
        {"seed": 4},
        {"controls": (JOB.controls[0],)},
        {"controls": (ControlUse("c", 0.6, 0.0, 0.6), ControlUse("d"))},
        {"controls": (ControlUse("c", 0.5, 0.2, 0.6), ControlUse("d"))},
        {"controls": (ControlUse("c", 0.5, 0.0, 0.9), ControlUse("d"))},
        {"controls": (ControlUse("d"), ControlUse("c", 0.5, 0.0, 0.6))},
        {"loras": (LoraUse("l", 0.8),)},
        {"loras": (LoraUse("l", 0.7), LoraUse("m"))},
        {"loras": (LoraUse("l", 0.8), LoraUse("k"))},
        {"controls": (ControlUse("c", 0.5, 0.0, 0.6, image=0), ControlUse("d")), "blobs": (b"\x89PNG 1",)},
    ],
)
def test_every_part_of_a_job_changes_every_image(other: dict[str, object]) -> None:
    changed = reference_images(dataclasses.replace(JOB, **other), 2)  # type: ignore[arg-type]
    assert not set(changed) & set(reference_images(JOB, 2))


def test_every_patch_step_gives_other_images() -> None:
    images = [tuple(reference_images(JOB, step)) for step in (None, *range(JOB.n_steps))]
    assert len(set(images)) == len(images)


def test_the_images_of_a_job_differ_and_do_not_depend_on_its_name() -> None:
    one, two = reference_images(JOB, 1)
    assert one != two
    assert reference_images(dataclasses.replace(JOB, request_id="b"), 1) == [one, two]


def test_images_are_png_files_of_the_size_asked_for() -> None:
    image = Image.open(io.BytesIO(reference_images(JOB, 0)[0]))
    image.load()
    assert (image.format, image.size, image.mode) == ("PNG", (16, 24), "RGB")
