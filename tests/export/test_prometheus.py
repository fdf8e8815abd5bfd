"""Rules and dashboard ask for what the engine really gives, fire when the plan is missed, and are silent when it is kept."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.allocation import Allocation
from planner.export import metric_names
from planner.export.grafana import dashboard_json
from planner.export.prometheus import in_time_rate, prometheus_texts, scrape_config, stage_intervals
from planner.export.prometheus_check import rule_faults
from planner.export.run import export_texts
from planner.export.simulated import SimulatedFigures, read_simulated
from planner.export.source import Source
from tests.export.plans import CLUSTER, pool, source_of
from traces.problems import InputError

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: apt-get install prometheus)"
)
FIGURES = SimulatedFigures(
    n_requests=1000, stage_mean_s={"switch": 0.0, "controlnet_load": 0.1, "lora_wait": 0.2, "text": 0.01, "denoise": 2.0, "decode": 0.1},
    lora_hit_ratio=0.8,
)  # fmt: skip
HERE = 'job="diffplan",namespace="diffplan"'


@pytest.fixture
def source() -> Source:
    return dataclasses.replace(source_of(Allocation((pool(n=4),))), simulated=FIGURES, noise_ratio=(0.98, 1.02))


def promtool(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def firing(source: Source, folder: Path, series: Mapping[str, str], at: str = "130m") -> list[str]:
    """Alerts that fire at a time, from promtool's own simulation; samples and rules every minute, to keep it short."""
    rules = prometheus_texts(source, "diffplan")["rules.yml"].replace('interval: "15s"', 'interval: "1m"')
    (folder / "rules.yml").write_text(rules, encoding="utf-8")
    test = {
        "rule_files": ["rules.yml"],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [
                    {"expr": 'count by (alertname) (ALERTS{alertstate="firing"})', "eval_time": at, "exp_samples": []}
                ],
            }
        ],
    }
    (folder / "test.yml").write_text(yaml.safe_dump(test), encoding="utf-8")
    done = promtool("test", "rules", "test.yml", folder=folder)
    got = (done.stdout + done.stderr).partition("got:")[2]
    assert done.returncode == 0 or "alertname" in got, done.stdout + done.stderr
    return sorted({part.split('"')[1] for part in got.split("alertname=")[1:]})


def healthy(
    late: int = 0, hits: int = 9, denoise_s: float = 2.0, waiting: str = "1x200", ready: int = 1
) -> dict[str, str]:
    """Series of an engine that answers 30 requests every minute, ``late`` of them after more than 25 s."""
    n = 30 - late
    series = {
        f'diffplan_http_requests_total{{{HERE},status="200"}}': "0+30x200",
        f'diffplan_request_seconds_bucket{{{HERE},status="done",le="16.0"}}': f"0+{n}x200",
        f'diffplan_request_seconds_bucket{{{HERE},status="done",le="25.0"}}': f"0+{n}x200",
        f'diffplan_queue_depth{{{HERE},pool="base"}}': waiting,
        f"diffplan_queue_oldest_wait_seconds{{{HERE}}}": "1x200",
        f"diffplan_lora_cache_hits_total{{{HERE}}}": f"0+{hits}x200",
        f"diffplan_lora_cache_misses_total{{{HERE}}}": "0+2x200",
        f'diffplan_stage_seconds_sum{{{HERE},status="done",stage="denoise"}}': f"0+{30 * denoise_s}x200",
        f'diffplan_stage_seconds_count{{{HERE},status="done",stage="denoise"}}': "0+30x200",
        f'up{{{HERE},pod="a"}}': "1x200",
    }
    for worker in range(4):
        labels = f'{HERE},pool="base",role="base",worker="w{worker}",pod="a"'
        series[f"diffplan_worker_ready{{{labels}}}"] = f"{1 if worker else ready}x200"
        series[f"diffplan_worker_restarts_total{{{labels}}}"] = "0x200"
    return series


