"""What a plan has simulated so far, kept in a run store: a plan that was interrupted goes on, and one asked again is read.

Beside the store's runs of the SimPy model, which sweeps and comparisons share, lie a plan's own answers: evaluations of the
search, confirmations by the compiled tier, fleets that scale by themselves. Their keys also carry the compiled tier's sources:
its times agree with the SimPy model's to 1e-9, which is not to the byte.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from engine.allocation import Allocation, to_json
from planner.fast.cache import source_digest
from planner.replication import Confirmation, load_inputs
from planner.run_store import RunKey, RunStore, metrics_of, run_key
from planner.scenario import Scenario
from planner.search import Evaluation
from planner.traffic import build_traffic

T = TypeVar("T")
_NOBODY: Final = Allocation(())


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """The answers about one repetition of a scenario's traffic; without a store, nothing is known and nothing is kept."""

    store: RunStore | None = None
    about: RunKey | None = None

    def get(
        self,
        kind: str,
        allocation: Allocation,
        ask: Callable[[], T],
        to_plain: Callable[[T], Any],
        from_plain: Callable[[Any], T],
    ) -> T:
        """What was answered before, or what ``ask`` says now.

        Args:
            kind: what is asked about the allocation.

        Raises:
            InputError: the store cannot be written. What was stored before stays readable.
        """
        if self.store is None or self.about is None:
            return ask()
        about = replace(self.about, allocation_json=to_json(allocation)).digest
        key = hashlib.sha256(f"{kind}\n{about}".encode()).hexdigest()
        plain = self.store.recall(key)
        if plain is not None:
            return from_plain(plain)
        answer = ask()
        self.store.keep(key, kind, to_plain(answer))
        return answer

    def under(self, change: str) -> Answers:
        """The same with the profile changed in the way that ``change`` names."""
        if self.about is None:
            return self
        return replace(self, about=replace(self.about, profile_id=f"{self.about.profile_id} {change}"))


NO_ANSWERS: Final = Answers()


@contextmanager
def answers_about(store: Path | None, scenario: Scenario, folder: Path, repetition: int | None) -> Iterator[Answers]:
    """Opens the store for one repetition (None: the traffic as stated), if there is one.

    Raises:
        InputError: the store cannot be opened.
    """
    if store is None:
        yield NO_ANSWERS
        return
    digest = build_traffic(scenario, folder, repetition).digest
    key = run_key(scenario, load_inputs(scenario, folder), digest, _NOBODY, repetition)
    with RunStore(store) as kept:
        yield Answers(kept, replace(key, code=f"{key.code} {source_digest()} {_evaluation_digest()}"))


@functools.cache
def _evaluation_digest() -> str:
    """Of the source that turns a compiled run into an evaluation."""
    return hashlib.sha256(Path(__file__).with_name("evaluation.py").read_bytes()).hexdigest()[:16]


def plain_evaluation(one: Evaluation) -> dict[str, Any]:
    """JSON-ready."""
    return {name: getattr(one, name) for name in Evaluation.__slots__}


def evaluation_of(plain: dict[str, Any]) -> Evaluation:
    """The inverse of :func:`plain_evaluation`."""
    return Evaluation(**{**plain, "counts": tuple(plain["counts"]), "busy_ratios": tuple(plain["busy_ratios"])})


def plain_confirmation(one: Confirmation) -> dict[str, Any]:
    """JSON-ready."""
    return {"metrics": one.metrics.to_plain(), "in_slo_images_per_s": float(one.in_slo_images_per_s)}


def confirmation_of(plain: dict[str, Any]) -> Confirmation:
    """The inverse of :func:`plain_confirmation`."""
    return Confirmation(metrics_of(plain["metrics"]), plain["in_slo_images_per_s"])
