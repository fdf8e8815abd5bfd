"""Synthetic services against the published figures they follow."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from traces.character import Description, describe, rates
from traces.katz_figures import FIGURES
from traces.problems import InputError
from traces.samples import load_sample, sample_names
from traces.samples.make_samples import made_sample
from traces.synth import POISSON, RateShape, shares_of_curve, synthesise
from traces.trace import Trace

DAY = 86_400.0


@pytest.fixture(scope="module", params=["A", "B"])
def service(request) -> tuple[str, Trace, Description]:
    """A service with 24 instances at the full trace's requests per instance."""
    figures = FIGURES[request.param]
    n_requests = 24 * figures.n_requests // figures.n_instances
    trace = synthesise(request.param, n_requests, 24, 3 * DAY, seed=11)
    return request.param, trace, describe(trace)


def test_add_ons_per_request_follow_the_published_shares(service) -> None:
    name, trace, found = service
    for published, observed in (
        (FIGURES[name].controlnets_per_request_percent, found.controlnets.per_request),
        (FIGURES[name].loras_per_request_percent, found.loras.per_request),
    ):
        for number, percent in enumerate(published):
            share = percent / sum(published)
            # Independent draws: four standard deviations of a binomial share, exceeded with p < 1e-4.
            assert observed.get(number, 0.0) == pytest.approx(
                share, abs=4 * np.sqrt(share * (1 - share) / len(trace)) + 1e-9
            )


def test_controlnet_popularity_follows_the_published_curve(service) -> None:
    name, trace, found = service
    uses = trace.requests["controlnet_ids"].explode().dropna().value_counts()
    n_uses = int(uses.sum())
    for top, percent in FIGURES[name].controlnet_top_percent[1:]:
        published = [f"{name}-controlnet-{rank:02d}" for rank in range(1, top + 1)]
        share = float(uses.reindex(published).fillna(0).sum()) / n_uses
        # Inclusion probabilities are exact, so only sampling noise is left: four standard deviations, the variance of a
        # use taken as binomial; drawing two distinct ones makes the true variance smaller.
        assert share == pytest.approx(percent / 100, abs=4 * np.sqrt(0.25 / n_uses))
    assert found.controlnets.popularity.n_uses == n_uses


def test_lora_popularity_follows_the_published_curve(service) -> None:
    name, trace, _ = service
    uses = trace.requests["lora_ids"].explode().dropna().value_counts()
    n_uses = int(uses.sum())
    for top, percent in FIGURES[name].lora_top_percent[1:]:
        published = [f"{name}-lora-{rank:04d}" for rank in range(1, top + 1)]
        share = float(uses.reindex(published).fillna(0).sum()) / n_uses
        # A repeat copies an earlier use of its instance, so uses are correlated: this is an elephant random walk with memory
        # r, whose variance after m uses is at most m·p(1-p)/(1-2r) (Schütz and Trimper 2004), with r = 0.277 2.24 times that
        # of independent draws. Four standard deviations, p(1-p) at most 1/4.
        assert share == pytest.approx(percent / 100, abs=4 * np.sqrt(2.24 * 0.25 / n_uses))


def test_unique_loras_per_instance_show_the_published_locality(service) -> None:
    name, trace, found = service
    published = FIGURES[name].mean_unique_loras_per_instance
    assert found.loras.loads.distinct_per_instance == pytest.approx(published, rel=0.15)  # the target of this synthesis
    # The same requests dealt out without locality would be outside: instances see more different LoRAs.
    shuffled = trace.requests.assign(instance_id=np.random.default_rng(0).permutation(trace.requests["instance_id"]))
    without = describe(Trace(shuffled, trace.provenance, trace.duration_s)).loras.loads.distinct_per_instance
    assert without > 1.15 * published


def test_a_request_never_names_an_add_on_twice(service) -> None:
    _, trace, _ = service
    for column in ("lora_ids", "controlnet_ids"):
        assert all(len(set(names)) == len(names) for names in trace.requests[column])


