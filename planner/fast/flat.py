"""Workloads and service tables as flat arrays: made once, then simulated with as many allocations as a search looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pandas as pd

from planner.fast import arrays as a
from planner.fast.arrays import Floats, Ints, Smalls, Tables
from planner.fast.refusal import NotModelledError
from planner.service import ServiceTable
from planner.workload import Workload


@dataclass(frozen=True, slots=True, eq=False)
class FlatWorkload:
    """A workload as the compiled loop reads it; see :class:`planner.fast.arrays.Requests`."""

    workload: Workload
    arrival_s: Floats
    expiry_s: Floats
    expiry_order: Ints
    asks: Smalls
    """The column GROUP depends on the allocation and is not filled in."""
    add_on_start: Smalls
    lora: Smalls
    controlnet: Smalls
    need: Ints
    """[n] code of what the request needs hosted: its checkpoint with its ControlNets."""
    first_of_need: Ints
    """The first request of each need; needs are numbered in order of first appearance."""
    controlnets_max: int
    """ControlNets of the request that has most."""

    def __len__(self) -> int:
        return len(self.workload)


def flatten(workload: Workload) -> FlatWorkload:
    """Flattens a workload; raises :class:`NotModelledError` if it has 2³¹ entries of a kind or more."""
    n = len(workload)
    expiry_s = np.maximum(workload.arrival_s, workload.arrival_s + workload.deadline_s)
    expiry_s = np.where(np.isnan(workload.deadline_s), np.inf, expiry_s)
    limited = np.flatnonzero(np.isfinite(expiry_s))
    asks = np.zeros((n, 3), dtype=np.int32)
    asks[:, a.CHECKPOINT] = workload.checkpoint
    asks[:, a.N_STEPS] = workload.n_steps
    n_loras, n_controlnets = _counted(workload.n_loras), _counted(workload.n_controlnets)
    add_on_start = np.zeros((0, 2), dtype=np.int32)
    if n_loras.any() or n_controlnets.any():
        add_on_start = np.zeros((n + 1, 2), dtype=np.int32)
        np.cumsum(n_loras, out=add_on_start[1:, a.LORAS])
        np.cumsum(n_controlnets, out=add_on_start[1:, a.CONTROLNETS])
    n_uses = int(n_controlnets.sum())
    controlnet = np.zeros((n_uses, 3), dtype=np.int32)
    controlnet[:, a.CODE] = workload.controlnet_uses
    if n_uses:
        windows = chain.from_iterable(chain.from_iterable(workload.control_steps))
        controlnet[:, a.FIRST_STEP :] = np.fromiter(windows, dtype=np.int32, count=2 * n_uses).reshape(n_uses, 2)
    need, first_of_need = _needs(workload)
    return FlatWorkload(
        workload=workload,
        arrival_s=np.array(workload.arrival_s, dtype=np.float64),
        expiry_s=expiry_s,
        expiry_order=limited[np.argsort(expiry_s[limited], kind="stable")].astype(np.int64),
        asks=asks,
        add_on_start=add_on_start,
        lora=workload.lora_uses.astype(np.int32),
        controlnet=controlnet,
        need=need,
        first_of_need=first_of_need,
        controlnets_max=int(n_controlnets.max(initial=0)),
    )


def flat_tables(services: Sequence[ServiceTable], flat: FlatWorkload) -> Tables:
    """Service tables as stacked columns; what no request can use is left out."""
    n, n_tables = len(flat), len(services)
    workload = flat.workload
    n_lora_rows, n_step_rows = n if len(flat.lora) else 0, n if len(flat.controlnet) else 0
    tables = Tables(
        compute_s=np.empty((n_tables, n)),
        lora_s=np.empty((n_tables, n_lora_rows, 2)),
        steps=np.empty((n_tables, n_step_rows, 9)),
        checkpoint_s=np.empty((n_tables, len(workload.checkpoint_names), 2)),
        controlnet_s=np.empty((n_tables, len(workload.controlnet_names), 2)),
        lora_fetch_s=np.empty((n_tables, len(workload.lora_names))),
    )
    for t, service in enumerate(services):
        # summed in the SimPy model's order
        np.add(service.text_s + service.denoise_alone_s, service.decode_s, out=tables.compute_s[t])
        if n_lora_rows:
            tables.lora_s[t, :, a.ATTACH_DETACH_S] = service.lora_attach_s + service.lora_detach_s
            tables.lora_s[t, :, a.HIDDEN_S] = service.lora_hidden_s
        if n_step_rows:
            for column, values in (
                (a.IS_REMOTE, service.is_remote),
                (a.TEXT_S, service.text_s),
                (a.DECODE_S, service.decode_s),
                (a.NOISE_RATIO, service.noise_ratio),
                (a.PLAIN_S, service.plain_step_s),
                (a.ENCODER_S, service.encoder_s),
                (a.DECODER_S, service.decoder_s),
                (a.FORWARD_S, service.controlnet_forward_s),
                (a.TRANSFER_S, service.transfer_s),
            ):
                tables.steps[t, :, column] = values
        for table, load_s, fetch_s in (
            (tables.checkpoint_s, service.checkpoint_load_s, service.checkpoint_fetch_s),
            (tables.controlnet_s, service.controlnet_load_s, service.controlnet_fetch_s),
        ):
            table[t, :, a.LOAD_S], table[t, :, a.FETCH_S] = load_s, fetch_s
        tables.lora_fetch_s[t] = service.lora_fetch_s
    return tables


def _counted(counts: Ints) -> Ints:
    if counts.sum() >= 2**31:
        raise NotModelledError((f"{counts.sum()} add-ons of one kind",))
    return counts


def _needs(workload: Workload) -> tuple[Ints, Ints]:
    n = len(workload)
    combined = workload.checkpoint
    if workload.controlnet_names:
        sets: dict[tuple[int, ...], int] = {}
        codes = (sets.setdefault(names, len(sets)) for names in workload.controlnets)
        combined = np.fromiter(codes, dtype=np.int64, count=n) * max(1, len(workload.checkpoint_names)) + combined
    need = pd.factorize(combined)[0].astype(np.int64)  # in order of first appearance
    highest = np.maximum.accumulate(need) if n else need
    is_first = np.ones(n, dtype=np.bool_)
    is_first[1:] = highest[1:] > highest[:-1]
    return need, np.flatnonzero(is_first).astype(np.int64)
