"""A diagnosis in words and tables, and as plain JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import pandas as pd
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from planner.attribution import NS_PER_S, STAGE_WORDS, by_add_on, by_checkpoint, by_stage, by_tenant
from planner.diagnose import Diagnosis, Effect, Figures
from planner.explain import gpus_words, usd

ROWS_MAX: Final = 8
"""Add-ons, checkpoints and tenants on the terminal; JSON has all."""
SAME_P95_RATIO: Final = 0.01
"""A p95 within 1 % of the present one is no difference worth a sentence."""
KIND_WORDS: Final = {"images": "the images themselves", "waiting": "waiting for others", "idle": "idle"}


def ranked(effects: Sequence[Effect]) -> list[Effect]:
    """Most money saved first, then most p95 gained; what cannot keep the promise comes last."""

    def key(effect: Effect) -> tuple[float, float, str]:
        saving = -math.inf if effect.saving_usd_per_month is None else effect.saving_usd_per_month
        gain = effect.p95_gain_s if math.isfinite(effect.p95_gain_s) else -math.inf
        return (-saving, -gain, effect.key)

    return sorted(effects, key=key)


def best_by_money(found: Diagnosis) -> Effect | None:
    """The single change that saves most; None if none saves."""
    singles = [e for e in found.effects if e.kind == "single" and (e.saving_usd_per_month or 0.0) > 0]
    return ranked(singles)[0] if singles else None


def best_by_latency(found: Diagnosis) -> Effect | None:
    """The single change (one more GPU included) that lowers p95 most; None if none does by more than 1 %."""
    least = SAME_P95_RATIO * found.figures.latency_p95_s
    faster = [e for e in found.effects if e.kind != "combined" and e.p95_gain_s > least]
    return max(faster, key=lambda e: (e.p95_gain_s, e.key)) if faster else None


def sentences(found: Diagnosis) -> list[str]:
    """The diagnosis in a few sentences."""
    slo = found.present.scenario.slo
    now = found.measured or found.figures
    stages = by_stage(found.attribution, found.cost_micro_usd).set_index("stage")
    latency_total = int(stages["latency_ns"].sum())
    gpu_total = int(stages["gpu_ns"].sum())
    said = [
        f"{gpus_words(found.fleet.n_gpus)} as {found.present.topology} for {usd(now.cost_usd_per_month)} a month: p95 {now.latency_p95_s:.2f} s, "
        f"{now.slo_attainment_ratio:.2%} within {slo.latency_s:g} s ({slo.attainment_ratio:.2%} promised)."
    ]
    if latency_total:
        felt = stages["latency_ns"].astype("int64")
        top = felt.sort_values(ascending=False, kind="stable").index[:2]
        said.append(
            "Users wait mostly for " + " and ".join(f"{STAGE_WORDS[s]} ({felt[s] / latency_total:.0%})" for s in top) + "."
        )  # fmt: skip
    paid = stages["gpu_ns"].astype("int64")
    idle = paid["idle"] / gpu_total if gpu_total else 0.0
    busy = paid.drop("idle").sort_values(ascending=False, kind="stable")
    said.append(
        f"Of the money, {idle:.0%} pays for idle GPUs; of the rest most goes to {STAGE_WORDS[str(busy.index[0])]} "
        f"({busy.iloc[0] / max(1, int(busy.sum())):.0%})."
    )
    if found.fewest_gpus is None:
        said.append("This service cannot keep the promise with any number of GPUs tried.")
    elif found.fewest_gpus > found.fleet.n_gpus:
        said.append(f"{gpus_words(found.fewest_gpus)} of this kind would keep the promise.")
    elif found.spare_gpus:
        month = found.spare_gpus * found.figures.cost_usd_per_month / found.fleet.n_gpus
        said.append(
            f"{gpus_words(found.fewest_gpus)} would keep the promise in this run: {gpus_words(found.spare_gpus)} could go, {usd(month)} a month."
        )
    money, latency = best_by_money(found), best_by_latency(found)
    if money is not None:
        said.append(
            f"The single change that saves most: {money.words}: {usd(money.saving_usd_per_month)} a month "
            f"({gpus_words(found.fewest_gpus)} → {gpus_words(money.fewest_gpus)} for the promise)."
        )
    else:
        said.append("No single change saves a GPU.")
    if latency is not None:
        said.append(
            f"The single change that users feel most: {latency.words}: p95 {found.figures.latency_p95_s:.2f} → "
            f"{latency.at_present_size.latency_p95_s:.2f} s on the same GPUs."
            if latency.kind == "single"
            else f"Users feel {latency.words} most: p95 {found.figures.latency_p95_s:.2f} → {latency.at_present_size.latency_p95_s:.2f} s."
        )
    return said


def print_diagnosis(found: Diagnosis, console: Console) -> None:
    """Sentences, then time and money by stage, add-on and checkpoint, then the changes."""
    for position, line in enumerate(sentences(found)):
        console.print(Text(line, style="bold" if position == 0 else ""), soft_wrap=True)
    if found.measured is not None:
        gap = found.figures.latency_p95_s / found.measured.latency_p95_s - 1
        console.print(
            Text(f"The log says p95 {found.measured.latency_p95_s:.2f} s, the simulation {found.figures.latency_p95_s:.2f} s ({gap:+.0%}): "
                 "read the changes below as differences from the simulation.")
        )  # fmt: skip
    total = found.cost_micro_usd
    console.print()
    console.print(_stage_table(found, by_stage(found.attribution, total)))
    console.print(_add_on_table(found, by_add_on(found.attribution, total)))
    console.print(_use_table(found, by_checkpoint(found.attribution, total), "checkpoint"))
    tenants = by_tenant(found.attribution, total)
    if len(tenants) > 2:
        console.print(_use_table(found, tenants, "tenant"))
    console.print()
    console.print(_change_table(found))
    for effect in ranked(found.effects):
        if effect.note:
            console.print(Text(f"{effect.words}: {effect.note}"), soft_wrap=True)
    for item in found.not_tried:
        console.print(Text(f"Not tried: {item.words}: {item.why}"), soft_wrap=True)
    for line in (*found.assumptions, *notes(found)):
        console.print(Text(line), soft_wrap=True)


def notes(found: Diagnosis) -> tuple[str, ...]:
    """What the numbers leave out."""
    grades = found.present.service.grades
    worst = sorted({str(grade) for grade in grades.values()})
    return (
        "One run with the fitted profile: small differences are within the noise; 'diffplan plan' gives intervals.",
        f"The present service's latencies are {', '.join(worst)} by profile {found.present.scenario.profile.name}.",
    )


def to_plain(found: Diagnosis) -> dict[str, Any]:
    """JSON-ready: all rows, seconds and dollars."""
    total = found.cost_micro_usd
    return {
        "scenario": found.present.scenario.name,
        "topology": found.present.topology,
        "n_gpus": found.fleet.n_gpus,
        "slo_latency_s": found.present.scenario.slo.latency_s,
        "slo_attainment_ratio": found.present.scenario.slo.attainment_ratio,
        "sentences": sentences(found),
        "present": _figures(found.figures),
        "measured": _figures(found.measured) if found.measured is not None else None,
        "fewest_gpus": found.fewest_gpus,
        "by_stage": _rows(by_stage(found.attribution, total)),
        "by_add_on": _rows(by_add_on(found.attribution, total)),
        "by_checkpoint": _rows(by_checkpoint(found.attribution, total)),
        "by_tenant": _rows(by_tenant(found.attribution, total)),
        "changes": [
            {
                "key": e.key, "words": e.words, "kind": e.kind, "at_present_size": _figures(e.at_present_size), "fewest_gpus": e.fewest_gpus,
                "saving_usd_per_month": e.saving_usd_per_month, "p95_gain_s": _finite(e.p95_gain_s), "note": e.note,
            }
            for e in ranked(found.effects)
        ],
        "not_tried": [{"words": item.words, "why": item.why} for item in found.not_tried],
        "assumptions": list(found.assumptions),
        "notes": list(notes(found)),
    }  # fmt: skip


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Integer nanoseconds and micro-dollars stay integers: they sum exactly."""
    return [{str(k): v.item() if hasattr(v, "item") else v for k, v in row.items()} for row in frame.to_dict("records")]


