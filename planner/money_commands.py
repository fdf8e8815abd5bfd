"""The commands about money and live tests: ``roi``, ``ab``. Streams and exit codes as in ``planner.commands``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from planner.commands import AsJson, _json, _say

if TYPE_CHECKING:  # loaded by the command itself, when it runs
    from planner.plan_record import PhaseRow

DRIFT = 4


def roi(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json, or the folder it is in.")],
    assumptions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Your own figures (YAML); docs/money.md lists every field.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for roi.json and roi.md; the plan's own by default.")
    ] = None,
    roadmap: Annotated[bool, typer.Option(help="Simulate the phases of the introduction; seconds to a minute.")] = True,
    into_plan: Annotated[
        bool,
        typer.Option(
            "--into-plan", help="Write the roadmap into plan.json and the report too, for 'diffplan export --phase'."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a plan costs in full, what changing to it returns, how sure that is, and in which phases to do it."""
    from planner import report
    from planner.files import make_folder, write_texts
    from planner.money.assumptions import read_assumptions
    from planner.money.roi import make_roi
    from planner.money.text import markdown, to_json, to_plain
    from planner.plan_record import to_json as plan_json
    from planner.roadmap import make_roadmap
    from planner.sentences import decision
    from traces.problems import one_problem

    found = make_roi(plan, read_assumptions(assumptions))
    if into_plan and (not roadmap or found.evidence is None or found.returns is None):
        raise one_problem(
            "--into-plan", "has no roadmap to write", "a whole plan folder with a fleet to start from", "See the notes"
        )
    folder = out if out is not None else plan if plan.is_dir() else plan.parent
    make_folder(folder)
    phases: tuple[PhaseRow, ...] = ()
    if roadmap and found.evidence is not None and found.returns is not None:
        today = next(r.topology for r in found.plan.topologies if r.topology == found.returns.today_topology)
        phases = make_roadmap(found.evidence, today, found.returns.today_gpus, _say, pays=found.returns.pays)
    elif roadmap:
        _say("No roadmap: it needs the plan's whole folder and a fleet to start from (assumptions: today).")
    written = write_texts(folder, {"roi.json": to_json(found, phases), "roi.md": markdown(found, phases)})
    if into_plan:
        record = found.plan.model_copy(update={"roadmap": phases})
        texts = {"plan.json": plan_json(record), **report.reports(record, found)}
        written += write_texts(plan if plan.is_dir() else plan.parent, texts)
    if as_json:
        _json(to_plain(found, phases))
        return
    said = decision(found)
    lines = [said.english, "", said.japanese, "", *(f"Note: {note}" for note in found.notes), ""]
    for phase in phases:
        lines.append(
            f"Phase {phase.number} ({phase.name}){'' if phase.is_worthwhile else ', not worthwhile'}: {phase.what}"
        )
    lines += ["", f"Files in {folder}: {', '.join(path.name for path in written)}"]
    sys.stdout.write("\n".join(lines) + "\n")


def ab(
    log_a: Annotated[
        Path, typer.Argument(metavar="LOG_A", help="Request records of the old side: a Parquet file or its folder.")
    ],
    log_b: Annotated[Path, typer.Argument(metavar="LOG_B", help="Request records of the new side.")],
    slo_seconds: Annotated[
        float | None, typer.Option(min=0.001, max=86_400, help="Also compare the share of requests within this time.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the bootstrap.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Judge a test on live traffic from two engine logs; exit code 4 if the new side is worse or breaks a guardrail."""
    from planner.ab import judge

    found = judge(log_a, log_b, slo_seconds, seed)
    if as_json:
        _json(found.to_plain())
    else:
        lines = [
            f"{found.verdict}. {found.sentence}",
            "",
            f"{found.n_requests_a} requests of A, {found.n_requests_b} of B",
            "",
        ]
        table = [("figure", "A", "B", "B less A", "95 % interval"), *(item.words for item in found.differences)]
        lines += [f"{row[0]:24}{row[1]:>12}{row[2]:>12}{row[3]:>12}   {row[4]}" for row in table]
        lines += [
            "",
            *(
                f"guardrail {'BROKEN' if rail.is_broken else 'held  '} {rail.name}: {rail.why}"
                for rail in found.guardrails
            ),
        ]
        sys.stdout.write("\n".join(lines) + "\n")
    if found.verdict in {"guardrail broken", "B is worse"}:
        raise typer.Exit(DRIFT)
