"""Checks of rules and dashboards before they are written, and reading them back: PromQL parsed, names known, sizes as planned."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import promql_parser

from planner.export.counts import PoolCount
from planner.export.metric_names import ENGINE_METRICS
from planner.export.yaml_text import from_yaml

_METRIC: Final = re.compile(r"\b(diffplan[a-zA-Z0-9_:]*)")
_TEMPLATE: Final = re.compile(r"\{\{(?! \$(?:labels\.(?:worker|pod|pool)|value) \}\})")
_DURATION: Final = re.compile(r"\d+[smhd]")
OTHER_METRICS: Final = ("diffplan_images_total",)


def rule_faults(rules_text: str, dashboard_text: str) -> list[str]:
    """Everything wrong with a rules file and a dashboard; empty if they are right."""
    rules = [rule for group in from_yaml(rules_text)[0]["groups"] for rule in group["rules"]]
    dashboard = json.loads(dashboard_text)
    recorded = {rule["record"] for rule in rules if "record" in rule}
    known = recorded | {
        f"{name}{end}" for name in (*ENGINE_METRICS, *OTHER_METRICS) for end in ("", "_bucket", "_sum", "_count")
    }
    faults = []
    for rule in rules:
        where = rule.get("record") or rule.get("alert")
        faults += [f"{where}: {fault}" for fault in (*_expression_faults(rule["expr"], known), *_alert_faults(rule))]
    alerts = [rule["alert"] for rule in rules if "alert" in rule]
    faults += [f"alert {name} occurs twice" for name in sorted({name for name in alerts if alerts.count(name) > 1})]
    ids = [panel["id"] for panel in dashboard["panels"]]
    if len(set(ids)) != len(ids):
        faults.append("two panels have one id")
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            faults += [f"panel {panel['title']!r}: {fault}" for fault in _expression_faults(target["expr"], known)]
    return faults


def counts_in_rules(rules_text: str) -> tuple[PoolCount, ...]:
    """The planned sizes that the recording rules state."""
    sizes: dict[tuple[str, str, str], dict[str, int]] = {}
    for group in from_yaml(rules_text)[0]["groups"]:
        for rule in group["rules"]:
            if rule.get("record") in {"diffplan:planned_replicas", "diffplan:planned_gpus"}:
                labels: Mapping[str, str] = rule["labels"]
                key = (labels["pool"], labels["role"], labels["gpu_kind"])
                number = int(rule["expr"].removeprefix("vector(").removesuffix(")"))
                sizes.setdefault(key, {})[rule["record"]] = number
    return tuple(
        sorted(PoolCount(*key, n["diffplan:planned_replicas"], n["diffplan:planned_gpus"]) for key, n in sizes.items())
    )


def _expression_faults(expr: str, known: set[str]) -> Iterator[str]:
    try:
        promql_parser.parse(expr)
    except ValueError as error:
        yield f"is not PromQL: {error}"
    # texts in quotes are labels' values, not metrics
    for name in _METRIC.findall(re.sub(r'"(?:[^"\\]|\\.)*"', '""', expr)):
        if name not in known:
            yield f"asks for {name}, which neither the engine nor a rule gives"


def _alert_faults(rule: Mapping[str, Any]) -> Iterator[str]:
    if "alert" not in rule:
        return
    if not _DURATION.fullmatch(rule["for"]):
        yield f"for is {rule['for']!r}"
    for text in (*rule["annotations"].values(), *rule["labels"].values()):
        if _TEMPLATE.search(text):
            yield f"has a template that is not ours: {text[:80]!r}"
