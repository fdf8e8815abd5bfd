"""From a plan to checked texts: makes what each target needs, reads it back, and refuses to hand out anything that lost a number."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

from engine.allocation import ANY, Allocation
from engine.catalogue import Catalogue, check_catalogue
from planner.export import bill
from planner.export.autoscaling import autoscaling_texts, planned_autoscalers
from planner.export.autoscaling_read import read_autoscalers
from planner.export.cells import Cell, cells_of
from planner.export.cluster import Cluster
from planner.export.counts import LostInExportError, counts_of
from planner.export.engine_command import CHECKPOINTS_ON_DEVICE
from planner.export.grafana import dashboard_json
from planner.export.host_memory import host_tiers, memory_request_gib, planned_memory_gib
from planner.export.kubernetes import kubernetes_texts, named_in, split_groups
from planner.export.kubernetes_check import object_faults
from planner.export.kubernetes_read import counts_in, objects_in
from planner.export.pods_figures import PodsCheck
from planner.export.pods_text import FILE_NAME as AS_EXPORTED
from planner.export.pods_text import check_json, check_lines, unchecked_line
from planner.export.prometheus import prometheus_texts
from planner.export.prometheus_check import counts_in_rules, rule_faults
from planner.export.source import Source
from planner.export.terraform import VARIABLES, counts_in_variables, node_pools, terraform_texts, variable_faults
from planner.export.tree import MANIFEST, manifest
from traces.problems import InputError, Problem, one_problem

Target = Literal["kubernetes", "autoscaling", "prometheus", "terraform", "json", "csv"]
TARGETS: Final[tuple[Target, ...]] = get_args(Target)
NEEDS_CLUSTER: Final = frozenset({"kubernetes", "autoscaling", "prometheus", "terraform"})


@dataclass(frozen=True, slots=True)
class Asked:
    """What a target's files are made of."""

    source: Source
    cluster: Cluster | None
    catalogue: Catalogue | None
    remarks: tuple[str, ...] = ()
    pods: PodsCheck | None = None

    @property
    def in_cluster(self) -> Cluster:
        """The cluster, which :func:`export_texts` has seen to be there."""
        assert self.cluster is not None  # noqa: S101
        return self.cluster


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export gives: every file's text, and what its user has to know."""

    texts: Mapping[str, str]
    """Path under the export's folder to text; the manifest is one of them."""
    notes: tuple[str, ...]


def chosen_targets(names: list[str]) -> tuple[Target, ...]:
    """The targets in their fixed order, each once; ``all`` stands for every one. Raises :class:`InputError` for other names."""
    unknown = sorted(set(names) - {*TARGETS, "all"})
    if unknown:
        raise one_problem("--to", f"got {unknown[0]!r:.80}", f"one of {', '.join(TARGETS)}, all")
    return tuple(target for target in TARGETS if target in names or "all" in names)


def command_line(
    targets: tuple[Target, ...],
    *,
    has_cluster: bool,
    is_forced: bool,
    is_difference: bool = False,
    is_rollback: bool = False,
    is_checking_pods: bool | None = None,
    is_growing: bool = False,
    is_autoscaled: bool = False,
    phase: int | None = None,
) -> str:
    """The command that makes the files again, with stand-ins for paths."""
    words = ["diffplan", "export", *(["--diff", "old.json", "new.json"] if is_difference else ["plan.json"])]
    words += ["--rollback"] if is_rollback else []
    for target in ("all",) if targets == TARGETS else targets:
        words += ["--to", target]
    words += ["--cluster", "cluster.yaml"] if has_cluster else []
    words += ["--phase", str(phase)] if phase is not None else []
    if is_checking_pods is not None:
        words += ["--check-pods" if is_checking_pods else "--no-check-pods"]
    words += ["--grow"] if is_growing else []
    words += ["--autoscaled"] if is_autoscaled else []
    words += ["--out", "DIR"]
    words += ["--force"] if is_forced else []
    return shlex.join(words)