@needs_promtool
def test_a_service_that_keeps_the_plan_fires_nothing(source: Source, tmp_path: Path) -> None:
    assert firing(source, tmp_path, healthy()) == []


@needs_promtool
@pytest.mark.parametrize(
    ("series", "alerts"),
    [
        # promised 99 %: a fifth late burns 20 times the budget, 14.4 times pages
        (healthy(late=6), ["DiffplanSloBurn1h", "DiffplanSloBurn3d", "DiffplanSloBurn6h"]),
        # 3.3 % late: neither 14.4 % nor 6 %, but above the 1 % that was promised over days
        (healthy(late=1), ["DiffplanSloBurn3d"]),
        (healthy(hits=2), ["DiffplanLoraHitsBelowPlan"]),
        (healthy(denoise_s=2.3), ["DiffplanStageOutsideDenoise"]),
        (healthy(denoise_s=1.7), ["DiffplanStageOutsideDenoise"]),
        (healthy(ready=0), ["DiffplanReplicasMissing"]),
    ],
    ids=["burn", "slow burn", "cache", "slower", "faster", "missing"],
)  # fmt: skip
def test_what_misses_the_plan_fires_its_alert_and_no_other(
    source: Source, tmp_path: Path, series: dict[str, str], alerts: list[str]
) -> None:
    assert firing(source, tmp_path, series) == alerts


@needs_promtool
def test_a_service_that_never_answered_in_time_fires_too(source: Source, tmp_path: Path) -> None:
    series = {name: values for name, values in healthy().items() if "request_seconds" not in name}
    assert "DiffplanSloBurn1h" in firing(source, tmp_path, series)


@needs_promtool
def test_malformed_requests_burn_no_budget_and_rejected_ones_do(source: Source, tmp_path: Path) -> None:
    malformed = {**healthy(), f'diffplan_http_requests_total{{{HERE},status="400"}}': "0+90x200"}
    assert firing(source, tmp_path, malformed) == []
    rejected = {**healthy(), f'diffplan_http_requests_total{{{HERE},status="429"}}': "0+90x200"}
    assert "DiffplanSloBurn1h" in firing(source, tmp_path, rejected)


@needs_promtool
def test_a_growing_queue_a_flapping_worker_and_a_lost_engine_fire(source: Source, tmp_path: Path) -> None:
    growing = {**healthy(waiting="0+1x200"), f"diffplan_queue_oldest_wait_seconds{{{HERE}}}": "15x200"}
    assert firing(source, tmp_path, growing) == ["DiffplanQueueGrows"]
    restarts = f'diffplan_worker_restarts_total{{{HERE},pool="base",role="base",worker="w0",pod="a"}}'
    assert firing(source, tmp_path, {**healthy(), restarts: "0+0.1x200"}) == ["DiffplanWorkerFlaps"]
    assert firing(source, tmp_path, {**healthy(), f'up{{{HERE},pod="a"}}': "0x200"}) == ["DiffplanEngineUnseen"]


@needs_promtool
@pytest.mark.parametrize("attainment", [0.5, 0.9, 0.95, 0.999])
def test_a_total_outage_pages_whatever_was_promised(source: Source, tmp_path: Path, attainment: float) -> None:
    plan = source.plan.model_copy(update={"slo_attainment_ratio": attainment})
    assert "DiffplanSloBurn1h" in firing(dataclasses.replace(source, plan=plan), tmp_path, healthy(late=30))


