"""Recording rules, alerts and a scrape configuration for Prometheus, with the plan's own values as thresholds.

Free texts of a plan stand only in comments and in static labels of recording rules, which Prometheus does not expand;
alerts' annotations are templates, so only our own words and numbers are in them.
"""

from __future__ import annotations

from typing import Any, Final

from engine.allocation import Allocation
from planner.export import metric_names as names
from planner.export.metric_names import JOB, quoted, selector
from planner.export.simulated import SimulatedFigures
from planner.export.source import Source
from planner.export.yaml_text import to_yaml
from traces.problems import one_problem

Rule = dict[str, Any]
BURN_WINDOWS: Final = (
    ("page", 14.4, "5m", "1h", "2m"),
    ("ticket", 6.0, "30m", "6h", "15m"),
    ("ticket", 1.0, "6h", "3d", "1h"),
)
"""Severity, factor, short and long window, wait: the multi-window alerts of Google's SRE workbook (chapter 5), for 30 days."""
BURNABLE_MOST: Final = 0.9
"""A factor is capped so that its threshold stays at 90 % of all requests: above 100 % it could never fire."""
STAGE_SLACK_RATIO: Final = 0.1
"""The traffic's mix moves a stage's mean as well; less than 10 % is not taken for drift."""
STAGE_SHARE_MIN: Final = 0.02
"""Stages under 2 % of the service time are not watched."""
HIT_RATIO_SLACK: Final = 0.05
WAIT_SHARE: Final = 0.5
"""A request that has waited for half the promise, while the queue grows, is a warning."""


def prometheus_texts(source: Source, namespace: str) -> dict[str, str]:
    """File name (under ``prometheus/``) to text, without the dashboard.

    Raises:
        InputError: the promise is longer than what the engine's histograms can tell apart.
    """
    comment = source.provenance.comment()
    rules = {"groups": [_recorded(source, namespace), _alerts(source, namespace)]}
    return {
        "rules.yml": to_yaml([rules], comment),
        "scrape.yml": to_yaml([scrape_config(namespace)], comment + _SCRAPE_REMARK),
    }


def scrape_config(namespace: str) -> dict[str, Any]:
    """How Prometheus finds the engines' pods and which labels it gives their series."""
    keep = {"action": "keep"}
    pod = "__meta_kubernetes_pod"
    relabel = [
        {"source_labels": [f"{pod}_label_app_kubernetes_io_part_of"], "regex": "diffplan", **keep},
        {"source_labels": [f"{pod}_container_port_name"], "regex": "http", **keep},
        *(
            {"source_labels": [label], "target_label": target}
            for label, target in (
                ("__meta_kubernetes_namespace", "namespace"),
                (f"{pod}_name", "pod"),
                (f"{pod}_label_diffplan_group", "group"),
                (f"{pod}_label_diffplan_cell", "cell"),
            )
        ),
    ]
    job = {
        "job_name": JOB,
        "scrape_interval": "5s",
        "scrape_timeout": "4s",
        "metrics_path": "/metrics",
        "authorization": {"type": "Bearer", "credentials_file": "/etc/prometheus/secrets/diffplan-metrics/token"},
        "kubernetes_sd_configs": [{"role": "pod", "namespaces": {"names": [namespace]}}],
        "relabel_configs": relabel,
    }
    return {"scrape_configs": [job]}


_SCRAPE_REMARK: Final = (
    "# The engines' metrics need a token: mount one of a tenant of yours at credentials_file. Two samples within 15 s are\n"
    "# needed for the busy ratio that a HorizontalPodAutoscaler reads, so the interval is 5 s.\n"
)


def in_time_rate(slo_latency_s: float, window: str, namespace: str) -> str:
    """PromQL: finished requests a second within the promise, linear between the two buckets around it.

    Raises:
        InputError: the promise is above the last bucket.
    """
    above = [bound for bound in names.SECONDS_BUCKETS if bound >= slo_latency_s]
    if not above:
        raise one_problem(
            "slo.latency_s", f"is {slo_latency_s:g} s", f"at most {names.SECONDS_BUCKETS[-1]:g} s",
            "The engine's metrics do not tell longer latencies apart: leave --to prometheus out",
        )  # fmt: skip
    below = max((bound for bound in names.SECONDS_BUCKETS if bound < above[0]), default=0.0)
    share = (slo_latency_s - below) / (above[0] - below)

    def rate(bound: float) -> str:
        bucket = selector(
            f"{names.REQUEST_SECONDS}_bucket", job=JOB, namespace=namespace, status="done", le=repr(float(bound))
        )
        return f"sum(rate({bucket}[{window}]))"

    if share == 1.0:
        return rate(above[0])
    upper = f"{share:.6g} * {rate(above[0])}"
    return f"{1 - share:.6g} * {rate(below)} + {upper}" if below else upper


