"""The validation as one self-contained page: every number in it is one of ``validation.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import jinja2
import numpy as np

from planner.report import TEMPLATES
from planner.validation.bounds import GAP_MAX
from planner.validation.charts import STAGE_COLOURS, distribution, overview, stage_bars
from planner.validation.comparison import Comparison
from planner.validation.gaps import STAGES, Gap

LEVELS: Final = ("p50", "p95", "p99")
NOTES: Final = (
    "A request that ends after its deadline counts as expired in both logs, and its replica as busy to its end: an engine on a GPU has "
    "queued all steps by then. One that waits for each step, as on a CPU, is free earlier than the simulator says.",
    "Times of the engine run from the hand-over of a request to its dispatcher to its answer there: HTTP is not in them.",
    "The shapes of a workload are compiled, and one request with LoRAs of each number is run, before the clock starts; the simulation "
    "starts with the models that the workers then held.",
    "Requests that use ControlNet workers run alone in the simulator; the engine may batch them where the allocation batches.",
    "LoRA fetches ahead of take-up (lora_prefetch_depth) are not simulated.",
    "Floor: one pair of replays, itself a random number; the text of a run says where only the floor lets a figure pass.",
)


@dataclass(frozen=True, slots=True)
class _Cell:
    measured: str
    gap: str
    floor: str
    is_out: bool


def verdict_sentence(comparisons: Sequence[Comparison]) -> str:
    """The answer in a sentence or two."""
    outside = [item for item in comparisons if not item.holds]
    n = len(comparisons)
    if not outside:
        return f"The simulator agrees with the engine within the bounds in {'the run' if n == 1 else f'all {n} runs'}."
    return f"The simulator is out of the bounds in {len(outside)} of {n} runs."


def failures(comparisons: Sequence[Comparison]) -> list[str]:
    """For every run out of its bounds what is out, and what carries the gap."""
    return [f"{item.run.name}: {failure_words(item)}." for item in comparisons if not item.holds]


def failure_words(comparison: Comparison) -> str:
    """Which bounds are broken, and which stage carries the gap."""
    parts = [
        f"{check.name} {check.gap:+.1%} (allowed ±{check.allowed:.1%})"
        for check in comparison.checks
        if not check.holds
    ]
    if not comparison.is_verdict_shared:
        parts.append(_saturation_words(comparison))
    stages = f"the gap of the mean is carried by {comparison.carrier}" if comparison.carrier else ""
    if comparison.service_carrier and comparison.service_carrier != comparison.carrier:
        stages += f", without the queue by {comparison.service_carrier}"
    return "; ".join([*parts, stages]) if stages else "; ".join(parts)


def html(comparisons: Sequence[Comparison], plain: Mapping[str, Any]) -> str:
    """The page: no script, no request to anywhere; every text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    marks, edge = overview(comparisons)
    return environment.get_template("validation.html.j2").render(
        plain=plain,
        verdict=verdict_sentence(comparisons),
        failures=failures(comparisons),
        levels=LEVELS,
        rows=[_row(item) for item in comparisons],
        marks=marks,
        edge=f"{edge:.0%}",
        pooled=pooled_rows(comparisons),
        parts=[_part(item) for item in comparisons],
        stage_colours=list(zip(STAGES, STAGE_COLOURS, strict=True)),
        grades=_grades(comparisons),
        notes=NOTES,
    )


