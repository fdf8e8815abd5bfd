"""What-if answers what the search would see, for the traffic that scaling and cutting give, without building it anew."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.allocation import Topology
from planner.evaluation import Bench, evaluate_counts
from planner.replication import service_table
from planner.scenario import Scenario, load_scenario
from planner.traffic import build_traffic, stream_seed
from planner.what_if import (
    Change,
    Ground,
    Terms,
    change,
    first_guess,
    keeps_controlnets,
    lay_out,
    run,
    sizes_around,
    trace_with_share,
)
from planner.workload import build_workload
from traces.problems import InputError
from traces.samples import load_sample
from traces.scaling import busiest_window, scale_traffic, scaled_rows, window

TERMS = Terms(20.0, 0.95, 3.5)
TOPOLOGIES: tuple[Topology, ...] = ("diffusers", "colocated", "decoupled")


@pytest.fixture(scope="module")
def asked() -> tuple[Scenario, Path]:
    """Half an hour of the sample as it is: nothing is scaled, so request ids are the same everywhere."""
    scenario, folder = load_scenario("sample:small")
    traffic = scenario.traffic.model_copy(update={"scale_factor": 1.0})
    slo = scenario.slo.model_copy(update={"latency_s": TERMS.latency_s})
    return scenario.model_copy(update={"traffic": traffic, "topologies": TOPOLOGIES, "slo": slo}), folder


@pytest.fixture(scope="module")
def ground(asked: tuple[Scenario, Path]) -> Ground:
    return lay_out(*asked)


@pytest.mark.parametrize(("topology", "counts"), [("diffusers", (24,)), ("colocated", (9,)), ("decoupled", (6, 4))])
def test_unchanged_traffic_gives_what_the_search_sees(
    asked: tuple[Scenario, Path], ground: Ground, topology: Topology, counts: tuple[int, ...]
) -> None:
    scenario, folder = asked
    workload = build_traffic(scenario, folder).workload
    seed = stream_seed(scenario.simulation.seed, "search noise")
    table = service_table(scenario, ground.inputs, workload, topology, draw=None, noise_seed=seed)
    shape = ground.shapes[topology][0]
    seen = evaluate_counts(Bench.of(scenario, ground.inputs, workload, table), shape, counts)
    found = run(ground, change(ground, Change()), topology, counts, TERMS)
    assert found.attainment_ratio == seen.attainment_ratio
    # noise is divided out and multiplied in again: the last bits of a service time may differ
    np.testing.assert_allclose(found.busy_ratios, seen.busy_ratios, rtol=1e-9)
    assert found.bottleneck in ("pool", "idle", seen.lost_to)


@pytest.mark.parametrize("law", ["same_hours", "independent", "amplify"])
@pytest.mark.parametrize("factor", [0.3, 1.0, 2.4])
def test_rows_are_the_requests_that_scaling_and_cutting_build(law: str, factor: float) -> None:
    trace = load_sample("katz_a_hour")
    scaled = scale_traffic(trace, factor, law, 7)  # type: ignore[arg-type]
    for cut, options in (
        (scaled, {}),
        (window(scaled, 600.0, 1800.0), {"window_s": (600.0, 1800.0)}),
        (window(scaled, *busiest_window(scaled, 900.0)), {"busiest_s": 900.0}),
    ):
        rows = scaled_rows(trace, factor, law, 7, **options)  # type: ignore[arg-type]
        np.testing.assert_array_equal(rows.arrival_s, cut.requests["arrival_s"].to_numpy())
        names = trace.requests["request_id"].to_numpy()[rows.source]
        ids = [f"{name}#{k}" if k else name for name, k in zip(names, rows.copy.tolist(), strict=True)]
        assert ids == cut.requests["request_id"].tolist()
        assert rows.duration_s == cut.duration_s


def test_copies_of_a_request_differ_in_their_noise(ground: Ground) -> None:
    changed = change(ground, Change(traffic_ratio=2.0))
    noise = changed.tables["colocated"].noise_ratio
    assert len(set(changed.workload.request_ids)) < len(noise)
    # drawn from a continuous law: only its flat ends repeat
    assert len(np.unique(noise)) > 0.9 * len(noise)


def test_a_larger_share_keeps_whoever_a_smaller_one_kept(ground: Ground) -> None:
    kept = [keeps_controlnets(ground.recorded, share, 0) for share in (0.0, 0.2, 0.7, 1.0)]
    assert not kept[0].any()
    assert kept[3].all()
    for less, more in itertools.pairwise(kept):
        assert (less <= more).all()
    # 7,960 requests: five standard deviations of a share are under 0.03
    assert abs(float(kept[2].mean()) - 0.7) < 0.03


def test_a_share_of_controlnets_is_the_same_in_a_trace_written_for_the_search(ground: Ground) -> None:
    changed = change(ground, Change(controlnet_share=0.4)).workload
    whole = build_workload(trace_with_share(ground.trace, 0.4, ground.scenario.simulation.seed))
    window_s = ground.scenario.traffic.window
    assert window_s is not None
    inside = whole.subset((whole.arrival_s >= window_s.start_h * 3600) & (whole.arrival_s < window_s.end_h * 3600))
    names = [[whole.controlnet_names[code] for code in codes] for codes in inside.controlnets]
    assert [[changed.controlnet_names[code] for code in codes] for codes in changed.controlnets] == names


def test_without_controlnets_nobody_pays_for_them(ground: Ground) -> None:
    none = change(ground, Change(controlnet_share=0.0))
    assert not none.workload.n_controlnets.any()
    assert not none.tables["decoupled"].is_remote.any()
    some = run(ground, change(ground, Change()), "colocated", (9,), TERMS)
    plain = run(ground, none, "colocated", (9,), TERMS)
    assert plain.latency_p50_s < some.latency_p50_s
    assert plain.busy_ratios[0] < some.busy_ratios[0]


def test_an_impossible_promise_names_the_images_themselves(ground: Ground) -> None:
    found = run(ground, change(ground, Change()), "diffusers", (200,), replace(TERMS, latency_s=1.0))
    assert not found.is_kept
    assert found.bottleneck == "idle"


def test_a_first_guess_keeps_the_promise_and_one_gpu_less_does_not(ground: Ground) -> None:
    counts = first_guess(ground, "colocated", TERMS)
    unchanged = change(ground, Change())
    assert run(ground, unchanged, "colocated", counts, TERMS).is_kept
    assert not run(ground, unchanged, "colocated", (counts[0] - 1,), TERMS).is_kept


def test_price_and_promise_change_the_judgement_only(ground: Ground) -> None:
    unchanged = change(ground, Change())
    cheap, dear = (run(ground, unchanged, "colocated", (9,), replace(TERMS, price_usd_per_gpu_hour=p)) for p in (1.0, 4.0))  # fmt: skip
    assert dear.cost_usd_per_month == pytest.approx(4 * cheap.cost_usd_per_month)
    assert (dear.latency_p95_s, dear.attainment_ratio) == (cheap.latency_p95_s, cheap.attainment_ratio)


def test_too_much_traffic_is_refused_in_a_sentence(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.what_if.REQUESTS_MAX", 5000)
    with pytest.raises(InputError, match="while a slider moves"):
        change(ground, Change(traffic_ratio=2.0))


@pytest.mark.parametrize(("counts", "gpus_max"), [((1,), 100), ((10,), 100), ((10, 4), 16), ((100, 7), 1000)])
def test_sizes_around_are_others_and_allowed(counts: tuple[int, ...], gpus_max: int) -> None:
    found = sizes_around(counts, 0, gpus_max)
    assert counts not in found
    assert found == tuple(sorted(set(found)))
    assert all(sizes[0] >= 1 and sizes[1:] == counts[1:] and sum(sizes) <= gpus_max for sizes in found)
