"""Has plans and diagnoses computed outside the server, one at a time, bounded in work and time, and remembers the latest ones."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from dashboards import plan_process
from planner import __version__
from planner.kinds import as_planned
from planner.plan_record import PlanRecord, read_plan
from planner.prices import shipped_tables
from planner.profile_choice import file_of
from planner.scenario import SAMPLE_PREFIX, Scenario, resolve, to_yaml
from traces.problems import one_problem
from traces.trace import Trace

REQUESTS_MAX: Final = 5_000_000
"""Requests after scaling. GenTD26 ×100, 2.7 million before its busiest day is cut out, peaks at 2.9 GiB (benchmarks/results)."""
MINUTES_MAX: Final = 30
PLANS_KEPT: Final = 8
POLL_S: Final = 0.25
STDERR_SHOWN_BYTES: Final = 20_000
T = TypeVar("T")
Waiting = Callable[[str, float], None]
"""Told what is being done and for how many seconds already; may raise to give up, which stops the computation."""


class RefusedError(Exception):
    """The planner found the question unusable; carries its sentences."""


class BrokenError(Exception):
    """The computation ended without an answer and it is not the question's fault."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan and its files, by name."""

    record: PlanRecord
    files: dict[str, bytes]
    """``plan.json``, ``report.html``, ``report.md``, ``scenario.yaml``; with a recommendation ``allocation.json``; and, unless it is too
    long, its first repetition: ``requests.parquet``, ``workers.parquet``."""
    scenario: Scenario
    """The question it answers; names of uploaded files in it mean something in the folder of the session that asked."""


@dataclass(slots=True)
class Store:
    """The plans of this server, shared by its sessions; a plan depends on nothing but its key."""

    plans: OrderedDict[str, Plan] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(1))

    def get(self, key: str) -> Plan | None:
        """The plan of this key, if it is still kept."""
        with self.lock:
            if key in self.plans:
                self.plans.move_to_end(key)
            return self.plans.get(key)

    def put(self, key: str, plan: Plan) -> None:
        """Keeps a plan and forgets the one that was not looked at for longest."""
        with self.lock:
            self.plans[key] = plan
            self.plans.move_to_end(key)
            while len(self.plans) > PLANS_KEPT:
                self.plans.popitem(last=False)


def plan_key(scenario: Scenario, folder: Path) -> str:
    """Identity of a question: its text, the content of the files it names, and the version that answers."""
    digest = hashlib.sha256(f"{__version__}\n{to_yaml(scenario)}".encode())
    for path in _named_files(scenario, folder):
        if path.is_file():
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _named_files(scenario: Scenario, folder: Path) -> Iterator[Path]:
    if not scenario.traffic.trace.startswith(SAMPLE_PREFIX):
        yield resolve(scenario.traffic.trace, folder)
    for name in (scenario.profile.name, *(item.profile for item in scenario.gpu.others)):
        yield file_of(name, folder)
    yield shipped_tables().get(scenario.prices.table, resolve(scenario.prices.table, folder))
    if scenario.add_ons.catalogue:
        yield resolve(scenario.add_ons.catalogue, folder)


def check_work(scenario: Scenario, trace: Trace) -> None:
    """Raises :class:`InputError` if the question asks for more requests than the page simulates."""
    wanted = len(trace) * scenario.traffic.scale_factor
    if wanted > REQUESTS_MAX:
        raise one_problem(
            "Traffic", f"{scenario.traffic.scale_factor:g} times {len(trace):,} requests are {wanted:,.0f}",
            f"at most {REQUESTS_MAX:,} on this page", "Choose a smaller factor, or run 'diffplan plan' on the downloaded scenario",
        )  # fmt: skip


def compute(store: Store, key: str, scenario: Scenario, folder: Path, jobs: int, waiting: Waiting) -> Plan:
    """The plan of this question, from the store or computed now.

    Raises:
        RefusedError: the question cannot be used.
        BrokenError: the computation crashed, was killed, or took longer than ``MINUTES_MAX``.
    """
    with turn(store, waiting):
        plan = store.get(key)  # whoever had the turn before may have asked the same
        if plan is None:
            plan = _compute(scenario, folder, jobs, waiting)
            store.put(key, plan)
        return plan


