"""A plan with a run store: nothing is simulated twice, an interrupted plan goes on, and no byte depends on either."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.allocation import Allocation, Pool
from planner import addon_placement, evaluation, topology_search
from planner.answers import answers_about, evaluation_of, plain_evaluation
from planner.plan_record import to_json
from planner.plan_run import make_plan
from planner.run_store import FILE, RunStore
from planner.scenario import load_scenario
from planner.search import Evaluation
from traces.problems import InputError

ALLOCATION = Allocation((Pool("base", "base", 1, "gpu"),))


class Simulated:
    """Counts compiled runs, and may be told to break off."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n, self.stop_at = 0, 10**9
        real = evaluation.simulate_fast

        def counted(*arguments: Any, **keywords: Any) -> Any:
            self.n += 1
            if self.n > self.stop_at:
                raise KeyboardInterrupt
            return real(*arguments, **keywords)

        for module in (evaluation, addon_placement):
            monkeypatch.setattr(module, "simulate_fast", counted)

    def during(self, act: Callable[[], Any]) -> int:
        self.n = 0
        act()
        return self.n


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Simulated:
    return Simulated(monkeypatch)


def test_a_plan_asked_again_is_read_and_says_the_same(tiny_plan: Any, tmp_path: Path, simulated: Simulated) -> None:
    expected = to_json(tiny_plan.result.record)
    texts: list[str] = []

    def plan() -> None:
        record = make_plan(tiny_plan.scenario, tiny_plan.folder, jobs=1, store=tmp_path / "store").record
        texts.append(to_json(record))

    first, second = simulated.during(plan), simulated.during(plan)
    assert first > 20
    assert second == 1  # the winner, whose records are written, is compared with the SimPy model's again
    assert texts == [expected, expected]


def test_an_interrupted_plan_goes_on_where_it_was(tiny_plan: Any, tmp_path: Path, simulated: Simulated) -> None:
    store = tmp_path / "store"

    def plan() -> Any:
        return make_plan(tiny_plan.scenario, tiny_plan.folder, jobs=1, store=store)

    simulated.stop_at = 15
    with pytest.raises(KeyboardInterrupt):
        plan()
    simulated.stop_at = 10**9
    with sqlite3.connect(store / FILE) as connection:
        n_kept = connection.execute("SELECT COUNT(*) FROM answers").fetchone()[0]
    assert n_kept >= 15 - 1
    texts: list[str] = []
    simulated.during(lambda: texts.append(to_json(plan().record)))
    assert texts == [to_json(tiny_plan.result.record)]


def test_an_answer_is_about_one_allocation_repetition_and_question(tiny_plan: Any, tmp_path: Path) -> None:
    scenario, folder = tiny_plan.scenario, tiny_plan.folder
    later = scenario.model_copy(update={"slo": scenario.slo.model_copy(update={"latency_s": 3.0})})
    other = Allocation((Pool("base", "base", 2, "gpu"),))

    def ask(asked: Any, repetition: int, kind: str, allocation: Allocation, answer: int) -> int:
        with answers_about(tmp_path, asked, folder, repetition) as known:
            return known.get(kind, allocation, lambda: answer, lambda x: x, lambda x: x)

    assert ask(scenario, 0, "k", ALLOCATION, 1) == 1
    assert ask(scenario, 0, "k", ALLOCATION, 2) == 1
    assert ask(scenario, 1, "k", ALLOCATION, 3) == 3
    assert ask(scenario, 0, "l", ALLOCATION, 4) == 4
    assert ask(scenario, 0, "k", other, 5) == 5
    assert ask(later, 0, "k", ALLOCATION, 6) == 6


def test_numbers_come_back_to_the_bit() -> None:
    one = Evaluation((3, 1), 1 / 3, 0.1, (0.7, 1e-300), True, "switch_s", float("inf"))
    assert evaluation_of(plain_evaluation(one)) == one


def test_a_store_that_cannot_be_used_is_said_before_the_work(tiny_plan: Any, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no database" * 1000)
    with pytest.raises(InputError, match="run store"):
        make_plan(tiny_plan.scenario, tiny_plan.folder, jobs=1, store=tmp_path)


def test_a_store_of_before_gets_a_place_for_answers(tmp_path: Path) -> None:
    with RunStore(tmp_path):
        pass
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute("DROP TABLE answers")
    with RunStore(tmp_path) as store:
        store.keep("a", "kind", {"x": [1.5, None]})
        assert store.recall("a") == {"x": [1.5, None]}
        assert store.recall("b") is None


def test_the_search_of_a_stretch_is_not_taken_for_the_whole(tiny_plan: Any, tmp_path: Path) -> None:
    found = topology_search.search_topology(tiny_plan.scenario, tiny_plan.folder, "decoupled", tmp_path)
    with sqlite3.connect(tmp_path / FILE) as connection:
        kinds = {kind for (kind,) in connection.execute("SELECT kind FROM answers")}
    n = tiny_plan.result.record.traffic.n_requests
    assert kinds == {f"evaluation decoupled of {n} requests"}
    assert found.counts is not None


def test_the_command_takes_a_store(write_scenario: Callable[..., Path], tmp_path: Path) -> None:
    scenario, folder = load_scenario(str(write_scenario(tmp_path)))
    narrow = scenario.model_copy(update={"topologies": ("colocated",)})
    make_plan(narrow, folder, jobs=1, store=tmp_path / "runs")
    assert (tmp_path / "runs" / FILE).exists()
