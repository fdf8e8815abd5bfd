"""Where a saving comes from: from the stock pipeline through compilation and our engine in one process to the recommendation.

Each step is priced against the row before it, so what compilation and kernels save is never credited to decoupling. A step
that costs money is shown as it is; a row that cannot meet the SLO has no price and the next row is compared with the last one
that has, and says whose part is in its step too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from engine.allocation import Topology

BASELINES: Final[tuple[tuple[Topology, str], ...]] = (
    ("diffusers", "stock Diffusers pipeline"),
    ("diffusers_tuned", "compiled, LoRAs fused"),
    ("colocated", "this engine, add-ons on the same GPU"),
)
IN_IT: Final = "is in this step too"


@dataclass(frozen=True, slots=True)
class Step:
    """One row of the waterfall."""

    topology: str
    what: str
    n_gpus: int | None
    """None: this topology cannot meet the SLO, or does not compete."""
    cost_usd_per_month: float | None
    saving_usd_per_month: float | None
    """Against the last priced row before; negative if this row costs more. None in the first priced row."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Waterfall:
    """The rows, and their sum."""

    steps: tuple[Step, ...]
    baseline: str
    """Topology of the first priced row; empty if only the recommendation has a price."""
    saving_usd_per_month: float
    """First priced row minus the recommendation: the sum of the steps."""
    saving_ratio: float
    """The same as a share of the first priced row."""


def build_waterfall(
    costs: Mapping[str, tuple[int, float]], missing: Mapping[str, str], recommended: str, *, has_workers: bool = True
) -> Waterfall:
    """Builds the rows.

    Args:
        costs: topology to (GPUs, USD a month), for those that meet the SLO.
        missing: topology to the reason why it has no price.
        recommended: the topology of the recommendation; must be in ``costs``.
        has_workers: whether it has ControlNet workers; traffic without ControlNets needs none, decoupled or not.
    """
    steps = []
    previous: tuple[str, float] | None = None
    first: tuple[str, float] | None = None
    skipped: list[str] = []
    for topology, what in BASELINES:
        if topology not in costs:
            skipped.append(topology)
            steps.append(Step(topology, what, None, None, None, missing.get(topology, "does not compete")))
            continue
        n_gpus, usd = costs[topology]
        saving = previous[1] - usd if previous else None
        note = against_words(previous[0], skipped) if previous else ""
        steps.append(Step(topology, what, n_gpus, usd, saving, note))
        previous, skipped = (topology, usd), []
        first = first or previous
    n_gpus, usd = costs[recommended]
    what = f"the recommendation is {recommended}"
    if recommended == "decoupled":
        what = "ControlNets on GPUs of their own" if has_workers else "LoRAs fetched while denoising; no ControlNets"
    saving = previous[1] - usd if previous else None
    note = against_words(previous[0], skipped) if previous else ""
    steps.append(Step("recommendation", what, n_gpus, usd, saving, note))
    total = first[1] - usd if first else 0.0
    return Waterfall(tuple(steps), first[0] if first else "", total, total / first[1] if first else 0.0)


def against_words(previous: str, skipped: Sequence[str]) -> str:
    """What a step is compared with, and which rows between, having no price, leave their part in it."""
    if not skipped:
        return f"against {previous}"
    has, it = ("has", "it saves") if len(skipped) == 1 else ("have", "they save")
    return f"against {previous}; {' and '.join(skipped)} {has} no price, so what {it} {IN_IT}"


def holds_more(note: str) -> bool:
    """Whether a step's words (:func:`against_words`) say that a part of it belongs to rows without a price."""
    return note.endswith(IN_IT)
