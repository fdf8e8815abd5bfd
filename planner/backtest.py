"""Plans on a trace's past and scores the plan on what came after: would it have kept its promise?"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.allocation import Allocation
from planner.cost import cost_of
from planner.explain import gpus_words, usd
from planner.files import make_folder, write_texts
from planner.plan_files import with_absolute_paths, write_plan
from planner.plan_record import paid_gpus
from planner.plan_run import PlanResult, make_plan
from planner.replication import Run, load_inputs, run_allocation, service_table
from planner.scenario import Scenario, Traffic, Window
from planner.traffic import build_traffic, source_trace, stream_seed
from traces.problems import one_problem

HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Score:
    """One allocation on the rest of the trace."""

    name: str
    topology: str
    n_gpus: int
    slo_attainment_ratio: float
    latency_p95_s: float
    latency_p99_s: float
    cost_usd_per_month: float
    cost_usd_per_1000_images: float
    keeps_promise: bool


@dataclass(frozen=True, slots=True, eq=False)
class Backtest:
    """The plan from the past, and how it and what hindsight would have chosen did on the rest."""

    scenario: Scenario
    train_until_h: float
    end_h: float
    n_train: int
    n_rest: int
    train_per_s: float
    rest_per_s: float
    past: PlanResult
    hindsight: PlanResult
    predicted_attainment: tuple[float, float, float]
    """Mean and interval that the plan stated."""
    scores: tuple[Score, ...]

    @property
    def regret_usd_per_month(self) -> float | None:
        """What the plan costs more than hindsight's would; negative if it is cheaper, and then it broke the promise or was lucky."""
        by_name = {score.name: score for score in self.scores}
        if "plan" not in by_name or "hindsight" not in by_name:
            return None
        return by_name["plan"].cost_usd_per_month - by_name["hindsight"].cost_usd_per_month

    @property
    def sentence(self) -> str:
        """The verdict."""
        past = f"Planned on the first {self.train_until_h:g} h ({self.n_train} requests), scored on the next {self.end_h - self.train_until_h:g} h ({self.n_rest})"
        plan = next((score for score in self.scores if score.name == "plan"), None)
        if plan is None:
            return f"{past}: on the past, no plan keeps the promise."
        target = self.scenario.slo.attainment_ratio
        mean, low, high = self.predicted_attainment
        said = "keeps" if plan.keeps_promise else "breaks"
        inside = "inside" if low <= plan.slo_attainment_ratio <= high else "outside"
        words = (
            f"{past}: {gpus_words(plan.n_gpus)} as {plan.topology} {said} the promise: {plan.slo_attainment_ratio:.2%} in time, {target:.2%} promised, "
            f"{mean:.2%} predicted ({inside} its interval {low:.2%} … {high:.2%})."
        )
        hindsight = next((score for score in self.scores if score.name == "hindsight"), None)
        if hindsight is None:
            return f"{words} With hindsight, no plan keeps it."
        gap = self.regret_usd_per_month or 0.0
        if gap == 0:
            return f"{words} With hindsight the fleet costs as much."
        return f"{words} With hindsight {gpus_words(hindsight.n_gpus)} as {hindsight.topology}: {usd(abs(gap))} a month {'less' if gap > 0 else 'more'}."


def backtest(
    scenario: Scenario,
    folder: Path,
    train_until_h: float,
    *,
    jobs: int = 2,
    backend: str = "loky",
    progress: Callable[[str], None] = lambda text: None,
    store: Path | None = None,
) -> Backtest:
    """Plans on ``[0, train_until_h)`` of the (scaled) trace, and simulates that plan on the rest.

    Raises:
        InputError: the scenario cuts its trace already, or one of the two parts has no requests to plan for.
    """
    if scenario.traffic.window is not None or scenario.traffic.busiest is not None:
        raise one_problem(
            "--train-until", "the scenario has traffic.window or traffic.busiest", "a scenario with the whole trace",
            "Leave them out: the cut is the backtest's",
        )  # fmt: skip
    duration_s = source_trace(scenario, folder).duration_s
    end_h = duration_s / HOUR_S
    if end_h * HOUR_S > duration_s:  # rounded up: a window must end inside the trace
        end_h = math.nextafter(end_h, 0.0)
    if not (math.isfinite(train_until_h) and 0 < train_until_h < end_h):
        raise one_problem("--train-until", f"got {train_until_h:g} h", f"hours inside the trace, 0..{end_h:.4g}")
    train = _part(scenario, 0.0, train_until_h)
    rest = _part(scenario, train_until_h, end_h)
    train_traffic, rest_traffic = build_traffic(train, folder), build_traffic(rest, folder)
    progress(f"planning on the first {train_until_h:g} h")
    past = make_plan(train, folder, jobs=jobs, backend=backend, progress=progress, store=store)
    progress(f"planning on the remaining {end_h - train_until_h:.4g} h, as hindsight would")
    hindsight = make_plan(rest, folder, jobs=jobs, backend=backend, progress=progress, store=store)
    scores = []
    for name, result in (("plan", past), ("hindsight", hindsight)):
        if result.allocation is not None:
            scores.append(_score(name, rest, folder, result, result.allocation))
    row = past.record.row(past.record.recommended) if past.record.recommended else None
    estimate = row.slo_attainment_ratio if row is not None else None
    values = (estimate.mean, estimate.low, estimate.high) if estimate is not None else (None, None, None)
    predicted = tuple(math.nan if value is None else float(value) for value in values)
    return Backtest(
        scenario, train_until_h, end_h, len(train_traffic.workload), len(rest_traffic.workload), train_traffic.after.mean_per_s,
        rest_traffic.after.mean_per_s, past, hindsight, (predicted[0], predicted[1], predicted[2]), tuple(scores),
    )  # fmt: skip


