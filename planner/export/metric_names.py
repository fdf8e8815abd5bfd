"""Names of the engine's metrics and of the labels that our scrape configuration adds: the one place that knows them.

The engine's side is ``engine/frontdoor/metrics.py``; a test holds the two together.
"""

from __future__ import annotations

from typing import Final

JOB: Final = "diffplan"
REQUESTS: Final = "diffplan_http_requests_total"
REQUEST_SECONDS: Final = "diffplan_request_seconds"
STAGE_SECONDS: Final = "diffplan_stage_seconds"
QUEUE_DEPTH: Final = "diffplan_queue_depth"
OLDEST_WAIT_SECONDS: Final = "diffplan_queue_oldest_wait_seconds"
JOBS_RUNNING: Final = "diffplan_jobs_running"
LORA_HITS: Final = "diffplan_lora_cache_hits_total"
LORA_MISSES: Final = "diffplan_lora_cache_misses_total"
WORKER_BUSY_SECONDS: Final = "diffplan_worker_busy_seconds_total"
WORKER_RESTARTS: Final = "diffplan_worker_restarts_total"
WORKER_READY: Final = "diffplan_worker_ready"
ENGINE_METRICS: Final = (
    REQUESTS, REQUEST_SECONDS, STAGE_SECONDS, QUEUE_DEPTH, OLDEST_WAIT_SECONDS, JOBS_RUNNING, LORA_HITS, LORA_MISSES,
    WORKER_BUSY_SECONDS, WORKER_RESTARTS, WORKER_READY,
)  # fmt: skip
SECONDS_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 25, 40, 60, 120, 300, 600)
"""Upper bounds of the engine's histograms."""
SERVICE_STAGES: Final = ("switch", "controlnet_load", "lora_wait", "text", "denoise", "decode")
CLIENT_FAULTS: Final = "40[0-8]|41.|422"
"""HTTP statuses of requests that were not for us to serve: malformed, unauthorised, too large. 429 and 5xx are ours."""
BUSY_RATIO_METRIC: Final = "diffplan_engine_busy_ratio"
"""Recorded by our rules, one series a pod: busy share of its base workers over 15 s, the period over which it is simulated."""


def quoted(text: str) -> str:
    """A PromQL string literal: quotes, backslashes and everything outside printable ASCII escaped."""
    escaped = []
    for character in text:
        code = ord(character)
        if character in '"\\':
            escaped.append(f"\\{character}")
        elif 0x20 <= code < 0x7F:
            escaped.append(character)
        elif code <= 0xFFFF:
            escaped.append(f"\\u{code:04x}")
        else:
            escaped.append(f"\\U{code:08x}")
    return '"' + "".join(escaped) + '"'


def selector(metric: str, **labels: str) -> str:
    """``metric{label="value",…}``, labels in the given order."""
    return f"{metric}{{{','.join(_labels(**labels))}}}"


def ongoing_requests(namespace: str, cell: str) -> str:
    """Requests that wait or run in the pods of one cell; no result at all, rather than 0, where no engine is scraped."""
    either = quoted(f"{QUEUE_DEPTH}|{JOBS_RUNNING}")
    return f"sum({{__name__=~{either},{','.join(_labels(job=JOB, namespace=namespace, cell=cell))}}})"


def _labels(**labels: str) -> list[str]:
    return [f"{name}={quoted(value)}" for name, value in labels.items()]