@contextlib.contextmanager
def turn(store: Store, waiting: Waiting) -> Iterator[None]:
    """One computation at a time for the whole server."""
    started_s = time.monotonic()
    while not store.turn.acquire(timeout=POLL_S):
        waiting("waiting for another plan of this server to finish", time.monotonic() - started_s)
    try:
        yield
    finally:
        store.turn.release()


def compute_diagnosis(
    store: Store, scenario: Scenario, folder: Path, topology: str, n_gpus: int, jobs: int, waiting: Waiting
) -> dict[str, Any]:
    """Where time and money of a present service go, as ``diffplan diagnose --json`` says it; raises like :func:`compute`.

    Args:
        n_gpus: base replicas that serve today; 0 for the fewest that keep the promise.
    """
    options = ["--jobs", str(jobs), "--topology", topology, "--replicas", str(n_gpus)]

    def read(out: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((out / "diagnosis.json").read_text(encoding="utf-8"))
        return found

    with turn(store, waiting):
        return in_process("dashboards.diagnose_process", options, scenario, folder, waiting, read)


def _compute(scenario: Scenario, folder: Path, jobs: int, waiting: Waiting) -> Plan:
    def read(out: Path) -> Plan:
        files = {path.name: path.read_bytes() for path in sorted(out.iterdir())}
        files["scenario.yaml"] = to_yaml(scenario).encode()
        record = read_plan(out)
        kinds = record.kinds  # what reads a plan later goes by the kind that it recommends
        asked = as_planned(scenario, folder, kinds.base_gpu_kind, kinds.worker_gpu_kind) if kinds else scenario
        return Plan(record, files, asked)

    return in_process("dashboards.plan_process", ["--jobs", str(jobs)], scenario, folder, waiting, read)


def in_process(
    module: str, options: Sequence[str], scenario: Scenario, folder: Path, waiting: Waiting, read: Callable[[Path], T]
) -> T:
    """Runs one of our modules on a scenario in a process of its own and reads what it wrote."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="plan-") as place, tempfile.TemporaryFile() as stderr:
        question = folder / f"{Path(place).name}.yaml"  # beside the uploads, whose names are relative to it
        question.write_text(to_yaml(scenario), encoding="utf-8")
        out = Path(place)
        command = [sys.executable, "-P", "-m", module, str(question), str(out), *options]
        # two threads of a BLAS in each of several processes would fight for the same cores
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(  # noqa: S603  our own module, no shell
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True, encoding="utf-8",
            start_new_session=True,
        )  # fmt: skip
        try:
            refused = _follow(process, waiting)
        finally:
            _stop(process)
            question.unlink(missing_ok=True)
        if process.returncode == plan_process.REFUSED and refused:
            raise RefusedError(refused)
        if process.returncode != 0:
            stderr.seek(0, os.SEEK_END)
            stderr.seek(max(0, stderr.tell() - STDERR_SHOWN_BYTES))
            sys.stderr.write(stderr.read().decode("utf-8", "replace"))
            raise BrokenError(_words_of(process.returncode))
        return read(out)


def _follow(process: subprocess.Popen[str], waiting: Waiting) -> str:
    """Waits for the end and passes progress on; gives what was refused, if anything."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None  # noqa: S101  it was opened as a pipe
        with contextlib.suppress(ValueError):  # the pipe is closed under us when the plan is given up
            for line in process.stdout:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    started_s = time.monotonic()
    doing, refused = "starting", ""
    while True:
        elapsed_s = time.monotonic() - started_s
        if elapsed_s > 60 * MINUTES_MAX:
            raise BrokenError(
                f"The plan took longer than {MINUTES_MAX} minutes and was stopped. Run 'diffplan plan' on the downloaded scenario, "
                "or ask for less: a smaller traffic factor, a window, fewer replications."
            )
        waiting(doing, elapsed_s)
        with contextlib.suppress(queue.Empty):
            line = lines.get(timeout=POLL_S)
            if line is None:
                process.wait()
                return refused
            said = json.loads(line)
            doing, refused = said.get("progress", doing), said.get("refused", refused)


def _stop(process: subprocess.Popen[str]) -> None:
    """Ends the process and everything it started."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the leader of its own group: start_new_session
        else:
            process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _words_of(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        return f"The computation was ended from outside ({name}). If nobody did that, the machine ran out of memory: ask for less traffic."
    return (
        f"The computation failed (exit code {code}). This is a fault of diffplan, not of your input: the details are in the terminal "
        "that runs the dashboard. Download the scenario and replay it with 'diffplan plan'."
    )
