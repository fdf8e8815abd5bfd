"""The model side of the engine on a real GPU, with real processes: equality, transports, stages, memory, LoRAs, switching.

    PYTHONPATH=. python benchmarks/engine_gpu.py --out row.json                   # SDXL, bf16, CUDA graphs, all on cuda:0
    python benchmarks/engine_gpu.py --model tiny --device cpu --steps 3 --out row.json     # the same on a CPU

Sections run in order of worth, each within what is left of ``--budget-seconds``; the file is written anew after every one, so that a
run that is cut off keeps what it has. A section that fails is recorded with its error and the rest goes on. Workers share one
GPU unless ``--other-device`` names another: their times then include each other's, and ``shares_one_gpu`` says so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engine_gpu_processes import NETS, TIMEOUT_S, Child, main_of_child, paint, quiet, setup_of

from engine.drift import DriftSetup, run_drift
from engine.models import ModelSpec
from engine.serving.job import ControlUse, Job, LoraUse
from engine.workers.loader import Loader
from engine.workers.painter import LoadedLora
from engine.workers.sdxl_painter import SdxlPainter, make_painter


class Bench:
    """The sections. Each returns plain numbers."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model, self.device = arguments.model, arguments.device
        self.other = arguments.other_device or arguments.device
        self.n_steps, self.n_repeats = arguments.steps, arguments.repeats
        self.spec = ModelSpec.named(self.model)
        self.is_cuda = self.device.startswith("cuda")
        self.folder = Path(arguments.folder)
        self._painter: SdxlPainter | None = None
        self._loras: list[tuple[LoadedLora, float]] = []

    @property
    def painter(self) -> SdxlPainter:
        if self._painter is None:
            self._painter = make_painter(
                setup_of(self.model, "base", self.device, controlnet_ids=NETS[:2]), quiet, None
            )
        return self._painter

    def job(self, n_controls: int = 0, **changes: Any) -> Job:
        size = self.spec.default_size_px
        values: dict[str, Any] = {
            "request_id": "bench",
            "prompt": "a red fox in the snow",
            "negative_prompt": "blurred",
            "n_steps": self.n_steps,
            "width_px": size,
            "height_px": size,
            "seed": 3,
            "controls": tuple(ControlUse(name, 0.7) for name in NETS[:n_controls]),
            **changes,
        }
        return Job(**values)

    def loras(self) -> list[tuple[LoadedLora, float]]:
        if not self._loras:
            loader = Loader(self.folder, self.model, "BF16" if self.is_cuda else "F32")
            self._loras = [
                (LoadedLora(name, str(loader.fetch(name, {}))), scale) for name, scale in (("l1", 0.8), ("l2", -0.5))
            ]
        return self._loras

    def timed(self, *arguments: Any, **more: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        """One warm-up (captures), then medians of the repetitions."""
        _, first = paint(*arguments, **more)
        runs = [paint(*arguments, **more) for _ in range(self.n_repeats)]
        stages = {name: statistics.median(laps[name] for _, laps in runs) for name in runs[0][1]}
        return runs[-1][0], {**stages, "first_total_s": first["total_s"]}

    def local(self) -> dict[str, Any]:
        """Whole images in one process."""
        start = time.perf_counter()
        painter = self.painter
        built_s = time.perf_counter() - start
        rows = {f"{n}C": self.timed(painter, [self.job(n)])[1] for n in (0, 1, 2)}
        return {"built_s": built_s, "rows": rows, "memory": painter.memory()}

    def remote(self, transport: str) -> dict[str, Any]:
        """ControlNets in another process: equality with local ones, attach time, image times, time of one push."""
        options = {"tensor_transport": transport}
        child = Child("controlnets", self.model, self.other, f"pair-{transport}", {})
        painter = self.painter
        pair_id = child.line.pair_id
        wanted, painter._model_options = painter._model_options, type(painter._model_options)(**options)
        try:
            child.wait_ready()
            start = time.perf_counter()
            painter.open(child.line)
            result: dict[str, Any] = {
                "attach_s": time.perf_counter() - start,
                "worker_start_s": child.ready_s,
                "transport": child.line.transport,
                "rows": {},
            }
            pairs = dict.fromkeys(NETS[:2], child.line)
            for n in (1, 2):
                expected, _ = paint(painter, [self.job(n)])
                found, stages = self.timed(painter, [self.job(n)], pairs)
                result["rows"][f"{n}C"] = {**stages, "is_bitwise_equal_to_local": torch.equal(found, expected)}
            result["push"] = self._pushes(painter._remotes[pair_id])
            child.line.tell({"type": "step", "what": "memory"})
            result["controlnet_worker_memory"] = child.line.hear(TIMEOUT_S)
            return result
        finally:
            painter._model_options = wanted
            painter.close(pair_id)
            child.close()

    def _pushes(self, remote: Any) -> dict[str, float]:
        """Seconds for buffers of a CFG half's and a whole guided forward's residuals, asked for by a message; 30 each."""
        from engine.controlnet import ResidualLayout

        size, seconds = self.spec.default_size_px, {}
        for batch in (1, 2):
            n_elements = ResidualLayout.of(self.spec, batch, size, size, is_channels_last=False).n_elements
            values = []
            for _ in range(33):
                start = time.perf_counter()
                remote.exchange(n_elements)
                if self.is_cuda:
                    torch.cuda.synchronize(self.device)
                values.append(time.perf_counter() - start)
            n_bytes = n_elements * self.painter.options.dtype.itemsize
            seconds[f"{n_bytes}_bytes_s"] = statistics.median(values[3:])
        return seconds

    def lora(self) -> dict[str, Any]:
        """Fetch, patch in time and late, restore; the weights afterwards."""
        start = time.perf_counter()
        loras = self.loras()
        fetch_s = (time.perf_counter() - start) / len(loras)
        painter = self.painter
        unet = painter._checkpoints.worker("default").models.unet
        before = {name: weight.detach().clone() for name, weight in unet.named_parameters()}
        plain, _ = paint(painter, [self.job()])
        rows = {}
        for n in (1, 2):
            job = self.job(loras=tuple(LoraUse(item.lora_id, scale) for item, scale in loras[:n]))
            for step in (0, min(5, self.n_steps - 1)):
                _, rows[f"{n}L_patched_before_{step}"] = self.timed(painter, [job], loras=loras[:n], patch_step=step)
        is_same = all(torch.equal(weight, before[name]) for name, weight in unet.named_parameters())
        again, _ = paint(painter, [self.job()])
        return {
            "file_to_host_tier_s": fetch_s,
            "rows": rows,
            "weights_are_restored_bitwise": is_same,
            "image_after_is_bitwise_equal": torch.equal(plain, again),
            "mapped_bytes": painter._loras.bytes,
        }

    def cfg2(self) -> dict[str, Any]:
        """Two ranks: their picture beside the one of a single rank."""
        child = Child("rank", self.model, self.other, "partner", {})
        try:
            child.wait_ready()
            setup = setup_of(self.model, "base", self.device, rank=0, n_ranks=2, topology="decoupled_cfg2")
            leader = make_painter(setup, quiet, child.line)
            expected, single = self.timed(self.painter, [self.job()])
            values, memory, found = [], {}, expected
            for _ in range(self.n_repeats + 1):
                child.line.tell({"type": "paint", "job": self.job().to_plain()})
                found, stages = paint(leader, [self.job()])
                values.append(stages)
                memory = child.line.hear(TIMEOUT_S)
            return {
                "transport": child.line.transport,
                "relative_l2_to_single": relative_l2(found, expected),
                "single": single,
                "pair": {name: statistics.median(run[name] for run in values[1:]) for name in values[0]},
                "memory_of_rank_1": memory,
            }
        finally:
            child.close()

    def batch(self) -> dict[str, Any]:
        """Compatible jobs in one forward batch: seconds, and how far each picture is from the one painted alone."""
        rows = {}
        alone, _ = paint(self.painter, [self.job()])
        for n in (1, 2, 4):
            jobs = [self.job(request_id=str(i), seed=3 + i) for i in range(n)]
            found, stages = self.timed(self.painter, jobs)
            rows[str(n)] = {**stages, "first_relative_l2_to_alone": relative_l2(found[:1], alone)}
        return rows

    def checkpoints(self) -> dict[str, Any]:
        """Three checkpoints on two places: loading into a free place, into a taken one, and switching to a resident one."""
        painter, rows = self.painter, {}
        for name in ("second", "third", "default", "third"):
            start = time.perf_counter()
            is_loaded = painter.activate(name)
            if self.is_cuda:
                torch.cuda.synchronize(self.device)
            rows[f"{len(rows)}_{name}"] = {"is_loaded": is_loaded, "s": time.perf_counter() - start}
        painter.activate("default")
        return {"rows": rows, "memory": painter.memory()}

    def drift(self) -> dict[str, Any]:
        """By patch step, 30 steps, one seed."""
        n_steps = min(30, self.n_steps)
        steps = tuple(step for step in (0, 1, 2, 5, 10, 20) if step < n_steps)
        return run_drift(DriftSetup(self.model, self.device, n_steps, steps, n_seeds=1), lambda text: None)

    def fp8(self) -> dict[str, Any]:
        """8-bit residuals through host memory: time and distance."""
        painter = self.painter
        child = Child("controlnets", self.model, self.other, "pair-fp8", {})
        options = painter._model_options
        try:
            child.wait_ready()
            painter._model_options = type(options)(tensor_transport="line", fp8_residuals=True)
            painter.open(child.line)
            expected, _ = paint(painter, [self.job(1)])
            found, stages = self.timed(painter, [self.job(1)], {"a": child.line})
            return {**stages, "relative_l2_to_exact": relative_l2(found, expected)}
        finally:
            painter._model_options = options
            painter.close("pair-fp8")
            child.close()

    def engine(self) -> dict[str, Any]:
        """The whole engine: a decoupled allocation, 4 jobs with ControlNets and LoRAs, from submit to PNG."""
        from engine.allocation import Allocation, Policies, Pool
        from engine.serving.engine import Engine
        from engine.serving.settings import EngineSettings

        kind = "gpu" if self.is_cuda else "cpu"
        pools = (
            Pool("base", "base", 1, kind, topology="decoupled", controlnet_ids=()),
            Pool("nets", "controlnet", 1, kind, topology="decoupled", controlnet_ids=NETS[:2]),
        )
        allocation = Allocation(pools, policies=Policies(lora_patch_by_step=min(10, self.n_steps - 1)))
        devices = (self.device, self.other) if self.is_cuda else ("cpu",)
        settings = EngineSettings(Path(tempfile.mkdtemp(dir=self.folder)), model=self.model, devices=devices)
        jobs = [
            self.job(n, request_id=f"job-{i}", loras=(LoraUse("l1", 0.8),)[: i % 2])
            for i, n in enumerate((0, 1, 2, 2, 2, 0))
        ]

        async def run() -> dict[str, Any]:
            engine = Engine(allocation, settings)
            start = time.perf_counter()
            await engine.start()
            started_s = time.perf_counter() - start
            try:
                outcomes = [await engine.submit(job) for job in jobs]
            finally:
                await engine.stop()
            return {
                "start_s": started_s,
                "jobs": [
                    {
                        "status": outcome.status,
                        "reason": outcome.reason,
                        "latency_s": outcome.end_s - outcome.arrival_s,
                        "patch_step": outcome.result.lora_patch_step if outcome.result else None,
                    }
                    for outcome in outcomes
                ],
            }

        return asyncio.run(asyncio.wait_for(run(), 300))


def relative_l2(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes the file anew, beside and renamed."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(result, indent=1, default=str) + "\n")
    beside.replace(path)


def run_bench(arguments: argparse.Namespace) -> None:
    start = time.perf_counter()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        arguments.folder = folder
        bench = Bench(arguments)
        sections: list[tuple[str, Callable[[], dict[str, Any]]]] = [
            ("local", bench.local),
            ("remote_auto", lambda: bench.remote("auto")),
            ("lora", bench.lora),
            ("remote_host_memory", lambda: bench.remote("line")),
            ("cfg2", bench.cfg2),
            ("batch", bench.batch),
            ("checkpoints", bench.checkpoints),
            ("engine", bench.engine),
            ("drift", bench.drift),
            ("fp8", bench.fp8),
        ]
        from calibrate.fingerprint import engine_version, software

        result: dict[str, Any] = {
            "benchmark": "engine_model_side",
            "what": f"{bench.model}, {bench.n_steps} steps, {bench.n_repeats} repetitions after one that captures",
            "gpu": torch.cuda.get_device_name(bench.device) if bench.is_cuda else "cpu",
            "shares_one_gpu": bench.other == bench.device,
            "software": software(),
            "engine": engine_version(),
            "sections": {},
        }
        wanted = arguments.only.split(",") if arguments.only else [name for name, _ in sections]
        for name, section in sections:
            if name not in wanted:
                continue
            used_s = time.perf_counter() - start
            if used_s > arguments.budget_seconds:
                result["sections"][name] = {"skipped": f"{used_s:.0f} s of {arguments.budget_seconds:g} s were used"}
                continue
            before = time.perf_counter()
            try:
                found = section()
            except Exception as error:  # recorded; the sections do not depend on each other
                traceback.print_exc()
                found = {"failed": f"{type(error).__name__}: {error}"[:2000]}
            found["section_s"] = round(time.perf_counter() - before, 2)
            result["sections"][name] = found
            result["seconds"] = round(time.perf_counter() - start, 1)
            write(arguments.out, result)
            print(json.dumps({name: found}, default=str), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sdxl", choices=["sdxl", "tiny"])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--other-device", default="", help="of ControlNet workers and of rank 1; the same if not given")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget-seconds", type=float, default=420)
    parser.add_argument("--only", default="", help="names of sections, separated by commas")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=["controlnets", "rank"], help=argparse.SUPPRESS)
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--options", default="{}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is None:
        if arguments.out is None:
            parser.error("--out is needed")
        run_bench(arguments)
        return
    main_of_child(arguments.child, arguments.model, arguments.device, arguments.fd, arguments.options)


if __name__ == "__main__":
    main()
