"""Makes ``kubernetes.json``: the definitions that the exported kinds reach, from the package ``kubernetes-validate``.

    python planner/export/schemas/make_kubernetes_schema.py

The version is the oldest that is supported: what it accepts, newer clusters accept (a test checks against all of them).
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

VERSION = "v1.30.0-local-strict"
KINDS = {
    "ConfigMap": "io.k8s.api.core.v1.ConfigMap",
    "Deployment": "io.k8s.api.apps.v1.Deployment",
    "HorizontalPodAutoscaler": "io.k8s.api.autoscaling.v2.HorizontalPodAutoscaler",
    "Namespace": "io.k8s.api.core.v1.Namespace",
    "NetworkPolicy": "io.k8s.api.networking.v1.NetworkPolicy",
    "PodDisruptionBudget": "io.k8s.api.policy.v1.PodDisruptionBudget",
    "PriorityClass": "io.k8s.api.scheduling.v1.PriorityClass",
    "Service": "io.k8s.api.core.v1.Service",
    "ServiceAccount": "io.k8s.api.core.v1.ServiceAccount",
}
PREFIX = "#/$defs/"


def bundled() -> str:
    """The text of ``kubernetes.json``."""
    folder = resources.files("kubernetes_validate") / "kubernetes-json-schema" / VERSION
    everything = json.loads((folder / "_definitions.json").read_text(encoding="utf-8"))["$defs"]
    wanted: dict[str, Any] = {}
    todo = sorted(KINDS.values())
    while todo:
        name = todo.pop()
        if name not in wanted:
            wanted[name] = _bare(everything[name], todo)
    plain = {
        "source": f"Kubernetes {VERSION.removesuffix('-local-strict')} OpenAPI schemas, Apache-2.0, through kubernetes-validate",
        "kinds": KINDS,
        "$defs": dict(sorted(wanted.items())),
    }
    return json.dumps(plain, indent=1, sort_keys=True) + "\n"


def _bare(node: Any, todo: list[str], *, is_properties: bool = False) -> Any:
    """The schema without descriptions; definitions that it refers to are added to ``todo``."""
    if isinstance(node, list):
        return [_bare(item, todo) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        todo.append(name)
        return {"$ref": PREFIX + name}
    return {
        key: _bare(item, todo, is_properties=key == "properties")
        for key, item in node.items()
        if is_properties or key not in {"description", "x-kubernetes-group-version-kind"}
    }


if __name__ == "__main__":
    Path(__file__).with_name("kubernetes.json").write_text(bundled(), encoding="utf-8")
