"""Makes one plan in a process of its own: ``python -m dashboards.plan_process QUESTION.yaml OUT --jobs N``.

A process of its own can be stopped at any moment, gives its memory back, and starts from files as they are now. It says on standard
output, one JSON object a line, how far it is (``progress``) or what is wrong with the question (``refused``, exit code 2). It ends
with its whole process group when standard input closes, so that nothing is left computing for a server that is gone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any, Final

REFUSED: Final = 2
RECORDS_MAX: Final = 400_000
"""Requests of a run whose records are kept for the page, about 30 bytes each; a longer run's are left to ``diffplan plan``."""


def main() -> int:
    """Runs the planner on a scenario and writes the plan's files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    threading.Thread(target=end_with_the_server, daemon=True).start()
    # imported here so that the watch above is on before seconds of imports
    from engine.allocation import to_json as allocation_json
    from planner.files import make_folder, write_texts
    from planner.plan_files import report_texts, write_logs
    from planner.plan_record import to_json
    from planner.plan_run import make_plan
    from planner.scenario import load_scenario
    from traces.problems import InputError

    try:
        scenario, folder = load_scenario(str(arguments.question))
        say("progress", "reading traffic and profile")
        result = make_plan(scenario, folder, jobs=arguments.jobs, progress=lambda text: say("progress", text))
        texts = {"plan.json": to_json(result.record), **report_texts(result, scenario, folder)}
        if result.allocation is not None:
            texts["allocation.json"] = allocation_json(result.allocation)
        write_texts(make_folder(arguments.out), texts)
        if result.run is not None and len(result.run.result.requests) <= RECORDS_MAX:
            write_logs(result.run, arguments.out)
    except InputError as error:
        say("refused", str(error))
        return REFUSED
    return 0


def say(kind: str, text: Any) -> None:
    """Tells the server one thing."""
    sys.stdout.write(json.dumps({kind: text}) + "\n")
    sys.stdout.flush()


def end_with_the_server() -> None:
    """Waits for the server to go, then ends this process and everything it started."""
    os.read(sys.stdin.fileno(), 1)  # nothing is ever written there: this returns when the other end is closed
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
