"""The pod of one engine: GPUs, node, probes, drain, volumes, and nothing it does not need."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from engine.allocation import Allocation
from engine.catalogue import Catalogue
from planner.export.cells import Cell
from planner.export.cluster import Cluster
from planner.export.engine_command import (
    CATALOGUE_FILE,
    CATALOGUE_PARTS,
    HOST_TIER_FOLDER,
    LIVE_PATH,
    PORT,
    READY_PATH,
    RUN_FOLDER,
    STORE_FOLDER,
    STORE_TOKEN_FOLDER,
    STORE_TOKEN_KEY,
    TOKEN_FOLDER,
    TOKEN_KEY,
    TOKEN_SECRET_FOLDER,
    engine_arguments,
    engine_command,
)
from planner.export.host_memory import host_tiers, lora_tier_gib, memory_request_gib
from planner.export.names import label_value

USER_ID: Final = 10_001
GPU_RESOURCE: Final = "nvidia.com/gpu"
GPU_KIND_LABEL: Final = "diffplan/gpu-kind"
PURCHASE_LABEL: Final = "diffplan/purchase"
START_S_MAX: Final = 1800
"""Loading checkpoints and compiling: the engine's own limits are shorter and name the worker; this one only ends a pod that hangs."""
LEAVE_S: Final = 5
"""Requests that are on their way to a pod when it is told to stop arrive before it stops admitting."""
LEAVE_BALANCED_S: Final = 15
"""Likewise behind a balancer, which learns from DNS that the pod goes: names are kept up to 5 s by the cluster's DNS and 2 s by HAProxy."""
STOP_MARGIN_S: Final = 30
"""From the end of the drain until the processes are gone."""


@dataclass(frozen=True, slots=True)
class PodFiles:
    """Names of the ConfigMaps that a pod mounts."""

    allocation: str
    catalogue: tuple[str, ...]
    """One a part of the catalogue, in order."""


def pod_template(
    cell: Cell,
    cluster: Cluster,
    files: PodFiles,
    catalogue: Catalogue | None,
    labels: dict[str, str],
    slo_latency_s: float,
    purchase: str,
) -> dict[str, Any]:
    """The template of a Deployment's pods."""
    return {
        # nothing here names the plan: pods roll when what they run changes, not when a plan is made again
        "metadata": {"labels": labels},
        "spec": {
            "serviceAccountName": "diffplan-engine",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "priorityClassName": "diffplan-serving",
            "terminationGracePeriodSeconds": leave_s(cluster) + drain_s(slo_latency_s) + STOP_MARGIN_S,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER_ID,
                "runAsGroup": USER_ID,
                "fsGroup": USER_ID,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "nodeSelector": node_labels(cell.gpu_kind, purchase, cluster),
            "tolerations": [{"key": GPU_RESOURCE, "operator": "Exists", "effect": "NoSchedule"}],
            "initContainers": _init_containers(cluster, files),
            "containers": [_engine(cell, cluster, catalogue, slo_latency_s)],
            "volumes": _volumes(cell.allocation, cluster, files),
        },
    }


def node_labels(gpu_kind: str, purchase: str, cluster: Cluster) -> dict[str, str]:
    """Labels of the nodes that have this GPU kind, bought this way."""
    given = cluster.node_labels.get(gpu_kind)
    if given is not None:
        return dict(sorted(given.items()))
    return {GPU_KIND_LABEL: label_value(gpu_kind), PURCHASE_LABEL: label_value(purchase)}


def leave_s(cluster: Cluster) -> int:
    """From the moment a pod is told to stop until it admits nothing more."""
    return LEAVE_S if cluster.balancer is None else LEAVE_BALANCED_S


def drain_s(slo_latency_s: float) -> int:
    """How long a pod that is to go may finish what it admitted: twice the promise."""
    return math.ceil(2 * slo_latency_s)


def mebibytes(gib: float) -> str:
    """A Kubernetes quantity, rounded up, at least 1 Mi (0 would mean no limit)."""
    return f"{max(1, math.ceil(gib * 1024))}Mi"


