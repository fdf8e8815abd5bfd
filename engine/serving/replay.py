"""Plays a trace against a running engine in real or scaled time, and leaves the tables that a simulation of it would leave.

Open loop: a request is sent when it is due, whatever became of those before it. Written to the folder: ``trace.parquet`` (the
requests as offered: simulate this one to compare), ``requests.parquet``, ``workers.parquet``, ``summary.json``, ``allocation.json``
and ``start.json`` (:mod:`engine.serving.replay_state`): all that ``diffplan validate`` needs. While it runs, ``records-*.jsonl``, so that
an interrupted replay keeps what has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from engine.allocation import Pool
from engine.catalogue import Catalogue
from engine.serving.job import Job, Outcome
from engine.serving.record_log import RecordLog, recording
from engine.serving.record_tables import read_record_log, write_record_tables
from engine.serving.replay_jobs import (
    AddOnMap,
    TraceChoice,
    chosen_trace,
    job_of,
    map_add_ons,
    mapped_trace,
    warm_up_jobs,
)
from engine.serving.replay_state import start_state, with_later_sizes, write_state
from engine.serving.replay_summary import summary_of
from traces.files import written_beside
from traces.problems import InputError, Problem, one_problem
from traces.trace import Trace
from traces.writer import write_trace

NOT_SENT: Final = "the replay had too many requests outstanding"


class ReplayEngine(Protocol):
    """What a replay needs of an engine (:class:`engine.serving.engine.Engine`)."""

    async def submit(self, job: Job) -> Outcome:
        """Runs a job; returns in bounded time."""

    def clock(self) -> float:
        """The clock of the outcomes, in seconds."""


@dataclass(frozen=True, slots=True)
class ReplaySettings:
    """How a trace is played."""

    choice: TraceChoice = field(default_factory=TraceChoice)
    synthesise_add_ons: bool = False
    """Checkpoints and add-ons that the catalogue does not list get random weights."""
    slo_latency_s: float | None = None
    outstanding_max: int = 10_000
    """Requests sent and not ended; one that is due beyond that is not sent and counts as rejected."""
    warm_up_shapes_max: int = 32
    """Commonest shapes that every replica runs once before the clock starts. 0: none."""
    ending_s: float = 1200.0
    """Wait for the last requests to end; longer than the engine's own limit for a request."""


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """A replay that is ready to begin."""

    trace: Trace
    """As it will be offered."""
    jobs: Sequence[Job]
    add_ons: AddOnMap


def plan_replay(trace: Trace, catalogue: Catalogue, settings: ReplaySettings) -> ReplayPlan:
    """Chooses and maps the requests. What is in ``add_ons.synthetic`` has to be admitted to the engine before :func:`replay`.

    Raises:
        InputError: a setting is out of range, no request is left, or an add-on is not in the catalogue.
    """
    if settings.outstanding_max < 1:
        raise one_problem("replay outstanding_max", f"got {settings.outstanding_max}", "1 or more")
    offered = chosen_trace(trace, settings.choice)
    add_ons = map_add_ons(offered, catalogue, synthesise=settings.synthesise_add_ons)
    offered = mapped_trace(offered, add_ons)
    return ReplayPlan(offered, [job_of(request) for request in offered], add_ons)