def export_texts(
    source: Source,
    targets: tuple[Target, ...],
    cluster: Cluster | None = None,
    catalogue: Catalogue | None = None,
    pods: PodsCheck | None = None,
    why_unchecked: str = "",
) -> Exported:
    """Makes and checks every file of the targets.

    Args:
        cluster: Needed by the targets that run in one.
        catalogue: What the engines may load. None: what the allocation names, which leaves LoRAs out.
        pods: What simulating the pods has shown. None: it was not done, or there is one queue as planned.
        why_unchecked: Said where several queues were not simulated.

    Raises:
        InputError: a target needs a cluster and there is none, or the plan cannot run on it; every problem is named.
        LostInExportError: our own check found that a file does not say what the plan says.
    """
    asking = [target for target in targets if target in NEEDS_CLUSTER]
    if asking and cluster is None:
        raise one_problem(
            "--cluster", f"is not given, and --to {asking[0]} needs it", "a file that names image, store and nodes",
            "Copy examples/export/cluster.yaml and adapt it",
        )  # fmt: skip
    remarks = queue_lines(source, cluster, pods, why_unchecked) if "kubernetes" in targets else ()
    asked = Asked(source, cluster, catalogue, remarks, pods)
    texts: dict[str, str] = {}
    for target in targets:
        made = _MAKERS[target](asked)
        texts |= {f"{target}/{name}": text for name, text in made.items()}
    notes = (*_notes(asked, targets), *remarks)
    texts[MANIFEST] = manifest(source.provenance, targets, notes, texts)
    return Exported(texts, notes)


def queue_lines(source: Source, cluster: Cluster | None, pods: PodsCheck | None, why_unchecked: str) -> tuple[str, ...]:
    """What has to be said where one queue of the plan becomes several: what simulating them has shown, or that it was not done."""
    if cluster is None:
        return ()
    if pods is not None:
        return check_lines(pods, source)
    groups = split_groups(cells_of(source.allocation, cluster.gpus_per_node))
    return (unchecked_line(groups, why_unchecked),) if groups else ()


def _checked(target: str, source: Source, read: object) -> None:
    planned = counts_of(source.allocation)
    if read != planned:
        raise LostInExportError(target, planned, read)


def _json(asked: Asked) -> dict[str, str]:
    text = bill.bill_json(asked.source)
    _checked("json", asked.source, bill.read_bill_json(text))
    return {"bill.json": text}


def _csv(asked: Asked) -> dict[str, str]:
    text = bill.bill_csv(asked.source)
    _checked("csv", asked.source, bill.read_bill_csv(text))
    return {"bill.csv": text}


def _kubernetes(asked: Asked) -> dict[str, str]:
    source, cluster, catalogue = asked.source, asked.in_cluster, asked.catalogue
    check_known(source, catalogue)
    texts = kubernetes_texts(source, cluster, catalogue, asked.remarks)
    objects = objects_in(texts)
    refuse("kubernetes", object_faults(objects))
    _checked("kubernetes", source, counts_in(objects))
    if asked.pods is not None:
        texts[AS_EXPORTED] = check_json(asked.pods, source, source.provenance)
    return texts


def _autoscaling(asked: Asked) -> dict[str, str]:
    source, cluster = asked.source, asked.in_cluster
    if cluster.prometheus_url is None:
        raise one_problem(
            "cluster file prometheus_url", "is missing, and --to autoscaling needs it",
            "the address of a Prometheus that scrapes the engines", "Add it",
        )  # fmt: skip
    texts = autoscaling_texts(source, cluster)
    objects = objects_in(texts)
    refuse("autoscaling", object_faults(objects))
    planned = planned_autoscalers(source.allocation, cluster)
    read = read_autoscalers(objects)
    if read != planned:
        raise LostInExportError("autoscaling", planned, read)
    return texts


def _prometheus(asked: Asked) -> dict[str, str]:
    source, cluster = asked.source, asked.in_cluster
    texts = prometheus_texts(source, cluster.namespace)
    texts["dashboard.json"] = dashboard_json(source, cluster.namespace)
    refuse("prometheus", rule_faults(texts["rules.yml"], texts["dashboard.json"]))
    _checked("prometheus", source, counts_in_rules(texts["rules.yml"]))
    return texts


def _terraform(asked: Asked) -> dict[str, str]:
    source, cluster = asked.source, asked.in_cluster
    texts = terraform_texts(source, cluster)
    refuse("terraform", variable_faults(texts[VARIABLES]))
    _checked("terraform", source, counts_in_variables(texts[VARIABLES]))
    return texts


def check_known(source: Source, catalogue: Catalogue | None) -> None:
    """Raises :class:`InputError` for names that no engine would load: they are not in the catalogue, or not in its form."""
    named = named_in(source.allocation)
    if catalogue is None:
        problems = list(check_catalogue(named, "allocation"))
    else:
        known = set(catalogue.entries) | {entry.name for entry in catalogue.entries.values()}
        problems = [
            Problem("allocation", f"names {name[:80]!r}", "an id or name of the catalogue", "Add it with its file")
            for name in named.entries
            if name not in known
        ]
    if problems:
        raise InputError(problems)


