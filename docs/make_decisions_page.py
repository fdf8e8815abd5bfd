"""Writes docs/decisions.md from benchmarks/results/plans.json: ``python docs/make_decisions_page.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "decisions.md"
ROWS = Path(__file__).parents[1] / "benchmarks" / "results" / "plans.json"
INTRO = """# Decision sentences of the sample services

What `diffplan plan` and `diffplan roi` say about the services below, word for word; this page is written by
`docs/make_decisions_page.py` from `benchmarks/results/plans.json`. The services are GenTD26, a log of a real service without ControlNets,
and two synthetic ones after the published figures of Katz, A (`small`) and B (`provider`, `provider_fast`). How the sentences are made and
what keeps them from overstating: [money.md](money.md). \"Would need\" means the fewest GPUs that keep the promise in the simulation;
with `today.n_gpus` in the assumptions, the fleet you really run takes their place.
"""


def entry(row: dict[str, Any]) -> list[str]:
    """One service."""
    ids, said = row["ids"], row.get("decision")
    lines = [
        f"## {ids['scenario_name']}", "",
        f"    diffplan plan {row['scenario']} --out PLAN", "    diffplan roi PLAN --no-roadmap", "",
        f"Profile {ids['profile_name']} `{ids['profile_id']}`, seed {ids['seed']}, ${ids['price_usd_per_gpu_hour']:.2f} per GPU-hour, "
        f"scenario `{ids['scenario_sha256'][:12]}`, requests `{ids['trace_digest']}`.", "",
        f"The plan: {row['sentence']}", "",
    ]  # fmt: skip
    return [*lines, f"> {said['en']}", "", f"> {said['ja']}", ""] if said else lines


def page() -> str:
    """The whole page."""
    rows = json.loads(ROWS.read_text(encoding="utf-8"))
    lines = [INTRO, *(line for row in rows for line in entry(row))]
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
