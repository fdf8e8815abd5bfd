"""Strict JSON schemas of the Kubernetes objects that are exported, bundled so that checking needs no network.

``kubernetes.json`` is the part of Kubernetes 1.30's published OpenAPI schemas (Apache-2.0, github.com/kubernetes/kubernetes)
that the exported kinds use, unknown fields closed, without descriptions. Made by ``make_kubernetes_schema.py`` beside this file.
"""
