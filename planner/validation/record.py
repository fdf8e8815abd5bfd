"""The validation as JSON: one object for all runs, the same bytes for the same inputs. Every number of the page is in it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from calibrate.profile import LatencyProfile
from planner import __version__
from planner.validation.bounds import BAND_UNTIL, BUSY_GAP_MAX, GAP_MAX, Check
from planner.validation.comparison import Comparison
from planner.validation.gaps import CONFIDENCE, N_BLOCKS, N_RESAMPLES, Gap, StageGap
from planner.validation.simulated import SimulationSettings

SCHEMA_VERSION: Final = 1


def to_plain(
    comparisons: Sequence[Comparison], profile: LatencyProfile, profile_name: str, settings: SimulationSettings
) -> dict[str, Any]:
    """JSON values; no path and no time of day is in them."""
    plain = {
        "schema_version": SCHEMA_VERSION,
        "kind": "validation",
        "diffplan_version": __version__,
        "holds": all(comparison.holds for comparison in comparisons),
        "profile": {
            "name": profile_name,
            "profile_id": profile.profile_id,
            "architecture": profile.architecture,
            "gpu_kind": profile.gpu_kind,
            "created": profile.created,
        },
        "settings": dataclasses.asdict(settings),
        "bounds": {
            "latency_gap_ratio": {band: dict(limits) for band, limits in GAP_MAX.items()},
            "busy_gap": BUSY_GAP_MAX,
            "band_until_load": [[until, band] for until, band in BAND_UNTIL],
        },
        "intervals": {"confidence": CONFIDENCE, "n_resamples": N_RESAMPLES, "n_blocks": N_BLOCKS},
        "runs": [_run(comparison) for comparison in comparisons],
    }
    return {key: _finite(value) for key, value in plain.items()}


def to_json(plain: Mapping[str, Any]) -> str:
    """Indented, keys in their order."""
    return json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _run(comparison: Comparison) -> dict[str, Any]:
    run = comparison.run
    floor = comparison.floor
    measured, simulated = comparison.measured, comparison.simulated
    return {
        "name": run.name,
        "against": comparison.against,
        "holds": comparison.holds,
        "topology": run.topology,
        "model": run.model,
        "pools": {pool.name: pool.n_replicas for pool in run.allocation.pools},
        "n_gpus": run.allocation.n_gpus,
        "load": comparison.load,
        "band": comparison.band,
        "n_requests": len(run.log.requests),
        "n_compared": len(comparison.pairing),
        "n_repetitions": comparison.n_repetitions,
        "offered_per_s": measured.offered_per_s,
        "latency_s": {name: _gap(gap, None if floor is None else floor[name]) for name, gap in comparison.latency.items()},
        "queue_wait_s": {
            name: _gap(gap, None if comparison.wait_floor is None else comparison.wait_floor[name])
            for name, gap in comparison.wait.items()
        },
        "service_s": {name: _gap(gap, None) for name, gap in comparison.service.items()},
        "classes": {
            name: {"n": comparison.class_sizes[name], **{level: _gap(gap, None) for level, gap in gaps.items()}}
            for name, gaps in comparison.classes.items()
        },
        "stages": [_stage(item, _floor_of(item, comparison.stages_floor)) for item in comparison.stages],
        "tail_stages": [_stage(item, None) for item in comparison.tail_stages],
        "stage_quantiles_s": {
            stage: {level: {"measured": pair[0], "simulated": pair[1]} for level, pair in levels.items()}
            for stage, levels in comparison.stage_quantiles.items()
        },
        "carried_by": {
            "mean": comparison.carrier,
            "mean_without_queue": comparison.service_carrier,
            "slowest_tenth": comparison.tail_carrier,
        },
        "busy": {pool: {"measured": pair[0], "simulated": pair[1]} for pool, pair in comparison.busy.items()},
        "counts": {
            name: {"measured": getattr(measured, f"n_{name}"), "simulated": getattr(simulated, f"n_{name}")}
            for name in ("done", "rejected", "expired", "failed")
        },
        "hit_ratios": {
            name: {"measured": getattr(measured, f"{name}_warm_hit_ratio"), "simulated": getattr(simulated, f"{name}_warm_hit_ratio")}
            for name in ("lora", "controlnet")
        },
        "served_per_s": {"measured": measured.served_per_s, "simulated": simulated.served_per_s},
        "saturated": {"measured": comparison.is_saturated[0], "simulated": comparison.is_saturated[1]},
        "checks": [_check(check) for check in comparison.checks],
        "grades": dict(comparison.grades),
    }  # fmt: skip


def _gap(gap: Gap, floor: Gap | None) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "measured": gap.measured, "simulated": gap.other, "gap_ratio": gap.ratio, "gap_low": gap.low, "gap_high": gap.high
    }  # fmt: skip
    if floor is not None:
        plain |= {"second": floor.other, "floor_ratio": floor.ratio, "floor_low": floor.low, "floor_high": floor.high}
    return plain


def _stage(item: StageGap, floor: StageGap | None) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "stage": item.stage,
        "measured_mean_s": item.measured_s,
        "simulated_mean_s": item.other_s,
        "gap_s": item.gap_s,
        "gap_low_s": item.low_s,
        "gap_high_s": item.high_s,
        "share_of_latency": item.share_of_latency,
    }
    if floor is not None:
        plain["floor_gap_s"] = floor.gap_s
    return plain


def _floor_of(item: StageGap, floors: Sequence[StageGap] | None) -> StageGap | None:
    return None if floors is None else next(each for each in floors if each.stage == item.stage)


def _check(check: Check) -> dict[str, Any]:
    return {**dataclasses.asdict(check), "allowed": check.allowed, "holds": check.holds}


def _finite(value: Any) -> Any:
    """NaN and infinities have no JSON: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
