"""Plays the validation workloads on one start of the engine, one after another, within a time limit; then simulate and compare elsewhere.

    python benchmarks/validation.py --model sdxl --device cuda:0 --limit-s 540 --out played     # on the GPU host
    diffplan validate played/w?-* --against played/again/* --profile PROFILE --out report       # anywhere

Needs neither pydantic nor simpy. Each replay has a folder as ``diffplan engine replay`` writes it; second replays, for the floor, lie under
``again/``. With ``--pack FILE`` everything that is finished is in one archive after every replay. LoRAs are real files in a local
store, under ids of their own in every replay, so that each begins with the same caches. What does not fit into the time left is left out
and named.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import platform
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.allocation import Allocation, Policies, Pool  # noqa: E402
from engine.catalogue import Catalogue, CatalogueEntry  # noqa: E402
from engine.registry.random_lora import write_random_lora  # noqa: E402
from engine.registry.shapes import architecture, architecture_names  # noqa: E402
from engine.serving.engine import Engine  # noqa: E402
from engine.serving.job import ControlUse, Job, LoraUse  # noqa: E402
from engine.serving.replay import ReplaySettings, plan_replay, replay  # noqa: E402
from engine.serving.settings import EngineSettings  # noqa: E402
from traces.problems import InputError  # noqa: E402
from traces.reader import read_trace  # noqa: E402
from traces.trace import Trace  # noqa: E402

NETS: Final = ("canny", "depth", "pose")
WARM_LORAS: Final = ("warm-a", "warm-b")
LORA_RANKS: Final = {"sdxl": 16}
TIER_BYTES_MIN: Final = 4 * 2**30
STOP_S: Final = 12.0
"""Kept of the limit for ending the engine and packing."""
OVERRUN: Final = 1.1
"""A replay may take this much longer than its trace; one past saturation takes what its work takes."""


@dataclass(frozen=True, slots=True)
class Play:
    """One replay to be made."""

    name: str
    number: int
    """0: the first of its workload; 1: the second."""
    trace: Trace
    expected_s: float


def allocation_of(topology: str, gpu_kind: str) -> Allocation:
    """One GPU: everything in one process, or the ControlNets in a second process on the same device."""
    policies = Policies(lora_cache_gib=8.0)
    if topology == "decoupled":
        base = Pool("base", "base", 1, gpu_kind, 1, "decoupled", base_model_ids=("default",), controlnet_ids=())
        nets = Pool("controlnets", "controlnet", 1, gpu_kind, 1, "decoupled", controlnet_ids=NETS)
        return Allocation((base, nets), policies=policies)
    base = Pool("base", "base", 1, gpu_kind, 1, "colocated", base_model_ids=("default",), controlnet_ids=NETS)
    return Allocation((base,), policies=policies)


def models(model: str) -> Catalogue:
    """Random weights."""
    entries = [CatalogueEntry("default", "base", architecture=_kind(model), file="seed:0")]
    entries += [
        CatalogueEntry(name, "controlnet", architecture=_kind(model), file=f"seed:{k + 1}")
        for k, name in enumerate(NETS)
    ]
    return Catalogue(MappingProxyType({entry.id: entry for entry in entries}))


def with_loras(trace: Trace, number: int, model: str, known: Catalogue) -> Catalogue:
    """The catalogue with the LoRAs of one replay, each under an id that only this replay uses."""
    names = sorted({name for names in trace.requests["lora_ids"] for name in names})
    entries = dict(known.entries)
    for name in names:
        lora_id = f"{name}.play{number}"
        entries[lora_id] = CatalogueEntry(lora_id, "lora", architecture=_kind(model), name=name, file=_lora_file(model))
    return replace(known, entries=MappingProxyType(entries))


def _lora_file(model: str) -> str:
    """One file serves all: each id is checked and laid out anew. Models without real files make theirs up."""
    return "lora.safetensors" if _has_files(model) else "seed:7"


def _has_files(model: str) -> bool:
    return model in architecture_names()


def _kind(model: str) -> str:
    """What the catalogue calls the architecture; a model without one takes any."""
    return model if _has_files(model) else "sdxl"


def plays_of(folder: Path, only: Sequence[str], again: Sequence[str], topology: str) -> list[Play]:
    """What is to be played, in the order of ``only``, else of the table; a second replay comes right after the first."""
    rows = json.loads((folder / "workloads.json").read_text(encoding="utf-8"))["workloads"]
    rows = [row for row in rows if row["topology"] == topology]
    places = [next((k for k, name in enumerate(only or ("",)) if row["name"].startswith(name)), None) for row in rows]
    chosen = [row for k in range(len(only) or 1) for row, place in zip(rows, places, strict=True) if place == k]
    plays = []
    for row in chosen:
        for number in range(2 if again and row["name"].startswith(tuple(again)) else 1):
            expected_s = max(row["duration_s"], row["mean_service_s"] * row["n_requests"]) + 3.0
            plays.append(Play(row["name"], number, read_trace(folder / f"{row['name']}.parquet"), expected_s))
    return plays


async def warm_loras(engine: Engine, plays: Sequence[Play], model: str, size_px: int) -> None:
    """One and two LoRAs patched once: what is compiled on first use is no part of a replay."""
    known = models(model)
    entries = {
        name: CatalogueEntry(name, "lora", architecture=_kind(model), file=_lora_file(model)) for name in WARM_LORAS
    }
    await engine.admit(Catalogue(MappingProxyType({**known.entries, **entries})))
    for n in (1, 2):
        outcome = await engine.submit(
            Job(
                f"warm-loras-{n}", n_steps=2, width_px=size_px, height_px=size_px, wants_images=False,
                loras=tuple(LoraUse(name) for name in WARM_LORAS[:n]),
            )
        )  # fmt: skip
        if outcome.status != "done":
            raise SystemExit(f"the warm-up with {n} LoRAs was not done: {outcome.reason}")


PROBES: Final[tuple[tuple[int, int, float, int, int, int], ...]] = (
    (512, 4, 5.0, 1, 0, 0), (512, 4, 5.0, 1, 1, 0), (512, 4, 5.0, 1, 2, 0), (512, 4, 5.0, 1, 3, 0), (512, 4, 5.0, 2, 0, 0),
    (512, 4, 5.0, 4, 0, 0), (512, 4, 5.0, 1, 0, 1), (512, 4, 5.0, 1, 0, 2), (512, 30, 1.0, 1, 0, 0), (512, 30, 1.0, 1, 1, 0),
    (1024, 4, 5.0, 1, 0, 0), (1024, 4, 5.0, 1, 1, 0),
)  # fmt: skip
"""Size, steps, guidance, images, ControlNets, LoRAs of single jobs that are timed on the idle engine before the replays: for the laws of
small requests, not for the validation."""


async def probe(engine: Engine, scale: float, n_repeats: int, lora_bytes: int) -> list[dict[str, Any]]:
    """A row for each kind of :data:`PROBES`: the stages of every repetition but a first one, in seconds."""
    rows = []
    for number, (size_px, n_steps, guidance, n_images, n_controls, n_loras) in enumerate(PROBES):
        size_px = round(size_px * scale)
        row: dict[str, Any] = {
            "size_px": size_px, "n_steps": n_steps, "guidance_scale": guidance, "n_images": n_images, "n_controlnets": n_controls,
            "n_loras": n_loras, "n_bytes": lora_bytes if n_loras else 0, "latency_s": [],
        }  # fmt: skip
        for repeat in range(n_repeats + 1):
            outcome = await engine.submit(
                Job(
                    f"probe-{number}-{repeat}", prompt=f"probe {repeat}", negative_prompt="none" if guidance > 1.0 else None,
                    n_steps=n_steps, width_px=size_px, height_px=size_px, guidance_scale=guidance, n_images=n_images,
                    controls=tuple(ControlUse(name) for name in NETS[:n_controls]), seed=number,
                    loras=tuple(LoraUse(name) for name in WARM_LORAS[:n_loras]), wants_images=False,
                )
            )  # fmt: skip
            if outcome.status != "done" or outcome.result is None:
                raise SystemExit(f"probe {row} was not done: {outcome.reason}")
            if repeat == 0:
                continue
            row["latency_s"].append(outcome.end_s - outcome.arrival_s)
            for name, value in dataclasses.asdict(outcome.result.stages).items():
                row.setdefault(name, []).append(value)
        rows.append(row)
    return rows


async def run(given: argparse.Namespace, began_s: float) -> int:
    """Plays; the number of replays that were finished."""
    out, scratch = given.out, Path(tempfile.mkdtemp(prefix="diffplan-validation-"))
    out.mkdir(parents=True, exist_ok=True)
    store = scratch / "store"
    store.mkdir()
    lora_bytes = 0
    if _has_files(given.model):
        write_random_lora(store / "lora.safetensors", architecture(given.model), LORA_RANKS.get(given.model, 4), seed=7)
        lora_bytes = (store / "lora.safetensors").stat().st_size
    plays = plays_of(given.workloads, _names(given.only), _names(given.again), given.topology)
    allocation = allocation_of(given.topology, given.gpu_kind)
    n_devices = len(allocation.pools)
    devices = ("cpu",) if given.device == "cpu" else (given.device,) * n_devices
    shared = Path("/dev/shm")  # noqa: S108
    has_room = shared.is_dir() and shutil.disk_usage(shared).free >= TIER_BYTES_MIN
    settings = EngineSettings(
        run_dir=scratch / "engine", model=given.model, devices=devices, store=str(store) if _has_files(given.model) else "",
        host_tier_parent=shared if has_room else scratch,
    )  # fmt: skip
    facts = _facts(given, settings, began_s)
    n_done = 0
    try:
        async with started(Engine(allocation, settings, models(given.model))) as engine:
            facts["start_s"] = round(time.monotonic() - began_s, 3)
            say(began_s, f"engine started, {len(plays)} replays to make")
            await warm_loras(engine, plays, given.model, given.warm_px)
            if given.probes:
                rows = await probe(engine, given.warm_px / 512, given.probes, lora_bytes)
                (out / "probes.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
                say(began_s, f"{len(rows)} kinds of jobs timed alone")
                pack(out, facts, given.pack)
            for play in plays:
                left_s = given.limit_s - STOP_S - (time.monotonic() - began_s)
                wanted_s = play.expected_s * OVERRUN
                place = out / "again" / play.name if play.number else out / play.name
                if wanted_s > left_s:
                    say(
                        began_s,
                        f"left out {play.name} ({play.number + 1}): {wanted_s:.0f} s wanted, {left_s:.0f} s left",
                    )
                    facts["left_out"].append(f"{play.name} ({play.number + 1})")
                    continue
                say(began_s, f"playing {play.name} ({play.number + 1}), about {play.expected_s:.0f} s")
                n_done += await one(engine, play, place, given.model, left_s, began_s, facts)
                pack(out, facts, given.pack)
    finally:
        pack(out, facts, given.pack)
        for log in sorted((scratch / "engine").glob("**/*.log"))[:8]:
            tail = log.read_bytes()[-4000:].decode("utf-8", "replace")
            (out / f"{log.stem}.log.txt").write_text(tail, encoding="utf-8")
        pack(out, facts, given.pack)
        shutil.rmtree(scratch, ignore_errors=True)
    return n_done


async def one(
    engine: Engine, play: Play, place: Path, model: str, left_s: float, began_s: float, facts: dict[str, Any]
) -> int:
    """One replay; 1 if it was finished. One that takes too long is broken off and moved to ``unfinished/``."""
    catalogue = with_loras(play.trace, play.number, model, models(model))
    await engine.admit(catalogue)
    plan = plan_replay(play.trace, catalogue, ReplaySettings())
    task = asyncio.create_task(
        replay(plan, engine, place, engine.allocation.pools, ReplaySettings(), progress=lambda line: say(began_s, line))
    )
    done, _ = await asyncio.wait({task}, timeout=left_s)
    if not done:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        unfinished = place.parent / "unfinished"
        unfinished.mkdir(exist_ok=True)
        place.replace(unfinished / place.name)
        facts["left_out"].append(f"{play.name} ({play.number + 1}), broken off")
        return 0
    summary = task.result()
    for records in place.glob("records-*.jsonl"):
        records.unlink()  # the tables have it all
    latency = summary["latency_s"]["all"]
    say(began_s, f"{play.name}: {summary['n_by_status']}, p50 {latency['p50']:.3f} s, busy {summary['busy_ratio']}")
    facts["played"].append({"name": play.name, "number": play.number, "warm_up_s": round(summary["warm_up_s"], 3)})
    return 1


@contextlib.asynccontextmanager
async def started(engine: Engine) -> AsyncIterator[Engine]:
    """The engine while it runs."""
    try:
        await engine.start()
        yield engine
    finally:
        await engine.stop()


def pack(out: Path, facts: dict[str, Any], archive: Path | None) -> None:
    """Writes ``facts.json`` and, if asked, the archive of everything: beside, then renamed."""
    (out / "facts.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if archive is None:
        return
    archive.parent.mkdir(parents=True, exist_ok=True)
    beside = archive.with_name(archive.name + ".part")
    with tarfile.open(beside, "w:gz") as tar:
        tar.add(out, arcname="played")
    beside.replace(archive)


def _facts(given: argparse.Namespace, settings: EngineSettings, began_s: float) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "model": given.model,
        "topology": given.topology,
        "device": given.device,
        "python": platform.python_version(),
        "n_cores": os.cpu_count(),
        "host_tier_in_memory": str(settings.host_tier_parent) == "/dev/shm",  # noqa: S108
        "workloads": json.loads((given.workloads / "workloads.json").read_text(encoding="utf-8"))["profile_id"],
        "played": [],
        "left_out": [],
        "prepared_s": round(time.monotonic() - began_s, 3),
    }
    try:
        import torch

        facts["torch"] = torch.__version__
        if given.device != "cpu":
            facts["gpu"] = torch.cuda.get_device_name(0)
    except ImportError:
        pass  # the front process needs no torch; the facts then say nothing about it
    return facts


def say(began_s: float, text: str) -> None:
    """A line of progress."""
    print(f"{time.monotonic() - began_s:7.1f} s  {text}", file=sys.stderr, flush=True)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if everything that was asked for was played."""
    began_s = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", type=Path, default=ROOT / "examples" / "validation")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--model", default="tiny", choices=("tiny", "sdxl", "featherweight"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gpu-kind", default="nvidia-h200", help="as the profile calls it")
    parser.add_argument("--topology", default="colocated", choices=("colocated", "decoupled"))
    parser.add_argument("--only", default="", help="beginnings of names, separated by commas: these, in this order")
    parser.add_argument("--again", default="", help="beginnings of names of which a second replay is made")
    parser.add_argument("--limit-s", type=float, default=540.0, help="for everything, the engine's start included")
    parser.add_argument("--probes", type=int, default=0, help="time single jobs so often first")
    parser.add_argument("--warm-px", type=int, default=512)
    parser.add_argument("--pack", type=Path, help="archive of what is finished, rewritten after every replay")
    given = parser.parse_args(arguments)
    if given.out.exists() and any(given.out.iterdir()):
        parser.error(f"{given.out} is not empty")
    try:
        n_done = asyncio.run(run(given, began_s))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    say(began_s, f"{n_done} replays finished")
    return 0 if n_done else 1


if __name__ == "__main__":
    sys.exit(main())
