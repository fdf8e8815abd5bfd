"""One denoising step on the GPU's clock: which kernels run in the encoder, the ControlNet and the decoder, and what is hidden.

    PYTHONPATH=. python benchmarks/step_timeline.py --out step_timeline.json                  # SDXL, 1024², bf16, one ControlNet
    PYTHONPATH=. python benchmarks/step_timeline.py --draw step_timeline.json docs/step_timeline.svg

Times come from torch's profiler, which sees the kernels inside CUDA graphs. The profiler itself makes a step a little longer; the
row states the step without it as well. Needs a GPU to measure; drawing needs nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

PARTS: Final = ("scale", "encoder", "controlnet", "decoder")
KINDS: Final[Mapping[str, tuple[str, ...]]] = {
    "attention": ("sdpa", "flash", "fmha", "attention"),
    "convolution": ("conv", "fprop", "implicit", "nhwctonchw", "nchwtonhwc"),
    "GEMM with GEGLU": ("geglu",),
    "norm": ("group_norm", "layer_norm", "norm"),
    "GEMM": ("gemm", "nvjet", "cublas", "cutlass", "splitk"),
}
"""Kind to the pieces of kernel names that mean it; what has none of them is ``other``."""
COLOURS: Final = {
    "GEMM": "#0072B2", "GEMM with GEGLU": "#56B4E9", "attention": "#E69F00", "convolution": "#009E73", "norm": "#CC79A7",
    "other": "#999999",
}  # fmt: skip
Row = dict[str, Any]


def kind_of(kernel: str) -> str:
    """Which of :data:`KINDS` a kernel belongs to, by its name."""
    name = kernel.lower()
    return next((kind for kind, pieces in KINDS.items() if any(piece in name for piece in pieces)), "other")


def kernels_of(events: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Kernels of a Chrome trace with the part they belong to, by start; times in µs from the first.

    A kernel belongs to the part whose range on the host encloses the launch with the same correlation id.
    """
    events = list(events)
    ranges = [
        (e["ts"], e["ts"] + e["dur"], e["name"])
        for e in events
        if e.get("cat") == "user_annotation" and e["name"] in PARTS
    ]
    launches = {
        e["args"]["correlation"]: e["ts"] for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }  # fmt: skip
    found = []
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memset", "gpu_memcpy"):
            continue
        launched = launches.get(event.get("args", {}).get("correlation"))
        part = next((name for start, end, name in ranges if launched is not None and start <= launched <= end), None)
        if part is not None:
            found.append(
                {"part": part, "kind": kind_of(event["name"]), "start_us": event["ts"], "duration_us": event["dur"]}
            )
    found.sort(key=lambda row: row["start_us"])
    first = found[0]["start_us"] if found else 0.0
    for row in found:
        row["start_us"] = round(row["start_us"] - first, 2)
    return found


def summary(kernels: Sequence[Row]) -> Row:
    """Milliseconds and launches by part and kind, the span of each part, and the time in which no kernel ran."""
    parts: Row = {}
    for part in PARTS:
        rows = [row for row in kernels if row["part"] == part]
        if not rows:
            continue
        kinds: dict[str, float] = {}
        for row in rows:
            kinds[row["kind"]] = kinds.get(row["kind"], 0.0) + row["duration_us"] / 1e3
        end_us = max(row["start_us"] + row["duration_us"] for row in rows)
        parts[part] = {
            "n_kernels": len(rows),
            "from_ms": rows[0]["start_us"] / 1e3,
            "to_ms": end_us / 1e3,
            "kinds_ms": {kind: round(ms, 3) for kind, ms in sorted(kinds.items())},
        }
    busy_us, until_us = 0.0, 0.0
    for row in kernels:
        end_us = row["start_us"] + row["duration_us"]
        busy_us += max(0.0, end_us - max(until_us, row["start_us"]))
        until_us = max(until_us, end_us)
    return {"parts": parts, "span_ms": until_us / 1e3, "busy_ms": busy_us / 1e3, "gaps_ms": (until_us - busy_us) / 1e3}


