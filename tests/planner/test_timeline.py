"""A run as a Chrome trace: what viewers need of its slices, and the same bytes for the same run."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pytest

from engine.allocation import Allocation
from planner.service import build_service
from planner.simulator import SimulationResult, simulate
from planner.timeline import events, write_chrome_trace
from tests.simulation_builders import FACTS, SIZES, base_pool, constant_profile, controlnet_pool, workload_of
from traces.problems import InputError


@pytest.fixture(scope="module")
def result() -> SimulationResult:
    workload = workload_of(
        [0.0, 0.5, 1.0, 30.0], base_model_id="m", controlnet_ids=[("depth",), (), ("depth",), ()],
        controlnet_scales=[(1.0,), (), (1.0,), ()], lora_ids=[("l",), (), (), ()], n_steps=10, deadline_s=[float("nan"), float("nan"), 0.1, float("nan")],
    )  # fmt: skip
    service = build_service(workload, "decoupled", constant_profile(), SIZES)
    allocation = Allocation((base_pool(2, "decoupled"), controlnet_pool(1)))
    return simulate(workload, allocation, {"base": service}, SIZES, FACTS)


def test_stages_fill_their_request_and_requests_of_a_worker_do_not_overlap(result: SimulationResult) -> None:
    slices = [event for event in events(result) if event["ph"] == "X"]
    requests = [event for event in slices if event["cat"] == "request"]
    assert len(requests) == int((result.requests["status"] == "done").sum()) == 3
    for one in requests:
        inside = [
            e
            for e in slices
            if e["cat"] == "stage" and e["tid"] == one["tid"] and one["ts"] <= e["ts"] < one["ts"] + one["dur"]
        ]
        # times are rounded to a nanosecond, one stage after the other
        assert sum(e["dur"] for e in inside) == pytest.approx(one["dur"], abs=0.01)
    for tid in {e["tid"] for e in requests}:
        mine = sorted((e["ts"], e["ts"] + e["dur"]) for e in requests if e["tid"] == tid)
        assert all(end <= begin + 1e-3 for (_, end), (begin, _) in itertools.pairwise(mine))


def test_turned_away_requests_and_controlnet_workers_are_there(result: SimulationResult) -> None:
    found = list(events(result))
    assert [e["args"]["request"] for e in found if e["ph"] == "i"] == ["r2"]
    assert any(e["ph"] == "X" and e["cat"] == "controlnet" and e["name"] == "busy" for e in found)
    waiting = [e["args"]["requests"] for e in found if e["ph"] == "C" and e["name"] == "waiting"]
    assert max(waiting) == 1
    assert waiting[-1] == 0


def test_the_file_is_json_packed_or_not_and_the_same_twice(result: SimulationResult, tmp_path: Path) -> None:
    plain = write_chrome_trace(result, tmp_path / "a.json").read_bytes()
    packed = write_chrome_trace(result, tmp_path / "a.json.gz").read_bytes()
    assert gzip.decompress(packed) == plain
    assert write_chrome_trace(result, tmp_path / "b.json.gz").read_bytes() == packed
    assert {"ph", "name", "pid"} <= set(json.loads(plain)["traceEvents"][0])
    with pytest.raises(InputError, match=r"a name ending in \.json"):
        write_chrome_trace(result, tmp_path / "a.txt")