def refuse(target: str, faults: list[str]) -> None:
    """Raises :class:`InputError` with the faults that a target's checker found; nothing if there are none."""
    if faults:
        raise InputError(
            [
                Problem(f"--to {target}", fault, "files that pass their checker", "Nothing was written")
                for fault in faults
            ]
        )


def _notes(asked: Asked, targets: tuple[Target, ...]) -> list[str]:
    source, cluster, catalogue = asked.source, asked.cluster, asked.catalogue
    notes = list(source.provenance.warnings)
    if cluster is not None and "terraform" in targets:
        for pool in node_pools(source, cluster).values():
            n_spare = pool["n_nodes"] * pool["gpus_per_node"] - pool["n_gpus_used"]
            if n_spare:
                notes.append(
                    f"Whole nodes with {pool['gpu_kind']} ({pool['n_nodes']}) have {n_spare} more GPUs than the plan uses and prices."
                )
    if cluster is None or "kubernetes" not in targets:
        return notes
    cells = cells_of(source.allocation, cluster.gpus_per_node)
    if catalogue is None:
        notes.append(
            "No catalogue is named in the cluster file. The exported one holds the checkpoints and ControlNets that the plan names, "
            "without files: engines started with it draw random weights and load no LoRA. Name yours before you apply this."
        )
    elif cluster.store.url is not None:
        models = [e for e in catalogue.entries.values() if e.kind != "lora" and e.file and e.seed is None]
        if models:
            notes.append(
                f"An HTTP store gives LoRAs only, and {len(models)} checkpoints and ControlNets of the catalogue have files: workers "
                "read those from a volume (store.volume_claim)."
            )
    notes += _memory_notes(cells, cluster, catalogue)
    if any(ANY in pool.base_model_ids for pool in source.allocation.pools):
        notes.append("Replicas may load any checkpoint of the catalogue, as simulated.")
    n_checkpoints = _checkpoints_of_a_replica(source.allocation, catalogue)
    if n_checkpoints > CHECKPOINTS_ON_DEVICE:
        notes.append(
            f"A replica serves up to {n_checkpoints} checkpoints. The plan keeps as many on the device as fit; an engine keeps "
            f"{CHECKPOINTS_ON_DEVICE} and takes the others from its host memory, unless an overlay adds --option n_checkpoints_max=N."
        )
    return notes


def _checkpoints_of_a_replica(allocation: Allocation, catalogue: Catalogue | None) -> int:
    """The most checkpoints that a base replica may be asked for, as far as plan and catalogue name them."""
    listed = {entry_id for entry_id, entry in catalogue.entries.items() if entry.kind == "base"} if catalogue else set()
    named = [set(pool.base_model_ids) for pool in allocation.pools_of("base")]
    return max((len((ids - {ANY}) | (listed if ANY in ids else set())) for ids in named), default=0)


def _memory_notes(cells: tuple[Cell, ...], cluster: Cluster, catalogue: Catalogue | None) -> list[str]:
    largest = max(cells, key=lambda cell: planned_memory_gib(cell.allocation, catalogue))
    planned = planned_memory_gib(largest.allocation, catalogue)
    asked = memory_request_gib(largest, cluster, catalogue)
    repair = "Lower policies.*_gib in the scenario, or give the catalogue sizes, to plan with less."
    cpu = "CPU is not planned: add requests in an overlay."
    if asked < planned:
        tiers = host_tiers(largest, cluster, catalogue)
        return [
            f"The plan lets the replicas of the largest pod keep {planned:.0f} GiB of models in host memory; its node has "
            f"{asked:.0f} GiB for it, so more loads come from the store than planned: each worker may keep "
            f"{tiers.checkpoint_gib:g} GiB of checkpoints and {tiers.controlnet_gib:g} GiB of ControlNets. {repair} {cpu}"
        ]
    return [
        f"The largest pod asks for {asked:.0f} GiB of host memory, the caches that the plan gives it. {repair} {cpu}"
    ]


_MAKERS: Final[Mapping[str, Callable[[Asked], dict[str, str]]]] = {
    "json": _json,
    "csv": _csv,
    "kubernetes": _kubernetes,
    "autoscaling": _autoscaling,
    "prometheus": _prometheus,
    "terraform": _terraform,
}
