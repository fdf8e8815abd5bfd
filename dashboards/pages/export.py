"""The page Export: the plan's own files, and what other systems read, as one archive."""

from __future__ import annotations

import datetime
from typing import Any, Final

import streamlit as st
import yaml

from dashboards import link, uploads
from dashboards.elements import draw_empty, draw_problem
from dashboards.folder_job import Archive, ExportWish, compute_export, exported_folder
from dashboards.here import Here
from dashboards.phases import known_phases
from dashboards.plain_text import escaped
from dashboards.plan_folder import plan_digest
from dashboards.plan_job import Plan
from dashboards.planning import ask_plan, store, with_progress
from dashboards.results import draw_files
from dashboards.words import say
from planner.export.cluster import Cluster
from planner.export.run import NEEDS_CLUSTER, TARGETS
from planner.export.source import load_source
from planner.plan_record import PhaseRow
from planner.strict_yaml import parse_strict
from traces.problems import InputError, one_problem

WANTED: Final = "ex_targets"
PHASE: Final = "ex_phase"
MADE: Final = "_exported"
CLUSTER_BYTES_MAX: Final = 100_000
SHOWN_CHARACTERS: Final = 20_000
TEXTS: Final = (
    ("image", "", "registry.example.com/diffplan-engine:0.1.0"), ("store", "", "https://models.example.com"), ("volume", "", "diffplan-models"),
    ("namespace", "diffplan", "diffplan"), ("prometheus_url", "", "http://prometheus.monitoring.svc:9090"),
)  # fmt: skip
"""Text fields of the cluster: name, what they start at, and an example that is shown while they are empty."""


def draw(here: Here) -> None:
    """The whole page below the frame."""
    plan = ask_plan(here)
    if plan is None:
        return
    draw_files(plan.files)
    st.caption(say("export.files.note"))
    record = plan.record
    if record.allocation is None and (record.infeasible is None or record.infeasible.nearest_allocation is None):
        draw_empty(say("export.none"))
        return
    known = known_phases(plan)
    phases = known.phases if known is not None else ()
    targets = _ask_targets()
    phase = _ask_phase(phases)
    try:
        needs_cluster = bool(NEEDS_CLUSTER & set(targets))
        cluster = _ask_cluster() if needs_cluster else None
        doubts = load_source(
            exported_folder(plan, phases), "", datetime.datetime.now(tz=datetime.UTC).date(), is_forced=True, phase=phase
        ).provenance.warnings  # fmt: skip
    except InputError as error:
        draw_problem(say("roi.refused"), str(error))
        return
    is_forced = _ask_confirmation(doubts, plan, phase)
    checks = bool({"kubernetes"} & set(targets)) and phase is None and record.recommended is not None
    checks = checks and st.checkbox(say("export.check_pods"), key="ex_check_pods", help=say("export.check_pods.help"))
    wish = ExportWish(targets, cluster, phase, phases, is_forced, checks)
    _draw_made(plan, wish, missing=_missing(targets, needs_cluster and cluster is None, bool(doubts) and not is_forced))


def _missing(targets: tuple[str, ...], is_cluster_open: bool, is_unconfirmed: bool) -> str:
    """What the visitor still has to say; empty if nothing."""
    if not targets:
        return say("export.no_target")
    if is_cluster_open:
        return say("export.no_cluster")
    return say("export.must_confirm") if is_unconfirmed else ""


def _ask_targets() -> tuple[str, ...]:
    if WANTED not in st.session_state:
        said = link.text("to")
        named = said.split(",") if said else ["json", "csv"]
        for name in named:
            if name not in TARGETS:
                link.ignore("to", name)
        st.session_state[WANTED] = [target for target in TARGETS if target in named]
    chosen: list[str] = st.pills(
        say("export.targets"), TARGETS, selection_mode="multi", key=WANTED, help=say("export.targets.help"), persist_state="session"
    )  # fmt: skip
    targets = tuple(target for target in TARGETS if target in chosen)
    link.put(to=",".join(targets) or None)
    return targets


def _ask_phase(phases: tuple[PhaseRow, ...]) -> int | None:
    new = [phase for phase in phases if phase.allocation is not None]
    if not new:
        st.caption(say("export.phase.none"))
        return None
    names = {0: say("export.phase.all")}
    names |= {
        phase.number: say("export.phase.one", n=phase.number, name=say(f"roi.phase.{phase.name.split()[0]}"))
        for phase in new
    }
    if st.session_state.get(PHASE) not in names:
        st.session_state[PHASE] = 0
    chosen = st.selectbox(
        say("export.phase"), list(names), format_func=lambda number: names[number], key=PHASE, persist_state="session"
    )
    return chosen or None


