"""Where the rest of a session's time is best spent: the design of experiments after its first pass. Torch-free.

Each further measurement goes where it removes most uncertainty from a typical request per second of measuring:

    score = seconds of a typical request that the quantity stands for x relative uncertainty / seconds that the task takes

The uncertainty of what was measured is the standard error of its median. That of a step shape that was not is the leave-one-out
error of a provisional law at the nearest shape that was: where the law cannot predict its own points, points are missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from scipy.optimize import nnls

from calibrate.measurement import Features
from calibrate.points import Task

Cell = tuple[str, str, Features]
Key = tuple[str, str, Features]
Measured = Mapping[Cell, Sequence[float]]

PER_STEP: Final = {"engine.unet_step": 1.0, "engine.controlnet_step": 0.5, "diffusers_tuned.unet_step": 0.3}
"""How often in a step of a typical request; halves of the UNet are in its whole."""
PER_REQUEST: Final = {
    "engine.vae_decode": 1.0, "engine.text_encode": 1.0, "engine.lora_attach": 0.5, "engine.lora_detach": 0.5,
    "lora_fetch.local": 0.1, "engine.checkpoint_load": 0.02, "engine.controlnet_load": 0.05,
    "engine.checkpoint_read": 0.005, "engine.controlnet_read": 0.01, "e2e.colocated": 0.5,
    "e2e.diffusers_tuned": 0.2, "e2e.diffusers": 0.1, "serving.overhead": 1.0,
}  # fmt: skip
OTHERWISE: Final = 0.02
AWAY: Final = 0.25
"""Weight of sizes and batches other than one guided image of the session's size."""
FEW: Final = 3
"""With fewer repetitions a spread says nothing: this relative uncertainty is taken."""
FEW_UNCERTAINTY: Final = 0.05
MAD_TO_SIGMA: Final = 1.4826
MEDIAN_TO_MEAN: Final = 1.2533
"""Standard error of a median over that of a mean, for normal noise."""


def relative_error(values: Sequence[float]) -> float:
    """Standard error of the median over the median, from the spread around it."""
    found = np.asarray(values, dtype=np.float64)
    if found.size < FEW:
        return FEW_UNCERTAINTY
    median = float(np.median(found))
    sigma = MAD_TO_SIGMA * float(np.median(np.abs(found - median)))
    return MEDIAN_TO_MEAN * sigma / math.sqrt(found.size) / median


def leave_one_out(cells: Mapping[tuple[int, float], float]) -> dict[tuple[int, float], float]:
    """Relative error at each (forward batch, megapixels) of a law fitted to all others.

    The law: fixed + linear in samples x megapixels + attention, samples x megapixels squared; none below 0.
    """
    keys = sorted(cells)
    errors = {}
    for left_out in keys:
        others = [key for key in keys if key != left_out]
        if len(others) < FEW:
            errors[left_out] = FEW_UNCERTAINTY
            continue
        seconds = np.array([cells[key] for key in others])
        weights, _ = nnls(_terms(others) / seconds[:, None], np.ones(len(others)))
        errors[left_out] = abs(float((_terms([left_out]) @ weights)[0]) / cells[left_out] - 1.0)
    return errors


def _terms(keys: Sequence[tuple[int, float]]) -> np.ndarray:
    return np.array([(1.0, batch * pixels, batch * pixels**2) for batch, pixels in keys])


def weight(cell: Cell, main: Features) -> float:
    """How many seconds of a typical request one second of this quantity stands for."""
    quantity, _, features = cell
    times = PER_STEP[quantity] * main.n_steps if quantity in PER_STEP else PER_REQUEST.get(quantity, OTHERWISE)
    has_size = features.width_px > 0
    is_main = (features.width_px, features.height_px, features.n_images) == (main.width_px, main.height_px, 1)
    return times * (1.0 if is_main or not has_size else AWAY)


def scores(
    tasks: Sequence[Task],
    measured: Mapping[Key, Measured],
    took: Mapping[Key, float],
    main: Features,
) -> list[float]:
    """The score of each task, in the order given; see the module.

    Args:
        tasks: repeatable ones, and step tasks that were not done yet.
        measured: by task key, what it gave so far.
        took: by task key, the seconds it took last.
        main: the typical request: size, steps, one guided image.
    """
    steps: dict[tuple[int, float], float] = {}
    for task in tasks:
        for (quantity, _, features), values in measured.get(task.key, {}).items():
            if quantity == "engine.unet_step" and not task.is_held_out:
                steps[features.forward_batch, features.megapixels] = float(np.median(values))
    errors = leave_one_out(steps)
    found = []
    for task in tasks:
        cost_s = max(1e-3, took.get(task.key, task.cost_s))
        if task.key in measured:
            gain_s = sum(
                weight(cell, main) * float(np.median(values)) * relative_error(values)
                for cell, values in measured[task.key].items()
            )
        elif task.method == "steps" and errors and task.station == "engine":
            near = min(errors, key=lambda key: (_distance(key, task.features), key))
            gain_s = PER_STEP["engine.unet_step"] * main.n_steps * AWAY * steps[near] * errors[near]
        else:
            gain_s = 0.0
        found.append(gain_s / cost_s)
    return found


def _distance(key: tuple[int, float], features: Features) -> float:
    return abs(math.log(key[0] / features.forward_batch)) + abs(math.log(key[1] / features.megapixels))


def next_task(
    tasks: Sequence[Task],
    measured: Mapping[Key, Measured],
    took: Mapping[Key, float],
    main: Features,
    left_s: float,
) -> Task | None:
    """The task with the highest score among those that fit into the time left; None if none does or none is worth it."""
    fitting = [task for task in tasks if took.get(task.key, task.cost_s) <= left_s]
    if not fitting:
        return None
    found = scores(fitting, measured, took, main)
    best = max(range(len(fitting)), key=lambda i: (found[i], -i))
    return fitting[best] if found[best] > 0 else None
