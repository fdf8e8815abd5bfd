"""``diffplan watch``: reads plan and live windows, judges, and says what to do. State lives in the live data: the same data, the same verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from planner.export.metric_names import SECONDS_BUCKETS
from planner.observe.ask import ObserveQuestion, is_address, observed_summary
from planner.observe.run_folder import Observed, read_observed
from planner.observe.summary import Summary, read_summary
from planner.watch.baseline import WARMUP_S, Baseline, charts_for, read_baseline, thresholds
from planner.watch.propose import Proposal, next_step, propose
from planner.watch.verdict import Finding, Judgement, judge
from planner.watch.windows import WindowTable, windows_of_records, windows_of_summary
from traces.problems import one_problem

SLOW_S: Final = 1800.0
SENTENCES: Final = {
    "in_plan": "In plan.",
    "traffic_changed": "Traffic changed: the plan was made for other requests.",
    "engine_drifted": "The engine drifted: its stages take another time than calibrated.",
    "capacity_short": "Capacity is short: more requests are slow than planned, though traffic and stage times are as planned.",
}
ALSO: Final = {
    "engine_drifted": "stages take another time than calibrated; with shared ControlNet workers more traffic alone does that.",
    "capacity_short": "more requests are slow than planned, as is to be expected then.",
}
COUNTERS: Final = "Counters know no single request: a stage's mean also moves when other requests are asked for. Only records tell the two apart."

UNKNOWN_LAWS: Final = "The plan's scenario or its profile is not at hand: stages are compared with the one draw of the laws that its run was made with."


@dataclass(frozen=True, slots=True)
class WatchQuestion:
    """What the command line asks for."""

    live: ObserveQuestion
    plan: Path
    offset_s: float = 0.0
    until_s: float | None = None
    propose: Path | None = None
    jobs: int = 2


@dataclass(frozen=True, slots=True)
class WatchAnswer:
    """The verdict as JSON values and as text."""

    plain: dict[str, Any]
    text: str


def answer(question: WatchQuestion, say: Callable[[str], None]) -> WatchAnswer:
    """Judges the live engine; with ``propose`` also plans again, if planning can help.

    Raises:
        InputError: plan or live data cannot be used; nothing is written then.
    """
    live = question.live
    window_s = live.window_s
    data = _read(question)
    buckets_s: tuple[float, ...] = ()
    if isinstance(data, Summary):
        window_s, buckets_s = data.window_s, data.bounds_s or SECONDS_BUCKETS
    baseline = read_baseline(question.plan, window_s, buckets_s)
    table = _windows(question, data, baseline)
    charts = charts_for(baseline, table, question.offset_s)
    judgement = judge(charts, table, thresholds(charts, window_s))
    step = next_step(judgement, question)
    proposal = None
    if question.propose is not None and judgement.verdict != "in_plan":
        observed = data if isinstance(data, Observed) else None
        proposal = propose(judgement, baseline, live.log, observed, question.propose, jobs=question.jobs, say=say)
    notes = [COUNTERS] if isinstance(data, Summary) else []
    if baseline.spreads is None:
        notes.append(UNKNOWN_LAWS)
    return WatchAnswer(
        _plain(judgement, baseline, data.source, window_s, step, proposal, notes),
        _text(judgement, baseline, data.source, window_s, step, proposal, notes),
    )


def _read(question: WatchQuestion) -> Summary | Observed:
    source = question.live.source
    if is_address(source):
        return observed_summary(question.live)
    path = Path(source)
    if path.suffix == ".json":
        return read_summary(path)
    if path.is_dir() and (path / "summary.json").is_file() and not (path / "requests.parquet").is_file():
        return read_summary(path / "summary.json")
    return read_observed(path, question.live.start)


def _windows(question: WatchQuestion, data: Summary | Observed, baseline: Baseline) -> WindowTable:
    if isinstance(data, Summary):
        return windows_of_summary(data, baseline.norms)
    until_s = data.seen_until_s if question.until_s is None else question.until_s
    if until_s < data.seen_until_s:
        raise one_problem(
            "--until-s", f"got {until_s:g}", f"at least {data.seen_until_s:g}, the last record's end", "Raise it"
        )
    return windows_of_records(
        data.requests, baseline.norms, window_s=question.live.window_s, begin_s=WARMUP_S, until_s=until_s
    )


def _plain(
    judgement: Judgement, baseline: Baseline, source: str, window_s: float, step: str, proposal: Proposal | None, notes: list[str]
) -> dict[str, Any]:  # fmt: skip
    return {
        "schema_version": 1,
        "verdict": judgement.verdict,
        "also": list(judgement.also),
        "sentence": SENTENCES[judgement.verdict],
        "live": source,
        "plan": str(baseline.path),
        "n_windows": judgement.n_windows,
        "window_s": window_s,
        "begin_s": judgement.begin_s,
        "end_s": judgement.end_s,
        "charts": [{name: getattr(each, name) for name in Finding.__dataclass_fields__} for each in judgement.findings],
        "next": step,
        "proposal": None if proposal is None else proposal.plain,
        "notes": notes,
    }


def _text(
    judgement: Judgement, baseline: Baseline, source: str, window_s: float, step: str, proposal: Proposal | None, notes: list[str]
) -> str:  # fmt: skip
    lines = [SENTENCES[judgement.verdict]]
    lines += [f"Also: {ALSO[each]}" for each in judgement.also]
    lines += [f"  {_sentence(each)}" for each in judgement.signals]
    lines.append(
        f"{judgement.n_windows} windows of {window_s:g} s of {source}, compared with {baseline.path}: {len(judgement.findings)} tests, "
        f"{len(judgement.signals)} on."
    )
    slow = [each for each in judgement.findings if each.delay_s is None or each.delay_s > SLOW_S]
    if slow:
        lines.append(
            "Too little of it to find its shift within 30 minutes: "
            + ", ".join(f"{each.measure} {each.direction} ({_minutes(each.delay_s)})" for each in slow)
            + "."
        )
    lines += notes
    if step:
        lines.append(f"Next: {step}")
    if proposal is not None:
        lines += ["", proposal.text]
    return "\n".join(lines) + "\n"


def _sentence(finding: Finding) -> str:
    seen = "nothing" if finding.seen is None else f"{finding.seen:.4g}"
    since = "" if finding.changed_at_s is None else f" since second {finding.changed_at_s:.0f}"
    at = "" if finding.signalled_at_s is None else f", signalled at second {finding.signalled_at_s:.0f}"
    if finding.measure.startswith("stage_") and finding.seen is not None:
        return f"{finding.measure.removeprefix('stage_')}: {100 * finding.seen:+.1f} % of the planned time{since}{at}"
    return f"{finding.measure}: {seen}, planned {finding.planned:.4g}{since}{at}"


def _minutes(delay_s: float | None) -> str:
    return "never" if delay_s is None else f"{delay_s / 60:.0f} min"
