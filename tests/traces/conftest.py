"""Small traces for the tests of this package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from traces.frame import checked_frame
from traces.trace import Provenance, Trace


@pytest.fixture
def make_trace() -> Callable[..., Trace]:
    """Makes a trace of keyword columns; ``arrival_s`` alone is enough."""

    def make(duration_s: float | None = None, **columns: Any) -> Trace:
        n = len(next(iter(columns.values())))
        columns.setdefault("request_id", [f"r{row}" for row in range(n)])
        columns.setdefault("arrival_s", [float(row) for row in range(n)])
        frame = pd.DataFrame({name: pd.Series(list(values), dtype=object) for name, values in columns.items()})
        return checked_frame(frame, "test", Provenance("test"), duration_s)

    return make


@pytest.fixture
def real_gentd26() -> Path:
    """Folder of the real data set, beside the checkout."""
    return Path(__file__).resolve().parents[3] / "shared" / "traces" / "gentd26"
