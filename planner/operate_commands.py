"""The commands of operations: ``observe``, ``watch``. Streams as in ``planner.commands``; ``watch`` ends with 4 unless all is in plan."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from planner.commands import AsJson, Jobs, _json, _say

OUT_OF_PLAN = 4
Start = Annotated[str, typer.Option(help="Which start of the engine, by its folder's name; the latest if left out.")]
Minutes = Annotated[float, typer.Option(min=0.1, max=20_160, help="Prometheus: how far back.")]
WindowSeconds = Annotated[float, typer.Option(min=1, max=3600, help="Length of one window.")]
EndS = Annotated[float | None, typer.Option(min=0, help="Prometheus: Unix time to look back from; now if left out.")]
Match = Annotated[str, typer.Option(help="""Prometheus: label matchers, as 'job="diffplan",namespace="prod"'.""")]
Timeout = Annotated[float, typer.Option(min=0.1, max=600, help="Prometheus: seconds for one answer.")]
TokenFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Prometheus: bearer token, one line.")]


def observe(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="An engine's run folder, its records, or a Prometheus server's address."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the tables; made if it is not there.")],
    log: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The engine's request log: gives trace.parquet, for the next plan."),
    ] = None,
    start: Start = "",
    minutes: Minutes = 30.0,
    window_seconds: WindowSeconds = 60.0,
    end_s: EndS = None,
    match: Match = "",
    timeout: Timeout = 10.0,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Read what a serving engine did back into tables; a Prometheus server gives counts by window only."""
    from planner.observe.ask import ObserveQuestion
    from planner.observe.ask import observe as read

    question = ObserveQuestion(source, log, start, minutes, window_seconds, end_s, match, timeout, token_file)
    plain, text = read(question, out)
    if as_json:
        _json(plain)
    else:
        sys.stdout.write(text)


def watch(
    source: Annotated[
        str,
        typer.Argument(metavar="LIVE", help="A run folder, records, a summary.json, or a Prometheus server's address."),
    ],
    plan: Annotated[Path, typer.Option(metavar="PLAN", help="plan.json, or its folder, with its requests.parquet.")],
    propose: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Plan again for the traffic seen; writes a plan, applies nothing."),
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The engine's request log: a proposal is then for these requests."),
    ] = None,
    offset_s: Annotated[
        float,
        typer.Option(
            help="Seconds after the plan's start that live second 0 corresponds to; for plans of a day or more."
        ),
    ] = 0.0,
    until_s: Annotated[
        float | None,
        typer.Option(
            min=0, help="Records: live second up to which the engine was seen; its last record's if left out."
        ),
    ] = None,
    start: Start = "",
    minutes: Minutes = 1440.0,
    window_seconds: WindowSeconds = 60.0,
    end_s: EndS = None,
    match: Match = "",
    timeout: Timeout = 10.0,
    token_file: TokenFile = None,
    jobs: Jobs = 2,
    as_json: AsJson = False,
) -> None:
    """Compare a serving engine with its plan: in plan, traffic changed, engine drifted or capacity short. Exit code 4 unless in plan."""
    from planner.observe.ask import ObserveQuestion
    from planner.watch.ask import WatchQuestion, answer

    live = ObserveQuestion(source, log, start, minutes, window_seconds, end_s, match, timeout, token_file)
    answered = answer(WatchQuestion(live, plan, offset_s, until_s, propose, jobs), _say)
    if as_json:
        sys.stdout.write(json.dumps(answered.plain, ensure_ascii=True, allow_nan=False) + "\n")
    else:
        sys.stdout.write(answered.text)
    if answered.plain["verdict"] != "in_plan":
        raise typer.Exit(OUT_OF_PLAN)