def _figures(figures: Figures) -> dict[str, Any]:
    return {name: _finite(getattr(figures, name)) for name in Figures.__dataclass_fields__}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _money(micro_usd: int) -> str:
    return usd(micro_usd / 1e6)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="", pad_edge=False)
    for position, name in enumerate(columns):
        table.add_column(name, justify="left" if position == 0 else "right", overflow="fold")
    return table


def _stage_table(found: Diagnosis, frame: pd.DataFrame) -> Table:
    table = _table("Where time and money go", "stage", "s/request", "of latency", "of GPU time", "$/month")
    latency, gpu = int(frame["latency_ns"].sum()), int(frame["gpu_ns"].sum())
    n_done = max(1, int((found.attribution.latency_ns.sum(axis=1) > 0).sum()))
    for row in frame.itertuples(index=False):
        if row.latency_ns or row.gpu_ns:
            table.add_row(
                STAGE_WORDS[str(row.stage)], f"{int(row.latency_ns) / NS_PER_S / n_done:.3f}",  # type: ignore[arg-type]
                _share(int(row.latency_ns), latency), _share(int(row.gpu_ns), gpu), _money(int(row.cost_micro_usd)),  # type: ignore[arg-type]
            )  # fmt: skip
    table.add_section()
    table.add_row("sum", f"{latency / NS_PER_S / n_done:.3f}", "100.0%", "100.0%", _money(found.cost_micro_usd))
    return table