def _part(scenario: Scenario, start_h: float, end_h: float) -> Scenario:
    traffic: Traffic = scenario.traffic.model_copy(update={"window": Window(start_h=start_h, end_h=end_h)})
    return scenario.model_copy(update={"traffic": traffic})


def _score(name: str, rest: Scenario, folder: Path, planned: PlanResult, allocation: Allocation) -> Score:
    """One run on the rest, with the fitted profile: what happened, not what might have."""
    if planned.scenario is not None:  # seen from the GPU kind that it recommends
        rest = planned.scenario.model_copy(update={"traffic": rest.traffic})
    inputs = load_inputs(rest, folder)
    workload = build_traffic(rest, folder).workload
    topology = allocation.pools_of("base")[0].topology
    seed = stream_seed(rest.simulation.seed, "noise")
    service = service_table(rest, inputs, workload, topology, draw=None, noise_seed=seed, allocation=allocation)
    run: Run = run_allocation(rest, inputs, workload, allocation, service)
    cost = cost_of(
        paid_gpus(planned.record, allocation),
        run.in_slo_images_per_s,
        planned.price.price_usd_per_gpu_hour,
        rest.prices.hours_per_month,
    )
    metrics = run.metrics
    return Score(
        name, topology, allocation.n_gpus, metrics.slo_attainment_ratio, metrics.latency_p95_s, metrics.latency_p99_s,
        cost.cost_usd_per_month, 1000 * cost.cost_usd_per_image, metrics.slo_attainment_ratio >= rest.slo.attainment_ratio,
    )  # fmt: skip


def to_plain(done: Backtest) -> dict[str, Any]:
    """JSON-ready."""

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    mean, low, high = done.predicted_attainment
    return {
        "sentence": done.sentence,
        "scenario": done.scenario.name,
        "train_until_h": done.train_until_h,
        "end_h": done.end_h,
        "n_requests": {"train": done.n_train, "rest": done.n_rest},
        "mean_per_s": {"train": done.train_per_s, "rest": done.rest_per_s},
        "predicted_attainment_ratio": {"mean": finite(mean), "low": finite(low), "high": finite(high)},
        "scores": [{k: finite(v) if isinstance(v, float) else v for k, v in asdict(score).items()} for score in done.scores],
        "regret_usd_per_month": done.regret_usd_per_month,
    }  # fmt: skip


def write_backtest(done: Backtest, folder: Path, out: Path) -> list[Path]:
    """``backtest.json``, and the plan from the past with all its files."""
    make_folder(out)
    text = json.dumps(to_plain(done), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    train = _part(with_absolute_paths(done.scenario, folder), 0.0, done.train_until_h)
    return [*write_texts(out, {"backtest.json": text}), *write_plan(done.past, train, folder, out)]


def print_backtest(done: Backtest, files: list[Path], console: Console) -> None:
    """The verdict and the scores."""
    console.print(Text(done.sentence, style="bold"))
    console.print(Text(f"Traffic: {done.train_per_s:.3g} requests/s in the past, {done.rest_per_s:.3g} in the rest."))
    table = Table(title="On the rest of the trace", title_justify="left", title_style="", pad_edge=False)
    for name in ("chosen by", "topology", "GPUs", "in time", "p95", "p99", "$/month", "$/1000 images"):
        table.add_column(name, justify="left" if name in {"chosen by", "topology"} else "right")
    for score in done.scores:
        per_1000 = f"${score.cost_usd_per_1000_images:,.2f}" if math.isfinite(score.cost_usd_per_1000_images) else "–"
        table.add_row(
            score.name, score.topology, str(score.n_gpus), f"{score.slo_attainment_ratio:.2%}", f"{score.latency_p95_s:.2f} s",
            f"{score.latency_p99_s:.2f} s", usd(score.cost_usd_per_month), per_1000,
        )  # fmt: skip
    console.print(table)
    if files:
        console.print(Text(f"Files in {files[0].parent}: {', '.join(path.name for path in files)}"), soft_wrap=True)
