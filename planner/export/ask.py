"""What ``diffplan export`` was asked, and the answer: the files it wrote, or the difference between two plans."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.catalogue import Catalogue, read_catalogue
from planner.export.cells import cells_of
from planner.export.cluster import Cluster, load_cluster
from planner.export.difference import change_between, change_json, change_markdown, change_plain, change_text
from planner.export.kubernetes import split_groups
from planner.export.kubernetes_read import objects_in
from planner.export.names import one_line
from planner.export.pods_figures import PodsCheck
from planner.export.run import Target, chosen_targets, command_line, export_texts
from planner.export.source import Source, grown, load_source
from planner.export.tree import MANIFEST, check_out, is_writable_parent, manifest, write_tree
from traces.problems import InputError, Problem, one_problem

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ExportQuestion:
    """The command's arguments."""

    plan: Path | None
    to: tuple[str, ...]
    out: Path | None
    cluster: Path | None
    diff: tuple[Path, Path] | None
    is_rollback: bool
    phase: int | None
    profile: Path | None
    is_forced: bool
    is_checking_pods: bool | None = None
    """Whether pods are simulated as exported. None: where several queues come of one, if the plan's scenario is at hand."""
    is_growing: bool = False
    """Whether a fleet that would break the promise as exported is replaced by the smallest one found that keeps it."""
    is_autoscaled: bool = False
    """Whether the plan's variant that scales by itself is exported."""


@dataclass(frozen=True, slots=True)
class ExportAnswer:
    """What the command says."""

    text: str
    plain: dict[str, Any]

    def to_plain(self) -> dict[str, Any]:
        """For ``--json``."""
        return self.plain


def answer(question: ExportQuestion, today: datetime.date, say: Say = lambda text: None) -> ExportAnswer:
    """Does what was asked; writes everything or nothing.

    Args:
        say: told what takes long.

    Raises:
        InputError: the arguments contradict each other, or a plan, the cluster file or the folder cannot be used.
    """
    _check(question)
    if question.diff is not None:
        return _difference(question, question.diff, today, say)
    assert question.plan is not None  # noqa: S101 - _check has seen to them
    assert question.out is not None  # noqa: S101
    targets = chosen_targets(list(question.to))
    cluster, catalogue = _cluster(question.cluster)
    source = _source(question, question.plan, targets, today)
    pods, why = _pods(question, question.plan, source, cluster, targets, say)
    if question.is_growing:
        source, pods = grown(source, pods, why)
    exported = export_texts(source, targets, cluster, catalogue, pods, why)
    written = write_tree(question.out, exported.texts)
    lines = [f"{one_line(source.sentence)}", "", f"{len(written)} files in {question.out}:"]
    lines += [f"  {path.relative_to(question.out)}" for path in written]
    if exported.notes:
        lines += ["", *(f"Note: {one_line(note)}" for note in exported.notes)]
    plain = {
        "out": str(question.out),
        "provenance": source.provenance.to_plain(),
        "files": sorted(exported.texts),
        "notes": list(exported.notes),
    }
    return ExportAnswer("\n".join(lines) + "\n", plain)


def _difference(question: ExportQuestion, plans: tuple[Path, Path], today: datetime.date, say: Say) -> ExportAnswer:
    """Only shown, or written with what the later plan needs; the earlier one is running, so it may be as old as it is."""
    old, new = reversed(plans) if question.is_rollback else plans
    targets = chosen_targets(list(question.to) or (["kubernetes"] if question.is_rollback else []))
    cluster, catalogue = _cluster(question.cluster)
    before = _source(question, old, targets, today, is_forced=True, is_before=True)
    is_shown_only = question.out is None
    after = _source(question, new, targets, today, is_forced=question.is_forced or is_shown_only)
    objects = None
    if cluster is not None:
        objects = (
            objects_in(export_texts(before, ("kubernetes",), cluster, catalogue).texts),
            objects_in(export_texts(after, ("kubernetes",), cluster, catalogue).texts),
        )
    change = change_between(before, after, objects)
    text = change_text(change)
    if question.out is None:
        return ExportAnswer(text, change_plain(change))
    pods, why = _pods(question, new, after, cluster, targets, say)
    exported = export_texts(after, targets, cluster, catalogue, pods, why)
    has_objects = cluster is not None and "kubernetes" in targets
    texts = {name: held for name, held in exported.texts.items() if name != MANIFEST}
    texts["change.json"] = change_json(change)
    texts["change.md"] = change_markdown(change, cluster.namespace if cluster is not None and has_objects else None)
    texts[MANIFEST] = manifest(after.provenance, targets, exported.notes, texts)
    written = write_tree(question.out, texts)
    lines = [
        text,
        f"{len(written)} files in {question.out}:",
        *(f"  {path.relative_to(question.out)}" for path in written),
    ]
    lines += [f"Note: {one_line(note)}" for note in exported.notes]
    return ExportAnswer("\n".join(lines) + "\n", {"out": str(question.out), **change_plain(change)})


