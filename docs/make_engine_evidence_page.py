"""Writes docs/engine_evidence.md from the rows of benchmarks/results: ``python docs/make_engine_evidence_page.py``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

PAGE: Final = Path(__file__).parent / "engine_evidence.md"
RESULTS: Final = Path(__file__).parents[1] / "benchmarks" / "results"
INTRO: Final = """# What the engine was seen to do

This page is written by `docs/make_engine_evidence_page.py` from the rows in `benchmarks/results`; each section names its script. Weights are
random. The tests show the same on a CPU: `tests/engine` (equality with the stock pipeline, fp32, 10⁻⁴), `tests/faults` (200 seeded schedules of
faults on featherweight workers, 8 on the tiny model, 50 kills without a leak).
"""
COUNTS: Final = ("n_injected", "n_jobs", "n_lost", "n_doubled", "n_wrong", "n_retried", "n_failed_with_reason")
MIB: Final = 2**20
Rows = Iterable[Mapping[str, Any]]


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """Markdown."""
    names = list(head)
    lines = [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    return [*lines, *(f"| {' | '.join(map(str, cells))} |" for cells in rows), ""]


def read(name: str) -> Any:
    """The rows of a file; none if it is not there."""
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def equality() -> list[str]:
    """Final latents beside stock Diffusers'."""
    found = read("gpu_equality.json")
    rows = []
    for row in found["rows"]:
        floors = [row["stock_nhwc_vs_stock_nchw"], row["stock_fused_vs_stock"]]
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.2f}"
        rows.append([row["cell"], *(f"{value:.4f}" for value in (row["engine_vs_stock"], *floors)), ratio])
    bitwise = [
        "Remote ControlNets gave the bits of local ones" if found["remote_controlnets_are_bitwise_equal"] else "",
        "after LoRAs were taken off, the image was bitwise the one before"
        if found["restored_after_loras_is_bitwise_equal"]
        else "",
    ]
    return [
        "## The same image as stock Diffusers", "",
        f"`benchmarks/gpu_equality.py`: {found['what']}, on one {found['gpu']}. Two stock runs that differ only in memory layout (NHWC, NCHW) or in",
        "whether LoRAs are fused are the measure of what bf16 makes of the order of sums; ours may be 1.5 times as far. The ratio is to the larger of the",
        "two. Without ControlNets and LoRAs the two stock runs do not differ at all: there is no measure, and ours is as far as elsewhere.", "",
        *table(["ControlNets, LoRAs", "ours – stock", "stock NHWC – NCHW", "stock fused – unfused", "ratio"], rows),
        f"{'; '.join(filter(None, bitwise))} (transport: `{found['remote_transport']}`).", "",
    ]  # fmt: skip


def faults(rows: Rows) -> list[str]:
    """What was done to workers, and what it cost."""
    lines = []
    for row in rows:
        if "n_injected" in row:
            back = f"{row['recovery_s_median']:.1f} ({row['recovery_s_max']:.1f})"
            lines.append([row["model"], f"`{row['fault']}`", *(row[name] for name in COUNTS), back])
    head = ["workers", "fault", "times", "jobs", "lost", "doubled", "wrong", "tried again", "failed", "back after, s"]
    return [
        "## Faults", "",
        "`benchmarks/faults.py`: workers are killed (`SIGKILL`), stopped (`SIGSTOP`), made to stand still while their heart beats, or asked to go (`SIGTERM`)",
        "in the middle of a batch, while six jobs run on a base worker, a CFG pair, a ControlNet worker and a loader. *wrong*: done, with another image than",
        "without faults, bit by bit. *failed*: ended with a reason. *back after*: from the fault until every worker was ready and attached again, median (longest).",
        "A stopped featherweight worker is found after 1.5 s of silence, one that stands still after 2.5 s; tiny and sdxl workers have longer limits and import torch anew.", "",
        *table(head, lines),
        *(machine(row) for row in one_of_each_model(rows)), "",
    ]  # fmt: skip


def one_of_each_model(rows: Rows) -> list[Mapping[str, Any]]:
    """The last row of each."""
    return list({row["model"]: row for row in rows if "n_injected" in row}.values())


def machine(row: Mapping[str, Any]) -> str:
    """On what it ran."""
    gpus = f", {row['gpus'][0].split(',')[0]} shared by {len(row['devices'])}" if row.get("gpus") else ""
    load = f", load average {row['load_average_1_min']}" if "load_average_1_min" in row else ""
    return f"- {row['model']}: {row['n_cores']} cores{gpus}{load}"


