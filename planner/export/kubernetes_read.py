"""Reads exported Kubernetes files back: the pools they start, and the objects they create."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from engine.allocation import allocation_from_plain
from planner.export.counts import PoolCount
from planner.export.kubernetes import PODS_ANNOTATION
from planner.export.pod import GPU_RESOURCE
from planner.export.yaml_text import from_yaml


def objects_in(texts: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every object of the YAML files, Kustomizations left out."""
    return [
        document
        for name, text in sorted(texts.items())
        if name.endswith(".yaml")
        for document in from_yaml(text)
        if document.get("kind") != "Kustomization"
    ]


def counts_in(objects: list[dict[str, Any]]) -> tuple[PoolCount, ...]:
    """The pools that the Deployments start, summed over their pods.

    Raises:
        ValueError: a Deployment asks for another number of GPUs than its allocation.
    """
    maps = {item["metadata"]["name"]: item["data"] for item in objects if item["kind"] == "ConfigMap"}
    replicas: Counter[tuple[str, str, str]] = Counter()
    gpus: Counter[tuple[str, str, str]] = Counter()
    for item in objects:
        if item["kind"] != "Deployment" or PODS_ANNOTATION not in item["metadata"]["annotations"]:
            continue  # a balancer is no pool
        name, spec = item["metadata"]["name"], item["spec"]
        n_pods = int(item["metadata"]["annotations"][PODS_ANNOTATION])
        if spec.get("replicas", n_pods) != n_pods:
            raise ValueError(f"{name}: {spec['replicas']} replicas, planned {n_pods}")
        pod = spec["template"]["spec"]
        volume = next(volume for volume in pod["volumes"] if volume["name"] == "allocation")
        plain = json.loads(maps[volume["configMap"]["name"]]["allocation.json"])
        allocation = allocation_from_plain(plain, name)
        n_gpus = pod["containers"][0]["resources"]["limits"][GPU_RESOURCE]
        if n_gpus != allocation.n_gpus:
            raise ValueError(f"{name}: asks for {n_gpus} GPUs, its allocation needs {allocation.n_gpus}")
        for pool in allocation.pools:
            key = (pool.name, pool.role, pool.gpu_kind)
            replicas[key] += pool.n_replicas * n_pods
            gpus[key] += pool.n_gpus * n_pods
    return tuple(sorted(PoolCount(*key, replicas[key], gpus[key]) for key in replicas))
