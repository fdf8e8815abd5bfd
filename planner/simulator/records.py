"""Turns what happened in a run into the recorded tables, column by column, once at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pandas as pd

from engine.allocation import Pool
from planner.service import ServiceTable
from planner.simulator.replicas import BaseReplica, ControlNetWorker
from planner.simulator.result import SimulationResult
from planner.statistics import is_saturated
from planner.workload import Floats, Workload
from traces.records import REQUEST_RECORD_COLUMNS, WORKER_INTERVAL_COLUMNS, RequestStatus, column_names

OPEN: Final = 0
TAKEN: Final = 1


class Recorder:
    """Columns of the run so far. Stages that only depend on the request and its pool are filled in at the end."""

    def __init__(
        self,
        workload: Workload,
        pools: Sequence[Pool],
        services: Mapping[str, ServiceTable],
        replicas: Sequence[BaseReplica],
        workers: Sequence[ControlNetWorker],
        n_requests: int,
    ) -> None:
        self._workload = workload
        self._pools = pools
        self._services = [services[pool.name] for pool in pools]
        self._replicas = replicas
        self._workers = workers
        n = n_requests
        self._n = n
        nan = float("nan")
        self._state = bytearray(n)
        self._replica = [-1] * n
        self._turned_away: dict[int, tuple[RequestStatus, str]] = {}
        self.start_s = [nan] * n
        self.end_s = [nan] * n
        self.switch_s = [0.0] * n
        self.controlnet_load_s = [0.0] * n
        self.lora_wait_s = [0.0] * n
        self.lora_fetch_s = [0.0] * n
        """What of the LoRA wait was fetching."""
        self.denoise_start_s = [nan] * n
        self.denoise_s = [nan] * n
        """Only of requests that used ControlNet workers; the others' is in their service table."""
        self.denoise_alone_s = [nan] * n
        self.n_lora_misses = [0] * n
        self.n_controlnet_misses = [0] * n
        self.is_switch = bytearray(n)
        self._spans: list[tuple[int, bool, float, float, float]] = []

    def is_open(self, i: int) -> bool:
        """Whether request i was neither taken up nor turned away."""
        return self._state[i] == OPEN

    def start(self, i: int, replica: int, now_s: float) -> None:
        """A replica takes request i up."""
        self._state[i] = TAKEN
        self._replica[i] = replica
        self.start_s[i] = now_s

    def turn_away(self, i: int, status: RequestStatus, reason: str, now_s: float) -> None:
        """Request i ends without having been taken up."""
        self._state[i] = TAKEN
        self._turned_away[i] = (status, reason)
        self.end_s[i] = now_s

    def controlnet_span(self, worker: ControlNetWorker, end_s: float) -> None:
        """A ControlNet worker becomes unused after a span in which somebody denoised with it."""
        self._spans.append((worker.index, False, worker.span_start_s, end_s, worker.work_s))

    def controlnet_load(self, worker: ControlNetWorker, start_s: float, end_s: float) -> None:
        """A ControlNet is loaded onto a worker, beside what the worker computes."""
        self._spans.append((worker.index, True, start_s, end_s, 0.0))

    def result(self, n_events: int, offered_until_s: float) -> SimulationResult:
        """The tables of the finished run."""
        n, workload = self._n, self._workload
        replica = np.array(self._replica, dtype=np.int64)
        pool_of_replica = np.array([item.pool for item in self._replicas], dtype=np.int64)
        pool = np.where(replica >= 0, pool_of_replica[replica], -1) if n else replica
        start_s, end_s = np.array(self.start_s), np.array(self.end_s)
        arrival_s = workload.arrival_s[:n]
        is_done = replica >= 0
        status = np.full(n, "done", dtype=object)
        reason = np.full(n, "", dtype=object)
        for i, (how, why) in self._turned_away.items():
            status[i], reason[i] = how, why
        text_s, denoise_s, decode_s = self._stages(pool)
        coupled_s = np.array(self.denoise_s)
        is_coupled = ~np.isnan(coupled_s)
        alone_s = np.where(is_coupled, np.array(self.denoise_alone_s), denoise_s)
        denoise_s = np.where(is_coupled, coupled_s, denoise_s)
        switch_s, load_s = np.array(self.switch_s), np.array(self.controlnet_load_s)
        queue_wait_s = start_s - arrival_s
        columns: dict[str, Any] = {
            "request_id": _texts(np.array(workload.request_ids[:n], dtype=object)),
            "arrival_s": arrival_s,
            "status": _texts(status),
            "reason": _texts(reason),
            "topology": named([item.topology for item in self._pools], pool),
            "worker_id": named([item.worker_id for item in self._replicas], replica),
            "base_model_id": named(workload.checkpoint_names, workload.checkpoint[:n]),
            "tenant_id": named(workload.tenant_names, workload.tenant[:n]),
            "n_images": workload.n_images[:n],
            "n_steps": workload.n_steps[:n],
            "n_controlnets": workload.n_controlnets[:n],
            "n_loras": workload.n_loras[:n],
            "start_s": start_s,
            "end_s": end_s,
            "queue_wait_s": queue_wait_s,
            "switch_s": switch_s,
            "controlnet_load_s": load_s,
            "lora_wait_s": np.array(self.lora_wait_s),
            "text_s": text_s,
            "denoise_s": denoise_s,
            "denoise_alone_s": alone_s,
            "decode_s": decode_s,
            "n_lora_misses": np.array(self.n_lora_misses, dtype=np.int64),
            "n_controlnet_misses": np.array(self.n_controlnet_misses, dtype=np.int64),
            "is_switch": np.frombuffer(self.is_switch, dtype=np.uint8).astype(np.int64),
            "latency_s": np.where(is_done, end_s - arrival_s, np.nan),
        }
        offered_until_s = max(offered_until_s, float(arrival_s[-1]) if n else 0.0)
        horizon_s = max(float(end_s.max(initial=0.0)), offered_until_s)
        not_ready_s = switch_s + load_s + np.array(self.lora_fetch_s)
        return SimulationResult(
            requests=pd.DataFrame(columns, columns=column_names(REQUEST_RECORD_COLUMNS)),
            workers=self._worker_table(replica, start_s, not_ready_s, end_s, horizon_s),
            saturated=is_saturated(arrival_s[is_done], queue_wait_s[is_done], (end_s - start_s)[is_done]),
            n_events=n_events,
            offered_until_s=offered_until_s,
            horizon_s=horizon_s,
        )

    def _stages(self, pool: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[Floats, Floats, Floats]:
        """Text, denoising without sharing, decoding of every request, 0 where no pool served it."""
        return (
            self._from_tables("text_s", pool),
            self._from_tables("denoise_alone_s", pool),
            self._from_tables("decode_s", pool),
        )

    def _from_tables(self, name: str, pool: np.ndarray[Any, np.dtype[np.int64]]) -> Floats:
        values = np.zeros(self._n)
        for p, service in enumerate(self._services):
            rows = pool == p
            values[rows] = getattr(service, name)[: self._n][rows]
        return values

    def _worker_rows(self) -> list[tuple[str, Pool, str, int]]:
        """Name, pool, role and GPUs of base workers, ControlNet workers and their loaders, in the order of their numbers."""
        return [
            *((item.worker_id, self._pools[item.pool], "base", self._pools[item.pool].n_gpus_per_replica) for item in self._replicas),
            *((item.worker_id, item.pool, "controlnet", item.pool.n_gpus_per_replica) for item in self._workers),
            *((f"{item.worker_id}-loader", item.pool, "loader", 0) for item in self._workers),
        ]  # fmt: skip

    def _worker_table(
        self,
        replica: np.ndarray[Any, np.dtype[np.int64]],
        start_s: Floats,
        not_ready_s: Floats,
        end_s: Floats,
        horizon_s: float,
    ) -> pd.DataFrame:
        n_base = len(self._replicas)
        taken = np.flatnonzero(replica >= 0)
        begun, ready, done = start_s[taken], (start_s + not_ready_s)[taken], end_s[taken]
        owner = replica[taken]
        spans = np.array(self._spans, dtype=np.float64).reshape(-1, 5)
        # a base span has the state of its worker; loads onto a ControlNet worker run beside its work, so they are rows of
        # their own, with the role "loader", numbered after all workers
        n_workers = n_base + len(self._workers)
        worker = np.concatenate(
            [owner, owner, n_base + spans[:, 0].astype(np.int64) + len(self._workers) * spans[:, 1].astype(np.int64)]
        )
        loading = np.concatenate([np.ones(len(taken)), np.zeros(len(taken)), spans[:, 1]]).astype(np.bool_)
        begin = np.concatenate([begun, ready, spans[:, 2]])
        end = np.concatenate([ready, done, spans[:, 3]])
        work_s = np.concatenate([np.zeros(len(taken)), done - ready, spans[:, 4]])
        kept = end > begin
        worker, loading, begin, end, work_s = (a[kept] for a in (worker, loading, begin, end, work_s))
        order = np.lexsort((end, begin, worker))
        worker, loading, begin, end, work_s = (a[order] for a in (worker, loading, begin, end, work_s))
        # adjacent spans of one worker and state become one row
        new = np.ones(len(worker), dtype=np.bool_)
        new[1:] = (worker[1:] != worker[:-1]) | (loading[1:] != loading[:-1]) | (begin[1:] > end[:-1])
        first = np.flatnonzero(new)
        last = np.append(first[1:], len(worker)) - 1 if len(worker) else first
        unused = np.setdiff1d(np.arange(n_workers), worker)
        worker = np.concatenate([worker[first], unused])
        n_unused = len(unused)
        state = np.concatenate([np.where(loading[first], 1, 0), np.full(n_unused, 2)]).astype(np.int64)
        begin = np.concatenate([begin[first], np.zeros(n_unused)])
        end = np.concatenate([end[last], np.full(n_unused, horizon_s)])
        work_s = np.concatenate([np.add.reduceat(work_s, first) if len(first) else work_s, np.zeros(n_unused)])
        order = np.lexsort((begin, worker))
        worker = worker[order]
        rows = self._worker_rows()
        columns: dict[str, Any] = {
            "worker_id": named([row[0] for row in rows], worker),
            "pool": named([row[1].name for row in rows], worker),
            "role": named([row[2] for row in rows], worker),
            "n_gpus": np.array([row[3] for row in rows], dtype=np.int64)[worker],
            "gpu_kind": named([row[1].gpu_kind for row in rows], worker),
            "state": named(["busy", "loading", "idle"], state[order]),
            "start_s": begin[order],
            "end_s": end[order],
            "busy_s": work_s[order],
        }
        return pd.DataFrame(columns, columns=column_names(WORKER_INTERVAL_COLUMNS))


def named(names: Sequence[str], codes: np.ndarray[Any, np.dtype[np.int64]]) -> Any:
    """Names by code; code -1 is the empty text."""
    return _texts(np.array([*names, ""], dtype=object)[codes])


def _texts(values: np.ndarray[Any, np.dtype[np.object_]]) -> Any:
    return pd.array(values, dtype="str")
