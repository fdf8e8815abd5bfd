"""Requests that share forwards: who may, how long they wait for company, how long they take together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibrate.profile_file import load_profile
from engine.allocation import Allocation, Policies
from planner.service import Sizes, build_service
from planner.simulator import ProfileFacts, SimulationResult, simulate
from tests.simulation_builders import FACTS, SIZES, base_pool, constant_profile, controlnet_pool, run_queue, workload_of
from traces.problems import InputError

PROVISIONAL = Path(__file__).resolve().parents[2] / "data" / "provisional_profile.json"
ALONE_S = 10 * 0.1 + 1.0  # ten steps; text, decode and overhead


def simulated(
    arrival_s: list[float], n: int = 1, *, most: int | None = 8, window_s: float = 0.0, topology: str = "colocated",
    pools: tuple[Any, ...] = (), policies: dict[str, Any] | None = None, **columns: Any,
) -> SimulationResult:  # fmt: skip
    workload = workload_of(arrival_s, **{"n_steps": 10, "base_model_id": "m", **columns})
    service = build_service(workload, topology, constant_profile(), SIZES, forward_batch_max=most)  # type: ignore[arg-type]
    settings = Policies(forward_batch_max=most, batch_window_s=window_s, **(policies or {}))
    allocation = Allocation((base_pool(n, topology, base_model_ids=("m", "o", "*")), *pools), policies=settings)
    return simulate(workload, allocation, {"base": service}, SIZES, FACTS)


def starts(result: SimulationResult) -> list[float]:
    return result.requests["start_s"].tolist()


def test_those_that_wait_together_run_together() -> None:
    result = simulated([0.0, 0.5, 0.5, 0.5, 0.5, 0.5])
    # one at once; then four of two samples each fill eight; the sixth runs alone
    assert starts(result) == [0.0, 2.0, 2.0, 2.0, 2.0, 4.0]
    assert result.requests["end_s"].tolist() == [2.0, 4.0, 4.0, 4.0, 4.0, 6.0]
    busy = result.workers[result.workers["state"] == "busy"]
    assert busy["busy_s"].sum() == pytest.approx(3 * ALONE_S, rel=1e-12)  # a batch is one piece of work


def test_only_requests_that_agree_share_a_forward() -> None:
    for column, values in (
        ("n_steps", [10, 10, 20]),
        ("base_model_id", ["m", "m", "o"]),
        ("width_px", [1024, 1024, 512]),
        ("guidance_scale", [7.5, 7.5, 1.0]),
        ("lora_ids", [(), (), ("a",)]),
        ("controlnet_ids", [(), (), ("c",)]),
        ("control_end", [(), (), ()]),
    ):
        result = simulated([0.0, 0.1, 0.1], **{column: values})
        together = result.requests["start_s"].iloc[1] == result.requests["start_s"].iloc[2]
        assert together == (column == "control_end"), column


def test_requests_with_the_same_controlnets_and_loras_share_and_load_once() -> None:
    result = simulated([0.0, 0.1, 0.1], controlnet_ids=("c",), lora_ids=[(), ("a",), ("a",)])
    assert starts(result)[1] == starts(result)[2]
    assert result.requests["n_lora_misses"].tolist() == [0, 1, 0]
    assert result.requests["lora_wait_s"].iloc[1] == result.requests["lora_wait_s"].iloc[2] > 0


def test_a_request_waits_its_window_for_company_and_no_longer() -> None:
    alone = simulated([1.0], window_s=0.75)
    assert starts(alone) == [1.75]
    joined = simulated([1.0, 1.5, 1.9], window_s=0.75)
    # the window counts from the first one's arrival; the third comes too late and has its own window, then the replica
    assert starts(joined) == [1.75, 1.75, 1.75 + ALONE_S]


def test_a_full_batch_waits_for_nobody() -> None:
    result = simulated([1.0, 1.1, 1.2, 1.3], window_s=5.0, most=8)
    assert starts(result) == [1.3] * 4
    assert starts(simulated([1.0], window_s=5.0, most=2)) == [1.0]


def test_a_window_does_not_outlive_a_deadline() -> None:
    result = simulated([1.0], window_s=5.0, deadline_s=2.0)
    assert result.requests["status"].tolist() == ["expired"]
    assert result.requests["end_s"].tolist() == [3.0]


def test_a_large_request_lets_a_small_one_join_another_batch() -> None:
    # eight samples: the first takes two; of those that wait 3 images (6) and 2 images (4) do not fit together, 1 image (2) does
    result = simulated([0.0, 0.1, 0.1, 0.1], n_images=[1, 3, 2, 1])
    assert starts(result) == [0.0, 2.0, 4.0, 2.0]


def test_requests_on_controlnet_workers_are_never_put_together() -> None:
    pools = (controlnet_pool(2, "c"),)
    result = simulated([0.0, 0.1, 0.1], 1, topology="decoupled", pools=pools, controlnet_ids=("c",))
    assert len(set(starts(result))) == 3
    plain = simulated([0.0, 0.1, 0.1], 1, topology="decoupled", pools=pools)
    assert starts(plain)[1] == starts(plain)[2]


def test_two_requests_together_take_what_one_request_for_two_images_takes() -> None:
    profile = load_profile(str(PROVISIONAL))
    sizes = Sizes.from_profile(profile, lora_bytes=200 * 2**20)
    facts = ProfileFacts.from_profile(profile)
    for topology in ("diffusers", "diffusers_tuned", "colocated"):
        columns: dict[str, Any] = {"n_steps": 30, "base_model_id": "m", "controlnet_ids": ("c",)}
        pair = workload_of([0.0, 0.0], **columns)
        service = build_service(pair, topology, profile, sizes, forward_batch_max=4)  # type: ignore[arg-type]
        pool = base_pool(1, topology, base_model_ids=("m",), controlnet_ids=("c",))
        allocation = Allocation((pool,), policies=Policies(forward_batch_max=4, batch_window_s=1.0))
        frame = simulate(pair, allocation, {"base": service}, sizes, facts).requests
        assert frame["start_s"].tolist() == [0.0, 0.0]
        one = workload_of([0.0], n_images=2, **columns)
        alone = build_service(one, topology, profile, sizes)  # type: ignore[arg-type]
        noise = service.noise_ratio[0] / alone.noise_ratio[0]
        for column, seconds in (
            ("text_s", alone.text_s), ("denoise_s", alone.denoise_alone_s), ("decode_s", alone.decode_s)
        ):  # fmt: skip
            # sums of the same laws in another order
            assert frame[column].to_numpy() == pytest.approx([seconds[0] * noise] * 2, rel=1e-9), (topology, column)


def test_a_saturated_replica_serves_a_full_batch_each_time() -> None:
    result = simulated([0.0] * 41)
    ends = result.requests["end_s"].to_numpy()
    # the first finds an idle replica; the other forty go four at a time
    assert ends.max() == pytest.approx(11 * ALONE_S, rel=1e-12)
    assert np.bincount(np.round(ends / ALONE_S).astype(int))[1:].tolist() == [1] + [4] * 10


def test_a_batch_of_a_tenant_stays_within_its_limit() -> None:
    result = simulated(
        [0.0, 0.1, 0.1, 0.1, 0.1], policies={"tenant_running_max": 2}, tenant_id=["b", "a", "a", "a", "a"]
    )
    assert starts(result) == [0.0, 2.0, 2.0, 4.0, 4.0]


def test_batching_needs_times_of_shared_forwards() -> None:
    with pytest.raises(InputError, match="no times of shared forwards"):
        run_queue([0.0], [1.0], 1, policies=Policies(forward_batch_max=4))
