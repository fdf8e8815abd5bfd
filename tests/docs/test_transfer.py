"""What the page says about carrying a profile over is what the two shipped profiles say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from calibrate.profile_file import load_profile

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_of_the_roofline_is_that_of_the_shipped_profiles() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import transfer_check
    finally:
        sys.path.pop(0)
    rows = transfer_check.compare(load_profile("h200"), load_profile("h100"))
    committed = json.loads((ROOT / "benchmarks" / "results" / "transfer.json").read_text(encoding="utf-8"))
    assert rows == committed["laws"]
    page = (ROOT / "docs" / "calibration-method.md").read_text(encoding="utf-8")
    assert transfer_check.markdown(rows) in page


def test_most_sizes_lie_where_the_stated_intervals_say() -> None:
    """90 % intervals: of some hundred sizes at least four in five should lie inside, or the widths are wishful."""
    committed = json.loads((ROOT / "benchmarks" / "results" / "transfer.json").read_text(encoding="utf-8"))
    assert committed["n_sizes"] >= 100
    assert committed["n_inside_90_percent_interval"] >= 0.8 * committed["n_sizes"]
