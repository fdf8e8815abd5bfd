"""Small synthetic traces that travel with the package. How they were made: ``SAMPLES.md`` and ``make_samples.py``."""

from __future__ import annotations

import difflib
from importlib import resources
from typing import Final

from traces.problems import one_problem
from traces.reader import read_trace
from traces.trace import Trace

SAMPLES: Final[tuple[str, ...]] = ("katz_a_hour", "katz_b_hour")


def sample_names() -> tuple[str, ...]:
    """Names that :func:`load_sample` and ``sample:NAME`` know."""
    return SAMPLES


def load_sample(name: str) -> Trace:
    """A shipped sample.

    Raises:
        InputError: there is no sample of that name.
    """
    if name not in SAMPLES:
        close = difflib.get_close_matches(name, SAMPLES, n=1)
        repair = f"Did you mean {close[0]}?" if close else ""
        raise one_problem("sample", f"got {name!r}", f"one of {', '.join(SAMPLES)}", repair)
    with resources.as_file(resources.files("traces.samples") / f"{name}.parquet") as path:
        return read_trace(path)
