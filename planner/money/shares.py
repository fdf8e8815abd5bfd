"""Who the monthly cost is for: every cent of it given to one ControlNet, LoRA group, checkpoint or tenant, to idling, or to a line
that belongs to none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import pandas as pd

from planner.attribution import Attribution, apportion, by_add_on, by_checkpoint, by_tenant
from planner.money.lines import CostLines

SHOWN_MAX: Final = 20
LORA_GROUPS: Final = ((1, 10), (11, 100), (101, 1000), (1001, None))
"""Ranks by use."""


@dataclass(frozen=True, slots=True)
class Share:
    """One row of a division."""

    kind: str
    name: str
    n_requests: int | None
    cost_cents: int


@dataclass(frozen=True, slots=True)
class Shares:
    """The same month divided in three ways; each sums to ``total_cents``."""

    total_cents: int
    add_ons: tuple[Share, ...]
    checkpoints: tuple[Share, ...]
    tenants: tuple[Share, ...]


def divide(found: Attribution, lines: CostLines) -> Shares:
    """Divides GPUs by GPU time; storage, egress and operation are rows of their own."""
    total = round(100 * lines.total_usd)
    gpu, *others = apportion(
        total, [lines.gpu_usd + lines.unused_host_gpu_usd, lines.storage_usd, lines.egress_usd, lines.operation_usd]
    ).tolist()
    rest = tuple(
        Share("line", name, None, cents)
        for name, cents in zip(("storage", "egress", "operation of services"), others, strict=True)
        if cents
    )
    return Shares(
        total,
        (*_add_on_rows(by_add_on(found, 0), gpu), *rest),
        (*_rows(by_checkpoint(found, 0), "checkpoint", gpu), *rest),
        (*_rows(by_tenant(found, 0), "tenant", gpu), *rest),
    )


def _cents(frame: pd.DataFrame, cents: int) -> list[int]:
    values: list[int] = apportion(cents, frame["gpu_ns"].clip(lower=0).tolist()).tolist()
    return values


def _add_on_rows(frame: pd.DataFrame, gpu_cents: int) -> list[Share]:
    rows = frame.assign(cents=_cents(frame, gpu_cents)).to_dict("records")
    controlnets = [row for row in rows if row["kind"] == "controlnet"]
    found = _shown([Share("controlnet", row["id"], row["n_requests"], row["cents"]) for row in controlnets])
    loras = sorted((row for row in rows if row["kind"] == "lora"), key=lambda row: (-row["n_requests"], row["id"]))
    for first, last in LORA_GROUPS:
        group = loras[first - 1 : last]
        if group:
            words = f"LoRAs {first}–{first + len(group) - 1} by use"
            found.append(Share("lora group", words, None, sum(row["cents"] for row in group)))
    words_of = {"images": "the images themselves", "waiting": "waiting for shared ControlNet workers", "idle": "idle"}
    return [*found, *(Share(row["kind"], words_of[row["kind"]], None, row["cents"]) for row in rows if row["kind"] in words_of)]  # fmt: skip


def _rows(frame: pd.DataFrame, kind: str, gpu_cents: int) -> list[Share]:
    plain: list[dict[Any, Any]] = frame.assign(cents=_cents(frame, gpu_cents)).to_dict("records")
    named = [Share(kind, str(row[kind]), int(row["n_requests"]), row["cents"]) for row in plain[:-1]]
    return [*_shown(named), Share("idle", "idle", None, plain[-1]["cents"])]


def _shown(rows: Sequence[Share]) -> list[Share]:
    """The first rows, and the others as one."""
    if len(rows) <= SHOWN_MAX:
        return list(rows)
    others = rows[SHOWN_MAX:]
    return [
        *rows[:SHOWN_MAX],
        Share(rows[0].kind, f"{len(others)} others", None, sum(row.cost_cents for row in others)),
    ]
