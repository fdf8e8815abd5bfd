"""The objects of a plan: what each promises, and that the checker finds what a schema accepts."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.allocation import Allocation, Policies
from engine.catalogue import Catalogue, CatalogueEntry
from planner.export.cells import cells_of
from planner.export.cluster import Cluster, Store, load_cluster
from planner.export.engine_command import CHECKPOINTS_ON_DEVICE
from planner.export.host_memory import HostTiers, host_tiers, memory_request_gib, planned_memory_gib
from planner.export.kubernetes_check import object_faults
from planner.export.kubernetes_read import counts_in, objects_in
from planner.export.run import export_texts
from planner.export.schemas.make_kubernetes_schema import bundled
from tests.export.plans import CLUSTER, decoupled, pool, source_of
from traces.problems import InputError

SCHEMAS = Path(__file__).resolve().parents[2] / "planner" / "export" / "schemas"


def objects_of(
    allocation: Allocation, cluster: Cluster = CLUSTER, catalogue: Catalogue | None = None
) -> list[dict[str, Any]]:
    return objects_in(dict(export_texts(source_of(allocation), ("kubernetes",), cluster, catalogue).texts))


def of_kind(objects: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [item for item in objects if item["kind"] == kind]


@pytest.fixture(scope="module")
def objects() -> list[dict[str, Any]]:
    return objects_of(decoupled(12, 4))


@pytest.fixture
def pod(objects: list[dict[str, Any]]) -> dict[str, Any]:
    spec: dict[str, Any] = of_kind(objects, "Deployment")[0]["spec"]["template"]["spec"]
    return spec


def test_a_pod_asks_for_the_gpus_of_its_part_and_for_nodes_of_its_kind(pod: dict[str, Any]) -> None:
    resources = pod["containers"][0]["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == 8
    assert pod["nodeSelector"] == {"diffplan/gpu-kind": "nvidia-h200", "diffplan/purchase": "on_demand"}
    arguments = pod["containers"][0]["args"]
    assert arguments[arguments.index("--devices") + 1].count("cuda:") == 8


def test_a_pod_may_do_nothing_that_it_does_not_need(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    for container in (*pod["initContainers"], *pod["containers"]):
        held = container["securityContext"]
        assert (held["readOnlyRootFilesystem"], held["allowPrivilegeEscalation"]) == (True, False)
        assert held["capabilities"] == {"drop": ["ALL"]}


def test_a_pod_is_given_time_to_drain_and_is_probed_on_health(pod: dict[str, Any]) -> None:
    assert pod["terminationGracePeriodSeconds"] > source_of(decoupled(4, 2)).plan.slo_latency_s
    engine = pod["containers"][0]
    assert engine["readinessProbe"]["httpGet"]["path"] == "/health/ready"
    assert engine["livenessProbe"]["httpGet"]["path"] == "/health/live"


def test_the_engine_takes_the_arguments_that_pods_give_it(pod: dict[str, Any]) -> None:
    serving = pytest.importorskip("engine.serving_cli")
    import typer

    app = typer.Typer()
    app.command()(serving.serve)
    container = pod["containers"][0]
    assert container["command"] == ["diffplan", "engine", "serve"]
    context = typer.main.get_command(app).make_context("serve", list(container["args"]))
    given = context.params
    assert serving.devices_of(given["devices"][0])[-1] == "cuda:7"
    assert serving.parse_address(given["listen"])[1] == 8080
    assert given["drain_seconds"] < pod["terminationGracePeriodSeconds"]


def test_shapes_to_warm_are_what_the_engine_takes(tmp_path: Path) -> None:
    shapes = pytest.importorskip("engine.serving.warm_shapes")
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "image: a:1\nstore: {volume_claim: m}\nwarm: ['1024x1024:1', '512x768:2:unguided']\n", encoding="utf-8"
    )
    cluster, _ = load_cluster(path)
    container = of_kind(objects_of(decoupled(4, 2), cluster), "Deployment")[0]["spec"]["template"]["spec"][
        "containers"
    ][0]
    text = container["args"][container["args"].index("--warm") + 1]
    assert [str(shape) for shape in shapes.read_warm_shapes(text)] == list(cluster.warm)


def test_the_engines_own_paths_answer_the_probes() -> None:
    frontdoor = pytest.importorskip("engine.frontdoor.app")
    text = Path(frontdoor.__file__).read_text(encoding="utf-8")
    for path in ("/health/ready", "/health/live", "/metrics"):
        assert f'"{path}"' in text


def test_the_add_on_tier_has_the_planned_size(pod: dict[str, Any]) -> None:
    (tier,) = [volume for volume in pod["volumes"] if volume["name"] == "host-tier"]
    assert tier["emptyDir"] == {"medium": "Memory", "sizeLimit": f"{(6 * 64 + 8) * 1024}Mi"}  # 64 GiB a base, 1 a GPU


def test_secrets_are_named_and_never_written(objects: list[dict[str, Any]], pod: dict[str, Any]) -> None:
    assert not of_kind(objects, "Secret")
    (secret,) = [volume for volume in pod["volumes"] if volume["name"] == "token-secret"]
    assert secret["secret"]["secretName"] == "diffplan-tokens"


def test_the_stores_token_is_a_mounted_secret_that_the_loaders_read() -> None:
    from planner.export.cluster import Store

    store = Store(url="https://models.example.com/v1", token_secret="model-store")  # noqa: S106 - a Secret's name
    made = objects_of(decoupled(4, 2), CLUSTER.model_copy(update={"store": store}))
    assert not of_kind(made, "Secret")
    spec = of_kind(made, "Deployment")[0]["spec"]["template"]["spec"]
    (volume,) = [volume for volume in spec["volumes"] if volume["name"] == "store-token"]
    assert volume["secret"]["secretName"] == "model-store"
    assert volume["secret"]["defaultMode"] & 0o007 == 0  # the loader refuses a token that everybody can read
    engine = spec["containers"][0]
    (mount,) = [mount for mount in engine["volumeMounts"] if mount["name"] == "store-token"]
    assert f"loader_token_file={mount['mountPath']}/token" in engine["args"]
    assert "subPath" not in mount  # or a replaced Secret would not arrive


def test_an_http_store_is_said_not_to_give_checkpoints() -> None:
    from planner.export.cluster import Store

    catalogue = Catalogue({
        "sdxl-base": CatalogueEntry("sdxl-base", "base", file="checkpoints/base"),
        "canny": CatalogueEntry("canny", "controlnet", file="seed:1"),
    })  # fmt: skip
    over_http = CLUSTER.model_copy(update={"store": Store(url="https://models.example.com")})
    for cluster, is_said in ((over_http, True), (CLUSTER, False)):
        notes = export_texts(source_of(decoupled(4, 2)), ("kubernetes",), cluster, catalogue).notes
        assert any("gives LoRAs only, and 1 checkpoints" in note for note in notes) is is_said


def test_pods_roll_when_what_they_run_changes_and_not_when_a_plan_is_made_again() -> None:
    source = source_of(decoupled(12, 4))
    again = dataclasses.replace(
        source, provenance=dataclasses.replace(source.provenance, plan_id="b2" * 32, command="other")
    )
    templates = []
    for one in (source, again, source_of(decoupled(12, 4, lora_patch_by_step=3))):
        made = objects_in(dict(export_texts(one, ("kubernetes",), CLUSTER).texts))
        templates.append(of_kind(made, "Deployment")[0]["spec"]["template"])
    assert templates[0] == templates[1] != templates[2]


def test_network_policies_close_everything_but_clients_scrapes_names_and_the_store() -> None:
    cluster = Cluster(image="a:1", store=Store(url="https://models.example.com:8443/x"))
    policies = {
        item["metadata"]["name"]: item["spec"]
        for item in of_kind(objects_of(decoupled(4, 2), cluster), "NetworkPolicy")
    }
    assert "ingress" not in policies["diffplan-deny-all"]
    ports = [port["port"] for rule in policies["diffplan-engine"]["egress"] for port in rule["ports"]]
    assert ports == [53, 53, 8443]


def test_memory_is_what_the_catalogue_can_fill_if_that_is_less_than_planned() -> None:
    gib = 2**30
    known = Catalogue({
        "sdxl-base": CatalogueEntry("sdxl-base", "base", bytes=7 * gib),
        "depth": CatalogueEntry("depth", "controlnet", bytes=3 * gib),
        "style": CatalogueEntry("style", "lora", bytes=gib),
    })  # fmt: skip
    (cell,) = cells_of(Allocation((pool(n=4),)), 8)
    assert planned_memory_gib(cell.allocation, None) == 4 * (256 + 256 + 64)
    assert planned_memory_gib(cell.allocation, known) == 4 * (7 + 3 + 1)
    capped = CLUSTER.model_copy(update={"memory_gib_per_gpu": 2.5})
    assert memory_request_gib(cell, capped, known) == 10


def test_the_engine_is_told_to_keep_as_much_in_host_memory_as_was_simulated() -> None:
    options = pytest.importorskip("engine.workers.model_options").ModelOptions
    policies = Policies(checkpoint_host_cache_gib=40.5, controlnet_host_cache_gib=0.0)
    made = objects_of(dataclasses.replace(decoupled(4, 2), policies=policies))
    arguments = of_kind(made, "Deployment")[0]["spec"]["template"]["spec"]["containers"][0]["args"]
    given = dict(arguments[k + 1].split("=") for k, name in enumerate(arguments) if name == "--option")
    read = options.from_plain({name: json.loads(value) for name, value in given.items()})
    assert (read.host_checkpoint_gib, read.host_controlnet_gib) == (40.5, 0.0)


def test_what_a_replica_serves_beyond_the_engine_s_own_limit_is_said() -> None:
    options = pytest.importorskip("engine.workers.model_options").ModelOptions
    assert options().n_checkpoints_max == CHECKPOINTS_ON_DEVICE
    for ids, is_said in ((("a", "b"), False), (("a", "b", "c"), True)):
        allocation = Allocation((pool(n=2, base_model_ids=ids),))
        notes = export_texts(source_of(allocation), ("kubernetes",), CLUSTER).notes
        assert any("serves up to 3 checkpoints" in note for note in notes) is is_said


def test_on_nodes_with_less_memory_models_share_what_loras_leave_and_it_is_said() -> None:
    policies = Policies(checkpoint_host_cache_gib=60.0, controlnet_host_cache_gib=20.0, lora_cache_gib=10.0)
    allocation = Allocation((pool(n=4, controlnet_ids=("*",)),), policies=policies)
    (cell,) = cells_of(allocation, 8)
    roomy = CLUSTER.model_copy(update={"memory_gib_per_gpu": 90.0})
    assert host_tiers(cell, roomy, None) == HostTiers(60.0, 20.0)
    tight = CLUSTER.model_copy(update={"memory_gib_per_gpu": 50.0})
    assert host_tiers(cell, tight, None) == HostTiers(30.0, 10.0)  # 50 - 10 for LoRAs, of 80 planned: half
    notes = export_texts(source_of(allocation), ("kubernetes",), tight).notes
    assert any("each worker may keep 30 GiB of checkpoints and 10 GiB of ControlNets" in note for note in notes)
    assert host_tiers(cell, CLUSTER.model_copy(update={"memory_gib_per_gpu": 5.0}), None) == HostTiers(0.0, 0.0)


def test_the_bundled_schema_is_what_its_maker_makes() -> None:
    assert (SCHEMAS / "kubernetes.json").read_text(encoding="utf-8") == bundled()


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_builds_the_overlay(tmp_path: Path) -> None:
    texts = export_texts(source_of(decoupled(12, 4)), ("kubernetes", "autoscaling"), CLUSTER).texts
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    for folder, n_objects in (("kubernetes/overlays/cluster", 10), ("autoscaling", 1)):
        done = subprocess.run(
            ["kubectl", "kustomize", folder], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        built = list(yaml.safe_load_all(done.stdout))
        assert len(built) == n_objects
        if folder.startswith("kubernetes"):
            assert not object_faults(built)
            assert {count.n_gpus for count in counts_in(built)} == {12, 4}


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("spec", "template", "spec", "containers", 0, "imagePullPolice"), "Always", "Additional properties"),
        (("spec", "replicas"), "two", "is not of type"),
        (("spec", "template", "metadata", "labels"), {"a": "b"}, "does not match its own pods"),
        (("spec", "template", "spec", "serviceAccountName"), "nobody", "which is not here"),
        (("spec", "template", "spec", "volumes", 0, "configMap", "name"), "gone", "which is not here"),
        (("spec", "template", "spec", "containers", 0, "volumeMounts", 0, "name"), "gone", "which is no volume"),
        (("spec", "template", "spec", "containers", 0, "resources", "requests", "nvidia.com/gpu"), 9, "asks for 9"),
        (("spec", "template", "spec", "containers", 0, "image"), None, "is null"),
        (("metadata", "labels", "x"), "not a label!", "has the value"),
        (("metadata", "name"), "Not_A_Label", "is not a DNS label"),
        (("metadata", "annotations", "x"), "y" * 300_000, "annotations are over"),
    ],
)
def test_the_checker_finds_what_is_wrong(
    objects: list[dict[str, Any]], path: tuple[Any, ...], value: object, sentence: str
) -> None:
    broken = copy.deepcopy(objects)
    place: Any = of_kind(broken, "Deployment")[0]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert not object_faults(objects)
    assert any(sentence in fault for fault in object_faults(broken))


def test_two_objects_of_one_name_and_a_service_without_pods_are_found(objects: list[dict[str, Any]]) -> None:
    assert any("occurs twice" in fault for fault in object_faults([*objects, objects[0]]))
    lonely = [item for item in objects if item["kind"] != "Deployment"]
    assert any("selects no pod" in fault for fault in object_faults(lonely))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("image: a:1\nstore: {}\n", "needs either 'url' or 'volume_claim'"),
        ("image: a:1\nstore: {url: 'ftp://x'}\n", "store.url"),
        ("image: a:1\nstore: {url: 'http://x', token_secret: s}\n", "would send its token unencrypted"),
        ("image: a:1\nstore: {volume_claim: m, token_secret: s}\n", "has a 'token_secret' and no 'url'"),
        ("image: a:1\nstore: {volume_claim: m}\nbalancer: {image: 'a b'}\n", "balancer.image"),
        ("image: a:1\nstore: {volume_claim: m}\nbalancer: {image: a, cluster_domain: 'x y'}\n", "cluster_domain"),
        ("image: a:1\nstore: {volume_claim: m}\nwarm: ['large']\n", "warm"),
        ("image: 'a b'\nstore: {volume_claim: m}\n", "image"),
        ("image: a:1\nstore: {volume_claim: m}\nnamespace: Not_A_Label\n", "namespace"),
        ("image: a:1\nstore: {volume_claim: m}\ngpus_per_node: 0\n", "gpus_per_node"),
        ("image: a:1\nstore: {volume_claim: m}\nnode_labels: {h: {'a b': c}}\n", "label key"),
        ("image: a:1\nstore: {volume_claim: m}\nimagine: 1\n", "imagine"),
        ("image: a:1\nstore: {volume_claim: m\n", "cluster.yaml"),
    ],
)
def test_a_wrong_cluster_file_gets_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=sentence):
        load_cluster(path)