def measure(model: str, device: str, n_controlnets: int) -> Row:
    """Profiles one step of a worker that holds its ControlNets itself."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    from calibrate.fingerprint import engine_version, software
    from engine.base import BaseWorker, EngineOptions
    from engine.models import ModelSpec, build_controlnet, build_models

    torch.set_grad_enabled(False)
    spec, options = ModelSpec.named(model), EngineOptions.fast(device)
    nets = {f"net-{i}": build_controlnet(spec, device, options.dtype, i + 1) for i in range(n_controlnets)}
    worker = BaseWorker(build_models(spec, device, options.dtype, 0), nets, options)
    bench = worker.prepare(1, spec.default_size_px, spec.default_size_px, n_controlnets)

    def step() -> None:
        with record_function("encoder"):
            bench.encoder()
        for place in range(n_controlnets):
            with record_function("controlnet"):
                bench.controlnet(place)
        with record_function("decoder"):
            bench.decoder()

    times = []
    for repeat in range(13):
        worker.synchronize()
        started = time.perf_counter()
        step()
        worker.synchronize()
        if repeat >= 3:
            times.append((time.perf_counter() - started) * 1e3)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step()
        worker.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        kernels = kernels_of(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])
    times.sort()
    return {
        "benchmark": "step_timeline", "model": model, "n_controlnets": n_controlnets, "forward_batch": 2,
        "gpu": torch.cuda.get_device_name(device), "engine_version": engine_version(), "software": software(),
        "step_ms_without_profiler": {"median": times[len(times) // 2], "min": times[0], "max": times[-1]},
        "summary": summary(kernels),
        # columns, because there are some 1,500
        "kernels": {name: [row[name] for row in kernels] for name in ("part", "kind", "start_us", "duration_us")},
    }  # fmt: skip


def draw(row: Row) -> str:
    """An SVG: a lane for each part, kernels in the colour of their kind, and a table of milliseconds below."""
    columns = row["kernels"]
    kernels = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    found = row["summary"]
    parts = [part for part in PARTS if part in found["parts"]]
    left, top, wide, lane = 110.0, 46.0, 1040.0, 34.0
    bottom = top + lane * len(parts)
    scale = wide / found["span_ms"]
    text = 'font-family="sans-serif" font-size="13" fill="#222"'
    title = f"One step, {row['n_controlnets']} ControlNet in the same process, {row['gpu']}: {found['span_ms']:.1f} ms, {found['gaps_ms']:.1f} ms without a kernel"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1180 {bottom + 46 + 22 * len(parts):.0f}" role="img" aria-label="{title}">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="20" {text} font-weight="bold">{title}</text>',
    ]
    at = left
    for kind, colour in COLOURS.items():
        lines.append(
            f'<rect x="{at:.0f}" y="28" width="12" height="12" fill="{colour}"/><text x="{at + 16:.0f}" y="39" {text}>{kind}</text>'
        )
        at += 30 + 8 * len(kind)
    for index, part in enumerate(parts):
        y = top + lane * index
        lines.append(f'<text x="10" y="{y + 21:.0f}" {text}>{part}</text>')
        for kernel in kernels:
            if kernel["part"] == part:
                x, w = left + kernel["start_us"] / 1e3 * scale, max(0.15, kernel["duration_us"] / 1e3 * scale)
                lines.append(
                    f'<rect x="{x:.2f}" y="{y + 4:.0f}" width="{w:.2f}" height="{lane - 8:.0f}" fill="{COLOURS[kernel["kind"]]}"/>'
                )
    for ms in range(0, int(found["span_ms"]) + 1, 5):
        x = left + ms * scale
        lines.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.0f}" y2="{bottom:.0f}" stroke="#ccc" stroke-width="0.5"/>'
        )
        lines.append(f'<text x="{x - 6:.1f}" y="{bottom + 16:.0f}" {text}>{ms}{" ms" if ms == 0 else ""}</text>')
    for index, part in enumerate(parts):
        about = found["parts"][part]
        kinds = ", ".join(
            f"{kind} {ms:.1f}" for kind, ms in sorted(about["kinds_ms"].items(), key=lambda item: -item[1])
        )
        lines.append(
            f'<text x="10" y="{bottom + 42 + 22 * index:.0f}" {text}>{part}: {about["to_ms"] - about["from_ms"]:.1f} ms in {about["n_kernels"]} kernels ({kinds})</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    """Measures, or draws what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sdxl")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--controlnets", type=int, default=1, choices=range(4))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--draw", type=Path, nargs=2, metavar=("ROW", "SVG"))
    arguments = parser.parse_args()
    if arguments.draw:
        row, target = arguments.draw
        target.write_text(draw(json.loads(row.read_text(encoding="utf-8"))), encoding="utf-8")
        return
    if arguments.out is None:
        parser.error("needs --out FILE or --draw ROW SVG")
    row = measure(arguments.model, arguments.device, arguments.controlnets)
    arguments.out.write_text(json.dumps(row, sort_keys=True) + "\n", encoding="utf-8")
    print(json.dumps({"summary": row["summary"], "step": row["step_ms_without_profiler"]}, indent=1))


if __name__ == "__main__":
    main()
