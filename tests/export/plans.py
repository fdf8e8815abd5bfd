"""Plans to be exported: small ones by hand, and Hypothesis strategies for hostile ones."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import strategies as st

from engine.allocation import ANY, Allocation, Policies, Pool, Topology
from planner.export.cluster import Cluster, Store
from planner.export.provenance import Provenance
from planner.export.source import Source
from planner.plan_record import Estimate, Ids, Infeasible, PlanRecord, PoolRow, TopologyRow, TrafficRecord

PRICE_USD = 3.5
HOURS = 730.0
COMMAND = "diffplan export plan.json --to all --cluster cluster.yaml --out DIR"
CLUSTER = Cluster(
    image="registry.example.com/diffplan-engine:0.1.0",
    store=Store(volume_claim="models"),
    prometheus_url="http://prometheus.monitoring.svc:9090",
)
HOSTILE = (
    'a "quoted" name', "it's", "two\nlines", "a: b # c", "- item", "{{ .Values }}", "${file(\"/etc/passwd\")}", "%{ if true }x%{ endif }",
    '"} or vector(1) #', "x{job=~\".*\"}", "`id`", "$(reboot)", "; DROP", "=cmd|' /C calc'!A0", "+1", "@sum", "'", "''", "аdmin",
    "admin", "ADMIN", "Admin", "bаse", "no", "on", "null", "~", "1e3", "0x1f", "012", "1:20", ".inf", "\u2028", "\u0085", "\ufeff",
    "\u202etxt.exe", "\x00", "\x07", "\x7f", "\t", " lead", "trail ", "..", "../../etc", "a" * 5_000, "é" * 300, "😀", "<<", "!!python/x",
    "&a", "*a", "|", ">", "%", "---", "...", "base-1a2b3c4d", "{{template \"x\"}}", "[[ a ]]", "a,b", "a;b", "\\", "\\n", "{{ $value }}",
)  # fmt: skip


def pool(name: str = "base", n: int = 4, **other: Any) -> Pool:
    """A base pool, colocated unless said otherwise."""
    values: dict[str, Any] = {
        "role": "base",
        "gpu_kind": "nvidia-h200",
        "topology": "colocated",
        "base_model_ids": ("sdxl-base", ANY),
    }
    return Pool(name, n_replicas=n, **{**values, **other})


def decoupled(n_base: int, n_controlnet: int, **policies: Any) -> Allocation:
    """One base pool and one ControlNet pool that it shares hosts with."""
    base = pool(n=n_base, topology="decoupled", controlnet_ids=())
    workers = pool("controlnets", n_controlnet, role="controlnet", topology="decoupled", base_model_ids=())
    return Allocation((base, workers), policies=Policies(**policies))


def plan_of(allocation: Allocation, *, verdict: str = "recommended", **ids: Any) -> PlanRecord:
    """A plan that recommends this allocation, or is infeasible and names it as the nearest."""
    topology: Topology = allocation.pools[0].topology
    kind = allocation.pools[0].gpu_kind
    cost = allocation.n_gpus * PRICE_USD * HOURS
    plain = dataclasses.asdict(allocation)
    is_recommended = verdict == "recommended"
    values: dict[str, Any] = {
        "scenario_name": "shop", "scenario_sha256": "0" * 64, "trace_digest": "1" * 64, "profile_name": "somewhere-else.json",
        "profile_id": "0123456789ab", "profile_gpu_kind": kind, "profile_raw_sha256": "2" * 64, "price_table_id": "2026-11",
        "price_as_of": "2026-11-22", "price_source": "a quote", "price_usd_per_gpu_hour": PRICE_USD, "purchase": "on_demand",
        "hours_per_month": HOURS, "seed": 0, "diffplan_version": "0.1.0",
    }  # fmt: skip
    return PlanRecord(
        verdict="recommended" if is_recommended else "infeasible",
        sentence=f"Use {allocation.n_gpus} GPUs.",
        recommended=topology if is_recommended else None,
        slo_latency_s=20.0, slo_attainment_ratio=0.99, confidence=0.95, n_replications=5,
        allocation=plain if is_recommended else None,
        topologies=(row_of(allocation, cost),),
        runner_up="", alternatives=(), limited_by="", waterfall=None,
        infeasible=None if is_recommended else Infeasible(
            binds="gpus_max", why="too few GPUs", nearest="more GPUs", nearest_allocation=plain,
            nearest_n_gpus=allocation.n_gpus, nearest_cost_usd_per_month=cost,
        ),
        traffic=TrafficRecord(
            trace="trace.csv", source="", scale_factor=1.0, shift_law="same_hours", n_requests_before=100, n_requests=100,
            duration_s=3600.0, mean_per_s_before=0.1, mean_per_s=0.1, interarrival_cv_before=1.0, interarrival_cv=1.0,
            peak_to_mean_before=1.0, peak_to_mean=1.0, notes=(),
        ),
        ids=Ids(**{**values, **ids}),
        notes=(),
    )  # fmt: skip


def row_of(allocation: Allocation, cost_usd_per_month: float) -> TopologyRow:
    """What was simulated of the allocation."""
    none = Estimate(mean=None, low=None, high=None)

    def about(value: float) -> Estimate:
        return Estimate(mean=value, low=value * 0.9, high=value * 1.1)

    return TopologyRow(
        topology=allocation.pools[0].topology, verdict="meets_slo", why="", shape="",
        pools=tuple(
            PoolRow(name=p.name, role=p.role, n_replicas=p.n_replicas, n_gpus=p.n_gpus, hosts=(), busy_ratio=0.6, loading_ratio=0.01)
            for p in allocation.pools
        ),
        n_gpus=allocation.n_gpus, mean_load_gpus=2.0, peak_hour_load_gpus=3.0, cost_usd_per_month=cost_usd_per_month,
        cost_usd_per_1000_images=about(4.0), in_slo_images_per_s=about(1.5), slo_attainment_ratio=Estimate(mean=0.995, low=0.992, high=0.998),
        latency_p50_s=about(3.0), latency_p95_s=about(9.0), latency_p99_s=about(14.0), plain_latency_p50_s=none,
        plain_latency_p99_s=none, queue_wait_mean_s=about(0.8), rejected_ratio=0.0, limited_by="", grades={},
    )  # fmt: skip


def source_of(allocation: Allocation, **ids: Any) -> Source:
    """A source as ``load_source`` gives it, without files."""
    plan = plan_of(allocation, **ids)
    held = plan.ids
    provenance = Provenance(
        "a1" * 32, held.scenario_name, held.profile_name, held.profile_id, held.price_table_id, held.price_as_of,
        held.price_usd_per_gpu_hour, held.purchase, COMMAND, held.diffplan_version,
    )  # fmt: skip
    cost = allocation.n_gpus * PRICE_USD * HOURS
    return Source(plan, allocation, cost, plan.topologies[0], provenance)


names = st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40))
"""Names that a user, or somebody who means harm, may give; JSON can hold each of them."""


@st.composite
def hostile_sources(draw: st.DrawFn) -> Source:
    """Plans of up to three pools whose every free text is hostile."""
    kind = draw(names)
    pool_names = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    if len(pool_names) > 1 and draw(st.booleans()):
        base = pool(pool_names[0], draw(st.integers(2, 40)), topology="decoupled", controlnet_ids=(), gpu_kind=kind)
        others = [
            pool(
                name,
                draw(st.integers(8, 30)),
                role="controlnet",
                topology="decoupled",
                base_model_ids=(),
                gpu_kind=kind,
            )
            for name in pool_names[1:]
        ]
        pools = [dataclasses.replace(base, n_replicas=max(8, base.n_replicas)), *others]
    else:
        pools = [
            pool(name, draw(st.integers(1, 600)), gpu_kind=kind, n_gpus_per_replica=size, workers_per_gpu=per_gpu)
            for name, (size, per_gpu) in (
                (name, draw(st.sampled_from([(1, 1), (2, 1), (1, 3)]))) for name in pool_names
            )
        ]
    policies = Policies(
        queue_limit=draw(st.one_of(st.none(), st.integers(0, 500))),
        lora_cache_gib=draw(st.sampled_from([0.0, 0.3, 64.0])),
    )
    source = source_of(
        Allocation(tuple(pools), policies=policies),
        scenario_name=draw(names)[:100], profile_name=draw(names), price_table_id=draw(names), diffplan_version=draw(names),
    )  # fmt: skip
    return dataclasses.replace(
        source, provenance=dataclasses.replace(source.provenance, warnings=tuple(draw(st.lists(names, max_size=2))))
    )