def _ask_cluster() -> str | None:
    """The cluster file, from the upload or from the fields; None while these lack what has no default. Raises :class:`InputError` if it is none, or names a file of this machine."""
    st.subheader(say("export.cluster"), anchor=False)
    upload = st.file_uploader(
        say("export.cluster.file"), ["yaml", "yml"], key="ex_cluster_file", max_upload_size=1,
        help=say("export.cluster.file.help", n=CLUSTER_BYTES_MAX // 1000),
    )  # fmt: skip
    if upload is not None:
        name = uploads.shown_name(upload)
        text = _text_of(upload)
    else:
        fields = _cluster_of_fields()
        if not fields["image"] or not all(fields["store"].values()):
            return None
        name, text = "cluster", yaml.safe_dump(fields, sort_keys=False)
    found = parse_strict(text, Cluster, name)
    if found.catalogue is not None:
        raise one_problem(
            f"{name} catalogue", f"names the file {found.catalogue[:80]!r}", "none here", "Take it out, or run 'diffplan export' with this file"
        )  # fmt: skip
    return text


def _text_of(upload: uploads.Upload) -> str:
    name = uploads.shown_name(upload)
    if upload.size > CLUSTER_BYTES_MAX:
        raise one_problem(
            name,
            f"has {upload.size:,} bytes",
            f"at most {CLUSTER_BYTES_MAX:,} bytes",
            "Check that it is the right file",
        )
    try:
        return upload.getvalue().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise one_problem(
            name, f"is not UTF-8 text (byte {error.start})", "a cluster file in YAML", "Save it as UTF-8"
        ) from None


def _cluster_of_fields() -> dict[str, Any]:
    columns = st.columns(2)
    texts: dict[str, str] = {}
    words = {
        "image": say("export.image"), "store": say("export.store"), "volume": say("export.volume"), "namespace": say("export.namespace"),
        "prometheus_url": say("export.prometheus_url"),
    }  # fmt: skip
    for index, (name, start, example) in enumerate(TEXTS):
        with columns[index % 2]:
            key = f"ex_{name}"
            if key not in st.session_state:
                st.session_state[key] = link.text(f"c_{name}") or start
            texts[name] = st.text_input(
                words[name], key=key, max_chars=400, placeholder=example, persist_state="session"
            ).strip()
            link.put(**{f"c_{name}": texts[name] if texts[name] != start else None})
    with columns[1]:
        if "ex_per_node" not in st.session_state:
            st.session_state["ex_per_node"] = int(link.number("c_per_node", 1, 1024) or 8)
        per_node = st.number_input(say("export.per_node"), 1, 1024, key="ex_per_node", persist_state="session")
        link.put(c_per_node=float(per_node) if per_node != 8 else None)
    held: dict[str, Any] = {"volume_claim": texts["volume"]} if texts["volume"] else {"url": texts["store"]}
    plain: dict[str, Any] = {
        "image": texts["image"],
        "store": held,
        "namespace": texts["namespace"],
        "gpus_per_node": int(per_node),
    }
    return plain | ({"prometheus_url": texts["prometheus_url"]} if texts["prometheus_url"] else {})


def _ask_confirmation(doubts: tuple[str, ...], plan: Plan, phase: int | None) -> bool:
    """Whether a plan that does not hold is exported all the same; False for one that holds."""
    if not doubts:
        return False
    with st.container(border=True):
        st.warning(say("export.doubtful"), icon=":material/warning:")
        st.text("\n".join(f"• {doubt.removeprefix('exported with --force: ')}" for doubt in doubts))
        # a confirmation is of one plan and one phase
        return st.checkbox(say("export.confirm"), key=f"ex_confirm_{plan_digest(plan)}_{phase or 0}")


def _draw_made(plan: Plan, wish: ExportWish, missing: str) -> None:
    if missing:
        draw_empty(missing)
    asked = (plan_digest(plan), wish)
    if st.button(
        say("export.make"), key="export", type="primary", icon=":material/inventory_2:", disabled=bool(missing)
    ):
        made = with_progress(plan.scenario, lambda waiting: compute_export(store(), plan, wish, waiting))
        if made is not None:
            st.session_state[MADE] = (asked, made)
    known = st.session_state.get(MADE)
    if known is None or missing:
        return
    if known[0] != asked:
        draw_empty(say("export.old"))
        return
    _draw_archive(known[1])


def _draw_archive(made: Archive) -> None:
    if made.notes:
        st.subheader(say("export.notes"), anchor=False)
        st.text("\n".join(f"• {note}" for note in made.notes))
    st.download_button(
        escaped(say("export.archive", n=len(made.texts))), made.content, "diffplan-export.zip", "application/zip", key="ex_zip", on_click="ignore",
        icon=":material/folder_zip:",
    )  # fmt: skip
    name = st.selectbox(say("export.look"), list(made.texts), key="ex_look")
    if name is None:
        return
    text = made.texts[name]
    kind = {"yaml": "yaml", "yml": "yaml", "json": "json", "tf": "hcl"}.get(name.rpartition(".")[2])
    st.code(text[:SHOWN_CHARACTERS], language=kind, height=400)
    if len(text) > SHOWN_CHARACTERS:
        st.caption(say("export.cut", n=f"{SHOWN_CHARACTERS:,}"))
