"""Autoscalers with the very settings that were simulated: KEDA ScaledObjects, HorizontalPodAutoscalers or Knative annotations.

A setting that the target cannot hold is refused, never rounded. A pool without an autoscaler was simulated with a fixed
size: it is pinned, minimum equal to maximum, and nothing is claimed about scaling it.
"""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any, Final

from engine.allocation import Allocation
from engine.policies.autoscale_settings import Autoscale
from planner.export.autoscaling_settings import effective, inexpressible
from planner.export.cells import Cell, cells_of
from planner.export.cluster import Cluster
from planner.export.metric_names import BUSY_RATIO_METRIC, ongoing_requests
from planner.export.provenance import PREFIX, Provenance
from planner.export.source import Source
from planner.export.yaml_text import to_yaml
from traces.problems import InputError

Object = dict[str, Any]
SIMULATED: Final = f"{PREFIX}simulated"
"""Annotation: what the simulation took for granted and no autoscaler can be told."""
FALLBACK_AFTER: Final = 3
"""Failed looks at the metric before KEDA goes back to the plan's number of replicas."""


def autoscaling_texts(source: Source, cluster: Cluster) -> dict[str, str]:
    """File name (under ``autoscaling/``) to text.

    Raises:
        InputError: a simulated setting has no counterpart in the target; every one is named.
    """
    allocation, provenance = source.allocation, source.provenance
    problems = [problem for pool in allocation.pools for problem in inexpressible(pool.name, pool.autoscale)]
    if problems:
        raise InputError(problems)
    texts: dict[str, str] = {}
    resources = []
    for cell in cells_of(allocation, cluster.gpus_per_node):
        settings = _settings_of(cell, allocation)
        name = f"{settings.kind}-{cell.name}.yaml"
        comment = provenance.comment() + "".join(f"# {line}\n" for line in _remarks(cell, settings))
        texts[name] = to_yaml([_object(cell, settings, cluster, provenance)], comment)
        if settings.kind != "kpa":
            resources.append(name)
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "metadata": {"name": "diffplan-autoscaling", "annotations": provenance.annotations()},
        "resources": resources,
    }
    texts["kustomization.yaml"] = to_yaml([kustomization], provenance.comment())
    return texts


def planned_autoscalers(allocation: Allocation, cluster: Cluster) -> dict[str, Autoscale]:
    """Cell to the settings that its exported object must hold."""
    return {cell.name: _settings_of(cell, allocation) for cell in cells_of(allocation, cluster.gpus_per_node)}


def pinned(cell: Cell) -> Autoscale:
    """What keeps a pool of fixed size at its size."""
    return effective(Autoscale(max_replicas=cell.n_pods, min_replicas=cell.n_pods, kind="keda"))


def _settings_of(cell: Cell, allocation: Allocation) -> Autoscale:
    if not cell.is_autoscaled:
        return pinned(cell)
    name = cell.allocation.pools[0].name
    settings = next(pool.autoscale for pool in allocation.pools if pool.name == name)
    assert settings is not None  # noqa: S101 - the cell says so
    return effective(settings)


def _remarks(cell: Cell, settings: Autoscale) -> list[str]:
    if not cell.is_autoscaled:
        return ["The plan has a fixed size: minimum equals maximum, and no scaling was simulated."]
    lines = ["These are the settings that were simulated; one pod is one replica of the plan."]
    if settings.kind == "hpa":
        lines.append(f"The metric {BUSY_RATIO_METRIC} reaches it through an adapter such as prometheus-adapter.")
    if settings.kind == "kpa":
        lines += [
            "Annotations for a Knative Service that runs the pod of the engine's Deployment instead of that Deployment:",
            f"kubectl patch ksvc diffplan-{cell.name} --type merge --patch-file {settings.kind}-{cell.name}.yaml",
        ]
    return lines


