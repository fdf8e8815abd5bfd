"""Records of runs with mechanisms: requests tried more than once, batches, workers that are not always there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pandas as pd

from engine.allocation import Pool
from planner.simulator.full_placement import SharedLine
from planner.simulator.records import OPEN, Recorder, named
from planner.simulator.replicas import ControlNetWorker
from planner.workload import Floats
from traces.records import WORKER_INTERVAL_COLUMNS, column_names

STATES: Final = ("busy", "loading", "down", "idle")
BUSY, LOADING, DOWN, IDLE = range(4)
PAID: Final = -1
"""In place of a number of GPUs: as many as the worker has."""


class FullRecorder(Recorder):
    """As :class:`Recorder`; what base workers did is told span by span, because a request may end elsewhere."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._full_spans: list[tuple[int, int, float, float, float, int]] = []
        """Worker number, state, begin, end, work, GPUs."""
        self._loads: dict[int, list[tuple[float, float]]] = {}
        """By ControlNet worker."""
        self.stage_s: dict[int, tuple[float, float, float]] = {}
        """Text, denoising, decoding of requests that ran in a batch of several."""

    def reopen(self, i: int) -> None:
        """Request i was taken up in vain."""
        self._state[i] = OPEN
        self._replica[i] = -1
        nan = float("nan")
        self.start_s[i] = self.end_s[i] = self.denoise_start_s[i] = self.denoise_s[i] = self.denoise_alone_s[i] = nan
        self.switch_s[i] = self.controlnet_load_s[i] = self.lora_wait_s[i] = self.lora_fetch_s[i] = 0.0
        self.n_lora_misses[i] = self.n_controlnet_misses[i] = self.is_switch[i] = 0
        self.stage_s.pop(i, None)

    def base_span(self, replica: int, begin_s: float, ready_s: float, end_s: float) -> None:
        """A base worker took something up, had its models ready and was done (or lost it)."""
        ready_s = min(ready_s, end_s)
        self._add(replica, LOADING, begin_s, ready_s, 0.0, PAID)
        self._add(replica, BUSY, ready_s, end_s, end_s - ready_s, PAID)

    def away(self, number: int, state: int, begin_s: float, end_s: float, *, is_paid: bool) -> None:
        """A worker (base workers first, then ControlNet workers) was starting or down."""
        self._add(number, state, begin_s, end_s, 0.0, PAID if is_paid else 0)

    def controlnet_span(self, worker: ControlNetWorker, end_s: float) -> None:
        """As in :class:`Recorder`; a shared line is no worker and leaves no record."""
        if not isinstance(worker, SharedLine):
            number = len(self._replicas) + worker.index
            self._add(number, BUSY, worker.span_start_s, end_s, worker.work_s, PAID)

    def controlnet_load(self, worker: ControlNetWorker, start_s: float, end_s: float) -> None:
        """As in :class:`Recorder`, on the worker's loader."""
        self._loads.setdefault(worker.index, []).append((start_s, end_s))

    def cut_loads(self, worker: ControlNetWorker, now_s: float) -> None:
        """Loads that were under way, or queued, when their worker stopped."""
        loads = self._loads.get(worker.index, [])
        while loads and loads[-1][1] > now_s:
            begin_s, _ = loads.pop()
            if begin_s < now_s:
                loads.append((begin_s, now_s))

    def _add(self, number: int, state: int, begin_s: float, end_s: float, work_s: float, n_gpus: int) -> None:
        if end_s > begin_s:
            self._full_spans.append((number, state, begin_s, end_s, work_s, n_gpus))

    def _stages(self, pool: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[Floats, Floats, Floats]:
        stages = super()._stages(pool)
        for i, seconds in self.stage_s.items():
            for column, value in zip(stages, seconds, strict=True):
                column[i] = value
        return stages

    def _worker_rows(self) -> list[tuple[str, Pool, str, int]]:
        """As in :class:`Recorder`; of workers on one GPU only the first carries it."""
        rows = []
        place: dict[tuple[str, str], int] = {}
        for name, pool, role, n_gpus in super()._worker_rows():
            number = place[pool.name, role] = place.get((pool.name, role), -1) + 1
            rows.append((name, pool, role, n_gpus if number % pool.workers_per_gpu == 0 else 0))
        return rows

    def _worker_table(
        self,
        replica: np.ndarray[Any, np.dtype[np.int64]],
        start_s: Floats,
        not_ready_s: Floats,
        end_s: Floats,
        horizon_s: float,
    ) -> pd.DataFrame:
        rows = self._worker_rows()
        first_loader = len(self._replicas) + len(self._workers)
        for index, loads in self._loads.items():
            for begin_s, finish_s in loads:
                self._add(first_loader + index, LOADING, begin_s, finish_s, 0.0, PAID)
        spans = _merged(self._full_spans, horizon_s)
        told = {span[0] for span in spans}
        spans += [(number, IDLE, 0.0, horizon_s, 0.0, PAID) for number in range(first_loader) if number not in told]
        spans.sort(key=lambda span: (span[0], span[2], span[3]))
        worker = np.array([span[0] for span in spans], dtype=np.int64)
        all_gpus = np.array([row[3] for row in rows], dtype=np.int64)[worker]
        n_gpus = np.array([span[5] for span in spans], dtype=np.int64)
        columns: dict[str, Any] = {
            "worker_id": named([row[0] for row in rows], worker),
            "pool": named([row[1].name for row in rows], worker),
            "role": named([row[2] for row in rows], worker),
            "n_gpus": np.where(n_gpus == PAID, all_gpus, n_gpus),
            "gpu_kind": named([row[1].gpu_kind for row in rows], worker),
            "state": named(STATES, np.array([span[1] for span in spans], dtype=np.int64)),
            "start_s": np.array([span[2] for span in spans], dtype=np.float64),
            "end_s": np.array([span[3] for span in spans], dtype=np.float64),
            "busy_s": np.array([span[4] for span in spans], dtype=np.float64),
        }
        return pd.DataFrame(columns, columns=column_names(WORKER_INTERVAL_COLUMNS))


Span = tuple[int, int, float, float, float, int]


def _merged(spans: Sequence[Span], horizon_s: float) -> list[Span]:
    """Adjacent spans of one worker, state and number of GPUs become one; nothing is told beyond the horizon."""
    by_worker = sorted(spans, key=lambda span: (span[0], span[2], span[3]))
    found: list[Span] = []
    for number, state, begin_s, end_s, work_s, n_gpus in by_worker:
        end_s = min(end_s, horizon_s)
        if begin_s >= end_s:
            continue
        if found and found[-1][:2] == (number, state) and found[-1][5] == n_gpus and begin_s <= found[-1][3]:
            last = found[-1]
            found[-1] = (number, state, last[2], max(end_s, last[3]), last[4] + work_s, n_gpus)
        else:
            found.append((number, state, begin_s, end_s, work_s, n_gpus))
    return found
