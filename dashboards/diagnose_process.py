"""Makes one diagnosis in a process of its own: ``python -m dashboards.diagnose_process QUESTION.yaml OUT --topology T --replicas N``.

Speaks and ends as :mod:`dashboards.plan_process` does.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from pathlib import Path

from dashboards.plan_process import REFUSED, end_with_the_server, say


def main() -> int:
    """Diagnoses a scenario's present service and writes ``diagnosis.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--topology", required=True)
    parser.add_argument("--replicas", type=int, default=0)
    arguments = parser.parse_args()
    threading.Thread(target=end_with_the_server, daemon=True).start()
    from planner.diagnose import diagnose
    from planner.diagnose_question import PresentFleet, TraceDefaults
    from planner.diagnose_text import to_plain
    from planner.files import make_folder, write_texts
    from traces.problems import InputError

    try:
        say("progress", "reading traffic and profile")
        found = diagnose(
            str(arguments.question), PresentFleet(arguments.topology, arguments.replicas or None), TraceDefaults(), jobs=arguments.jobs,
            progress=lambda text: say("progress", text),
        )  # fmt: skip
        plain = json.dumps(to_plain(found), ensure_ascii=False, allow_nan=False)
        write_texts(make_folder(arguments.out), {"diagnosis.json": plain})
    except InputError as error:
        say("refused", str(error))
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