def test_count_instances_and_window_are_exact(service) -> None:
    name, trace, _ = service
    assert len(trace) == 24 * FIGURES[name].n_requests // FIGURES[name].n_instances
    assert trace.requests["instance_id"].nunique() == 24
    assert trace.duration_s == 3 * DAY
    assert any("assumed, arrivals" in note for note in trace.provenance.notes)
    assert trace.provenance.seed == 11


def test_curves_are_shares_that_fall_with_rank() -> None:
    for figures in FIGURES.values():
        for curve in (figures.controlnet_top_percent, figures.lora_top_percent):
            shares = shares_of_curve(curve)
            assert shares.sum() == pytest.approx(1.0)
            assert (shares > 0).all()
            assert 3 * shares.max() <= 1 or curve is figures.lora_top_percent  # what systematic sampling needs


def test_arrivals_without_bursts_and_rhythm_are_poisson() -> None:
    found = rates(synthesise("B", 20_000, 5, DAY, seed=4, rate_shape=POISSON))
    # Gaps of a Poisson stream: cv 1 with a standard error of 1/sqrt(n) = 0.007; four of them.
    assert found.interarrival_cv == pytest.approx(1.0, abs=0.03)
    # Dispersion over 24 hours given the total: a chi-square over 23 degrees, so within 1 ± 4·sqrt(2/23).
    assert found.dispersion == pytest.approx(1.0, abs=1.2)


def test_rhythm_and_bursts_make_arrivals_burstier() -> None:
    daily = synthesise("B", 20_000, 5, DAY, seed=4, rate_shape=RateShape(burst_share=0.0))
    counts = np.array(rates(daily).slot_counts)
    # 1 + 0.6·cos: the hour at the peak has 4 times the rate of the one twelve hours away; ±25 % is over 4 sd of 330 counts.
    assert counts[14:16].sum() / counts[2:4].sum() == pytest.approx(1.6 / 0.4, rel=0.25)
    bursty = rates(synthesise("B", 20_000, 5, DAY, seed=4, rate_shape=RateShape(daily_amplitude=0.0)))
    assert bursty.interarrival_cv is not None
    assert bursty.interarrival_cv > 1.2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("C", 10, 1, 60.0, 0), "service: got 'C', needs one of A, B"),
        (("A", 0, 1, 60.0, 0), "number of requests: got 0"),
        (("A", 10, 11, 60.0, 0), "number of instances: got 11, needs 1..10"),
        (("A", 10, 1, 0.0, 0), "duration: got 0 s"),
        (("A", 10, 1, 60.0, -1), "seed: got -1"),
        (("A", 10, 1, 60.0, 0, RateShape(daily_amplitude=2.0)), "daily_amplitude: got 2"),
    ],
)
def test_a_senseless_synthesis_is_refused(arguments, sentence) -> None:
    with pytest.raises(InputError) as caught:
        synthesise(*arguments)
    assert sentence in str(caught.value)


def test_a_tiny_synthesis_works() -> None:
    assert len(synthesise("A", 1, 1, 10.0, seed=0)) == 1


@pytest.mark.parametrize("name", sample_names())
def test_the_shipped_sample_is_what_its_recipe_makes(name) -> None:
    shipped, made = load_sample(name), made_sample(name)
    assert shipped.requests.equals(made.requests)
    assert shipped.provenance == made.provenance
    published = FIGURES[shipped.requests["request_id"].iloc[0][0]].mean_unique_loras_per_instance
    assert describe(shipped).loras.loads.distinct_per_instance == pytest.approx(published, rel=0.15)


def test_synthesis_and_scaling_give_the_same_bytes_whatever_the_hash_seed(tmp_path) -> None:
    code = (
        "import sys\nfrom traces.synth import synthesise\nfrom traces.scaling import scale_traffic\n"
        "from traces.writer import write_trace\n"
        "write_trace(scale_traffic(synthesise('A', 400, 4, 9000.0, 5), 2.5, 'independent', 1), sys.argv[1])\n"
    )
    contents = []
    for hash_seed in ("0", "4711"):
        path = tmp_path / f"{hash_seed}.parquet"
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run([sys.executable, "-c", code, str(path)], env=environment, check=True, timeout=120)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]