def _check(question: ExportQuestion) -> None:
    problems = []
    if question.phase is not None and question.diff is not None:
        problems.append(Problem(f"--phase {question.phase}", "is given with --diff", "one plan", "Export the phase"))
    asks_pods = question.is_checking_pods or question.is_growing
    pods_flag = "--grow" if question.is_growing else "--check-pods"
    if question.phase is not None and asks_pods:
        problems.append(
            Problem(f"--phase {question.phase}", f"is given with {pods_flag}", "one of the two", "Leave one out")
        )
    if question.is_autoscaled and question.phase is not None:
        problems.append(Problem("--autoscaled", "is given with --phase", "one of the two", "Leave one out"))
    if question.is_growing and question.is_checking_pods is False:
        problems.append(Problem("--grow", "is given with --no-check-pods", "one of the two", "Leave one out"))
    if question.diff is not None and question.plan is not None:
        problems.append(
            Problem("PLAN", f"got {str(question.plan)!r} beside --diff", "one of the two", "Leave PLAN out")
        )
    if question.diff is None and question.plan is None:
        problems.append(
            Problem("PLAN", "is missing", "a plan.json, or the folder it is in", "Give it, or --diff OLD NEW")
        )
    if question.is_growing and question.diff is not None:
        problems.append(
            Problem("--grow", "is given with --diff", "the fleets that the plans state", "Export the plan by itself")
        )
    if question.is_checking_pods and question.diff is not None and question.out is None:
        problems.append(Problem("--check-pods", "is given without files to write", "--out DIR", "Give it"))
    if question.is_rollback and question.diff is None:
        problems.append(Problem("--rollback", "is given without --diff", "--diff OLD NEW", "Name both plans"))
    if question.out is None and (question.diff is None or question.to or question.is_rollback):
        problems.append(Problem("--out", "is missing", "a folder for the files", "Give it"))
    if question.diff is None and not question.to:
        problems.append(Problem("--to", "is missing", "a target", "Give one, or --to all"))
    if problems:
        raise InputError(problems)
    chosen_targets(list(question.to))
    if question.out is not None:
        check_out(question.out)
        if not is_writable_parent(question.out):
            raise one_problem(f"--out {question.out}", "cannot be written", "a folder that may be written")


def _pods(
    question: ExportQuestion, plan: Path, source: Source, cluster: Cluster | None, targets: tuple[Target, ...], say: Say
) -> tuple[PodsCheck | None, str]:
    """What simulating the pods has shown; else why they were not simulated."""
    from planner.export.pods_check import check_pods

    if question.is_checking_pods is None and not question.is_growing:
        if cluster is None or "kubernetes" not in targets:
            return None, ""
        if not split_groups(cells_of(source.allocation, cluster.gpus_per_node)):
            return None, ""  # one queue, as planned
        if question.phase is not None:
            return None, "Not simulated: the phase serves a part of the plan's traffic."
        try:
            return check_pods(plan, source, cluster, say), ""
        except InputError as error:
            return None, f"Not simulated: {one_line('; '.join(str(problem) for problem in error.problems))}"
    if not question.is_checking_pods and not question.is_growing:
        return None, "Not simulated, as asked (--no-check-pods)."
    if cluster is None or "kubernetes" not in targets:
        raise one_problem(
            "--grow" if question.is_growing else "--check-pods",
            "is given without a cluster of pods",
            "--to kubernetes with --cluster FILE",
            "Give both",
        )
    return check_pods(plan, source, cluster, say), ""


def _cluster(path: Path | None) -> tuple[Cluster | None, Catalogue | None]:
    if path is None:
        return None, None
    cluster, catalogue = load_cluster(path)
    return cluster, None if catalogue is None else read_catalogue(catalogue)


def _source(
    question: ExportQuestion,
    plan: Path,
    targets: tuple[Target, ...],
    today: datetime.date,
    *,
    is_forced: bool | None = None,
    is_before: bool = False,
) -> Source:
    command = command_line(
        targets,
        has_cluster=question.cluster is not None,
        is_forced=question.is_forced,
        is_difference=question.diff is not None,
        is_rollback=question.is_rollback,
        is_checking_pods=question.is_checking_pods,
        is_growing=question.is_growing,
        is_autoscaled=question.is_autoscaled,
        phase=question.phase,
    )
    forced = question.is_forced if is_forced is None else is_forced
    return load_source(
        plan,
        command,
        today,
        is_forced=forced,
        profile=question.profile,
        phase=question.phase,
        # what runs now is the plan's fixed fleet; its successor may scale
        is_autoscaled=question.is_autoscaled and (question.diff is None or not is_before),
    )