async def replay(
    plan: ReplayPlan,
    engine: ReplayEngine,
    folder: Path,
    pools: Sequence[Pool],
    settings: ReplaySettings,
    *,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Plays a plan and returns the summary that it has written.

    When it is cancelled (Ctrl-C), the tables and the summary (``is_interrupted``) of what has ended are written before the
    cancellation goes on. Busy times of workers are recorded if the engine can be observed, as the real one can.

    Args:
        pools: of the allocation.
        progress: told what is being done, in a line now and then.

    Raises:
        InputError: the folder holds a replay already or cannot be written, or no warm-up job of a shape was done.
    """
    if any(folder.glob("records-*.jsonl")) or (folder / "summary.json").exists():
        raise one_problem(str(folder), "holds a replay already", "a new folder", "Name another one.")
    folder.mkdir(parents=True, exist_ok=True)
    write_trace(plan.trace, folder / "trace.parquet")
    n_replicas = sum(pool.n_replicas for pool in pools if pool.role == "base")
    warm_up_s = await _warm_up(plan.jobs, engine, n_replicas, settings, progress)
    state = start_state(engine)
    write_state(state, engine, folder)
    origin_s = engine.clock()
    run = _Run(plan, engine, origin_s, settings, progress)
    log = RecordLog(folder, engine.clock, pools, origin_s=origin_s)
    is_interrupted = True
    try:
        async with _recorded(engine, log):
            await run.play(log)
        is_interrupted = False
    finally:
        write_state(with_later_sizes(state, engine), engine, folder)
        summary = _written(plan, run, log, folder, settings)
        summary |= {"is_interrupted": is_interrupted, "warm_up_s": warm_up_s}
        _write_json(summary, folder / "summary.json")
    return summary


class _Run:
    """The sending of requests."""

    def __init__(
        self,
        plan: ReplayPlan,
        engine: ReplayEngine,
        origin_s: float,
        settings: ReplaySettings,
        progress: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._engine = engine
        self._origin_s = origin_s
        self._settings = settings
        self._progress = progress
        self._tasks: set[asyncio.Task[None]] = set()
        self._fault: BaseException | None = None
        self._faulted = asyncio.Event()
        self.due: dict[str, float] = {}
        """Request id to when it was to arrive, of those whose moment has come."""
        self.n_not_sent = 0

    async def play(self, log: RecordLog) -> None:
        arrivals_s = self._plan.trace.requests["arrival_s"].tolist()
        told_s = 0.0
        try:
            for job, due_s in zip(self._plan.jobs, arrivals_s, strict=True):
                while self._fault is None and (wait_s := self._origin_s + due_s - self._engine.clock()) > 0:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._faulted.wait(), wait_s)
                self.due[job.request_id] = due_s
                if self._fault is not None:
                    raise self._fault
                if len(self._tasks) >= self._settings.outstanding_max:
                    self.n_not_sent += 1
                    now_s = self._engine.clock()
                    outcome = Outcome(
                        job.request_id, "rejected", NOT_SENT, arrival_s=now_s, end_s=now_s, code="queue_full"
                    )
                    log.ended(job, outcome)
                    continue
                task = asyncio.create_task(self._send(job, log))
                self._tasks.add(task)
                task.add_done_callback(self._sent)
                if due_s - told_s >= 10.0:
                    told_s = due_s
                    self._progress(
                        f"{due_s:.0f} s: {len(self.due)} of {len(self._plan.jobs)} sent, {len(self._tasks)} open"
                    )
                await asyncio.sleep(0)  # also where arrivals are due at once, answers must get their turn
            if self._tasks:
                _, late = await asyncio.wait(self._tasks, timeout=self._settings.ending_s)
                if late:
                    self._progress(f"{len(late)} requests have not ended within {self._settings.ending_s:g} s")
            if self._fault is not None:
                raise self._fault
        finally:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _send(self, job: Job, log: RecordLog) -> None:
        log.ended(job, await self._engine.submit(job))

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None and self._fault is None:
            self._fault = task.exception()
            self._faulted.set()


async def _warm_up(
    jobs: Sequence[Job],
    engine: ReplayEngine,
    n_replicas: int,
    settings: ReplaySettings,
    progress: Callable[[str], None],
) -> float:
    """Runs the commonest shapes on every replica; seconds it took."""
    began_s = engine.clock()
    problems = []
    rounds = warm_up_jobs(jobs, settings.warm_up_shapes_max, max(1, n_replicas))
    for number, copies in enumerate(rounds):
        progress(
            f"warm-up {number + 1} of {len(rounds)}: {copies[0].width_px}x{copies[0].height_px}, {copies[0].n_images} images"
        )
        outcomes = await asyncio.gather(*(engine.submit(job) for job in copies))
        if not any(outcome.status == "done" for outcome in outcomes):
            job, reason = copies[0], outcomes[0].reason
            shape = f"{job.n_images} images of {job.width_px}x{job.height_px}, {len(job.controls)} ControlNets"
            problems.append(
                Problem(f"warm-up of {shape}", f"was not done: {reason}", "", "Leave such requests out of the replay.")
            )
    if problems:
        raise InputError(problems)
    return engine.clock() - began_s


@contextlib.asynccontextmanager
async def _recorded(engine: ReplayEngine, log: RecordLog) -> AsyncIterator[None]:
    """Workers are recorded where the engine shows them; ends of requests the replay notes itself."""
    if all(hasattr(engine, name) for name in ("orders", "events", "dispatcher", "view", "allocation")):
        async with recording(engine, log, with_requests=False):  # type: ignore[arg-type]
            yield
        return
    try:
        yield
    finally:
        log.close()


def _written(plan: ReplayPlan, run: _Run, log: RecordLog, folder: Path, settings: ReplaySettings) -> dict[str, Any]:
    tables = read_record_log(folder, [job.request_id for job in plan.jobs])
    choice = settings.choice
    facts = {"source": plan.trace.provenance.source, "speed": choice.speed, "from_s": choice.from_s}
    write_record_tables(tables, folder, {"replay": facts})
    deadlines_s = {job.request_id: job.deadline_s for job in plan.jobs if job.deadline_s is not None}
    summary = summary_of(
        tables.requests, tables.workers, run.due, deadlines_s, plan.trace.duration_s, settings.slo_latency_s
    )
    return {
        **facts,
        **summary,
        "n_planned": len(plan.jobs),
        "n_not_sent": run.n_not_sent,
        "n_synthetic_add_ons": len(plan.add_ons.synthetic.entries),
        "n_lost_rows": log.n_lost,
    }


def _write_json(plain: dict[str, Any], path: Path) -> None:
    text = json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")
