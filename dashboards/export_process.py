"""Exports a plan in a process of its own: ``python -m dashboards.export_process QUESTION OUT --plan FOLDER --to TARGET``.

Talks and ends as ``dashboards.plan_process`` does. Writes the files under ``files`` and what has to be known of them to ``answer.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import threading
from pathlib import Path

from dashboards.plan_process import REFUSED, end_with_the_server, say


def main() -> int:
    """Writes every file of the targets, or says why not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", type=Path, help="not read: the plan's folder says what was asked")
    parser.add_argument("out", type=Path)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--to", action="append", required=True)
    parser.add_argument("--cluster", type=Path)
    parser.add_argument("--phase", type=int)
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--check-pods", action="store_true")
    arguments = parser.parse_args()
    threading.Thread(target=end_with_the_server, daemon=True).start()
    from planner.export.ask import ExportQuestion, answer
    from planner.files import make_folder, write_texts
    from traces.problems import InputError

    try:
        out = make_folder(arguments.out)
        asked = ExportQuestion(
            plan=arguments.plan, to=tuple(arguments.to), out=out / "files", cluster=arguments.cluster, diff=None, is_rollback=False,
            phase=arguments.phase, profile=None, is_forced=arguments.force, is_checking_pods=arguments.check_pods,
        )  # fmt: skip
        say("progress", "writing and checking the files")
        said = answer(asked, datetime.datetime.now(tz=datetime.UTC).date())
        write_texts(out, {"answer.json": json.dumps(said.to_plain(), ensure_ascii=False)})
    except InputError as error:
        say("refused", str(error))
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
