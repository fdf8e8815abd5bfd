"""Where the rest of a session's time goes."""

from __future__ import annotations

import numpy as np
import pytest

from calibrate.design import leave_one_out, next_task, relative_error, scores
from calibrate.measurement import Features
from calibrate.points import Task

MAIN = Features(forward_batch=2, n_images=1, width_px=1024, height_px=1024, n_steps=50)


def _step(forward_batch: int, side_px: int, cost_s: float = 1.0) -> Task:
    features = Features(forward_batch=forward_batch, n_images=forward_batch // 2, width_px=side_px, height_px=side_px)
    return Task("steps", "engine", "steps", features, 6, cost_s=cost_s)


def _gave(task: Task, values: list[float]) -> dict[object, dict[object, list[float]]]:
    return {task.key: {("engine.unet_step", "graph", task.features): values}}


def test_time_goes_where_repetitions_scatter_most() -> None:
    quiet, noisy = _step(2, 1024), _step(4, 1024)
    measured = {**_gave(quiet, [0.03, 0.03, 0.03, 0.03]), **_gave(noisy, [0.05, 0.06, 0.07, 0.05])}
    assert next_task([quiet, noisy], measured, {}, MAIN, 60.0) is noisy


def test_a_dear_task_must_tell_more_than_a_cheap_one() -> None:
    cheap, dear = _step(4, 1024), _step(8, 1024)
    values = [0.05, 0.06, 0.07, 0.05]
    measured = {**_gave(cheap, values), **_gave(dear, values)}
    assert next_task([cheap, dear], measured, {cheap.key: 1.0, dear.key: 10.0}, MAIN, 60.0) is cheap


def test_a_new_size_is_measured_where_the_law_cannot_predict_its_own_points() -> None:
    done = [_step(batch, side) for batch, side in ((1, 512), (2, 512), (4, 512), (2, 1024), (4, 1024), (16, 1024))]
    measured: dict[object, dict[object, list[float]]] = {}
    for task in done:
        f = task.features
        seconds = 0.002 + 0.012 * f.forward_batch * f.megapixels
        if f.forward_batch == 16:
            seconds *= 1.5  # a kernel that is bad at this size: no law of the others knows
        measured |= _gave(task, [seconds] * 4)
    near, far = _step(16, 896), _step(1, 640)
    best = next_task([*done, near, far], measured, {}, MAIN, 600.0)
    assert best is near


def test_nothing_is_begun_that_does_not_fit() -> None:
    task = _step(2, 1024, cost_s=30.0)
    assert next_task([task], _gave(task, [0.03, 0.04, 0.05]), {}, MAIN, 20.0) is None


def test_a_law_without_noise_predicts_the_points_left_out() -> None:
    cells = {
        (b, m): 0.003 + 0.01 * b * m + 0.004 * b * m**2
        for b, m in ((1, 0.25), (2, 0.25), (4, 1.0), (2, 1.0), (8, 0.5625))
    }
    # exact data: what is left is rounding in the least squares
    assert max(leave_one_out(cells).values()) < 1e-6


def test_the_error_of_a_median_falls_with_the_square_root_of_repetitions() -> None:
    rng = np.random.default_rng(5)
    values = rng.normal(1.0, 0.02, 400)
    few, many = relative_error(values[:25].tolist()), relative_error(values.tolist())
    # 16 times as many: a quarter; the spread itself is only estimated, to 1/sqrt(2 * 25) = 14 % (three times that here)
    assert few / many == pytest.approx(4.0, rel=0.45)
    # 1.25 * 0.02 / sqrt(400) = 0.00125; the spread of 400 is known to 1/sqrt(800) = 3.5 %, MAD doubles it, three times that
    assert many == pytest.approx(0.00125, rel=0.25)


def test_the_order_of_tasks_with_the_same_score_is_theirs() -> None:
    first, second = _step(2, 1024), _step(2, 512)
    measured = {**_gave(first, [0.03] * 4), **_gave(second, [0.03] * 4)}
    assert scores([first, second], measured, {}, MAIN) == [0.0, 0.0]
    assert next_task([first, second], measured, {}, MAIN, 60.0) is None  # nothing is uncertain, nothing is worth it
