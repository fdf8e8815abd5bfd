"""The work path of a base worker: drives a :class:`engine.workers.painter.Painter` through one batch after the other."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from engine.links.host_memory import HostMemoryLine
from engine.links.protocol import LineLostError, PairOfBase
from engine.links.tcp import TcpLine, connect
from engine.serving.job import Job, StageSeconds
from engine.workers.agreement import Agreement, Flags, Partner
from engine.workers.batch import BatchNews, BatchOrder
from engine.workers.harness import Harness
from engine.workers.local_tier import LocalTier
from engine.workers.painter import JobError, LoadedLora, Painter, PeerLostError
from engine.workers.partner_line import partner_line
from engine.workers.setup import WorkerSetup, make_painter

IN_TIER: Final = "tier:"
"""Begins the path of a file that the front copied into this worker's own tier."""
URGENT: Final = frozenset({"cancel", "lora_ready", "lora_refused", "lora_file", "lora_drop"})


class CancelledError(Exception):
    """Nobody waits for this batch any more."""


class BaseProcess:
    """One rank of a base replica."""

    def __init__(self, harness: Harness, setup: WorkerSetup) -> None:
        self._harness = harness
        self._setup = setup
        self._news: BatchNews | None = None
        self._pairs: dict[str, PairOfBase] = {}
        self._tier = LocalTier()
        harness.listen(self._urgent)
        partner: Partner | None = None
        if setup.n_ranks > 1:
            partner = partner_line(harness, setup)
        self._agreement = Agreement(partner, setup.line_timeout_s)
        self._painter: Painter = make_painter(setup, harness.progress, partner)

    def run(self) -> None:
        """Serves until told to stop."""
        painter, harness = self._painter, self._harness
        harness.ready(painter.resident(), painter.memory())
        while True:
            harness.idle()
            frame = harness.take()
            if frame is None:
                continue
            message, blobs = frame
            harness.progress("step")
            if message["type"] == "run":
                self._run_batch(BatchOrder.from_message(message, blobs))
            elif message["type"] == "attach":
                self._attach(message)
            elif message["type"] == "detach":
                self._detach(message["pair_id"])
                harness.send({"type": "detached", "pair_id": message["pair_id"]})
            elif message["type"] == "admit":
                self._admit(message)
            elif message["type"] == "stop":
                for pair_id in list(self._pairs):
                    self._detach(pair_id)
                self._tier.close()
                return

    def _urgent(self, message: dict[str, Any], blobs: tuple[bytes, ...]) -> bool:
        """On the channel's thread: news for the batch that was ordered last."""
        kind, news = message["type"], self._news
        if kind == "run":
            paths = {lora_id: self._found(path) for lora_id, path in message["lora_paths"].items()}
            self._news = BatchNews(message["batch_id"], [plain["request_id"] for plain in message["jobs"]], paths)
            return False
        if kind == "lora_file":
            refusal = self._tier.store(message["name"], blobs[0])
            if refusal and news is not None:
                news.lora_refused(message["lora_id"], refusal)
        elif kind == "lora_drop":
            self._tier.drop(message["name"])
        elif kind == "cancel" and news is not None:
            news.cancel(message["request_id"])
        elif kind == "lora_ready" and news is not None:
            news.lora_ready(message["lora_id"], str(self._found(message["path"])))
        elif kind == "lora_refused" and news is not None:
            news.lora_refused(message["lora_id"], message["reason"])
        return kind in URGENT

    def _found(self, path: str | None) -> str | None:
        """A file in this worker's own tier is called by its name."""
        return self._tier.path(path.removeprefix(IN_TIER)) if path is not None and path.startswith(IN_TIER) else path

    # pairs

    def _attach(self, message: Mapping[str, Any]) -> None:
        pair_id, peer, timeout_s = message["pair_id"], message["peer"], self._setup.line_timeout_s
        started = time.monotonic()
        pair: PairOfBase | None = None
        try:
            if message["transport"] == "tcp":
                pair = TcpLine(
                    connect(message["address"], pair_id, message["token"], timeout_s), pair_id, peer, timeout_s
                )
            else:
                self._harness.send({"type": "attaching", "pair_id": pair_id})
                pair = HostMemoryLine(self._harness.receive_line(pair_id, timeout_s), pair_id, peer, timeout_s)
            self._painter.open(pair)
        except (LineLostError, PeerLostError, TimeoutError) as error:
            if pair is not None:
                self._painter.close(pair_id)
                pair.close()
            self._harness.send({"type": "pair_lost", "pair_id": pair_id, "reason": f"attaching failed: {error}"})
            return
        self._pairs[pair_id] = pair
        self._harness.send({
            "type": "attached", "pair_id": pair_id, "transport": pair.transport, "duration_s": time.monotonic() - started
        })  # fmt: skip

    def _detach(self, pair_id: str) -> None:
        pair = self._pairs.pop(pair_id, None)
        if pair is not None:
            self._painter.close(pair_id)
            pair.close()

    def _admit(self, message: Mapping[str, Any]) -> None:
        try:
            self._painter.admit(message["kind"], message["id"], message["source"])
        except JobError as error:
            self._harness.send({"type": "admit_failed", "id": message["id"], "reason": str(error)})
            return
        self._harness.send({"type": "admitted", "id": message["id"]})

    # batches

    def _run_batch(self, order: BatchOrder) -> None:
        news = self._news
        if news is None or news.batch_id != order.batch_id:
            raise RuntimeError(f"batch {order.batch_id} came while {news and news.batch_id} was announced")
        failures: dict[str, str] = {}
        jobs = order.jobs
        while jobs:
            try:
                results, blobs = self._paint(order, jobs, news)
            except CancelledError:
                failures.update({job.request_id: "cancelled" for job in jobs})
                break
            except JobError as error:
                at_fault = [job for job in jobs if job.request_id == error.request_id] or list(jobs)
                failures.update({job.request_id: str(error) for job in at_fault})
                jobs = tuple(job for job in jobs if job.request_id not in failures)
                continue
            except (PeerLostError, LineLostError) as error:
                reason = str(error)
                self._give_up_pairs(order, getattr(error, "pair_id", ""), reason)
                failures.update({job.request_id: reason for job in jobs})
                self._report_failures(order, failures, is_retryable=True)
                return
            self._harness.send(
                {
                    "type": "batch_done",
                    "batch_id": order.batch_id,
                    "results": results,
                    "failures": failures,
                    "resident": _plain(self._painter.resident()),
                    "memory": dict(self._painter.memory()),
                },
                blobs,
            )
            return
        self._report_failures(order, failures, is_retryable=False)

    def _report_failures(self, order: BatchOrder, failures: Mapping[str, str], *, is_retryable: bool) -> None:
        self._harness.send({
            "type": "batch_failed", "batch_id": order.batch_id, "failures": dict(failures), "is_retryable": is_retryable
        })  # fmt: skip

    def _give_up_pairs(self, order: BatchOrder, lost_pair_id: str, reason: str) -> None:
        """Lines that were in use when a call failed may hold half an exchange: the front attaches them anew."""
        for pair_id in sorted(set(order.pair_of_controlnet.values())):
            said = reason if lost_pair_id in {"", pair_id} else f"in use when another was lost: {reason}"
            self._detach(pair_id)
            self._harness.send({"type": "pair_lost", "pair_id": pair_id, "reason": said})

    def _paint(self, order: BatchOrder, jobs: Sequence[Job], news: BatchNews) -> tuple[dict[str, Any], list[bytes]]:
        painter = self._painter
        clock = _Clock()
        try:
            try:
                self._agreement.begin(order.batch_id)
                self._harness.progress("load")
                is_switch = painter.activate(jobs[0].base_model_id)
                clock.charge("switch_s" if is_switch else "text_s")
                self._harness.progress("step")
                n_steps = painter.begin(jobs, self._pairs_of(order))
                painter.settle()
                clock.charge("text_s")
                patch_step = self._denoise(jobs, news, n_steps, order.patch_by_step, clock)
                self._harness.progress("decode")
                images = painter.finish(wants_images=any(job.wants_images for job in jobs))
                clock.charge("decode_s")
            except (JobError, PeerLostError, LineLostError, CancelledError) as error:
                if not isinstance(error, CancelledError):
                    self._abort(error)
                raise
        finally:
            self._harness.progress("load")
            painter.restore()
        if patch_step is not None:
            painter.settle()
        clock.charge("lora_wait_s" if patch_step is not None else "decode_s")
        load_s = float(getattr(painter, "controlnet_load_s", 0.0))
        stages = clock.stages()
        # what was loaded in process was loaded before the text was encoded, and is in that time
        text_s = max(0.0, stages.text_s - float(getattr(painter, "local_load_s", 0.0)))
        stages = dataclasses.replace(stages, text_s=text_s, controlnet_load_s=load_s)
        results: dict[str, Any] = {}
        blobs: list[bytes] = []
        for job, files in zip(jobs, images, strict=True):
            files = files if job.wants_images else []
            results[job.request_id] = {
                "stages": dataclasses.asdict(stages),
                "lora_patch_step": patch_step,
                "is_switch": is_switch,
                "n_controlnet_misses": int(getattr(painter, "n_controlnet_misses", 0)),
                "n_images": len(files),
            }
            blobs.extend(files)
        return results, blobs

    def _abort(self, error: Exception) -> None:
        try:
            self._agreement.abort(error)
        except PeerLostError:
            return  # it is gone, and so cannot wait for this rank

    def _pairs_of(self, order: BatchOrder) -> dict[str, PairOfBase]:
        pairs = {}
        for controlnet_id, pair_id in order.pair_of_controlnet.items():
            if pair_id not in self._pairs:
                raise PeerLostError(f"the line to the worker of ControlNet {controlnet_id} is not attached")
            pairs[controlnet_id] = self._pairs[pair_id]
        return pairs

    def _denoise(
        self, jobs: Sequence[Job], news: BatchNews, n_steps: int, patch_by_step: int, clock: _Clock
    ) -> int | None:
        """All steps; returns before which one the LoRAs were patched in."""
        painter, harness = self._painter, self._harness
        loras = jobs[0].loras
        patch_step: int | None = None
        last = min(patch_by_step, n_steps - 1)
        for i in range(n_steps):
            harness.progress("step")
            is_pending = bool(loras) and patch_step is None
            both = self._agreement.agree(i, Flags(is_pending and news.has_loras, news.is_cancelled))
            if both.is_cancelled:
                raise CancelledError
            if is_pending and (both.has_loras or i >= last):
                if i > 0:
                    painter.settle()
                clock.charge("denoise_s")
                harness.progress("lora_wait")
                if not news.wait_for_loras(self._setup.lora_wait_s, lambda: harness.progress("lora_wait")):
                    self._abort(CancelledError("cancelled"))
                    raise CancelledError
                harness.progress("load")
                painter.patch([(LoadedLora(use.lora_id, news.path(use.lora_id)), use.scale) for use in loras])
                patch_step = i
                painter.settle()
                clock.charge("lora_wait_s")
            harness.progress("step")
            painter.step(i)
        painter.settle()
        clock.charge("denoise_s")
        return patch_step


class _Clock:
    """Charges the time since the last call to a stage."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._spent: dict[str, float] = {}

    def charge(self, stage: str) -> None:
        now = time.monotonic()
        self._spent[stage] = self._spent.get(stage, 0.0) + now - self._last
        self._last = now

    def stages(self) -> StageSeconds:
        return StageSeconds(**self._spent)


def _plain(resident: Mapping[str, list[str]]) -> dict[str, list[str]]:
    return {name: list(ids) for name, ids in resident.items()}