def overload_and_memory(rows: Rows) -> list[str]:
    """Ten times too much, and GPU memory after kills."""
    lines = []
    for row in rows:
        if row["fault"] == "overload_10x":
            resident, ended = (
                row["front_resident_mib"],
                ", ".join(f"{n:,} {name}" for name, n in row["n_ended"].items()),
            )
            lines += [
                f"**Ten times overload** for {row['duration_s']:.0f} s ({row['model']}): {row['n_jobs']:,} jobs, {ended}, {row['n_lost']} lost, "
                f"{row['n_accepted_late']} accepted ones late; never more than {row['n_waiting_max']} waited; the front process had "
                f"{resident[0]:.1f} MiB at first, {resident[-1]:.1f} MiB at last.", "",
            ]  # fmt: skip
        if row["fault"] == "device_memory":
            before, serving, after = (row[f"{name}_bytes"][0] / MIB for name in ("before", "serving", "after"))
            lines += [
                f"**Device memory** ({row['model']}): {before:,.0f} MiB before, {serving:,.0f} MiB while it served, {after:,.0f} MiB after the end.",
                "",
            ]
    return lines


def times(rows: Rows) -> list[str]:
    """Starts, attaches, drains and memory."""
    seconds, memory = [], []
    for row in rows:
        if row["fault"] == "worker_times":
            for name, found in row["duration_s"].items():
                seconds.append([row["model"], name, found["n"], f"{found['median']:.3f}", f"{found['max']:.3f}"])
            for worker, found in row["memory_bytes"].items():
                if any(found.values()):
                    kinds = ("device_bytes", "device_bytes_peak", "host_bytes")
                    memory.append([row["model"], worker, *(f"{found.get(kind, 0) / MIB:,.0f}" for kind in kinds)])
    played = read("engine_replay.json")
    for name, found in (played["duration_s"] if played else {}).items():
        seconds.append(["sdxl, replay", name, found["n"], f"{found['median']:.3f}", f"{found['max']:.3f}"])
    gpu = read("engine_gpu.json")["sections"]
    auto, pair = gpu["remote_auto"], gpu["cfg2"]
    seconds += [
        ["sdxl, H200", "ready, ControlNet worker with 2 ControlNets", 1, f"{auto['worker_start_s']:.3f}", "–"],
        ["sdxl, H200", f"attach, {auto['transport']}", 1, f"{auto['attach_s']:.3f}", "–"],
        ["sdxl, H200", "whole engine: base, ControlNet worker, loader", 1, f"{gpu['engine']['start_s']:.3f}", "–"],
    ]
    for name, found in (
        ("base with 2 ControlNets in process", gpu["local"]["memory"]),
        ("ControlNet worker with 2 ControlNets", auto["controlnet_worker_memory"]),
        ("rank of a CFG pair", pair["memory_of_rank_1"]),
    ):
        kinds = ("device_bytes", "device_bytes_peak", "host_bytes")
        memory.append(["sdxl, H200", name, *(f"{found[kind] / MIB:,.0f}" for kind in kinds)])
    return [
        "## Starting, attaching, draining", "",
        "From `events.jsonl`, in the runs above (`ready`: from the start of the process until it can be used, imports and weights included) and",
        "`benchmarks/engine_gpu.py`. Every engine keeps these events; `diffplan engine status --json` counts them.", "",
        *table(["workers", "event, pool", "times", "median, s", "longest, s"], seconds),
        "## Memory of a worker", "",
        "As workers report it, also as `diffplan_worker_memory_bytes`: what the allocator holds, and held at most; resident host memory, mostly torch itself.", "",
        *table(["workers", "worker", "device, MiB", "at most, MiB", "host, MiB"], memory),
    ]  # fmt: skip


def replay() -> list[str]:
    """A trace of every number of ControlNets and LoRAs, played on GPUs."""
    found = read("engine_replay.json")
    if not found:
        return []
    rows = [
        [
            row["cell"],
            row["n"],
            *(f"{row[name]:.2f}" for name in ("latency_s", "denoise_s", "lora_wait_s")),
            row["patch_steps"],
        ]
        for row in found["cells"]
    ]
    return [
        "## A replay with every number of add-ons", "",
        f"`benchmarks/replay_cells.py`: {found['what']}. {found['sentence']}", "",
        *table(["ControlNets, LoRAs", "requests", "latency, s (median)", "denoising, s", "waiting for LoRAs, s", "patched before step"], rows),
    ]  # fmt: skip


def page() -> str:
    """The whole page."""
    rows = read("faults.json")
    lines = [INTRO, *equality(), *faults(rows), *overload_and_memory(rows), *replay(), *times(rows)]
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
