"""Exported autoscalers hold the very settings that were simulated, or the export is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from engine.allocation import Allocation, read_allocation, to_json
from engine.policies.autoscale_settings import Autoscale, autoscale_faults
from planner.export.autoscaling import autoscaling_texts
from planner.export.autoscaling_read import read_autoscalers
from planner.export.autoscaling_settings import FIELDS, KNATIVE_CLUSTER_WIDE, effective
from planner.export.kubernetes_check import object_faults
from planner.export.kubernetes_read import objects_in
from planner.export.run import export_texts
from tests.export.plans import CLUSTER, decoupled, pool, source_of
from traces.problems import InputError

KEDA_CRD = Path(__file__).resolve().parents[3] / "shared" / "schemas" / "keda.sh_scaledobjects.yaml"


def scaled(settings: Autoscale, n: int = 4) -> Allocation:
    return Allocation((pool(n=n, autoscale=settings),))


def objects_of(allocation: Allocation) -> list[dict[str, Any]]:
    return objects_in(autoscaling_texts(source_of(allocation), CLUSTER))


seconds = st.integers(1, 1800).map(float)
percents = st.integers(0, 300).map(lambda percent: percent / 100)


@st.composite
def expressible(draw: st.DrawFn) -> Autoscale:
    kind = draw(st.sampled_from(["keda", "hpa", "kpa"]))
    values: dict[str, Any] = {
        "kind": kind,
        "max_replicas": draw(st.integers(4, 5000)),
        "min_replicas": draw(st.integers(0 if kind == "kpa" else 1, 4)),
        "target": draw(st.sampled_from([None, 0.5, 0.85, 1.0, *([] if kind == "hpa" else [7.0, 33.125])])),
        "start_s": draw(st.sampled_from([0.0, 45.5, 300.0])),
    }
    if kind == "kpa":
        values |= {
            "target_utilisation_ratio": draw(st.sampled_from([0.7, 0.57, 1.0])),
            "stable_window_s": draw(st.integers(6, 3600).map(float)),
            "panic_window_ratio": draw(st.sampled_from([0.1, 0.29])),
            "panic_threshold_ratio": draw(st.sampled_from([2.0, 1.1])),
            "down_delay_s": draw(st.integers(0, 3600).map(float)),
        }
    else:
        values |= {f"{way}_{name}_s": draw(seconds) for way in ("up", "down") for name in ("window", "period")}
        values |= {
            "up_replicas": draw(st.integers(1, 50)), "up_ratio": draw(percents), "down_replicas": draw(st.integers(1, 50)),
            "down_ratio": min(1.0, draw(percents)),
        }  # fmt: skip
    if kind == "keda":
        values |= {
            "polling_s": draw(seconds),
            "cooldown_s": draw(seconds),
            "activation": draw(st.sampled_from([0.0, 0.5, 3.0])),
        }
    made = Autoscale(**values)
    assert not autoscale_faults(made, 4)
    return made


@settings(max_examples=100, deadline=None)
@given(expressible())
def test_what_is_read_back_is_what_was_simulated(wanted: Autoscale) -> None:
    objects = objects_of(scaled(wanted))
    assert not object_faults(objects)
    assert read_autoscalers(objects) == {"base-1": effective(wanted)}


def test_every_setting_is_exported_or_refused_by_name() -> None:
    refused = {"warm_replicas", "interval_s", "tolerance_ratio", *KNATIVE_CLUSTER_WIDE}
    of_ray_serve = {
        "look_back_s", "upscale_delay_s", "downscale_delay_s", "downscale_to_zero_delay_s", "upscaling_factor",
        "downscaling_factor",
    }  # fmt: skip
    known = {name for names in FIELDS.values() for name in names} | refused | of_ray_serve
    assert {field.name for field in dataclasses.fields(Autoscale)} == known


def test_the_exported_settings_simulate_as_the_plan_does(tmp_path: Path) -> None:
    # the simulator reads an allocation: the one made of the exported files is the planned one, field by field
    planned = scaled(effective(Autoscale(max_replicas=9, kind="keda", target=2.5, cooldown_s=120.0)))
    (read,) = read_autoscalers(objects_of(planned)).values()
    path = tmp_path / "allocation.json"
    path.write_text(to_json(Allocation((dataclasses.replace(planned.pools[0], autoscale=read),))), encoding="utf-8")
    assert read_allocation(path) == planned


def test_an_autoscaled_deployment_leaves_its_number_of_pods_to_the_autoscaler() -> None:
    source = source_of(scaled(Autoscale(max_replicas=9)))
    texts = dict(export_texts(source, ("kubernetes", "autoscaling"), CLUSTER).texts)
    objects = objects_in({name: text for name, text in texts.items() if name.endswith(".yaml")})
    (deployment,) = [item for item in objects if item["kind"] == "Deployment"]
    (scaler,) = [item for item in objects if item["kind"] == "ScaledObject"]
    assert "replicas" not in deployment["spec"]
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert scaler["spec"]["fallback"]["replicas"] == 4  # without metrics: what was planned


def test_a_fixed_plan_is_pinned_and_says_that_no_scaling_was_simulated() -> None:
    texts = autoscaling_texts(source_of(decoupled(12, 4)), CLUSTER)
    (scaler,) = objects_in(texts)
    assert scaler["spec"]["minReplicaCount"] == scaler["spec"]["maxReplicaCount"] == 2
    assert "no scaling was simulated" in texts["keda-base-1.yaml"]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"warm_replicas": 1}, "warm_replicas is 1"),
        ({"interval_s": 20.0}, "interval_s is 20"),
        ({"tolerance_ratio": 0.2}, "a setting of the whole cluster"),
        ({"polling_s": 1.5}, "whole seconds"),
        ({"down_window_s": 7200.0}, "0..3600 s"),
        ({"up_ratio": 0.333}, "whole percents"),
        ({"min_replicas": 0}, "no engine whose queue could ask"),
        ({"kind": "ray_serve"}, "Ray Serve does not run this engine"),
        ({"kind": "kpa", "max_up_ratio": 10.0}, "max_up_ratio is 10"),
        ({"kind": "kpa", "stable_window_s": 5.0}, "6..3600 s"),
    ],
)
def test_a_setting_that_the_target_cannot_hold_is_refused(changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        autoscaling_texts(source_of(scaled(Autoscale(**{"max_replicas": 9, **changed}))), CLUSTER)


def test_a_pool_that_scales_beside_another_on_its_host_is_refused() -> None:
    base, workers = decoupled(4, 2).pools
    allocation = Allocation((dataclasses.replace(base, autoscale=Autoscale(max_replicas=9)), workers))
    with pytest.raises(InputError, match="'base' scales on its own"):
        autoscaling_texts(source_of(allocation), CLUSTER)


def test_a_minimum_above_the_maximum_is_found_where_schemas_accept_it() -> None:
    for kind, fields in (("keda", ("minReplicaCount", "maxReplicaCount")), ("hpa", ("minReplicas", "maxReplicas"))):
        (item,) = objects_of(scaled(Autoscale(max_replicas=9, kind=kind)))  # type: ignore[arg-type]
        item["spec"] |= {fields[0]: 10}
        assert any("is above" in fault for fault in object_faults([item]))


@pytest.mark.skipif(not KEDA_CRD.is_file(), reason=f"KEDA's CRD is not redistributed and not at {KEDA_CRD}")
def test_kedas_own_schema_with_closed_objects_accepts_the_scaled_objects() -> None:
    (crd,) = YAML(typ="safe", pure=True).load_all(KEDA_CRD.read_text(encoding="utf-8"))
    schema = closed(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    validator = jsonschema_rs.validator_for(schema)
    for wanted in (
        None,
        Autoscale(max_replicas=9),
        Autoscale(max_replicas=9, activation=1.5, down_replicas=2, down_ratio=0.0),
    ):
        (item,) = objects_of(Allocation((pool(n=4, autoscale=wanted),)))
        assert not [error.message for error in validator.iter_errors(item)]
        item["spec"]["coolDownPeriod"] = 3
        assert not validator.is_valid(item)


def closed(schema: Any) -> Any:
    """The schema with ``additionalProperties: false`` on every object that lists its properties."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if isinstance(made.get("properties"), dict) and "additionalProperties" not in made:
        made["additionalProperties"] = False
    return made
