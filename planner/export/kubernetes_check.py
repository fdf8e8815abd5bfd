"""Checks of Kubernetes objects before they are written: strict schemas, and the rules that schemas cannot state."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any, Final

import jsonschema_rs

from planner.export.names import dns_label

Object = Mapping[str, Any]
OBJECT_BYTES_MAX: Final = 1_000_000
"""etcd refuses requests over 1.5 MiB, ConfigMaps over 1 MiB."""
ANNOTATIONS_BYTES_MAX: Final = 262_144
API_VERSIONS: Final = {
    "ConfigMap": "v1",
    "Deployment": "apps/v1",
    "HorizontalPodAutoscaler": "autoscaling/v2",
    "Namespace": "v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "PodDisruptionBudget": "policy/v1",
    "PriorityClass": "scheduling.k8s.io/v1",
    "Service": "v1",
    "ServiceAccount": "v1",
}

OTHERS_GROUPS: Final = ("keda.sh/", "serving.knative.dev/")


def object_faults(objects: Iterable[Object]) -> list[str]:
    """Everything wrong with objects that are to be applied together; empty if they are right.

    Args:
        objects: Decoded documents. Kinds that Kubernetes itself does not define (KEDA's) are only looked at for their names.
    """
    everything = list(objects)
    faults: list[str] = []
    seen: set[tuple[str, str]] = set()
    for item in everything:
        where = f"{item.get('kind')}/{item.get('metadata', {}).get('name')}"
        key = (str(item.get("kind")), str(item.get("metadata", {}).get("name")))
        if key in seen:
            faults.append(f"{where}: occurs twice")
        seen.add(key)
        faults += [f"{where}: {fault}" for fault in (*_schema_faults(item), *_own_faults(item))]
    faults += _reference_faults(everything, seen)
    return faults


def _schema_faults(item: Object) -> Iterator[str]:
    kind = item.get("kind")
    if kind not in API_VERSIONS or str(item.get("apiVersion")).startswith(OTHERS_GROUPS):
        return
    if item.get("apiVersion") != API_VERSIONS[kind]:
        yield f"apiVersion is {item.get('apiVersion')!r}, needs {API_VERSIONS[kind]!r}"
    for error in _validator(kind).iter_errors(dict(item)):
        yield f"{'.'.join(str(part) for part in error.instance_path)}: {error.message[:300]}"


@cache
def _validator(kind: str) -> Any:
    bundle = _bundle()
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$ref": f"#/$defs/{bundle['kinds'][kind]}",
        "$defs": bundle["$defs"],
    }
    return jsonschema_rs.validator_for(schema)


@cache
def _bundle() -> dict[str, Any]:
    text = (resources.files("planner.export.schemas") / "kubernetes.json").read_text(encoding="utf-8")
    bundle: dict[str, Any] = json.loads(text)
    return bundle


def _own_faults(item: Object) -> Iterator[str]:
    metadata = item.get("metadata", {})
    name = metadata.get("name", "")
    if dns_label(name) != name and not _is_digested(name):
        yield f"name {name!r} is not a DNS label"
    for key, value in metadata.get("labels", {}).items():
        if not _fits_label(value):
            yield f"label {key} has the value {value!r}"
    annotations = metadata.get("annotations", {})
    if sum(len(key) + len(str(value).encode()) for key, value in annotations.items()) > ANNOTATIONS_BYTES_MAX:
        yield f"annotations are over {ANNOTATIONS_BYTES_MAX} bytes"
    n_bytes = len(json.dumps(item).encode())
    if n_bytes > OBJECT_BYTES_MAX:
        yield f"is {n_bytes} bytes, Kubernetes takes {OBJECT_BYTES_MAX}"
    spec = item.get("spec", {})
    if "minReplicas" in spec and spec["minReplicas"] > spec["maxReplicas"]:
        yield f"minReplicas {spec['minReplicas']} is above maxReplicas {spec['maxReplicas']}"
    if "minReplicaCount" in spec and spec["minReplicaCount"] > spec["maxReplicaCount"]:
        yield f"minReplicaCount {spec['minReplicaCount']} is above maxReplicaCount {spec['maxReplicaCount']}"
    scale = spec.get("template", {}).get("metadata", {}).get("annotations", {})
    least, most = (scale.get(f"autoscaling.knative.dev/{bound}-scale") for bound in ("min", "max"))
    if least is not None and int(least) > int(most):
        yield f"min-scale {least} is above max-scale {most}"
    if item.get("kind") == "Deployment":
        yield from _deployment_faults(spec)
    yield from (f"{path} is null" for path in _nulls(item, ""))


def _deployment_faults(spec: Mapping[str, Any]) -> Iterator[str]:
    template = spec["template"]
    labels = template["metadata"]["labels"]
    wanted = spec["selector"]["matchLabels"]
    if not wanted.items() <= labels.items():
        yield "its selector does not match its own pods"
    volumes = [volume["name"] for volume in template["spec"]["volumes"]]
    yield from (f"volume {name!r} occurs twice" for name in sorted({n for n in volumes if volumes.count(n) > 1}))
    for container in (*template["spec"].get("initContainers", ()), *template["spec"]["containers"]):
        for mount in container["volumeMounts"]:
            if mount["name"] not in volumes:
                yield f"container {container['name']!r} mounts {mount['name']!r}, which is no volume"
        resources_ = container.get("resources", {})
        for resource, request in resources_.get("requests", {}).items():
            limit = resources_.get("limits", {}).get(resource)
            if limit is not None and request != limit:
                yield f"container {container['name']!r} asks for {request} {resource} and is limited to {limit}"


def _reference_faults(objects: list[Object], seen: set[tuple[str, str]]) -> Iterator[str]:
    """Names that objects use must be names of objects."""
    pods = [item["spec"]["template"]["metadata"]["labels"] for item in objects if item.get("kind") == "Deployment"]
    for item in objects:
        where = f"{item.get('kind')}/{item.get('metadata', {}).get('name')}"
        if item.get("kind") == "Deployment":
            spec = item["spec"]["template"]["spec"]
            wanted = [("ServiceAccount", spec["serviceAccountName"]), ("PriorityClass", spec["priorityClassName"])]
            for volume in spec["volumes"]:
                sources = [volume, *volume.get("projected", {}).get("sources", [])]
                wanted += [("ConfigMap", source["configMap"]["name"]) for source in sources if "configMap" in source]
            yield from (
                f"{where}: names {kind}/{name}, which is not here" for kind, name in wanted if (kind, name) not in seen
            )
        selector = (
            item.get("spec", {}).get("selector") if item.get("kind") in {"Service", "PodDisruptionBudget"} else None
        )
        if selector is not None:
            labels = selector.get("matchLabels", selector)
            if not any(labels.items() <= pod.items() for pod in pods):
                yield f"{where}: selects no pod"


def _nulls(value: Any, path: str) -> Iterator[str]:
    if value is None:
        yield path.lstrip(".")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _nulls(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _nulls(item, f"{path}[{index}]")


def _fits_label(value: str) -> bool:
    stripped = value.strip("-._")
    return len(value) <= 63 and stripped == value and all(c.isascii() and (c.isalnum() or c in "-._") for c in value)


def _is_digested(name: str) -> bool:
    """A name that ends like a digest is changed by :func:`dns_label`, though it is a DNS label."""
    return (
        len(name) <= 63 and name.strip("-") == name and all(c in "abcdefghijklmnopqrstuvwxyz0123456789-" for c in name)
    )