def _engine(cell: Cell, cluster: Cluster, catalogue: Catalogue | None, slo_latency_s: float) -> dict[str, Any]:
    ready = {"httpGet": {"path": READY_PATH, "port": "http"}, "timeoutSeconds": 5}
    live = {"httpGet": {"path": LIVE_PATH, "port": "http"}, "timeoutSeconds": 5}
    mounts = [
        {"name": "allocation", "mountPath": "/etc/diffplan/allocation", "readOnly": True},
        {"name": "catalogue", "mountPath": "/etc/diffplan/catalogue", "readOnly": True},
        {"name": "tokens", "mountPath": TOKEN_FOLDER},
        {"name": "host-tier", "mountPath": HOST_TIER_FOLDER},
        {"name": "run", "mountPath": RUN_FOLDER},
        {"name": "scratch", "mountPath": "/tmp"},  # noqa: S108 - of the pod alone
    ]
    if cluster.store.volume_claim is not None:
        mounts.append({"name": "store", "mountPath": STORE_FOLDER, "readOnly": True})
    if cluster.store.token_secret is not None:
        mounts.append({"name": "store-token", "mountPath": STORE_TOKEN_FOLDER, "readOnly": True})
    return {
        "name": "engine",
        "image": cluster.image,
        "imagePullPolicy": cluster.image_pull_policy,
        "command": engine_command(),
        "args": engine_arguments(
            cluster.store, cell.n_gpus, drain_s(slo_latency_s), host_tiers(cell, cluster, catalogue), cluster.warm
        ),
        "env": [{"name": "HOME", "value": "/tmp"}],  # noqa: S108 - compile caches go where writing is allowed
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        "resources": {
            "limits": {GPU_RESOURCE: cell.n_gpus},
            "requests": {
                GPU_RESOURCE: cell.n_gpus,
                "memory": mebibytes(memory_request_gib(cell, cluster, catalogue)),
            },
        },
        "startupProbe": {**ready, "periodSeconds": 10, "failureThreshold": START_S_MAX // 10},
        "readinessProbe": {**ready, "periodSeconds": 5, "failureThreshold": 2},
        # asks only whether the front process answers: the engine restarts stuck workers itself
        "livenessProbe": {**live, "periodSeconds": 10, "failureThreshold": 6},
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(leave_s(cluster))]}}},
        "securityContext": _restricted(),
        "volumeMounts": mounts,
    }


def _init_containers(cluster: Cluster, files: PodFiles) -> list[dict[str, Any]]:
    """The engine wants its token file readable by itself alone, which a Secret volume with an fsGroup cannot be."""
    key = f"{TOKEN_SECRET_FOLDER}/{TOKEN_KEY}"
    made = [
        _init(
            cluster, "private-tokens", ["install", "-m", "0600", key, f"{TOKEN_FOLDER}/{TOKEN_KEY}"],
            [("token-secret", TOKEN_SECRET_FOLDER, True), ("tokens", TOKEN_FOLDER, False)],
        )
    ]  # fmt: skip
    if len(files.catalogue) > 1:
        made.append(
            _init(
                cluster,
                "join-catalogue",
                ["sh", "-c", f"cat {CATALOGUE_PARTS}/part-* > {CATALOGUE_FILE}"],
                [("catalogue-parts", CATALOGUE_PARTS, True), ("catalogue", "/etc/diffplan/catalogue", False)],
            )
        )
    return made


def _init(cluster: Cluster, name: str, command: list[str], mounts: list[tuple[str, str, bool]]) -> dict[str, Any]:
    return {
        "name": name,
        "image": cluster.image,
        "imagePullPolicy": cluster.image_pull_policy,
        "command": command,
        "securityContext": _restricted(),
        "volumeMounts": [
            {"name": volume, "mountPath": path, **({"readOnly": True} if is_read_only else {})}
            for volume, path, is_read_only in mounts
        ],
    }


def _restricted() -> dict[str, Any]:
    return {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


def _volumes(allocation: Allocation, cluster: Cluster, files: PodFiles) -> list[dict[str, Any]]:
    volumes: list[dict[str, Any]] = [{"name": "allocation", "configMap": {"name": files.allocation}}]
    if len(files.catalogue) == 1:
        items = [{"key": "part-000", "path": "catalogue.json"}]
        volumes.append({"name": "catalogue", "configMap": {"name": files.catalogue[0], "items": items}})
    else:
        volumes += [
            {"name": "catalogue", "emptyDir": {}},
            {
                "name": "catalogue-parts",
                "projected": {"sources": [{"configMap": {"name": n}} for n in files.catalogue]},
            },
        ]
    volumes += [
        {
            "name": "token-secret",
            "secret": {"secretName": cluster.token_secret, "items": [{"key": TOKEN_KEY, "path": TOKEN_KEY}]},
        },
        {"name": "tokens", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}},
        {"name": "host-tier", "emptyDir": {"medium": "Memory", "sizeLimit": mebibytes(lora_tier_gib(allocation))}},
        {"name": "run", "emptyDir": {}},
        {"name": "scratch", "emptyDir": {}},
    ]
    if cluster.store.volume_claim is not None:
        claim = {"claimName": cluster.store.volume_claim, "readOnly": True}
        volumes.append({"name": "store", "persistentVolumeClaim": claim})
    if cluster.store.token_secret is not None:
        items = [{"key": STORE_TOKEN_KEY, "path": STORE_TOKEN_KEY}]
        # a volume, not a subPath or a variable: a replaced Secret reaches the loaders without a restart
        secret = {"secretName": cluster.store.token_secret, "items": items, "defaultMode": 0o440}
        volumes.append({"name": "store-token", "secret": secret})
    return volumes