@needs_promtool
def test_promtool_accepts_the_scrape_configuration(tmp_path: Path) -> None:
    config = scrape_config("diffplan")
    # Debian builds Prometheus without Kubernetes discovery: everything else is checked
    job = config["scrape_configs"][0]
    del job["kubernetes_sd_configs"]
    job["static_configs"] = [{"targets": ["127.0.0.1:8080"]}]
    (tmp_path / "token").write_text("t", encoding="utf-8")
    job["authorization"]["credentials_file"] = "token"
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    done = promtool("check", "config", "prometheus.yml", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_share_in_time_is_linear_between_two_buckets() -> None:
    # 20 s lies 4/9 of the way from 16 to 25 s
    expr = in_time_rate(20.0, "5m", "diffplan")
    assert expr.startswith("0.555556 * ")
    assert 'le="16.0"' in expr
    assert (
        '0.444444 * sum(rate(diffplan_request_seconds_bucket{job="diffplan",namespace="diffplan",status="done",le="25.0"}'
        in expr
    )
    assert in_time_rate(25.0, "5m", "diffplan").count("rate(") == 1


def test_a_promise_beyond_the_last_bucket_is_refused() -> None:
    with pytest.raises(InputError, match="at most 600 s"):
        in_time_rate(900.0, "5m", "diffplan")


def test_metric_names_and_buckets_are_the_engines() -> None:
    metrics = pytest.importorskip("engine.frontdoor.metrics")
    client = pytest.importorskip("prometheus_client")
    text = Path(metrics.__file__).read_text(encoding="utf-8")
    assert metric_names.SECONDS_BUCKETS == metrics.SECONDS_BUCKETS
    for name in metric_names.ENGINE_METRICS:
        assert f'"{name.removesuffix("_total")}"' in text, name
    registry = client.CollectorRegistry()
    client.Histogram("seconds", "How long.", buckets=metrics.SECONDS_BUCKETS, registry=registry)
    exposed = client.generate_latest(registry).decode()
    for bound in metric_names.SECONDS_BUCKETS:
        assert f'le="{float(bound)!r}"' in exposed


def test_intervals_are_the_calibrated_ones_but_never_narrower_than_the_mix_allows() -> None:
    assert stage_intervals(FIGURES, (0.7, 1.05))["denoise"] == pytest.approx((1.4, 2.2))
    assert stage_intervals(FIGURES, None)["denoise"] == pytest.approx((1.8, 2.2))
    assert "text" not in stage_intervals(FIGURES, None)  # half a per cent of the service time


def test_the_dashboard_shows_the_plans_values_and_asks_only_for_what_exists(source: Source) -> None:
    dashboard = json.loads(dashboard_json(source, "diffplan"))
    by_title = {panel["title"]: panel for panel in dashboard["panels"]}
    steps = by_title["Latency p95"]["fieldConfig"]["defaults"]["thresholds"]["steps"]
    assert steps[-1]["value"] == source.plan.topologies[0].latency_p95_s.mean
    assert not rule_faults(prometheus_texts(source, "diffplan")["rules.yml"], json.dumps(dashboard))
    dashboard["panels"][0]["targets"][0]["expr"] = "diffplan_unheard_of"
    assert rule_faults(prometheus_texts(source, "diffplan")["rules.yml"], json.dumps(dashboard))


def test_a_template_in_an_alert_that_is_not_ours_is_found(source: Source) -> None:
    rules = yaml.safe_load(prometheus_texts(source, "diffplan")["rules.yml"])
    rules["groups"][1]["rules"][0]["annotations"]["summary"] = '{{ query "up" }}'
    assert any("template" in fault for fault in rule_faults(yaml.safe_dump(rules), dashboard_json(source, "diffplan")))


def test_without_simulated_records_the_alerts_that_need_them_are_left_out() -> None:
    texts: Mapping[str, Any] = export_texts(source_of(Allocation((pool(),))), ("prometheus",), CLUSTER).texts
    assert "DiffplanLoraHitsBelowPlan" not in texts["prometheus/rules.yml"]
    assert "DiffplanSloBurn1h" in texts["prometheus/rules.yml"]


def test_records_that_are_no_parquet_get_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "requests.parquet").write_text("no", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be read"):
        read_simulated(tmp_path)
    assert read_simulated(tmp_path / "elsewhere" / "plan.json") is None
