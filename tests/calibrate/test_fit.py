"""Fitting: known laws are recovered from noisy measurements, intervals cover, and what is missing is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from calibrate.fit import fit_profile
from calibrate.laws import evaluate, fit_form
from calibrate.measurement import Features, Measurement, Measurements, Session, read_measurements
from calibrate.output import write_fit
from calibrate.profile import LAW_FEATURES, READ_LAWS, has_loads_in_two_parts
from calibrate.profile_file import load_profile
from traces.problems import InputError

NOISE = 0.02
N_REPETITIONS = 40
# Standard error of a median of n normal values is 1.2533 sigma / sqrt(n) = 0.4 %; four of them.
TOLERANCE = 4 * 1.2533 * NOISE / np.sqrt(N_REPETITIONS)
STEP_LAWS = {
    "diffusers.unet_step": (0.0586, 0.0154, 0.0158),
    "diffusers_tuned.unet_step": (0.0, 0.004, 0.013),
    "engine.unet_step": (0.0, 0.003, 0.0135),
    "engine.controlnet_step": (0.0, 0.002, 0.0062),
    "engine.encoder_step": (0.0, 0.001, 0.0062),
    "engine.decoder_step": (0.0, 0.002, 0.0073),
}
OVERHEAD_S = {"diffusers": 0.05, "diffusers_tuned": 0.03, "engine": 0.02}
VAE_S = 0.085


def truth_s(name: str, batch: float) -> float:
    """Seconds of a step law at one megapixel."""
    floor_s, fixed_s, per_unit_s = STEP_LAWS[name]
    return max(floor_s, fixed_s + per_unit_s * batch)


def session(name: str, **changes: object) -> Session:
    """A session on one H200."""
    plain = Session(name, "sdxl", "nvidia-h200", f"2026-11-22T00:00:0{len(name) % 10}+00:00", 0, {"gpu": "NVIDIA H200"})
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def synthetic(seed: int, name: str = "one") -> Measurements:
    """Steps, VAE and images without add-ons of three stacks, with the noise above."""
    rng = np.random.default_rng(seed)
    rows: list[Measurement] = []

    def add(quantity: str, mode: str, features: Features, seconds: float) -> None:
        for repetition in range(N_REPETITIONS):
            value = seconds * (1 + NOISE * rng.standard_normal())
            rows.append(
                Measurement(name, quantity, quantity.split(".")[0], "", mode, features, repetition, len(rows), value)
            )

    modes = {"diffusers": "eager", "diffusers_tuned": "compiled", "engine": "compiled"}
    for law in STEP_LAWS:
        for batch in (2, 4, 8):
            add(law, modes[law.split(".")[0]], Features(batch, batch // 2, 1024, 1024), truth_s(law, batch))
    for stack, topology in (
        ("diffusers", "diffusers"),
        ("diffusers_tuned", "diffusers_tuned"),
        ("engine", "colocated"),
    ):
        # compiled Diffusers is timed with one image only, as on the GPU
        for n_images in (1,) if stack == "diffusers_tuned" else (1, 2):
            pixels = Features(n_images=n_images, width_px=1024, height_px=1024)
            add(f"{stack}.vae_decode", modes[stack], pixels, VAE_S * n_images)
        image = Features(2, 1, 1024, 1024, n_steps=50)
        seconds = 50 * truth_s(f"{stack}.unet_step", 2) + VAE_S + OVERHEAD_S[stack]
        add(f"e2e.{topology}", modes[stack], image, seconds)
    image = Features(2, 1, 1024, 1024, n_steps=50, n_controlnets=2)
    step_s = truth_s("engine.unet_step", 2) + 2 * truth_s("engine.controlnet_step", 2)
    add("e2e.colocated", "compiled", image, 50 * step_s + VAE_S + OVERHEAD_S["engine"])
    return Measurements(tuple(rows), (session(name),))


@pytest.fixture(scope="module")
def fitted():  # type: ignore[no-untyped-def]
    return fit_profile(synthetic(7), n_draws=32)


@pytest.mark.parametrize("law", sorted(STEP_LAWS))
@pytest.mark.parametrize("batch", [2, 4, 8])
def test_known_step_laws_are_recovered_from_noisy_repetitions(fitted, law: str, batch: int) -> None:
    seconds = float(fitted.profile.predictor().seconds(law, forward_batch=batch, megapixels=1.0))
    assert seconds == pytest.approx(truth_s(law, batch), rel=TOLERANCE)


def test_ninety_percent_intervals_cover_the_truth_about_that_often() -> None:
    # 15 independent data sets x 4 laws at batch 2 = 60 intervals. Bootstrapped medians of 40 cover a little less than they say;
    # at a true coverage of 0.86, fewer than 44 of 60 has probability 0.005, and 60 of 60 would mean intervals far too wide
    # only if it were more likely than 0.0001, which it is not at 0.86.
    laws = ["diffusers_tuned.unet_step", "engine.unet_step", "engine.encoder_step", "engine.controlnet_step"]
    n_covered = 0
    for seed in range(15):
        profile = fit_profile(synthetic(100 + seed), n_draws=40, seed=seed).profile
        for law in laws:
            drawn = [float(profile.predictor(k).seconds(law, forward_batch=2, megapixels=1.0)) for k in range(40)]
            low, high = np.quantile(drawn, [0.05, 0.95])
            n_covered += low <= truth_s(law, 2) <= high
    assert 44 <= n_covered < 60


@pytest.mark.parametrize(("stack", "overhead_s"), sorted(OVERHEAD_S.items()))
def test_the_overhead_is_what_an_image_takes_beyond_its_parts(fitted, stack: str, overhead_s: float) -> None:
    law = fitted.profile.laws[f"{stack}.request_overhead"]
    # an error of the step law counts 50 times, that of the image once
    slack_s = TOLERANCE * (50 * truth_s(f"{stack}.unet_step", 2) * 2 + VAE_S)
    assert law.status == "measured"
    assert law.parameters["value_s"] == pytest.approx(overhead_s, abs=slack_s)


def test_a_held_out_image_is_composed_from_the_laws(fitted) -> None:
    held_out = [row for row in fitted.check if row.is_held_out]
    assert [(row.topology, row.n_controlnets) for row in held_out] == [("colocated", 2)]
    assert abs(held_out[0].gap_ratio) < 3 * TOLERANCE


def test_laws_that_nobody_measured_are_assumed_with_a_source_or_named_as_missing(fitted) -> None:
    profile = fitted.profile
    assert profile.laws["engine.residual_transfer.network"].status == "assumed"
    assert "100 Gb/s" in profile.laws["engine.residual_transfer.network"].source
    assert profile.laws["diffusers_tuned.controlnet_step"].status == "assumed"
    assert "engine.controlnet_step" in profile.laws["diffusers_tuned.controlnet_step"].source
    missing = set(LAW_FEATURES) - set(READ_LAWS) - set(profile.laws)
    assert "engine.worker_start" in missing
    assert all(any(law in note for note in profile.notes) for law in missing)


def test_decoding_timed_with_one_image_is_assumed_by_proportion_for_more(fitted) -> None:  # type: ignore[no-untyped-def]
    laws = fitted.profile.laws
    assert laws["diffusers.vae_decode"].status == "measured"
    law = laws["diffusers_tuned.vae_decode"]
    assert (law.status, law.domain["n_images"]) == ("assumed", (1.0, 2.0))
    assert "by proportion" in law.source
    assert law.seconds(2.0) == pytest.approx(2 * law.seconds(1.0))


def test_draws_are_joint_and_move_a_law_with_those_it_was_taken_over_from(fitted) -> None:
    draws = fitted.profile.draws
    assert {len(values) for values in draws.values()} == {32}
    assert draws["diffusers_tuned.controlnet_step:per_unit_s"] == draws["engine.controlnet_step:per_unit_s"]


def test_per_batch_our_engine_is_taken_in_the_fastest_mode_measured() -> None:
    data = synthetic(3)
    slow = [
        dataclasses.replace(row, mode="graph", value_s=row.value_s * (0.5 if row.features.forward_batch == 8 else 2.0))
        for row in data.rows
        if row.quantity == "engine.unet_step"
    ]
    both = dataclasses.replace(data, rows=(*data.rows, *slow))
    profile = fit_profile(both, n_draws=2).profile
    assert "compiled for forward batch 2, 4; graph for forward batch 8" in profile.notes[0]
    seconds = float(profile.predictor().seconds("engine.unet_step", forward_batch=8, megapixels=1.0))
    # the three points of two modes lie on no common line any more: the floor form meets the smallest exactly
    assert seconds < truth_s("engine.unet_step", 8)


def test_one_measured_size_gives_a_line_through_the_origin() -> None:
    parameters = fit_form("affine", np.array([4.0]), np.array([0.2]))
    assert parameters == {"fixed_s": 0.0, "per_unit_s": pytest.approx(0.05)}


def test_a_cost_that_falls_with_size_never_gives_a_negative_parameter() -> None:
    parameters = fit_form("affine", np.array([1.0, 2.0]), np.array([0.2, 0.1]))
    assert min(parameters.values()) >= 0.0
    assert evaluate("affine", parameters, 100.0) > 0


def test_the_same_measurements_give_the_same_bytes_whatever_their_order(tmp_path: Path) -> None:
    data = synthetic(5)
    shuffled = dataclasses.replace(data, rows=tuple(reversed(data.rows)))
    texts = []
    for name, given in (("a", data), ("b", shuffled)):
        write_fit(fit_profile(given, n_draws=4), tmp_path / f"{name}.json")
        texts.append((tmp_path / f"{name}.json").read_bytes())
    assert texts[0] == texts[1]


def test_the_profile_names_the_digest_of_the_raw_rows_beside_it(tmp_path: Path) -> None:
    import hashlib

    paths = write_fit(fit_profile(synthetic(5), n_draws=2), tmp_path / "p.json")
    assert [path.name for path in paths] == ["p.json", "p.measurements.parquet", "p.check.csv"]
    digest = hashlib.sha256(paths[1].read_bytes()).hexdigest()
    assert load_profile(str(paths[0])).raw_sha256 == digest == json.loads(paths[0].read_text())["raw_sha256"]


def test_older_sessions_that_lent_rows_are_known_as_such_in_the_raw_file_beside_the_profile(tmp_path: Path) -> None:
    links = [
        ("engine.residual_exchange", "", Features(n_bytes=n, link="nvlink"), 1e-5 + n / 1e11) for n in (2**20, 2**26)
    ]
    old = with_rows(synthetic(6, "old"), links, "old")
    old = dataclasses.replace(
        old, sessions=tuple(dataclasses.replace(s, facts={"stock.device_memory_bytes": 2.0**37}) for s in old.sessions)
    )
    first = write_fit(fit_profile(synthetic(5), n_draws=2, borrowed=old), tmp_path / "p.json")
    write_fit(fit_profile(read_measurements(first[1]), n_draws=2), tmp_path / "q.json")
    assert (tmp_path / "q.json").read_bytes() == first[0].read_bytes()
    assert load_profile(str(first[0])).facts["device_memory_gib"].source.endswith("an older one")


def test_a_newer_session_takes_the_place_of_what_was_lent_before(tmp_path: Path) -> None:
    def loads(variant: str, s_per_gb: float) -> list[tuple[str, str, Features, float]]:
        return [("engine.checkpoint_load", "", Features(n_bytes=7 * 10**9, variant=variant), 7 * s_per_gb)]

    old = with_rows(synthetic(6, "old"), loads("checkpoint_file", 0.1), "old")
    lent = write_fit(fit_profile(synthetic(5), n_draws=2, borrowed=old), tmp_path / "p.json")
    assert load_profile(str(lent[0])).laws["engine.checkpoint_load"].status == "assumed"
    newer = with_rows(synthetic(7, "newer"), loads("checkpoint_serving", 0.3), "newer")
    law = fit_profile(read_measurements(lent[1]).merged(newer), n_draws=2).profile.laws["engine.checkpoint_load"]
    assert (law.status, float(law.seconds(7e9))) == ("measured", pytest.approx(2.1))


def test_two_sessions_of_one_machine_kind_make_one_profile() -> None:
    one, two = synthetic(1, "one"), synthetic(2, "other")
    profile = fit_profile(one.merged(two), n_draws=4).profile
    assert profile.laws["engine.unet_step"].n_repetitions == 2 * 3 * N_REPETITIONS
    assert [item["session"] for item in profile.fingerprint["sessions"]] == ["one", "other"]


def test_sessions_of_different_gpus_are_refused() -> None:
    one, two = synthetic(1, "one"), synthetic(2, "other")
    two = dataclasses.replace(two, sessions=(session("other", gpu_kind="nvidia-a100"),))
    with pytest.raises(InputError, match="mix gpu_kind nvidia-a100 and nvidia-h200"):
        fit_profile(one.merged(two))


def test_measurements_without_a_single_step_are_refused() -> None:
    data = synthetic(1)
    rows = tuple(row for row in data.rows if "unet_step" not in row.quantity)
    with pytest.raises(InputError, match="hold no UNet steps"):
        fit_profile(dataclasses.replace(data, rows=rows))


def test_a_session_given_twice_is_refused() -> None:
    with pytest.raises(InputError, match="'one' is given twice"):
        synthetic(1).merged(synthetic(2))


def test_a_transfer_is_the_slope_of_an_exchange_without_its_message() -> None:
    data = synthetic(9)
    rng = np.random.default_rng(9)
    rate_s, message_s = 2.7e-12, 4e-4
    rows = [
        Measurement(
            "one", "engine.residual_exchange", "engine", "", "graph", Features(n_bytes=n_bytes, link="nvlink"), k, k,
            (message_s + rate_s * n_bytes) * (1 + NOISE * rng.standard_normal()),
        )
        for n_bytes in (64, 2**24, 2**27, 2**29)
        for k in range(N_REPETITIONS)
    ]  # fmt: skip
    profile = fit_profile(dataclasses.replace(data, rows=(*data.rows, *rows)), n_draws=2).profile
    seconds = float(profile.predictor().seconds("engine.residual_transfer.nvlink", n_bytes=2**29))
    # the message is 28 % of the largest exchange: an error of a size's median counts 1 / 0.72, of two sizes
    assert seconds == pytest.approx(rate_s * 2**29, rel=2 * TOLERANCE / 0.72)


def with_rows(
    data: Measurements, rows: list[tuple[str, str, Features, float]], session_name: str = "one"
) -> Measurements:
    """The data and three repetitions of each of these (quantity, mode, features, seconds)."""
    more = [
        Measurement(session_name, quantity, quantity.split(".")[0], "", mode, features, k, 10_000 + k, seconds)
        for quantity, mode, features, seconds in rows
        for k in range(3)
    ]
    return dataclasses.replace(data, rows=(*data.rows, *more))


def test_loads_are_taken_the_way_workers_really_load_where_that_was_measured() -> None:
    sizes = {"unet": 5_000_000_000, "vae": 160_000_000}
    slow = [
        ("engine.checkpoint_load", "graph", Features(n_bytes=n, variant=f"{part}_serving"), n / 2e9)
        for part, n in sizes.items()
    ]
    fast = [
        ("engine.checkpoint_load", "graph", Features(n_bytes=n, variant=f"{part}_file"), n / 8e9)
        for part, n in sizes.items()
    ]
    profile = fit_profile(with_rows(synthetic(4), slow + fast), n_draws=2).profile
    assert float(profile.predictor().seconds("engine.checkpoint_load", n_bytes=5e9)) == pytest.approx(2.5)
    profile = fit_profile(with_rows(synthetic(4), fast), n_draws=2).profile
    assert float(profile.predictor().seconds("engine.checkpoint_load", n_bytes=5e9)) == pytest.approx(0.625)


CHECKPOINT_BYTES, CONTROLNET_BYTES = 6_900_000_000, 2_500_000_000


def rows_of_loads(ending: str, part: str, bytes_per_s: float) -> list[tuple[str, str, Features, float]]:
    return [
        (f"engine.{kind}_{part}", "graph", Features(n_bytes=n, variant=f"{kind}{ending}"), n / bytes_per_s)
        for kind, n in (("checkpoint", CHECKPOINT_BYTES), ("controlnet", CONTROLNET_BYTES))
    ]


IN_ONE = rows_of_loads("_serving", "load", 1e9)
INTO_HOST = rows_of_loads("_store", "read", 2e9)
FROM_HOST = rows_of_loads("_host", "load", 50e9)


def test_loads_in_two_parts_are_never_mixed_with_loads_in_one() -> None:
    fitted = fit_profile(with_rows(synthetic(4), IN_ONE + INTO_HOST + FROM_HOST), n_draws=2)
    seconds = fitted.profile.predictor().seconds
    assert has_loads_in_two_parts(fitted.profile)
    for kind, n in (("checkpoint", CHECKPOINT_BYTES), ("controlnet", CONTROLNET_BYTES)):
        assert float(seconds(f"engine.{kind}_load", n_bytes=n)) == pytest.approx(n / 50e9)
        assert float(seconds(f"engine.{kind}_read", n_bytes=n)) == pytest.approx(n / 2e9)
    assert "serving" not in fitted.profile.laws["engine.checkpoint_load"].source
    assert "_host" in fitted.profile.laws["engine.checkpoint_load"].source
    assert any(
        "two parts" in note and f"{3 * len(IN_ONE)} rows of loads in one part are not used" in note
        for note in fitted.profile.notes
    )


@pytest.mark.parametrize(("half", "lacking"), [(INTO_HOST, "loads from it"), (FROM_HOST, "reads into it")])
def test_half_of_a_load_in_two_parts_is_not_used(half: list[tuple[str, str, Features, float]], lacking: str) -> None:
    profile = fit_profile(with_rows(synthetic(4), IN_ONE + half), n_draws=2).profile
    assert float(profile.predictor().seconds("engine.checkpoint_load", n_bytes=CHECKPOINT_BYTES)) == pytest.approx(6.9)
    assert not has_loads_in_two_parts(profile)
    assert any(lacking in note for note in profile.notes)


def test_a_newer_session_with_a_host_tier_lets_no_older_load_in() -> None:
    """Older ControlNet rows are lent where the newer session has none; they are not of the host tier, so they are left out."""
    old = with_rows(synthetic(6, "old"), IN_ONE, "old")
    newer = with_rows(synthetic(5), [INTO_HOST[0], FROM_HOST[0]])
    laws = fit_profile(newer, n_draws=2, borrowed=old).profile.laws
    assert (laws["engine.checkpoint_load"].status, laws["engine.controlnet_load"].status) == ("measured", "assumed")
    assert "taken from engine.checkpoint_load" in laws["engine.controlnet_load"].source
    assert "taken from engine.checkpoint_read" in laws["engine.controlnet_read"].source


def test_tuned_diffusers_loras_and_controlnets_count_as_measured_where_they_were() -> None:
    lora = Features(n_loras=1, n_bytes=186_000_000, variant="rank64")
    parts = [(f"diffusers.lora_{name}", "eager", lora, 0.5) for name in ("attach", "fuse", "unfuse", "detach")]
    summed = fit_profile(with_rows(synthetic(4), parts), n_draws=2).profile.laws["diffusers_tuned.lora_attach"]
    assert (summed.status, float(summed.seconds(186e6))) == ("assumed", pytest.approx(1.0))
    direct = [
        ("diffusers_tuned.lora_attach", "compiled", lora, 1.4),
        ("diffusers_tuned.step_with_controlnets", "compiled", Features(2, 1, 1024, 1024, n_controlnets=2), 0.06),
    ]
    laws = fit_profile(with_rows(synthetic(4), parts + direct), n_draws=2).profile.laws
    assert (laws["diffusers_tuned.lora_attach"].status, float(laws["diffusers_tuned.lora_attach"].seconds(186e6))) == (
        "measured",
        pytest.approx(1.4),
    )
    # measured at one size, and the steps it belongs to at others: there by its form, which nobody measured
    net = laws["diffusers_tuned.controlnet_step"]
    assert (net.status, net.domain["forward_batch"]) == (
        "assumed",
        laws["diffusers_tuned.unet_step"].domain["forward_batch"],
    )
    assert (
        "diffusers_tuned.step_with_controlnets minus median diffusers_tuned.unet_step of the same session" in net.source
    )
    assert "in the rest of diffusers_tuned.unet_step's box by its form" in net.source
    # (60 ms - 30 ms) / 2; the plain step is known to its noise
    assert float(laws["diffusers_tuned.controlnet_step"].seconds(2.0)) == pytest.approx(
        0.015, abs=30e-3 * TOLERANCE / 2
    )


def test_a_lora_from_disk_counts_until_a_worker_has_mapped_it() -> None:
    rows = []
    for n_bytes in (20_000_000, 180_000_000):
        features = Features(n_loras=1, n_bytes=n_bytes)
        rows += [
            ("lora_fetch.local", "", features, n_bytes / 4e8),
            ("engine.lora_map", "graph", features, n_bytes / 2e9),
        ]
    law = fit_profile(with_rows(synthetic(4), rows), n_draws=2).profile.laws["lora_fetch.local"]
    assert float(law.seconds(180e6)) == pytest.approx(180e6 / 4e8 + 180e6 / 2e9)
    assert "engine.lora_map" in law.source


def test_an_older_session_lends_its_link_and_no_steps() -> None:
    old = with_rows(
        synthetic(6, "old"),
        [
            ("engine.residual_exchange", "graph", Features(n_bytes=n, link="nvlink"), 4e-4 + n / 4e11)
            for n in (64, 2**24, 2**27)
        ],
        "old",
    )
    new = synthetic(4)
    alone, fitted = fit_profile(new, n_draws=2), fit_profile(new, n_draws=2, borrowed=old)
    assert alone.profile.laws["engine.residual_transfer.nvlink"].status == "assumed"
    law = fitted.profile.laws["engine.residual_transfer.nvlink"]
    assert (law.status, law.parameters["per_unit_s"]) == ("measured", pytest.approx(1 / 4e11, rel=1e-3))
    assert fitted.profile.laws["engine.unet_step"].n_repetitions == alone.profile.laws["engine.unet_step"].n_repetitions
    assert {row.quantity for row in fitted.measurements.rows if row.session == "old"} == {"engine.residual_exchange"}
    assert any("Borrowed from session old" in note for note in fitted.profile.notes)


def test_an_older_session_of_another_gpu_lends_nothing() -> None:
    old = with_rows(
        synthetic(6, "old"), [("engine.residual_exchange", "", Features(n_bytes=9, link="nvlink"), 1.0)], "old"
    )
    old = dataclasses.replace(old, sessions=(session("old", gpu_kind="nvidia-a100"),))
    with pytest.raises(InputError, match="mix gpu_kind"):
        fit_profile(synthetic(4), n_draws=2, borrowed=old)
