"""Numbers for Prometheus, in a registry of their own. Labels are bounded: no tenant, no user, no text of a request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engine.frontdoor.health import EngineHealth
from engine.frontdoor.request_log import RequestTrail
from engine.serving.engine_view import EngineView

SECONDS_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 25, 40, 60, 120, 300, 600)
"""Between 1 and 12 s, where SDXL on current GPUs lies, no bucket is more than 1.5 times the one before."""
ADD_ON_LABELS_MAX: Final = 50
OTHER: Final = "other"
HEALTH_VALUES: Final = {"healthy": 2, "degraded": 1, "unhealthy": 0}


class FrontMetrics:
    """Counts requests as they end and asks the engines for the rest when it is scraped."""

    def __init__(
        self,
        views: Callable[[], Mapping[str, EngineView]],
        health: Callable[[], Mapping[str, EngineHealth]],
    ) -> None:
        disable_created_metrics()  # a series beside every counter that nobody reads
        self.registry = CollectorRegistry()
        self._labels: dict[str, dict[str, str]] = {}
        self._requests = Counter(
            "diffplan_http_requests",
            "Answered requests for images.",
            ["status", "code", "variant"],
            registry=self.registry,
        )
        self._latency = Histogram(
            "diffplan_request_seconds", "From the request's first byte to its answer.", ["status"],
            buckets=SECONDS_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._stage = Histogram(
            "diffplan_stage_seconds", "Time of a job by stage.", ["stage", "status"], buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )  # fmt: skip
        self._uses = Counter("diffplan_add_on_uses", "Uses of an add-on.", ["kind", "add_on"], registry=self.registry)
        self._images = Counter("diffplan_images", "Images made.", registry=self.registry)
        self._open = Gauge("diffplan_http_open_requests", "Requests being handled.", registry=self.registry)
        self._held = Gauge("diffplan_http_body_bytes", "Bytes of bodies held.", registry=self.registry)
        self.registry.register(_EngineCollector(views, health))

    def know(self, entries: Iterable[tuple[str, str, str]]) -> None:
        """Kind, id and title of catalogue entries: the first 50 of a kind get labels of their own, the rest share one."""
        for kind, entry_id, title in entries:
            known = self._labels.setdefault(kind, {})
            if entry_id not in known and len(known) < ADD_ON_LABELS_MAX:
                known[entry_id] = title

    def observe(self, trail: RequestTrail, latency_s: float) -> None:
        """Counts one answered request."""
        self._requests.labels(str(trail.http_status), trail.code, trail.variant).inc()
        status = trail.outcome.status if trail.outcome is not None else "refused"
        self._latency.labels(status).observe(latency_s)
        if trail.job is not None:
            for kind, used in (
                ("base", [trail.job.base_model_id]),
                ("controlnet", [use.controlnet_id for use in trail.job.controls]),
                ("lora", [use.lora_id for use in trail.job.loras]),
            ):
                for name in used:
                    self._uses.labels(kind, self._labels.get(kind, {}).get(name, OTHER)).inc()
        outcome = trail.outcome
        if outcome is None:
            return
        end_of_wait_s = outcome.end_s if outcome.start_s is None else outcome.start_s
        self._stage.labels("queue_wait", status).observe(max(0.0, end_of_wait_s - outcome.arrival_s))
        if outcome.result is not None:
            stages = outcome.result.stages
            for name in ("switch", "controlnet_load", "lora_wait", "text", "denoise", "decode"):
                self._stage.labels(name, status).observe(getattr(stages, f"{name}_s"))
            self._images.inc(len(outcome.result.images))

    def exposition(self, n_open: int, held_bytes: int) -> bytes:
        """The text format."""
        self._open.set(n_open)
        self._held.set(held_bytes)
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """What the engines know, read when it is asked for."""

    def __init__(
        self, views: Callable[[], Mapping[str, EngineView]], health: Callable[[], Mapping[str, EngineHealth]]
    ) -> None:
        self._views = views
        self._health = health

    def describe(self) -> Iterable[Metric]:
        return []  # so that registering asks no engine: none may have started yet

    def collect(self) -> Iterator[Metric]:
        views = self._views()
        yield from _queues(views)
        yield from _workers(views)
        health = GaugeMetricFamily("diffplan_engine_health", "2 healthy, 1 degraded, 0 unhealthy.", labels=["engine"])
        for name, judged in self._health().items():
            health.add_metric([name], HEALTH_VALUES[judged.status])
        yield health


def _queues(views: Mapping[str, EngineView]) -> Iterator[Metric]:
    depth = GaugeMetricFamily("diffplan_queue_depth", "Jobs that wait.", labels=["engine", "pool"])
    oldest = GaugeMetricFamily("diffplan_queue_oldest_wait_seconds", "Wait of the oldest job.", labels=["engine"])
    running = GaugeMetricFamily("diffplan_jobs_running", "Jobs that run.", labels=["engine"])
    submitted = CounterMetricFamily("diffplan_jobs_submitted", "Jobs submitted.", labels=["engine"])
    ended = CounterMetricFamily("diffplan_jobs_ended", "Jobs ended.", labels=["engine", "status"])
    retried = CounterMetricFamily("diffplan_jobs_retried", "Second attempts.", labels=["engine"])
    hits = CounterMetricFamily("diffplan_lora_cache_hits", "LoRAs found in the host tier.", labels=["engine"])
    misses = CounterMetricFamily("diffplan_lora_cache_misses", "LoRAs that had to be fetched.", labels=["engine"])
    held = GaugeMetricFamily("diffplan_lora_cache_bytes", "Bytes in the host tier.", labels=["engine"])
    for name, view in views.items():
        now = view.dispatch
        for pool, n_waiting in sorted(now.n_waiting_by_pool.items()):
            depth.add_metric([name, pool], n_waiting)
        oldest.add_metric([name], now.oldest_wait_s)
        running.add_metric([name], now.n_running)
        submitted.add_metric([name], now.n_submitted)
        for status, n_ended in sorted(now.n_ended.items()):
            ended.add_metric([name, status], n_ended)
        retried.add_metric([name], now.n_retried)
        hits.add_metric([name], now.n_lora_hits)
        misses.add_metric([name], now.n_lora_misses)
        held.add_metric([name], now.lora_cache_bytes)
    yield from (depth, oldest, running, submitted, ended, retried, hits, misses, held)


def _workers(views: Mapping[str, EngineView]) -> Iterator[Metric]:
    labels = ["engine", "pool", "role", "worker"]
    up = GaugeMetricFamily("diffplan_worker_ready", "1 if the worker is ready for work.", labels=labels)
    busy = CounterMetricFamily("diffplan_worker_busy_seconds", "Seconds of work.", labels=labels)
    restarts = CounterMetricFamily("diffplan_worker_restarts", "Restarts after a fault.", labels=labels)
    memory = GaugeMetricFamily(
        "diffplan_worker_memory_bytes", "Memory as the worker reports it.", labels=[*labels, "kind"]
    )
    wanted = GaugeMetricFamily(
        "diffplan_pool_replicas_wanted", "Replicas of the allocation.", labels=["engine", "pool"]
    )
    events = CounterMetricFamily("diffplan_events", "What happened to workers.", labels=["engine", "event"])
    for name, view in views.items():
        for worker in view.workers:
            where = [name, worker.pool, worker.role, worker.worker_id]
            up.add_metric(where, float(worker.state == "ready"))
            busy.add_metric(where, worker.busy_s)
            restarts.add_metric(where, worker.n_restarts)
            for kind, n_bytes in sorted(worker.memory_bytes.items()):
                memory.add_metric([*where, kind], n_bytes)
        for pool, n_wanted in sorted(view.wanted.items()):
            wanted.add_metric([name, pool], n_wanted)
        for event, n_events in sorted(view.n_events.items()):
            events.add_metric([name, event], n_events)
    yield from (up, busy, restarts, memory, wanted, events)
