"""Replaying a trace: open loop, in scaled time, with tables at the end even if it is interrupted."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from engine.allocation import Pool
from engine.catalogue import Catalogue, CatalogueEntry
from engine.serving.job import Job, Outcome, StageSeconds, WorkerResult
from engine.serving.replay import ReplaySettings, plan_replay, replay
from engine.serving.replay_jobs import TraceChoice, job_of, warm_up_jobs
from traces.frame import checked_frame
from traces.problems import InputError
from traces.reader import read_table, read_trace
from traces.records import REQUEST_RECORD_COLUMNS, WORKER_INTERVAL_COLUMNS
from traces.trace import Provenance, Trace

POOLS = (Pool("base", "base", 2, "cpu"),)


class FakeEngine:
    """Any number of servers; the moment at which it was asked is what the tests look at."""

    def __init__(self, service_s: float = 0.0, hang: bool = False, company: int = 1) -> None:
        self.service_s, self.hang = service_s, hang
        self.company = company
        """Nobody is answered before so many are there."""
        self.together = asyncio.Event()
        self.jobs: list[Job] = []
        self.n_open = self.n_open_max = 0

    def clock(self) -> float:
        return time.monotonic()

    async def submit(self, job: Job) -> Outcome:
        arrival_s = self.clock()
        self.jobs.append(job)
        self.n_open += 1
        self.n_open_max = max(self.n_open_max, self.n_open)
        try:
            if self.hang and not job.request_id.startswith("warm-up"):
                await asyncio.Event().wait()
            if len(self.jobs) >= self.company:
                self.together.set()
            await self.together.wait()
            await asyncio.sleep(self.service_s)
        finally:
            self.n_open -= 1
        end_s = self.clock()
        if job.prompt == "request refused":
            return Outcome(
                job.request_id, "rejected", "queue is full", arrival_s=arrival_s, end_s=end_s, code="queue_full"
            )
        result = WorkerResult(StageSeconds(denoise_s=(end_s - arrival_s) / 2))
        return Outcome(
            job.request_id, "done", worker_id="b0", n_attempts=1, arrival_s=arrival_s, start_s=arrival_s, end_s=end_s,
            result=result, topology="colocated",
        )  # fmt: skip


def trace_of(n: int = 8, gap_s: float = 1.0, **columns: Any) -> Trace:
    frame = pd.DataFrame(
        {"request_id": [f"r{k}" for k in range(n)], "arrival_s": [gap_s * k for k in range(n)], **columns}
    )
    return checked_frame(frame, "test", Provenance("test"))


def played(trace: Trace, folder: Path, engine: FakeEngine | None = None, **settings: Any) -> dict[str, Any]:
    choice = settings.pop("choice", TraceChoice(speed=100.0))
    made = ReplaySettings(choice=choice, synthesise_add_ons=True, **settings)
    plan = plan_replay(trace, Catalogue(), made)
    return run(replay(plan, engine or FakeEngine(), folder, POOLS, made))


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 30.0))


def test_every_request_is_recorded_in_the_order_of_the_trace_and_joins_with_it(tmp_path: Path) -> None:
    summary = played(trace_of(), tmp_path / "out")
    offered = read_trace(tmp_path / "out" / "trace.parquet")
    requests = read_table(tmp_path / "out" / "requests.parquet", REQUEST_RECORD_COLUMNS)
    assert requests["request_id"].tolist() == offered.requests["request_id"].tolist()
    assert offered.requests["arrival_s"].tolist() == pytest.approx([0.01 * k for k in range(8)])
    # nobody is sent before it is due: both are differences of one clock
    assert (requests["arrival_s"] >= offered.requests["arrival_s"] - 1e-9).all()
    assert len(read_table(tmp_path / "out" / "workers.parquet", WORKER_INTERVAL_COLUMNS)) == 0
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["n_due"], summary["n_by_status"], summary["n_unfinished"]) == (8, {"done": 8}, 0)
    assert summary["is_interrupted"] is False


def test_arrivals_do_not_wait_for_answers(tmp_path: Path) -> None:
    engine = FakeEngine(company=20)
    summary = played(trace_of(20, 0.1), tmp_path / "out", engine, warm_up_shapes_max=0)
    assert engine.n_open_max == 20
    assert summary["n_by_status"] == {"done": 20}


def test_beyond_the_cap_requests_are_not_sent_and_count_as_rejected(tmp_path: Path) -> None:
    engine = FakeEngine(hang=True)
    summary = played(
        trace_of(20, 0.1), tmp_path / "out", engine, outstanding_max=5, warm_up_shapes_max=0, ending_s=0.01
    )
    assert engine.n_open_max == 5
    assert summary["n_by_status"] == {"rejected": 15}
    assert (summary["n_not_sent"], summary["n_unfinished"]) == (15, 5)


def test_what_is_too_late_or_refused_does_not_attain_the_objective(tmp_path: Path) -> None:
    trace = trace_of(4, deadline_s=[None, None, 0.001, None])
    plan_settings = ReplaySettings(
        choice=TraceChoice(speed=100.0), synthesise_add_ons=True, slo_latency_s=5.0, warm_up_shapes_max=0
    )
    plan = plan_replay(trace, Catalogue(), plan_settings)
    jobs = [replace(job, prompt="request refused") if job.request_id == "r3" else job for job in plan.jobs]
    engine = FakeEngine(service_s=0.05)
    summary = run(replay(replace(plan, jobs=jobs), engine, tmp_path / "out", POOLS, plan_settings))
    assert summary["slo_attainment_ratio"] == 0.5
    assert summary["n_by_code"] == {"queue_full": 1}
    assert summary["latency_s"]["plain"]["n"] == 3
    assert summary["latency_s"]["lora"] == {
        "n": 0,
        "mean": None,
        "p50": None,
        "p90": None,
        "p95": None,
        "p99": None,
        "max": None,
    }


def test_an_interrupted_replay_keeps_what_has_ended(tmp_path: Path) -> None:
    settings = ReplaySettings(synthesise_add_ons=True, warm_up_shapes_max=0)
    plan = plan_replay(trace_of(3, 1000.0), Catalogue(), settings)

    async def interrupted() -> None:
        task = asyncio.create_task(replay(plan, FakeEngine(), tmp_path / "out", POOLS, settings))
        while not (list((tmp_path / "out").glob("records-*.jsonl"))):
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(interrupted())
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["is_interrupted"] is True
    assert (summary["n_planned"], summary["n_due"], summary["n_recorded"]) == (3, 1, 1)
    assert len(read_table(tmp_path / "out" / "requests.parquet", REQUEST_RECORD_COLUMNS)) == 1


def test_requests_that_never_end_do_not_hold_the_replay_for_ever(tmp_path: Path) -> None:
    summary = played(trace_of(2), tmp_path / "out", FakeEngine(hang=True), ending_s=0.05)
    assert (summary["n_unfinished"], summary["slo_attainment_ratio"]) == (2, 0.0)


def test_a_fault_of_the_engine_ends_the_replay_and_is_not_swallowed(tmp_path: Path) -> None:
    class Broken(FakeEngine):
        async def submit(self, job: Job) -> Outcome:
            raise ZeroDivisionError("engine is broken")

    with pytest.raises(ZeroDivisionError, match="engine is broken"):
        played(trace_of(3, 1000.0), tmp_path / "out", Broken(), warm_up_shapes_max=0, choice=TraceChoice())
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["is_interrupted"] is True


def test_a_folder_that_holds_a_replay_is_not_written_over(tmp_path: Path) -> None:
    played(trace_of(1), tmp_path / "out")
    with pytest.raises(InputError, match="holds a replay already"):
        played(trace_of(1), tmp_path / "out")


def test_shapes_are_warmed_up_on_every_replica_before_the_clock_starts(tmp_path: Path) -> None:
    engine = FakeEngine(service_s=0.02)
    summary = played(trace_of(3, n_images=[1, 2, 1], lora_ids=[["l"], [], []]), tmp_path / "out", engine)
    warm = [job for job in engine.jobs if job.request_id.startswith("warm-up")]
    assert [(job.n_images, job.n_steps, job.loras) for job in warm] == [(1, 2, ()), (1, 2, ()), (2, 2, ()), (2, 2, ())]
    assert summary["n_recorded"] == 3
    assert summary["warm_up_s"] >= 0.04  # two rounds, one after the other


def test_a_shape_that_no_replica_can_run_is_said_before_the_replay(tmp_path: Path) -> None:
    class Small(FakeEngine):
        async def submit(self, job: Job) -> Outcome:
            return Outcome(job.request_id, "failed", "out of memory", code="job_error")

    with pytest.raises(InputError, match="out of memory"):
        played(trace_of(1), tmp_path / "out", Small())


# which requests, which add-ons


def test_a_part_of_a_trace_is_played_with_the_changes_asked_for() -> None:
    trace = trace_of(10, n_images=[4] * 10)
    choice = TraceChoice(speed=2.0, from_s=2.0, until_s=6.0, width_px=64, n_steps=3, n_images_max=2, deadline_s=9.0)
    plan = plan_replay(trace, Catalogue(), ReplaySettings(choice=choice, synthesise_add_ons=True))
    assert [job.request_id for job in plan.jobs] == ["r2", "r3", "r4", "r5"]
    assert plan.trace.requests["arrival_s"].tolist() == [0.0, 0.5, 1.0, 1.5]
    assert plan.trace.duration_s == 2.0
    job = plan.jobs[0]
    assert (job.width_px, job.n_steps, job.n_images, job.deadline_s) == (64, 3, 2, 9.0)


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        (TraceChoice(speed=0.0), "speed: got 0"),
        (TraceChoice(speed=float("nan")), "speed: got nan"),
        (TraceChoice(from_s=99.0), "no request from 99 s"),
        (TraceChoice(n_requests_max=0), "n_requests_max: got 0"),
        (TraceChoice(deadline_s=-1.0), "deadline_s: got -1"),
    ],
)
def test_impossible_settings_are_refused_in_words(choice: TraceChoice, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        plan_replay(trace_of(2), Catalogue(), ReplaySettings(choice=choice, synthesise_add_ons=True))


def test_add_ons_are_found_by_id_or_name_and_all_that_are_missing_are_named_together() -> None:
    entries = {
        entry.id: entry
        for entry in (
            CatalogueEntry("default", "base", file="seed:1"),
            CatalogueEntry("a" * 64, "lora", name="style", version="1"),
            CatalogueEntry("b" * 64, "lora", name="style", version="2", stage="retired"),
        )
    }
    trace = trace_of(2, lora_ids=[["style"], ["a" * 64]])
    plan = plan_replay(trace, Catalogue(entries), ReplaySettings())
    assert [[use.lora_id for use in job.loras] for job in plan.jobs] == [["a" * 64], ["a" * 64]]
    missing = trace_of(2, lora_ids=[["style", "ghost"], ["ghost"]], controlnet_ids=[["style"], []])
    with pytest.raises(InputError) as caught:
        plan_replay(missing, Catalogue(entries), ReplaySettings())
    assert [problem.where for problem in caught.value.problems] == [
        "trace controlnet_ids 'style'",  # a LoRA is not a ControlNet
        "trace lora_ids 'ghost'",
    ]
    assert "used 2 times" in str(caught.value)


def test_missing_add_ons_can_be_synthesised_under_legal_ids_always_the_same_ones() -> None:
    trace = trace_of(2, lora_ids=[["my style!"], ["plain-name"]], controlnet_ids=[["canny"], []])
    settings = ReplaySettings(synthesise_add_ons=True)
    plan = plan_replay(trace, Catalogue(), settings)
    names = {(entry.kind, entry.id) for entry in plan.add_ons.synthetic.entries.values()}
    assert {("base", "default"), ("controlnet", "canny"), ("lora", "plain-name")} < names
    assert plan.jobs[0].loras[0].lora_id.startswith("synthetic-")
    assert plan.jobs == plan_replay(trace, Catalogue(), settings).jobs


def test_a_job_says_everything_that_its_request_says() -> None:
    trace = trace_of(
        1, n_steps=[7], guidance_scale=[1.0], controlnet_ids=[["c"]], controlnet_scales=[[0.5]], control_start=[[0.1]],
        control_end=[[0.9]], lora_ids=[["l"]], lora_scales=[[0.3]], tenant_id=["t"], priority=[2], deadline_s=[8.0],
    )  # fmt: skip
    job = job_of(next(iter(trace)))
    use = job.controls[0]
    assert (use.controlnet_id, use.scale, use.start, use.end, use.image) == ("c", 0.5, 0.1, 0.9, None)
    assert (job.loras[0].lora_id, job.loras[0].scale) == ("l", 0.3)
    assert (job.n_steps, job.uses_cfg, job.tenant_id, job.priority, job.deadline_s) == (7, False, "t", 2, 8.0)
    assert not job.wants_images


def test_the_commonest_shapes_are_warmed_up_first() -> None:
    jobs = [Job("a", width_px=512), Job("b"), Job("c")]
    rounds = warm_up_jobs(jobs, 1, 2)
    assert [[job.width_px for job in copies] for copies in rounds] == [[1024, 1024]]
