"""Writes the table of docs/theory.md by running examples/theory: ``python docs/make_theory_page.py`` (half a minute)."""

from __future__ import annotations

from pathlib import Path

from planner.theory import check_system
from planner.theory_system import load_system, shipped_systems
from planner.theory_text import markdown

PAGE = Path(__file__).parent / "theory.md"
HEAD = """# Held against theory

Some queues and caches have exact answers. `examples/theory/` has one file for each; anyone can run them, change them, and run them
again:

    diffplan theory                              # all of them
    diffplan theory examples/theory/mmck.yaml    # one

Each runs the simulator that plans use (`planner.simulator`), with independent replications from one seed; the first tenth of each
replication is not counted, because it starts empty. The interval is Student's t over the replications at the file's `level`: at 99.9 % one
figure in a thousand lies outside by chance. A figure outside ends the command with exit code 4.

"""
TAIL = """
The table is written by `python docs/make_theory_page.py`.

Where the answers come from: `planner/theory_exact.py`, a function each, with its source. M/G/1 and M/D/4 draw their service times as
plans do, from a latency profile (`examples/theory/profile.json`, written by hand) and its noise; the moments of that noise are exact. The
others' services are exponential, uniform or constant and drawn by the command, because no profile has such noise.

Fork–join: each arrival is one request for each of two pools, and counts until the later one is done. It checks that pools and
eligibility keep two queues apart; how requests share ControlNet workers step by step is another question, answered in
`tests/theory/test_sharing.py`.

What is not here: queues whose answers are only approximations (Allen–Cunneen, Kingman, Che) cannot prove anything to 1 %. That waits
on the same arrays equal the recursions of Lindley and of Kiefer and Wolfowitz, request by request, is in
`tests/theory/test_queues_per_path.py`.
"""


def page() -> str:
    """The whole page."""
    rows = [row for path in shipped_systems() for row in check_system(load_system(path), path.parent)]
    return HEAD + markdown(rows) + TAIL


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
