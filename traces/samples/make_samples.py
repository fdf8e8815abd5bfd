"""Makes the shipped samples anew: ``python -m traces.samples.make_samples [FOLDER]``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from traces.katz_figures import Service
from traces.synth import RateShape, synthesise
from traces.trace import Trace
from traces.writer import write_trace

HOUR_S: Final = 3_600.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """Arguments of one sample."""

    service: Service
    n_instances: int
    n_requests: int
    """Requests per instance are those of the full published trace (A 995, B 1276), so that locality is too."""
    seed: int


RECIPES: Final[dict[str, Recipe]] = {
    "katz_a_hour": Recipe("A", n_instances=8, n_requests=7_960, seed=20_250_707),
    "katz_b_hour": Recipe("B", n_instances=6, n_requests=7_654, seed=20_250_708),
}
AFTERNOON: Final = RateShape(starts_at_hour=14.5)


def made_sample(name: str) -> Trace:
    """The sample, synthesised anew."""
    recipe = RECIPES[name]
    return synthesise(recipe.service, recipe.n_requests, recipe.n_instances, HOUR_S, recipe.seed, AFTERNOON)


def main(folder: Path) -> None:
    """Writes every sample into the folder."""
    for name in RECIPES:
        path = write_trace(made_sample(name), folder / f"{name}.parquet")
        sys.stderr.write(f"{path}: {path.stat().st_size} bytes\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
