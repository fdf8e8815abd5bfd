"""The GPU kinds that a scenario has at hand: its question seen from each of them, and from each pair of base and worker kinds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.allocation import Allocation, Topology
from planner.candidates import Counts, Shape
from planner.prices import Price
from planner.profile_choice import is_carried_over
from planner.replication import Inputs, load_inputs, scenario_price, seen_from
from planner.scenario import OtherKind, Scenario
from traces.problems import InputError, Problem


@dataclass(frozen=True, slots=True, eq=False)
class Lens:
    """A scenario's question about fleets of one GPU kind, or with ControlNet workers on a second one."""

    scenario: Scenario
    """The question as it would be asked about these kinds alone."""
    inputs: Inputs
    price: Price
    """Of the base replicas' kind."""
    worker_price: Price | None
    """Of the ControlNet workers' kind; None: the base replicas' kind."""
    topologies: tuple[Topology, ...]

    @property
    def gpu_kind(self) -> str:
        """The base replicas' kind."""
        return self.inputs.gpu_kind

    @property
    def worker_gpu_kind(self) -> str:
        """The ControlNet workers' kind; the same unless they are apart."""
        return self.inputs.workers.gpu_kind if self.inputs.workers else self.inputs.gpu_kind

    @property
    def name(self) -> str:
        """In words."""
        apart = self.worker_gpu_kind != self.gpu_kind
        return f"{self.gpu_kind} with ControlNet workers on {self.worker_gpu_kind}" if apart else self.gpu_kind

    @property
    def assumed_kinds(self) -> tuple[str, ...]:
        """Kinds of these that were not measured: their profile was carried over by datasheet."""
        kinds = [self.gpu_kind] if is_carried_over(self.inputs.profile) else []
        workers = self.inputs.workers
        return (*kinds, workers.gpu_kind) if workers and is_carried_over(workers.profile) else tuple(kinds)

    def usd_per_month(self, shape: Shape, counts: Counts) -> float:
        """What these replicas cost."""
        return shape.cost(counts) * self.price.price_usd_per_gpu_hour * self.scenario.prices.hours_per_month

    def usd_of_kinds(self, allocation: Allocation) -> dict[str, float]:
        """USD a month of each GPU kind of an allocation."""
        found: dict[str, float] = {}
        hours = self.scenario.prices.hours_per_month
        for pool in allocation.pools:
            own = self.price if pool.gpu_kind == self.gpu_kind else (self.worker_price or self.price)
            usd = pool.n_gpus * own.price_usd_per_gpu_hour * hours
            found[pool.gpu_kind] = found.get(pool.gpu_kind, 0.0) + usd
        return found


def lenses_of(scenario: Scenario, folder: Path) -> tuple[Lens, ...]:
    """One lens a kind at hand, the scenario's own first, then one for each ordered pair that ``decoupled`` can be spread over.

    ``gpu.controlnet_kind`` leaves only the pairs with that kind of workers, and ``decoupled`` on the one kind where it is the base's.

    Raises:
        InputError: with every kind that has no usable profile, no price, or a profile of another kind or model.
    """
    problems: list[Problem] = []
    alone: dict[str, Lens] = {}
    fixed = scenario.gpu.controlnet_kind
    others = scenario.gpu.others
    own_gpu = (
        scenario.gpu.model_copy(update={"others": (), "controlnet_kind": None}) if others or fixed else scenario.gpu
    )
    own = scenario.model_copy(update={"gpu": own_gpu}) if others or fixed else scenario
    questions = [("", own), *((item.kind, seen_from(scenario, item.kind)) for item in others)]
    for kind, question in questions:
        place = f"scenario gpu.others {kind}: " if kind else ""
        try:
            inputs = load_inputs(question, folder)
            price = scenario_price(question, folder, inputs)
        except InputError as error:
            if not place:
                raise
            problems += [Problem(f"{place}{one.where}", one.what, one.allowed, one.repair) for one in error.problems]
            continue
        if inputs.gpu_kind in alone:
            problems.append(
                Problem(
                    f"scenario gpu.others {inputs.gpu_kind}", f"is the kind of profile {scenario.profile.name!r} too",
                    "each kind once", "Remove it",
                )
            )  # fmt: skip
            continue
        topologies = tuple(
            name for name in question.topologies if name != "decoupled" or fixed in (None, inputs.gpu_kind)
        )
        alone[inputs.gpu_kind] = Lens(question, inputs, price, None, topologies)
    first = next(iter(alone.values()), None)
    for lens in alone.values():
        if first is not None and _model_of(lens) != _model_of(first):
            problems.append(
                Problem(
                    f"scenario gpu.others {lens.gpu_kind}", f"its profile is of {_model_of(lens)}",
                    f"{_model_of(first)}, as profile {scenario.profile.name!r}", "Name a profile of the same model",
                )
            )  # fmt: skip
    if fixed is not None and not problems and fixed not in alone:
        load_inputs(scenario, folder)  # says which kinds there are
    if problems:
        raise InputError(problems)
    return (*alone.values(), *_pairs(scenario, folder, alone))


