"""How good the roofline is: a profile carried over to another GPU, held to that GPU's own measurements.

    python benchmarks/transfer_check.py --profile h200 --measured h100 [--docs docs/calibration-method.md]

Every law that was measured on both GPUs is asked at every size that was fitted on the other one, where its own profile is exactly
what was measured there. Writes ``benchmarks/results/transfer.json``; the same profiles give the same bytes. Not compared: laws of the
host alone (two hosts, whatever their GPUs) other than as rows, and what one of the two never measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from calibrate.profile import LatencyProfile  # noqa: E402
from calibrate.profile_file import load_profile  # noqa: E402
from calibrate.roofline import transfer_profile  # noqa: E402

RESULTS: Final = ROOT / "benchmarks" / "results" / "transfer.json"
MARKS: Final = ("<!-- table: benchmarks/transfer_check.py -->", "<!-- end of table -->")


def points_of(measured: LatencyProfile, name: str) -> list[dict[str, float]]:
    """Sizes at which a law was measured, by feature; one without features has one."""
    law = measured.laws[name]
    return [dict(zip(law.features, point, strict=True)) for point in law.points] if law.features else [{}]


def compare(source: LatencyProfile, measured: LatencyProfile) -> list[dict[str, Any]]:
    """A row a law: measured / carried over, its median and extremes over sizes, and how many lie in their 90 % intervals."""
    moved = transfer_profile(source, measured.gpu_kind)
    rows = []
    for name in sorted(set(moved.laws) & set(measured.laws)):
        if measured.laws[name].status != "measured" or source.laws[name].status != "measured":
            continue
        ratios, n_inside = [], 0
        for features in points_of(measured, name):
            truth = float(measured.predictor(extrapolate=True).seconds(name, **features))
            said = float(moved.predictor(extrapolate=True).seconds(name, **features))
            drawn = [
                float(moved.predictor(k, extrapolate=True).seconds(name, **features)) for k in range(moved.n_draws)
            ]
            low_s, high_s = np.quantile(drawn, [0.05, 0.95])
            if not said:
                continue  # nothing to carry over
            ratios.append(truth / said)
            n_inside += bool(low_s <= truth <= high_s)
        if ratios:
            rows.append({
                "law": name,
                "n_sizes": len(ratios),
                "measured_to_carried_over": round(float(np.median(ratios)), 3),
                "least": round(min(ratios), 3),
                "most": round(max(ratios), 3),
                "n_inside_90_percent_interval": n_inside,
            })  # fmt: skip
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/calibration-method.md."""
    lines = ["| law | sizes | measured ÷ carried over | inside the 90 % interval |", "| --- | --- | --- | --- |"]
    for row in rows:
        spread = f" ({row['least']:.2f}–{row['most']:.2f})" if row["n_sizes"] > 1 else ""
        lines.append(
            f"| `{row['law']}` | {row['n_sizes']} | {row['measured_to_carried_over']:.2f}{spread} "
            f"| {row['n_inside_90_percent_interval']} of {row['n_sizes']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="h200", help="the one that is carried over")
    parser.add_argument("--measured", default="h100", help="the other GPU's own")
    parser.add_argument("--docs", type=Path, help="page whose table is replaced")
    asked = parser.parse_args()
    source, measured = load_profile(asked.profile), load_profile(asked.measured)
    rows = compare(source, measured)
    n_sizes = sum(row["n_sizes"] for row in rows)
    n_inside = sum(row["n_inside_90_percent_interval"] for row in rows)
    found = {
        "benchmark": "transfer_check",
        "from": {"gpu_kind": source.gpu_kind, "profile_id": source.profile_id},
        "to": {"gpu_kind": measured.gpu_kind, "profile_id": measured.profile_id},
        "n_sizes": n_sizes,
        "n_inside_90_percent_interval": n_inside,
        "laws": rows,
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    table = markdown(rows)
    print(f"{table}\n\n{n_inside} of {n_sizes} sizes inside their 90 % intervals; wrote {RESULTS.relative_to(ROOT)}")
    if asked.docs is not None:
        text = asked.docs.read_text(encoding="utf-8")
        start, end = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
        asked.docs.write_text(f"{text[:start]}\n{table}\n{text[end:]}", encoding="utf-8")


if __name__ == "__main__":
    main()