def offered_rate(window: str, namespace: str) -> str:
    """PromQL: requests a second that were ours to serve; rejected ones count, malformed and unauthorised ones do not."""
    ours = selector(names.REQUESTS, job=JOB, namespace=namespace)[:-1]
    return f"sum(rate({ours},status!~{quoted(names.CLIENT_FAULTS)}}}[{window}]))"


def _recorded(source: Source, namespace: str) -> Rule:
    plan = source.plan
    windows = dict.fromkeys(window for _, _, short, long, _ in BURN_WINDOWS for window in (short, long))
    rules = [
        {
            "record": f"diffplan:late:ratio_rate{window}",
            # a request without an answer in time is late, also where none was ever done; rounding must not go below 0
            "expr": f"clamp_min(1 - ({in_time_rate(plan.slo_latency_s, window, namespace)} or vector(0)) / "
            f"({offered_rate(window, namespace)} > 0), 0)",
        }
        for window in windows
    ]
    here = {"job": JOB, "namespace": namespace}
    hits, misses = (f"sum(rate({selector(metric, **here)}[1h]))" for metric in (names.LORA_HITS, names.LORA_MISSES))
    busy = selector(names.WORKER_BUSY_SECONDS, **here)
    base_busy = selector(names.WORKER_BUSY_SECONDS, **here, role="base")
    stage = {part: selector(f"{names.STAGE_SECONDS}_{part}", **here, status="done") for part in ("sum", "count")}
    rules += [
        {"record": "diffplan:queue_depth:sum", "expr": f"sum({selector(names.QUEUE_DEPTH, **here)})"},
        {"record": "diffplan:oldest_wait_seconds:max", "expr": f"max({selector(names.OLDEST_WAIT_SECONDS, **here)})"},
        {"record": "diffplan:lora_hits:ratio_rate1h", "expr": f"{hits} / ({hits} + {misses} > 0)"},
        {"record": "diffplan:pool_busy:ratio_rate5m", "expr": f"avg by (pool) (rate({busy}[5m]))"},
        {"record": names.BUSY_RATIO_METRIC, "expr": f"avg by (namespace, pod) (rate({base_busy}[15s]))"},
        {
            "record": "diffplan:stage_seconds:mean30m",
            "expr": f"sum by (stage) (rate({stage['sum']}[30m])) / (sum by (stage) (rate({stage['count']}[30m])) > 0)",
        },
        {"record": "diffplan:ready_replicas:sum", "expr": f"sum by (pool) ({selector(names.WORKER_READY, **here)})"},
        *_planned(source.allocation),
    ]
    return {"name": "diffplan-recorded", "interval": "15s", "rules": rules}


def _planned(allocation: Allocation) -> list[Rule]:
    """The plan's sizes as series, so that graphs and alerts can compare with them."""
    rules: list[Rule] = []
    for pool in allocation.pools:
        labels = {"pool": pool.name, "role": pool.role, "gpu_kind": pool.gpu_kind}
        least = pool.n_replicas if pool.autoscale is None else pool.autoscale.min_replicas
        rules += [
            {"record": "diffplan:planned_replicas", "expr": f"vector({pool.n_replicas})", "labels": labels},
            {"record": "diffplan:planned_replicas:min", "expr": f"vector({least})", "labels": labels},
            {"record": "diffplan:planned_gpus", "expr": f"vector({pool.n_gpus})", "labels": labels},
        ]
    return rules