def _add_on_table(found: Diagnosis, frame: pd.DataFrame) -> Table:
    table = _table(
        "By add-on: frequency × weight", "add-on", "requests", "of requests", "s/use", "of GPU time", "$/month"
    )
    n, gpu = max(1, len(found.present.workload)), int(frame["gpu_ns"].sum())
    for kind in ("controlnet", "lora"):
        rows = frame[frame["kind"] == kind]
        shown = rows.head(ROWS_MAX)
        for row in shown.to_dict("records"):
            _add_on_row(table, f"{kind} {row['id']}", row, n, gpu)
        rest = rows.iloc[ROWS_MAX:]
        if len(rest):
            sums = {name: int(rest[name].sum()) for name in ("n_requests", "n_uses", "latency_ns", "gpu_ns", "cost_micro_usd")}  # fmt: skip
            _add_on_row(table, f"{len(rest)} more {kind}s", {**sums, "n_requests": 0}, n, gpu)
    for row in frame[~frame["kind"].isin(["controlnet", "lora"])].to_dict("records"):
        table.add_row(
            KIND_WORDS[row["kind"]], "", "", "", _share(int(row["gpu_ns"]), gpu), _money(int(row["cost_micro_usd"]))
        )
    return table


def _add_on_row(table: Table, name: str, row: dict[Any, Any], n: int, gpu: int) -> None:
    per_use = int(row["latency_ns"]) / NS_PER_S / max(1, int(row["n_uses"]))
    requests = str(row["n_requests"]) if row["n_requests"] else ""
    share = f"{row['n_requests'] / n:.1%}" if row["n_requests"] else ""
    table.add_row(Text(name), requests, share, f"{per_use:.3f}", _share(int(row["gpu_ns"]), gpu), _money(int(row["cost_micro_usd"])))  # fmt: skip


def _use_table(found: Diagnosis, frame: pd.DataFrame, kind: str) -> Table:
    columns = [kind, "requests", "s/request", "of GPU time", "$/month"]
    has_switches = "switch_ns" in frame.columns
    if has_switches:
        columns.insert(3, "switching s/request")
    table = _table(f"By {kind}", *columns)
    gpu = int(frame["gpu_ns"].sum())
    users, idle = frame.iloc[:-1], frame.iloc[-1]
    for row in users.head(ROWS_MAX).to_dict("records"):
        requests = max(1, int(row["n_requests"]))
        cells: list[RenderableType] = [Text(str(row[kind]) or "(none)"), str(row["n_requests"]), f"{int(row['latency_ns']) / NS_PER_S / requests:.3f}"]  # fmt: skip
        if has_switches:
            cells.append(f"{int(row['switch_ns']) / NS_PER_S / requests:.3f}")
        table.add_row(*cells, _share(int(row["gpu_ns"]), gpu), _money(int(row["cost_micro_usd"])))
    rest = users.iloc[ROWS_MAX:]
    if len(rest):
        requests = max(1, int(rest["n_requests"].sum()))
        cells = [Text(f"{len(rest)} more"), str(requests), f"{int(rest['latency_ns'].sum()) / NS_PER_S / requests:.3f}"]
        if has_switches:
            cells.append(f"{int(rest['switch_ns'].sum()) / NS_PER_S / requests:.3f}")
        table.add_row(*cells, _share(int(rest["gpu_ns"].sum()), gpu), _money(int(rest["cost_micro_usd"].sum())))
    table.add_row("idle", "", "", *([""] if has_switches else []), _share(int(idle["gpu_ns"]), gpu), _money(int(idle["cost_micro_usd"])))  # fmt: skip
    return table


def _change_table(found: Diagnosis) -> Table:
    n = found.fleet.n_gpus
    table = _table(
        f"One change at a time: on {gpus_words(n)}, and the fewest GPUs for the promise", "change", "p95", "p95 gain", "with add-ons",
        "in time", "fewest GPUs", "saves/month",
    )  # fmt: skip

    def add(words: str, f: Figures, gain: str, fewest: int | None, saving: str) -> None:
        p95 = "overloaded" if f.is_saturated else f"{f.latency_p95_s:.2f} s"
        add_on = f"{f.add_on_latency_p95_s:.2f} s" if math.isfinite(f.add_on_latency_p95_s) else "–"
        table.add_row(
            words, p95, gain, add_on, f"{f.slo_attainment_ratio:.2%}", "none" if fewest is None else str(fewest), saving
        )

    add("as it is", found.figures, "", found.fewest_gpus, "")
    table.add_section()
    for effect in ranked(found.effects):
        words = f"{effect.words} (combined)" if effect.kind == "combined" else effect.words
        add(
            words,
            effect.at_present_size,
            f"{effect.p95_gain_s:+.2f} s",
            effect.fewest_gpus,
            usd(effect.saving_usd_per_month),
        )
    return table
