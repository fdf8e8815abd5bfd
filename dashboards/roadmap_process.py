"""Simulates a plan's phases in a process of its own: ``python -m dashboards.roadmap_process QUESTION OUT --plan FOLDER``.

Talks and ends as ``dashboards.plan_process`` does. Writes ``roadmap.json``, the phases as they stand in a plan.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from pathlib import Path

from dashboards.plan_process import REFUSED, end_with_the_server, say


def main() -> int:
    """Works the phases out under the given assumptions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", type=Path, help="not read: the plan's folder says what was asked")
    parser.add_argument("out", type=Path)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--assumptions", type=Path, required=True)
    arguments = parser.parse_args()
    threading.Thread(target=end_with_the_server, daemon=True).start()
    from planner.files import make_folder, write_texts
    from planner.money.assumptions import read_assumptions
    from planner.money.roi import make_roi
    from planner.roadmap import make_roadmap
    from traces.problems import InputError, one_problem

    try:
        found = make_roi(arguments.plan, read_assumptions(arguments.assumptions))
        if found.evidence is None or found.returns is None:
            raise one_problem(
                "roadmap", "has nothing to start from", "a plan with its records, and a fleet that runs today", "Give today's fleet above"
            )  # fmt: skip
        today = next(row.topology for row in found.plan.topologies if row.topology == found.returns.today_topology)
        phases = make_roadmap(
            found.evidence, today, found.returns.today_gpus, lambda text: say("progress", text), pays=found.returns.pays
        )
        plain = [phase.model_dump(mode="json") for phase in phases]
        write_texts(
            make_folder(arguments.out), {"roadmap.json": json.dumps(plain, ensure_ascii=False, allow_nan=False)}
        )
    except InputError as error:
        say("refused", str(error))
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