def _model_of(lens: Lens) -> str:
    return str(lens.inputs.profile.architecture)


def _pairs(scenario: Scenario, folder: Path, alone: Mapping[str, Lens]) -> list[Lens]:
    if "decoupled" not in scenario.topologies:
        return []
    found = []
    for base in alone.values():
        for workers in alone.values():
            if workers is base or scenario.gpu.controlnet_kind not in (None, workers.gpu_kind):
                continue
            asked = rebased(scenario, base, workers.gpu_kind, alone)
            only = tuple(item for item in asked.gpu.others if item.kind == workers.gpu_kind)
            asked = asked.model_copy(update={"gpu": asked.gpu.model_copy(update={"others": only})})
            asked = asked.model_copy(update={"topologies": ("decoupled",)})
            found.append(Lens(asked, load_inputs(asked, folder), base.price, workers.price, ("decoupled",)))
    return found


def rebased(scenario: Scenario, base: Lens, worker_kind: str, alone: Mapping[str, Lens]) -> Scenario:
    """The whole question seen from another kind: that is the scenario's own, and what was its own is one of the others.

    It has the same fleets to choose from, so a plan for it recommends the same; ``worker_kind`` other than the base's is kept
    as ``gpu.controlnet_kind``.
    """
    own = next(iter(alone.values()))
    if base is own and worker_kind == base.gpu_kind:
        return scenario
    others = []
    for kind, lens in alone.items():
        if lens is base:
            continue
        question = lens.scenario
        others.append(
            OtherKind(
                kind=kind, profile=question.profile.name, price_usd_per_gpu_hour=question.prices.price_usd_per_gpu_hour,
                gpus_max=None if question.search.gpus_max == base.scenario.search.gpus_max else question.search.gpus_max,
                device_memory_gib=question.gpu.device_memory_gib,
            )
        )  # fmt: skip
    gpu = base.scenario.gpu.model_copy(
        update={
            "others": tuple(others),
            "controlnet_kind": worker_kind if worker_kind != base.gpu_kind else scenario.gpu.controlnet_kind,
        }
    )
    return base.scenario.model_copy(update={"gpu": gpu})


def as_planned(scenario: Scenario, folder: Path, gpu_kind: str | None, worker_gpu_kind: str | None) -> Scenario:
    """The question as the files of a plan state it whose fleet is of these kinds; as it is for None, and for its own kind."""
    if not scenario.gpu.others or gpu_kind is None or worker_gpu_kind is None:
        return scenario
    alone = {lens.gpu_kind: lens for lens in lenses_of(scenario, folder) if lens.inputs.workers is None}
    return rebased(scenario, alone[gpu_kind], worker_gpu_kind, alone)