def _object(cell: Cell, settings: Autoscale, cluster: Cluster, provenance: Provenance) -> Object:
    name = f"diffplan-{cell.name}"
    metadata: Object = {
        "name": name,
        "namespace": cluster.namespace,
        "labels": {
            "app.kubernetes.io/part-of": "diffplan",
            **provenance.labels(),
            f"{PREFIX}group": cell.group,
            f"{PREFIX}cell": cell.name,
        },
        "annotations": {
            **provenance.annotations(),
            SIMULATED: json.dumps({"start_s": settings.start_s, "attach_s": settings.attach_s}, sort_keys=True),
        },
    }
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
    if settings.kind == "kpa":
        annotations = _knative_annotations(settings, cell)
        template = {"template": {"metadata": {"annotations": annotations}}}
        return {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "metadata": metadata, "spec": template}
    if settings.kind == "hpa":
        metric = {
            "type": "Pods",
            "pods": {
                "metric": {"name": BUSY_RATIO_METRIC},
                "target": {"type": "AverageValue", "averageValue": _decimal(settings.target_value)},
            },
        }
        spec = {
            "scaleTargetRef": target,
            "minReplicas": settings.min_replicas,
            "maxReplicas": settings.max_replicas,
            "metrics": [metric],
            "behavior": _behaviour(settings),
        }
        return {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": metadata, "spec": spec}
    spec = {
        "scaleTargetRef": target,
        "pollingInterval": int(settings.polling_s),
        "cooldownPeriod": int(settings.cooldown_s),
        "minReplicaCount": settings.min_replicas,
        "maxReplicaCount": settings.max_replicas,
        "fallback": {"failureThreshold": FALLBACK_AFTER, "replicas": cell.n_pods},
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": _behaviour(settings)}},
        "triggers": [
            {
                "type": "prometheus",
                "metricType": "AverageValue",
                "metadata": {
                    "serverAddress": cluster.prometheus_url,
                    "query": ongoing_requests(cluster.namespace, cell.name),
                    "threshold": _decimal(settings.target_value),
                    "activationThreshold": _decimal(settings.activation),
                    # an empty answer means that Prometheus has lost the engines: fall back, do not read it as 0
                    "ignoreNullValues": "false",
                },
            }
        ],
    }
    return {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": metadata, "spec": spec}


def _behaviour(settings: Autoscale) -> Object:
    def rules(window_s: float, n: int, ratio: float, period_s: float) -> Object:
        period = int(period_s)
        policies: list[Object] = []
        if n > 0:
            policies.append({"type": "Pods", "value": n, "periodSeconds": period})
        if ratio > 0:
            policies.append({"type": "Percent", "value": round(ratio * 100), "periodSeconds": period})
        if not policies:
            return {"stabilizationWindowSeconds": int(window_s), "selectPolicy": "Disabled"}
        return {"stabilizationWindowSeconds": int(window_s), "selectPolicy": "Max", "policies": policies}

    return {
        "scaleUp": rules(settings.up_window_s, settings.up_replicas, settings.up_ratio, settings.up_period_s),
        "scaleDown": rules(settings.down_window_s, settings.down_replicas, settings.down_ratio, settings.down_period_s),
    }


def _knative_annotations(settings: Autoscale, cell: Cell) -> dict[str, str]:
    prefix = "autoscaling.knative.dev/"
    values = {
        "class": "kpa.autoscaling.knative.dev",
        "metric": "concurrency",
        "target": _decimal(settings.target_value),
        "target-utilization-percentage": _decimal(settings.target_utilisation_ratio, 100),
        "min-scale": str(settings.min_replicas),
        "max-scale": str(settings.max_replicas),
        "initial-scale": str(cell.n_pods),
        "window": f"{_decimal(settings.stable_window_s)}s",
        "panic-window-percentage": _decimal(settings.panic_window_ratio, 100),
        "panic-threshold-percentage": _decimal(settings.panic_threshold_ratio, 100),
        "scale-down-delay": f"{int(settings.down_delay_s)}s",
    }
    return {f"{prefix}{key}": value for key, value in values.items()}


def _decimal(value: float, times: int = 1) -> str:
    """The number as it is written, without an exponent; reading it gives the same float."""
    text = format(Decimal(repr(float(value))) * times, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
