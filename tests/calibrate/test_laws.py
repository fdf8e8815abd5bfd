"""Forms of laws: batch and pixels are told apart, the form that data came from is found, parameters stay physical."""

from __future__ import annotations

import numpy as np
import pytest

from calibrate.laws import choose_form, evaluate, fit_form
from calibrate.profile import FORM_PARAMETERS, Form, Law

BATCHES = np.repeat([1.0, 2.0, 4.0, 8.0, 16.0], 3)
MEGAPIXELS = np.tile([0.25, 0.5625, 1.0], 5)
X = BATCHES * MEGAPIXELS
TRUTH = {"floor_s": 8e-3, "fixed_s": 1e-3, "per_unit_s": 10e-3, "attention_s": 4e-3}
NOISE = 0.003


def seconds_of(form: Form, noise_seed: int | None = None) -> np.ndarray:
    """What a law of this form says at the sizes above, with relative noise."""
    given = {name: TRUTH[name] for name in FORM_PARAMETERS[form]}
    exact = np.array([evaluate(form, given, x, m) for x, m in zip(X, MEGAPIXELS, strict=True)])
    if noise_seed is None:
        return exact
    return exact * (1 + NOISE * np.random.default_rng(noise_seed).standard_normal(exact.size))


@pytest.mark.parametrize("form", ["attention", "floor_attention", "roofline", "roofline_attention"])
def test_the_form_that_the_data_came_from_is_chosen_and_its_parameters_are_found(form: Form) -> None:
    y = seconds_of(form, noise_seed=1)
    chosen = choose_form(X, MEGAPIXELS, y, has_floor=True)
    assert chosen.form == form
    # the largest error of 15 values with sd 0.3 % is about 2.5 sd; a left-out point adds its own
    assert chosen.left_out_error_ratio[form] < 2 * NOISE
    parameters = fit_form(form, X, y, MEGAPIXELS)
    # a parameter that carries a tenth of the time is known to about ten times the noise over sqrt(15): 0.8 %; three of these
    for name in FORM_PARAMETERS[form]:
        share = 0.05 if name == "fixed_s" else 0.3
        assert parameters[name] == pytest.approx(TRUTH[name], rel=3 * NOISE / share)


def test_the_same_number_of_pixels_takes_longer_as_one_large_image_than_as_many_small_ones() -> None:
    parameters = fit_form("attention", X, seconds_of("attention"), MEGAPIXELS)
    one_large = evaluate("attention", parameters, 4.0, megapixels=1.0)
    four_small = evaluate("attention", parameters, 4.0, megapixels=0.25)
    assert one_large - four_small == pytest.approx(4.0 * 0.75 * TRUTH["attention_s"], rel=1e-6)


def test_tiles_are_told_from_sizes_that_do_not_fill_them() -> None:
    truth = {**TRUTH, "row_padding_s": 12e-3, "sequence_padding_s": 2e-3}
    batches = np.concatenate([BATCHES, [1, 2, 6, 2, 16, 3, 12]])
    megapixels = np.concatenate([MEGAPIXELS, [0.390625, 0.390625, 0.25, 0.765625, 0.390625, 1.0, 0.5625]])
    x = batches * megapixels
    exact = np.array([evaluate("tiles", truth, a, m) for a, m in zip(x, megapixels, strict=True)])
    y = exact * (1 + NOISE * np.random.default_rng(2).standard_normal(x.size))
    chosen = choose_form(x, megapixels, y, has_floor=True)
    assert chosen.form == "tiles"
    assert chosen.left_out_error_ratio["tiles"] < 3 * NOISE < chosen.left_out_error_ratio["roofline_attention"]
    # 640 x 640 at batch 2 fills 6.25 tiles of 128 rows: it takes as long as 7, nearly a tenth longer than by its pixels
    smooth = {name: truth[name] for name in FORM_PARAMETERS["roofline_attention"]}
    assert evaluate("tiles", truth, 0.78125, 0.390625) > 1.09 * evaluate(
        "roofline_attention", smooth, 0.78125, 0.390625
    )


def test_sizes_that_all_fill_their_tiles_do_not_compete_for_padding() -> None:
    x = np.concatenate([np.full(5, 1.0) * [1, 2, 4, 8, 16], np.array([1, 2, 4, 8, 16]) * 0.25])
    megapixels = np.repeat([1.0, 0.25], 5)
    y = np.array([evaluate("roofline_attention", TRUTH, a, m) for a, m in zip(x, megapixels, strict=True)])
    assert "tiles" not in choose_form(x, megapixels, y, has_floor=True).left_out_error_ratio


def test_a_form_with_more_parameters_is_not_chosen_for_nothing() -> None:
    chosen = [
        choose_form(X, MEGAPIXELS, seconds_of("affine", noise_seed=seed), has_floor=True).form for seed in range(6)
    ]
    # chance alone makes one of the five others more than a standard error better in about one data set of six
    assert chosen.count("affine") >= 4


def test_too_few_sizes_to_leave_one_out_keep_the_rule_by_number_of_sizes() -> None:
    x = np.array([2.0, 4.0, 8.0])
    chosen = choose_form(x, np.ones(3), np.array([0.03, 0.058, 0.118]), has_floor=True)
    assert (chosen.form, dict(chosen.left_out_error_ratio)) == ("floor_affine", {})


@pytest.mark.parametrize("form", [form for form in FORM_PARAMETERS if form != "constant"])
def test_every_form_is_proportional_to_its_parameters_together(form: Form) -> None:
    # what-if questions of the planner scale a whole law by scaling its parameters
    law = Law("", form, (), {name: TRUTH.get(name, 5e-3) for name in FORM_PARAMETERS[form]}, "measured", "-")
    tripled = {name: 3 * value for name, value in law.parameters.items()}
    assert law.seconds(X, tripled, megapixels=MEGAPIXELS) == pytest.approx(
        3 * law.seconds(X, megapixels=MEGAPIXELS), rel=1e-12
    )


@pytest.mark.parametrize("form", ["affine", "floor_affine", "attention", "roofline", "roofline_attention"])
def test_parameters_are_never_negative_and_never_miss_by_more_than_a_constant_would(form: Form) -> None:
    falling = np.linspace(0.3, 0.1, X.size)[np.argsort(np.argsort(X))]
    parameters = fit_form(form, X, falling, MEGAPIXELS)
    assert min(parameters.values()) >= 0.0

    def cost(name: Form, given: dict[str, float]) -> float:
        said = np.array([evaluate(name, given, x, m) for x, m in zip(X, MEGAPIXELS, strict=True)])
        return float(np.sum((said / falling - 1) ** 2))

    # every form contains the constant; the search for the soft floor stops within a millionth
    assert cost(form, parameters) <= cost("constant", fit_form("constant", X, falling)) * (1 + 1e-6)


def test_a_size_of_more_weight_is_met_more_closely() -> None:
    x, y = np.array([1.0, 2.0, 4.0]), np.array([0.1, 0.25, 0.4])
    errors = []
    for weight in (1.0, 100.0):
        parameters = fit_form("affine", x, y, weights=np.array([1.0, weight, 1.0]))
        errors.append(abs(evaluate("affine", parameters, 2.0) / 0.25 - 1))
    assert errors[1] < errors[0] / 10