def pooled_rows(comparisons: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """Topology and band: number of runs, median and largest size of each quantile's gap, runs within their bounds."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for item in comparisons:
        groups.setdefault((item.run.topology, item.band), []).append(item)
    order = list(GAP_MAX)
    rows = []
    for (topology, band), items in sorted(groups.items(), key=lambda each: (each[0][0], order.index(each[0][1]))):  # type: ignore[arg-type]
        cells = [topology, band, str(len(items))]
        for level in LEVELS:
            sizes = [abs(ratio) for item in items if (ratio := item.latency[level].ratio) is not None]
            cells += [f"{np.median(sizes):.1%}", f"{max(sizes):.1%}"] if sizes else ["–", "–"]
        rows.append((*cells, f"{sum(item.holds for item in items)} of {len(items)}"))
    return rows


def table_rows(comparisons: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """The table of workloads for a terminal: run, topology, load, gap (floor) of each quantile, verdict."""
    rows = []
    for item in comparisons:
        cells = [
            f"{_ratio(item.latency[level])}" + ("" if item.floor is None else f" ({_ratio(item.floor[level])})")
            for level in LEVELS
        ]
        verdict = "within" if item.holds else "outside"
        rows.append((item.run.name, item.run.topology, f"{item.load:.2f} ({item.band})", *cells, verdict))
    return rows


def _row(item: Comparison) -> dict[str, Any]:
    out = {check.name for check in item.checks if not check.holds}
    cells = [
        _Cell(
            f"{item.latency[level].measured:.3f} s",
            _ratio(item.latency[level]),
            "–" if item.floor is None else _ratio(item.floor[level]),
            f"latency {level}" in out,
        )
        for level in LEVELS
    ]
    busy_out = sorted(name for name in out if name.startswith("busy"))
    verdict = "within" if item.holds else "outside" + (f" ({', '.join(busy_out)})" if busy_out else "")
    return {
        "name": item.run.name,
        "topology": item.run.topology,
        "load": f"{item.load:.2f} ({item.band})",
        "n": len(item.pairing),
        "cells": cells,
        "saturated": _saturation_words(item),
        "carried": item.carrier,
        "holds": item.holds,
        "verdict": verdict,
    }


def _part(item: Comparison) -> dict[str, Any]:
    tail = {stage.stage: stage for stage in item.tail_stages}
    floor = {stage.stage: stage for stage in item.stages_floor or ()}
    measured, simulated = item.measured, item.simulated
    counts = [
        (name, str(getattr(measured, f"n_{name}")), str(getattr(simulated, f"n_{name}")))
        for name in ("done", "rejected", "expired", "failed")
    ]
    hits = [
        (f"{word} uses found", f"{getattr(measured, name):.1%}", f"{getattr(simulated, name):.1%}")
        for word, name in (("LoRA", "lora_warm_hit_ratio"), ("ControlNet", "controlnet_warm_hit_ratio"))
    ]
    return {
        "run": item.run,
        "sentence": _sentence(item),
        "distribution": distribution(item),
        "bars": stage_bars(item),
        "latency": [
            *_latency_rows("", item.latency, item.floor),
            *_latency_rows("queue wait ", item.wait, item.wait_floor),
            *_latency_rows("service ", item.service, None),
        ],
        "stages": [
            (
                stage.stage, f"{stage.measured_s:.4f}", f"{stage.other_s:.4f}", f"{stage.gap_s:+.4f}",
                f"{stage.low_s:+.4f} … {stage.high_s:+.4f}", f"{stage.share_of_latency:+.2%}",
                f"{floor[stage.stage].gap_s:+.4f}" if floor else "–", f"{tail[stage.stage].gap_s:+.4f}",
            )
            for stage in item.stages
        ],
        "quantiles": [
            (stage, *(f"{value:.4f}" for level in LEVELS for value in levels[level]))
            for stage, levels in item.stage_quantiles.items()
        ],
        "classes": [
            (name, str(item.class_sizes[name]), *(
                text for level in LEVELS for text in (f"{gaps[level].measured:.3f}", _with_interval(gaps[level]))
            ))
            for name, gaps in item.classes.items()
        ],
        "others": [
            *((f"busy or loading, {pool}", f"{a:.1%}", f"{b:.1%}") for pool, (a, b) in item.busy.items()),
            ("served a second", f"{measured.served_per_s:.3f}", f"{simulated.served_per_s:.3f}"),
            *counts,
            *hits,
            ("past saturation", *("yes" if value else "no" for value in item.is_saturated)),
        ],
    }  # fmt: skip


def _latency_rows(prefix: str, gaps: Mapping[str, Gap], floors: Mapping[str, Gap] | None) -> list[tuple[str, ...]]:
    return [
        (
            f"{prefix}{name}", f"{gap.measured:.4f}", f"{gap.other:.4f}", _ratio(gap), _interval(gap),
            "–" if floors is None else f"{_ratio(floors[name])} {_interval(floors[name])}",
        )
        for name, gap in gaps.items()
    ]  # fmt: skip


def _sentence(item: Comparison) -> str:
    allocation = ", ".join(f"{pool.n_replicas} {pool.name}" for pool in item.run.allocation.pools)
    text = f"{len(item.run.log.requests)} requests on {allocation} ({item.run.topology}), load {item.load:.2f} ({item.band}). "
    text += "Within the bounds. " if item.holds else f"Out of the bounds: {failure_words(item)}. "
    if item.carrier:
        text += f"The mean's gap is carried by {item.carrier}, that of the slowest tenth by {item.tail_carrier}."
    decided = [check.name for check in item.checks if check.holds and abs(check.gap) > check.bound]
    if decided:
        text += f" Only the floor lets these pass: {', '.join(decided)}."
    return text


def _saturation_words(item: Comparison) -> str:
    words = {True: "saturated", False: "not saturated"}
    if item.is_verdict_shared:
        return words[item.is_saturated[0]]
    return f"engine {words[item.is_saturated[0]]}, simulator {words[item.is_saturated[1]]}"


def _grades(comparisons: Sequence[Comparison]) -> str:
    by_grade: dict[str, set[str]] = {}
    for item in comparisons:
        for law, grade in item.grades.items():
            by_grade.setdefault(grade, set()).add(law)
    return " ".join(f"{grade.capitalize()}: {', '.join(sorted(laws))}." for grade, laws in sorted(by_grade.items()))


def _ratio(gap: Gap) -> str:
    return "–" if gap.ratio is None else f"{gap.ratio:+.1%}"


def _interval(gap: Gap) -> str:
    return "" if gap.low is None or gap.high is None else f"({100 * gap.low:+.1f} … {100 * gap.high:+.1f})"


def _with_interval(gap: Gap) -> str:
    return f"{_ratio(gap)} {_interval(gap)}".rstrip()
