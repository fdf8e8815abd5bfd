"""Reads exported autoscalers back into the settings that they hold."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any, Final

from engine.policies.autoscale_settings import Autoscale
from planner.export.autoscaling import SIMULATED
from planner.export.provenance import PREFIX

Object = dict[str, Any]


def read_autoscalers(objects: list[Object]) -> dict[str, Autoscale]:
    """Cell to the settings that an exported object holds; the inverse of what :func:`autoscaling_texts` writes."""
    return {
        item["metadata"]["labels"][f"{PREFIX}cell"]: _READERS[item["kind"]](item)
        for item in objects
        if item["kind"] in _READERS
    }


def _ratio(percent: str) -> float:
    return float(Decimal(percent) / 100)


def _simulated(item: Object) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(item["metadata"]["annotations"][SIMULATED])
    return plain


def _read_behaviour(behaviour: Object) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for way, key in (("up", "scaleUp"), ("down", "scaleDown")):
        rules = behaviour[key]
        by_type = {policy["type"]: policy for policy in rules.get("policies", [])}
        values[f"{way}_window_s"] = float(rules["stabilizationWindowSeconds"])
        values[f"{way}_replicas"] = by_type.get("Pods", {}).get("value", 0)
        values[f"{way}_ratio"] = by_type.get("Percent", {}).get("value", 0) / 100
        periods = {float(policy["periodSeconds"]) for policy in by_type.values()}
        values[f"{way}_period_s"] = periods.pop() if periods else 15.0
    return values


def _read_scaled_object(item: Object) -> Autoscale:
    spec = item["spec"]
    trigger = spec["triggers"][0]["metadata"]
    return Autoscale(
        kind="keda", min_replicas=spec["minReplicaCount"], max_replicas=spec["maxReplicaCount"],
        target=float(trigger["threshold"]), activation=float(trigger["activationThreshold"]),
        polling_s=float(spec["pollingInterval"]), cooldown_s=float(spec["cooldownPeriod"]),
        **_read_behaviour(spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]), **_simulated(item),
    )  # fmt: skip


def _read_hpa(item: Object) -> Autoscale:
    spec = item["spec"]
    target = spec["metrics"][0]["pods"]["target"]["averageValue"]
    return Autoscale(
        kind="hpa", min_replicas=spec["minReplicas"], max_replicas=spec["maxReplicas"], target=float(target),
        **_read_behaviour(spec["behavior"]), **_simulated(item),
    )  # fmt: skip


def _read_knative(item: Object) -> Autoscale:
    annotations = item["spec"]["template"]["metadata"]["annotations"]
    values = {key.rpartition("/")[2]: value for key, value in annotations.items()}
    return Autoscale(
        kind="kpa", min_replicas=int(values["min-scale"]), max_replicas=int(values["max-scale"]),
        target=float(values["target"]), target_utilisation_ratio=_ratio(values["target-utilization-percentage"]),
        stable_window_s=float(values["window"].removesuffix("s")),
        panic_window_ratio=_ratio(values["panic-window-percentage"]),
        panic_threshold_ratio=_ratio(values["panic-threshold-percentage"]),
        down_delay_s=float(values["scale-down-delay"].removesuffix("s")), **_simulated(item),
    )  # fmt: skip


_READERS: Final = {"ScaledObject": _read_scaled_object, "HorizontalPodAutoscaler": _read_hpa, "Service": _read_knative}
