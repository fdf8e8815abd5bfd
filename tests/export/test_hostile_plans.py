"""Two hundred plans whose every name is hostile: each file of each target parses, passes its checker, and says what the plan says."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import hcl2
import kubernetes_validate
import pytest
from hypothesis import HealthCheck, given, settings
from ruamel.yaml import YAML

from engine.allocation import Allocation
from engine.catalogue import Catalogue, CatalogueEntry
from planner.export.cluster import Balancer
from planner.export.counts import counts_of
from planner.export.kubernetes_read import counts_in, objects_in
from planner.export.prometheus_check import counts_in_rules
from planner.export.run import TARGETS, export_texts
from planner.export.source import Source
from planner.export.terraform import VARIABLES, counts_in_variables
from tests.export.plans import CLUSTER, HOSTILE, hostile_sources, pool, source_of
from traces.problems import InputError

N_PLANS: Final = 200
CLUSTER_VERSIONS: Final = ("1.30", "1.34", "1.37")
WIDE = CLUSTER.model_copy(update={"gpus_per_node": 72, "balancer": Balancer(image="haproxy:3.0")})


def files_of(source: Source, target: str, texts: dict[str, str]) -> dict[str, str]:
    return {name.removeprefix(f"{target}/"): text for name, text in texts.items() if name.startswith(f"{target}/")}


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: apt-get install prometheus)"
)
def test_promtool_accepts_the_rules_of_every_plan(
    exported: list[tuple[Source, dict[str, str]]], tmp_path: Path
) -> None:
    paths = []
    for index, (_, texts) in enumerate(exported):
        path = tmp_path / f"rules-{index}.yml"
        path.write_text(texts["prometheus/rules.yml"], encoding="utf-8")
        paths.append(str(path))
    done = subprocess.run(
        ["promtool", "check", "rules", *paths], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("SUCCESS") == len(paths)


@pytest.fixture(scope="module")
def exported() -> list[tuple[Source, dict[str, str]]]:
    """Every plan that could be exported, with its files; building them checks them as the command does."""
    kept: list[tuple[Source, dict[str, str]]] = []

    @settings(
        max_examples=N_PLANS, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(hostile_sources())
    def build(source: Source) -> None:
        kept.append((source, dict(export_texts(source, TARGETS, WIDE).texts)))

    build()
    return kept


def test_every_plan_is_exported_to_every_target(exported: list[tuple[Source, dict[str, str]]]) -> None:
    assert len(exported) >= N_PLANS
    # engines of several nodes with a balancer before them, and plans that need none
    assert 0 < sum(any("/balancer-" in name for name in texts) for _, texts in exported) < len(exported)
    for source, texts in exported:
        planned = counts_of(source.allocation)
        assert counts_in(objects_in(files_of(source, "kubernetes", texts))) == planned
        assert counts_in_rules(texts["prometheus/rules.yml"]) == planned
        assert counts_in_variables(texts[f"terraform/{VARIABLES}"]) == planned


def test_every_file_says_where_it_comes_from(exported: list[tuple[Source, dict[str, str]]]) -> None:
    for source, texts in exported:
        for name, text in texts.items():
            for said in (source.provenance.plan_id, source.provenance.command, source.provenance.price_date):
                assert said in text, name
            assert json.dumps(source.provenance.profile_id)[1:-1] in text, name
            for warning in source.provenance.warnings:
                # other characters are written as escapes
                words = [word for word in warning[:200].split()[:-1] if word.isascii() and word.isalnum()]
                assert all(word in text for word in words), name


def test_files_of_hostile_plans_are_plain_ascii_except_in_comments_and_bills(
    exported: list[tuple[Source, dict[str, str]]],
) -> None:
    for _, texts in exported:
        for name, text in texts.items():
            body = [line for line in text.split("\n") if not line.startswith("#")]
            assert name.endswith(".csv") or "\n".join(body).isascii(), name


def test_kubernetes_own_schemas_accept_every_object(exported: list[tuple[Source, dict[str, str]]]) -> None:
    # the independent validator is slow: every thirtieth plan, each on one version of Kubernetes
    for index, (source, texts) in enumerate(exported[::30]):
        for item in objects_in(files_of(source, "kubernetes", texts)):
            kubernetes_validate.validate(item, CLUSTER_VERSIONS[index % len(CLUSTER_VERSIONS)], strict=True)


def test_ruamel_and_hcl2_read_what_was_written(exported: list[tuple[Source, dict[str, str]]]) -> None:
    for _, texts in exported[::50]:
        for name, text in texts.items():
            if name.endswith((".yaml", ".yml")):
                assert list(YAML(typ="safe", pure=True).load_all(text)), name
            elif name.endswith(".tf"):
                assert hcl2.loads(text), name
            elif name.endswith(".json"):
                json.loads(text)


@pytest.mark.skipif(shutil.which("terraform") is None, reason="terraform is not installed")
def test_terraform_reads_hostile_texts_as_texts(exported: list[tuple[Source, dict[str, str]]], tmp_path: Path) -> None:
    source, texts = max(
        exported, key=lambda item: sum("${" in str(v) for v in dataclasses.asdict(item[0].provenance).values())
    )
    for name, text in files_of(source, "terraform", texts).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for arguments in (["fmt", "-check"], ["init", "-backend=false"], ["validate"], ["apply", "-auto-approve"]):
        done = terraform(tmp_path, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    plan = json.loads(terraform(tmp_path, "output", "-json", "plan").stdout)
    assert plan == source.provenance.to_plain()


def terraform(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": str(folder),
        "CHECKPOINT_DISABLE": "1",
        "TF_IN_AUTOMATION": "1",
    }
    return subprocess.run(
        [shutil.which("terraform") or "terraform", *arguments, "-no-color"][: None if arguments[0] != "fmt" else 3],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("terraform") is None, reason="terraform is not installed")
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"n_nodes": 0}, "n_nodes_min <= n_nodes"),
        ({"purchase": "stolen"}, "on_demand or spot"),
        ({"n_gpus_used": 7}, "must add up"),
        ({"gpus_per_node": 0}, "gpus_per_node must be a whole number"),
    ],
)
def test_the_terraform_module_refuses_wrong_variables(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    texts = dict(export_texts(source_of(Allocation((pool(n=5),))), ("terraform",), CLUSTER).texts)
    for name, text in files_of(source_of(Allocation((pool(n=5),))), "terraform", texts).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    plain = json.loads((tmp_path / VARIABLES).read_text(encoding="utf-8"))
    plain["node_pools"]["nvidia-h200-on-demand"] |= change
    (tmp_path / VARIABLES).write_text(json.dumps(plain), encoding="utf-8")
    done = terraform(tmp_path, "plan", "-input=false")
    assert done.returncode != 0
    assert sentence in " ".join(done.stderr.replace("│", " ").split())


def test_ten_thousand_add_ons_fit_the_objects_kubernetes_takes() -> None:
    entries = {
        f"{index:064x}": CatalogueEntry(
            f"{index:064x}", "lora", bytes=186_000_000, rank=64, name=f"style/{index}", version="1", owner="somebody",
            licence="x" * 40, source="https://models.example.com/" + "y" * 60, file=f"loras/{index}.safetensors",
        )
        for index in range(10_000)
    }  # fmt: skip
    known = Catalogue({"sdxl-base": CatalogueEntry("sdxl-base", "base"), **entries})
    source = source_of(Allocation((pool(n=4),)))
    texts = export_texts(source, ("kubernetes",), CLUSTER, known).texts
    objects = objects_in(files_of(source, "kubernetes", dict(texts)))
    parts = [item for item in objects if item["metadata"]["name"].startswith("diffplan-catalogue-")]
    assert len(parts) > 1
    joined = "".join(text for item in parts for _, text in sorted(item["data"].items()))
    assert {entry["id"] for entry in json.loads(joined)["entries"]} == set(known.entries)
    (deployment,) = [item for item in objects if item["kind"] == "Deployment"]
    joiner = deployment["spec"]["template"]["spec"]["initContainers"][1]
    assert joiner["command"][:2] == ["sh", "-c"]


@pytest.mark.parametrize("name", [text for text in HOSTILE if not text.isalnum() or not text.isascii()][:12])
def test_a_name_that_no_engine_would_load_is_refused(name: str) -> None:
    source = source_of(Allocation((pool(base_model_ids=(name,)),)))
    with pytest.raises(InputError):
        export_texts(source, ("kubernetes",), CLUSTER)


def test_a_name_that_is_not_in_the_catalogue_is_refused() -> None:
    source = source_of(Allocation((pool(base_model_ids=("sdxl-base", "unknown")),)))
    with pytest.raises(InputError, match="'unknown'"):
        export_texts(source, ("kubernetes",), CLUSTER, Catalogue({"sdxl-base": CatalogueEntry("sdxl-base", "base")}))
