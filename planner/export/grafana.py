"""A Grafana dashboard whose thresholds are the plan's values: what the service does, beside what it was planned to do."""

from __future__ import annotations

import json
from typing import Any

from planner.export import metric_names as names
from planner.export.metric_names import JOB, quoted, selector
from planner.export.names import digest, label_value
from planner.export.prometheus import stage_intervals
from planner.export.source import Source
from planner.plan_record import Estimate

Panel = dict[str, Any]
SCHEMA_VERSION = 39
"""Of Grafana 10 and 11."""
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard_json(source: Source, namespace: str) -> str:
    """The dashboard as a file to import, or to provision. Titles hold slugs only: Grafana expands ``$`` and ``[[`` in them."""
    plan, row = source.plan, source.row
    scenario = label_value(source.provenance.scenario_name)
    here = {"job": JOB, "namespace": namespace}
    latency = selector(f"{names.REQUEST_SECONDS}_bucket", **here, status="done")
    panels = [
        _graph(
            "Late requests", "percentunit", 1.0 - plan.slo_attainment_ratio,
            [(f"diffplan:late:ratio_rate{window}", f"over {window}") for window in ("5m", "1h", "6h")],
            f"Share of offered requests without an image within {plan.slo_latency_s:g} s. Line: what the promise allows.",
        ),
        *(
            _graph(
                f"Latency p{level}", "s", _mean(estimate),
                [(f"histogram_quantile({level / 100:g}, sum by (le) (rate({latency}[5m])))", f"p{level}")],
                "Line: the plan's value.",
            )
            for level, estimate in (
                (50, row.latency_p50_s if row else None), (95, row.latency_p95_s if row else None),
                (99, row.latency_p99_s if row else None),
            )
        ),
        _graph(
            "Images in time a second", "short", _mean(row.in_slo_images_per_s) if row else None,
            [(f"sum(rate({selector('diffplan_images_total', **here)}[5m]))", "images made")], "Line: planned images in time.",
        ),
        _graph("Queue", "short", None, [("diffplan:queue_depth:sum", "waiting requests")], "Waiting requests."),
        _graph(
            "Oldest wait", "s", plan.slo_latency_s, [("diffplan:oldest_wait_seconds:max", "oldest")], "Line: the promise.",
        ),
        _graph(
            "Ready replicas", "short", None,
            [("diffplan:ready_replicas:sum", "{{pool}} ready"), ("diffplan:planned_replicas", "{{pool}} planned")],
            "Ready replicas beside planned ones.",
        ),
        _graph(
            "Busy workers", "percentunit", max((p.busy_ratio or 0.0 for p in row.pools), default=None) if row else None,
            [("diffplan:pool_busy:ratio_rate5m", "{{pool}}")], "Line: the busiest pool of the plan.",
        ),
        _graph(
            "LoRAs found in the host tier", "percentunit", source.simulated.lora_hit_ratio if source.simulated else None,
            [("diffplan:lora_hits:ratio_rate1h", "hits")], "Line: the simulated run.",
        ),
        *(
            _graph(
                f"Stage {stage}", "s", high, [(f"diffplan:stage_seconds:mean30m{{stage={quoted(stage)}}}", "mean")],
                f"Should stay within {low:.4g}..{high:.4g} s. Line: the upper end.",
            )
            for stage, (low, high) in (stage_intervals(source.simulated, source.noise_ratio) if source.simulated else {}).items()
        ),
        _graph(
            "Restarts", "short", None, [(f"sum by (worker) (increase({selector(names.WORKER_RESTARTS, **here)}[30m]))", "{{worker}}")],
            "Restarts within 30 minutes.",
        ),
    ]  # fmt: skip
    for index, panel in enumerate(panels):
        panel["id"] = index + 1
        panel["gridPos"] = {"h": 8, "w": 8, "x": 8 * (index % 3), "y": 8 * (index // 3)}
    plain = {
        "uid": f"diffplan-{digest(source.provenance.scenario_name, 16)}",
        "title": f"diffplan {scenario}",
        "tags": ["diffplan", source.provenance.plan_id[:16]],
        "description": "\n".join(
            line.replace("$", "&#36;").replace("[[", "&#91;&#91;") for line in source.provenance.lines()
        ),
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {
            "list": [{"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}]
        },
        "panels": panels,
        "diffplan": source.provenance.to_plain(),
    }
    return json.dumps(plain, indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def _graph(title: str, unit: str, line: float | None, queries: list[tuple[str, str]], description: str) -> Panel:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if line is not None:
        steps.append({"color": "red", "value": line})
    return {
        "type": "timeseries",
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "fieldConfig": {
            "defaults": {
                "unit": unit,
                "min": 0,
                "thresholds": {"mode": "absolute", "steps": steps},
                "custom": {"thresholdsStyle": {"mode": "off" if line is None else "line"}},
            },
            "overrides": [],
        },
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": DATASOURCE, "expr": expr, "legendFormat": legend}
            for index, (expr, legend) in enumerate(queries)
        ],
    }


def _mean(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.mean
