"""The committed validation report as a table for the documentation, and as the short file that the dashboard shows beside a profile.

    PYTHONPATH=. python benchmarks/validation_table.py --docs docs/validation.md --beside calibrate/profiles/h200.validation.json

Makes no number: everything is in ``benchmarks/results/validation/validation.json``, which ``diffplan validate`` wrote.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from traces.files import written_beside

ROOT = Path(__file__).resolve().parent.parent
REPORT: Final = ROOT / "benchmarks" / "results" / "validation" / "validation.json"
BEGIN: Final = "<!-- table: benchmarks/validation_table.py -->"
END: Final = "<!-- end of table -->"
LEVELS: Final = ("p50", "p95", "p99")
SHORT: Final = ("name", "topology", "load", "band", "n_requests", "holds", "carried_by", "saturated", "busy")


def table(report: Mapping[str, Any]) -> str:
    """Markdown: a row for each run; what is out of its bounds is bold."""
    lines = [
        "| workload | load | p50: measured, gap (floor) | p95 | p99 | busy ratio: measured, gap | saturated: engine, simulator | within bounds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in report["runs"]:
        out = {check["name"] for check in run["checks"] if not check["holds"]}
        cells = [_quantile(run["latency_s"][level], is_out=f"latency {level}" in out) for level in LEVELS]
        busy = "; ".join(
            _marked(f"{pair['measured']:.1%}, {100 * (pair['simulated'] - pair['measured']):+.1f} points", f"busy {pool}" in out)
            for pool, pair in run["busy"].items()
        )  # fmt: skip
        verdicts = ", ".join("yes" if run["saturated"][log] else "no" for log in ("measured", "simulated"))
        load = f"{run['load']:.2f} ({run['band']})"
        lines.append(
            "| " + " | ".join([run["name"], load, *cells, busy, verdicts, "yes" if run["holds"] else "**no**"]) + " |"
        )
    return "\n".join(lines)


def short(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the dashboard's page on accuracy draws: quantiles of the latency, verdicts, and the stage that carries the gap."""
    return {
        "schema_version": report["schema_version"],
        "kind": "validation, short",
        "profile_id": report["profile"]["profile_id"],
        "holds": report["holds"],
        "runs": [
            {**{name: run[name] for name in SHORT}, "latency_s": {level: run["latency_s"][level] for level in LEVELS}}
            for run in report["runs"]
        ],
    }


def with_table(page: str, text: str) -> str:
    """The page with the table between its two marks in place of what was there."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"the page lacks the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def _quantile(gap: Mapping[str, Any], *, is_out: bool) -> str:
    if gap["gap_ratio"] is None:
        return "–"
    floor = gap.get("floor_ratio")
    text = f"{gap['gap_ratio']:+.1%}" + (f" ({floor:+.1%})" if floor is not None else "")
    return f"{1000 * gap['measured']:.0f} ms, {_marked(text, is_out)}"


def _marked(text: str, is_out: bool) -> str:
    return f"**{text}**" if is_out else text


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table; writes where it is told to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, nargs="?", default=REPORT)
    parser.add_argument("--docs", type=Path, help="page with the two marks, to put the table in")
    parser.add_argument("--beside", type=Path, help="short JSON, such as calibrate/profiles/h200.validation.json")
    given = parser.parse_args(arguments)
    report = json.loads(given.report.read_text(encoding="utf-8"))
    text = table(report)
    print(text)
    if given.docs:
        page = with_table(given.docs.read_text(encoding="utf-8"), text)
        with written_beside(given.docs) as beside:
            beside.write_text(page, encoding="utf-8")
    if given.beside:
        with written_beside(given.beside) as beside:
            beside.write_text(json.dumps(short(report), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
