"""What a profile says in words about itself: modes, forms, whole images, gaps, failures; and where it was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from calibrate.compose import STACK_OF, CheckRow
from calibrate.estimate import Estimator
from calibrate.heldout import HeldOutPoint, notes_on
from calibrate.measurement import Measurements, Session
from calibrate.profile import LAW_FEATURES, READ_LAWS, STACKS, Law
from calibrate.recipes import FROM_FILE, FROM_HOST_TIER, IN_ONE, INTO_HOST_TIER

GIB: Final = 2**30
HOST_SPREAD: Final = "One session, so one machine: how much another host differs is not in the intervals. Intervals are percentiles of the draws."


def fingerprint(sessions: tuple[Session, ...]) -> dict[str, Any]:
    """Hardware and software of every session."""
    return {
        "gpu": sessions[0].fingerprint.get("gpu", ""),
        "sessions": [
            {
                "session": s.session,
                "started": s.started,
                "parts_s": dict(s.parts),
                **dict(sorted(s.fingerprint.items())),
            }
            for s in sessions
        ],
    }


def form_table(estimator: Estimator) -> dict[str, Any]:
    """Law to the chosen form, and the mean error of every candidate at sizes left out one by one."""
    return {
        law: {
            "form": choice.form,
            "left_out_error_ratio": {form: float(f"{e:.4g}") for form, e in choice.left_out_error_ratio.items()},
        }
        for law, choice in sorted(estimator.forms.items())
        if choice.left_out_error_ratio
    }


def _shared_gpu(estimator: Estimator) -> list[str]:
    """How much slower a job is while several workers of one GPU are busy: what ``speed_ratio`` of a pool should say."""
    medians = estimator.cells.medians()
    found = []
    for cell in estimator.cells.matching("serving.latency", lambda f: f.variant.startswith("shared")):
        alone = (cell[0], cell[1], dataclasses.replace(cell[2], variant=""))
        if alone in medians:
            n = cell[2].variant.removeprefix("shared")
            found.append(
                f"{n} busy workers on one GPU: each job takes {medians[cell] / medians[alone]:.2f} times as long as alone "
                f"({cell[2].n_controlnets} ControlNets, {cell[2].n_steps} steps)."
            )
    return found


def _memory(sessions: tuple[Session, ...]) -> list[str]:
    """What workers of ours really held on the device: the planner adds up weights and activations, a graph's pool is beyond both."""
    found = []
    for session in sessions:
        peak = session.facts.get("serving.worker_device_bytes_peak", 0.0)
        if peak > 0:
            found.append(
                f"A worker on the serving path held {peak / GIB:.1f} GiB of the device at its peak ({session.session})."
            )
        held = {
            key.rpartition(".")[2].replace("_", " "): value / GIB
            for key, value in sorted(session.facts.items())
            if key.startswith("engine.reserved_bytes.") and value > 0
        }
        if held:
            said = ", ".join(f"{name} {gib:.1f}" for name, gib in held.items())
            found.append(
                f"Device memory of our engine in the measuring process, GiB after capturing: {said} ({session.session})."
            )
    return found


def _loads(estimator: Estimator, laws: Mapping[str, Law]) -> list[str]:
    """Which rows loads of our engine come from, where there are rows of loads in two parts."""
    endings = (FROM_HOST_TIER, INTO_HOST_TIER, IN_ONE, FROM_FILE)
    n_rows = dict.fromkeys(endings, 0)
    for cell in estimator.cells.values:
        if cell[0] in ("engine.checkpoint_load", "engine.controlnet_load", *READ_LAWS):
            for ending in endings:
                n_rows[ending] += estimator.cells.pooled(cell).size if cell[2].variant.endswith(ending) else 0
    in_one = n_rows[IN_ONE] + n_rows[FROM_FILE]
    if any(law in laws for law in READ_LAWS):
        unused = f"; {in_one} rows of loads in one part are not used" if in_one else ""
        return [
            "Loads of our engine are in two parts, engine.*_read into the host tier and engine.*_load from there to the device"
            f"{unused}."
        ]
    if n_rows[FROM_HOST_TIER] or n_rows[INTO_HOST_TIER]:
        lacking = "reads into it" if n_rows[FROM_HOST_TIER] else "loads from it"
        return [
            f"Loads of our engine are in one part: there are rows of the host tier, but none of {lacking}, so they are not used."
        ]
    return []


def notes(
    estimator: Estimator,
    laws: Mapping[str, Law],
    check: tuple[CheckRow, ...],
    held_out: tuple[HeldOutPoint, ...],
    measurements: Measurements,
    served_since: str = "",
) -> list[str]:
    """Sentences for the profile."""
    found = [f"engine.* in the fastest mode that was measured: {estimator.choice.text}."]
    for topology in STACK_OF:
        gaps = [row.gap_ratio for row in check if row.topology == topology and row.is_held_out]
        if gaps:
            found.append(
                f"Held-out images, {topology}: composed from laws against measured {min(gaps):+.1%} to {max(gaps):+.1%}, "
                f"median {float(np.median(gaps)):+.1%} ({len(gaps)} kinds)."
            )
    served = [row.gap_ratio for row in check if row.topology == "serving"]
    if served:
        found.append(
            f"Served jobs, whose stages are in the laws: composed against measured {min(served):+.1%} to {max(served):+.1%}, median "
            f"{float(np.median(served)):+.1%} ({len(served)} kinds)."
        )
    if served_since:
        found.append(
            f"Jobs served before {served_since} are of an older engine: only their steps and decoding, of kinds that were not served "
            "since, are used."
        )
    found += notes_on(held_out)
    found += _shared_gpu(estimator)
    found += _memory(measurements.sessions)
    chosen = [
        f"{law} {choice.form} {choice.left_out_error_ratio[choice.form]:.1%}"
        for law, choice in sorted(estimator.forms.items())
        if len(choice.left_out_error_ratio) > 1
    ]
    if chosen:
        found.append(f"Forms chosen by mean error at sizes left out one by one: {'; '.join(chosen)}.")
    found += _loads(estimator, laws)
    missing = sorted(set(LAW_FEATURES) - set(READ_LAWS) - set(laws))
    if missing:
        found.append(f"Not measured and not assumed: {', '.join(missing)}.")
    for name in STACKS:
        overhead = laws.get(f"{name}.request_overhead")
        if overhead is not None and overhead.status == "measured" and overhead.parameters["value_s"] == 0.0:
            found.append(f"{name}.request_overhead is 0: whole images took less than their parts.")
    sessions = measurements.sessions
    for session in sessions:
        if borrowed := session.fingerprint.get("borrowed"):
            found.append(f"Borrowed from session {session.session}, of an older engine: {', '.join(borrowed)}.")
    if sum("borrowed" not in session.fingerprint for session in sessions) == 1:
        found.append(HOST_SPREAD)
    n_failures = sum(len(session.failures) for session in sessions)
    if n_failures:
        found.append(
            f"{n_failures} tasks of {len(sessions)} sessions failed or were left out; the raw data names them."
        )
    flagged = [row for row in measurements.rows if row.flags]
    if flagged:
        kinds = sorted({flag for row in flagged for flag in row.flags.split("+")})
        found.append(f"{len(flagged)} of {len(measurements.rows)} rows are flagged {', '.join(kinds)}; all are used.")
    return found
