"""What to do about a verdict, and a new plan for the traffic that was seen. A proposal is files and a difference; nothing is applied."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.observe.run_folder import Observed
from planner.watch.baseline import Baseline
from planner.watch.verdict import Judgement
from traces.problems import one_problem

if TYPE_CHECKING:
    from planner.scenario import Traffic
    from planner.watch.ask import WatchQuestion

RECALIBRATE = "diffplan calibrate run --out measured (on the GPU host), diffplan calibrate fit measured/measurements.parquet --out new-profile.json"


@dataclass(frozen=True, slots=True)
class Proposal:
    """What came of ``--propose``."""

    plain: dict[str, Any]
    text: str


def next_step(judgement: Judgement, question: WatchQuestion) -> str:
    """The command to run next; empty if all is in plan."""
    again = f"diffplan watch {shlex.quote(question.live.source)} --plan {shlex.quote(str(question.plan))}"
    log = f" --log {shlex.quote(str(question.live.log))}" if question.live.log is not None else ""
    if judgement.verdict == "in_plan" or (question.propose is not None and judgement.verdict == "traffic_changed"):
        return ""
    if judgement.verdict == "traffic_changed":
        hint = "" if log else " (add --log FILE, the engine's request log, to plan for the requests themselves)"
        return f"{again}{log} --propose DIR{hint}"
    if judgement.verdict == "engine_drifted":
        return f"{RECALIBRATE}; then plan again with the new profile"
    return f"diffplan engine status (are replicas missing or down?); if not: {again} --log FILE --propose DIR"


def propose(
    judgement: Judgement, baseline: Baseline, log: Path | None, observed: Observed | None, out: Path, *, jobs: int,
    say: Callable[[str], None],
) -> Proposal:  # fmt: skip
    """Plans again and compares with the plan in force.

    With a request log the new plan is for its requests; without one the planned traffic is scaled to the rate that was seen.

    Raises:
        InputError: neither a log nor a changed rate is at hand, or the scenario beside the plan cannot be used.
    """
    if judgement.verdict == "engine_drifted":
        text = f"No plan is proposed: its laws no longer hold. Measure first: {RECALIBRATE}"
        return Proposal({"status": "recalibrate_first", "files": []}, text)
    from planner.export.difference import change_between, change_plain, change_text
    from planner.export.source import load_source
    from planner.files import make_folder, write_texts
    from planner.plan_files import with_absolute_paths, write_plan
    from planner.plan_run import make_plan
    from planner.scenario import load_scenario, to_yaml

    scenario, folder = load_scenario(str(baseline.path / "scenario.resolved.yaml"))
    make_folder(out)
    traffic, how = _traffic(judgement, scenario.traffic, log, observed, out)
    asked = with_absolute_paths(scenario, folder).model_copy(update={"traffic": traffic})
    result = make_plan(asked, out, jobs=jobs, progress=say)
    files = write_plan(result, asked, out, out)
    files += write_texts(out, {"scenario.proposed.yaml": to_yaml(asked)})
    head = f"Proposed for {how}: {result.record.sentence}"
    today = datetime.datetime.now(datetime.UTC).date()
    before, after = (
        load_source(path, "diffplan watch --propose", today, is_forced=True) for path in (baseline.path, out)
    )
    change = change_between(before, after)
    text = (
        f"{head}\n\n{change_text(change)}\nNothing was applied. docs/operate.md says how to roll it out. Files: {out}"
    )
    plain = {
        "status": result.record.verdict,
        "for": how,
        "sentence": result.record.sentence,
        "change": change_plain(change)["total"],
    }
    return Proposal({**plain, "files": [str(file) for file in files]}, text)


def _traffic(
    judgement: Judgement, planned: Traffic, log: Path | None, observed: Observed | None, out: Path
) -> tuple[Traffic, str]:
    from planner.observe.request_log import read_request_log
    from planner.scenario import Traffic
    from traces.writer import write_trace

    if log is not None:
        trace = read_request_log(log, observed)
        path = write_trace(trace, out / "observed.parquet").resolve()
        return Traffic(trace=str(path)), f"the {len(trace)} requests of {log}"
    ratio = judgement.rate_ratio()
    if ratio is None or ratio <= 0:
        raise one_problem(
            "--propose", "cannot know which requests to plan for: the rate is as planned, other things changed",
            "the engine's request log beside it", "Add --log FILE",
        )  # fmt: skip
    scaled = planned.model_copy(update={"scale_factor": planned.scale_factor * ratio})
    return scaled, f"{ratio:.3f} times the planned traffic, its mix as planned"