def _alerts(source: Source, namespace: str) -> Rule:
    plan, figures = source.plan, source.simulated
    up = selector("up", job=JOB, namespace=namespace)
    labels = {"plan": source.provenance.plan_id[:16]}

    def alert(name: str, expr: str, wait: str, severity: str, summary: str, description: str) -> Rule:
        return {
            "alert": name,
            "expr": expr,
            "for": wait,
            "labels": {"severity": severity, **labels},
            "annotations": {"summary": summary, "description": description},
        }

    rules = []
    budget = 1.0 - plan.slo_attainment_ratio
    for severity, factor, short, long, wait in BURN_WINDOWS:
        limit = min(factor * budget, BURNABLE_MOST * factor / BURN_WINDOWS[0][1]) if factor > 1 else budget
        rules.append(
            alert(
                f"DiffplanSloBurn{long}",
                f"diffplan:late:ratio_rate{short} > {limit:.6g} and diffplan:late:ratio_rate{long} > {limit:.6g}",
                wait,
                severity,
                f"More than {limit:.3g} of the requests miss the promise, over {short} and over {long}.",
                f"Promised: {plan.slo_attainment_ratio:.6g} within {plan.slo_latency_s:g} s. Look at queue, ready replicas "
                "and stages on the dashboard; docs/export.md says what to do.",
            )
        )
    rules.append(
        alert(
            "DiffplanQueueGrows",
            f"deriv(diffplan:queue_depth:sum[10m]) > 0 and diffplan:oldest_wait_seconds:max > {WAIT_SHARE * plan.slo_latency_s:.6g}",
            "5m",
            "page",
            "The queue grows and requests wait for more than half of what was promised.",
            f"Planned mean wait: {_number(source.row.queue_wait_mean_s.mean if source.row else None)} s.",
        )
    )
    if figures is not None and figures.lora_hit_ratio is not None:
        limit = max(0.0, figures.lora_hit_ratio - HIT_RATIO_SLACK)
        rules.append(
            alert(
                "DiffplanLoraHitsBelowPlan",
                f"diffplan:lora_hits:ratio_rate1h < {limit:.6g}",
                "30m",
                "ticket",
                f"Fewer LoRAs are found in the host tier than planned ({figures.lora_hit_ratio:.3f}).",
                "More requests wait for fetches than simulated: popularity has changed, or the tier is too small.",
            )
        )
    if figures is not None:
        rules += [
            alert(
                f"DiffplanStageOutside{''.join(part.capitalize() for part in stage.split('_'))}",
                f"diffplan:stage_seconds:mean30m{{stage={quoted(stage)}}} < {low:.6g} or "
                f"diffplan:stage_seconds:mean30m{{stage={quoted(stage)}}} > {high:.6g}",
                "30m",
                "ticket",
                f"Mean time of stage {stage} is outside {low:.3g}..{high:.3g} s.",
                f"Planned mean {figures.stage_mean_s[stage]:.4g} s. Other requests than planned, or an engine that has "
                "drifted: measure again with diffplan calibrate.",
            )
            for stage, (low, high) in stage_intervals(figures, source.noise_ratio).items()
        ]
    rules += [
        alert(
            "DiffplanWorkerFlaps",
            f"increase({selector(names.WORKER_RESTARTS, job=JOB, namespace=namespace)}[30m]) > 2",
            "0s",
            "ticket",
            "A worker was restarted more than twice within 30 minutes.",
            "Worker {{ $labels.worker }} of pod {{ $labels.pod }}: its log says why.",
        ),
        alert(
            "DiffplanReplicasMissing",
            "diffplan:planned_replicas:min > 0 unless on (pool) "
            "(diffplan:ready_replicas:sum >= on (pool) group_right () diffplan:planned_replicas:min)",
            "10m",
            "page",
            "Fewer replicas are ready than the plan counts on.",
            "Pool {{ $labels.pool }} should have {{ $value }} or more.",
        ),
        alert(
            "DiffplanEngineUnseen",
            f"{up} == 0 or absent({up})",
            "5m",
            "page",
            "Prometheus cannot scrape an engine.",
            "Pod {{ $labels.pod }}. Without its metrics neither alerts nor autoscalers see it.",
        ),
    ]
    return {"name": "diffplan-alerts", "interval": "15s", "rules": rules}


def stage_intervals(
    figures: SimulatedFigures, noise_ratio: tuple[float, float] | None
) -> dict[str, tuple[float, float]]:
    """Stage to the interval its mean should stay in: the planned mean times the profile's 1 % and 99 % service noise, at
    least ±10 %. Stages that wait for a store or are a small part of the service time are left out."""
    low, high = noise_ratio if noise_ratio is not None else (1.0, 1.0)
    low, high = min(low, 1.0 - STAGE_SLACK_RATIO), max(high, 1.0 + STAGE_SLACK_RATIO)
    total_s = sum(figures.stage_mean_s.values())
    return {
        stage: (mean_s * low, mean_s * high)
        for stage, mean_s in figures.stage_mean_s.items()
        if stage in {"text", "denoise", "decode"} and mean_s > STAGE_SHARE_MIN * total_s
    }


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"
