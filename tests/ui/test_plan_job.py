"""Plans are computed in processes of their own: bounded, stoppable, remembered by what they depend on."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dashboards import plan_job
from dashboards.plan_job import BrokenError, Plan, RefusedError, Store, compute, plan_key
from planner.scenario import load_scenario

Question = Callable[..., Path]


def quiet(text: str, elapsed_s: float) -> None:
    """Says nothing."""


def test_a_computed_plan_is_remembered(question: Question, tmp_path: Path) -> None:
    scenario, folder = load_scenario(str(question()))
    store, key = Store(), plan_key(scenario, folder)
    said: list[str] = []
    plan = compute(store, key, scenario, folder, 1, lambda text, elapsed_s: said.append(text))
    assert store.get(key) is plan
    assert any("searching 2 topologies" in text for text in said)
    assert compute(store, key, scenario, folder, 1, quiet) is plan
    # nothing is left beside the question's own files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.yaml", "trace.csv"]


def test_a_plan_is_remembered_by_the_content_of_the_files_it_rests_on(question: Question) -> None:
    scenario, folder = load_scenario(str(question()))
    before = plan_key(scenario, folder)
    assert plan_key(scenario, folder) == before
    trace = folder / "trace.csv"
    trace.write_bytes(trace.read_bytes() + b'r60,200.0,30,"[]"\n')
    assert plan_key(scenario, folder) != before


def test_giving_up_stops_the_computation_and_frees_the_turn(
    question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario, folder = load_scenario(str(question()))
    started: list[subprocess.Popen[str]] = []
    follow = plan_job._follow

    def watched(process: subprocess.Popen[str], waiting: plan_job.Waiting) -> str:
        started.append(process)
        return follow(process, waiting)

    class GivenUpError(Exception):
        pass

    def give_up(text: str, elapsed_s: float) -> None:
        raise GivenUpError

    monkeypatch.setattr(plan_job, "_follow", watched)
    store = Store()
    with pytest.raises(GivenUpError):
        compute(store, "key", scenario, folder, 1, give_up)
    assert started[0].returncode is not None
    assert store.turn.acquire(blocking=False)
    assert sorted(path.name for path in folder.iterdir()) == ["tiny.yaml", "trace.csv"]


def test_a_plan_that_takes_too_long_is_stopped(question: Question, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_job, "MINUTES_MAX", 0)
    scenario, folder = load_scenario(str(question()))
    with pytest.raises(BrokenError, match="took longer than"):
        compute(Store(), "key", scenario, folder, 1, quiet)


def test_what_the_planner_refuses_comes_back_in_its_words(question: Question) -> None:
    scenario, folder = load_scenario(str(question()))
    (folder / "trace.csv").write_text("request_id,arrival_s\nr0,never\n")
    with pytest.raises(RefusedError, match=r"trace\.csv row 1 column arrival_s"):
        compute(Store(), "key", scenario, folder, 1, quiet)


def test_a_crash_is_said_to_be_ours_and_kept_for_the_terminal(
    question: Question, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(question().parent))
    # a planner that crashes on import, found first
    package = question().parent / "planner"
    package.mkdir()
    (package / "__init__.py").write_text("raise ZeroDivisionError('made to fail')")
    scenario, folder = load_scenario(str(question()))
    with pytest.raises(BrokenError, match=r"exit code 1.*fault of diffplan"):
        compute(Store(), "key", scenario, folder, 1, quiet)
    assert "made to fail" in capsys.readouterr().err


def test_the_process_ends_when_the_server_does(question: Question, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "dashboards.plan_process", str(question()), str(tmp_path / "out")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None
    process.stdin.close()  # what the system does to the pipes of a process that died
    assert process.wait(timeout=60) != 0
    assert not (tmp_path / "out" / "plan.json").exists()


def test_one_plan_at_a_time(question: Question) -> None:
    scenario, folder = load_scenario(str(question()))
    store = Store()
    store.turn.acquire()
    said = threading.Event()

    def waiting(text: str, elapsed_s: float) -> None:
        if "waiting for another plan" in text:
            said.set()
            store.turn.release()

    plan = compute(store, "key", scenario, folder, 1, waiting)
    assert said.is_set()
    assert isinstance(plan, Plan)


def test_the_store_forgets_what_was_not_looked_at_for_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_job, "PLANS_KEPT", 2)
    store, plan = Store(), object()
    for key in ("a", "b"):
        store.put(key, plan)  # type: ignore[arg-type]
    store.get("a")
    store.put("c", plan)  # type: ignore[arg-type]
    assert list(store.plans) == ["a", "c"]
