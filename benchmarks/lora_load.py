"""From a LoRA file to where a worker can copy it to its device: seconds, and ratios to a plain safetensors load in the same run.

    python benchmarks/lora_load.py [--model sdxl] [--rank 64] [--rounds 7] [--json FILE]

The file (sdxl, rank 64: 186 MB in fp16) is in the page cache and the host tier in /dev/shm; weights go to bf16. Rounds are
interleaved; rows carry the median and the range. "stage" rows time one part of the loader's work alone, on one thread; the loader
overlaps them. Its least possible time is that of its slowest stage, or of all of them over the processor's cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.lora import pin_pairs  # noqa: E402
from engine.lora_file import read_lora  # noqa: E402
from engine.registry.flat_lora import map_flat_lora  # noqa: E402
from engine.registry.float_bits import convert, is_finite  # noqa: E402
from engine.registry.lora_check import plan_lora  # noqa: E402
from engine.registry.random_lora import write_random_lora  # noqa: E402
from engine.registry.safetensors_header import LENGTH_BYTES, parse_header  # noqa: E402
from engine.registry.shapes import architecture  # noqa: E402
from engine.registry.store import FolderStore  # noqa: E402
from engine.workers.loader import Loader  # noqa: E402

PLAIN = "safetensors load and conversion to bf16"


def cases(folder: Path, tier: Path, model: str, rank: int) -> dict[str, Callable[[], object]]:
    """Name to what is timed."""
    shapes = architecture(model)
    path = folder / "style.safetensors"
    lora_id = write_random_lora(path, shapes, rank, seed=1)
    data = path.read_bytes()
    body_at = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
    bits = np.frombuffer(data, np.uint16, offset=body_at)
    targets = dict(shapes.lora_targets)
    loader = Loader(tier, model, "BF16", FolderStore(folder))
    entry = {"id": lora_id, "kind": "lora", "architecture": model, "file": path.name}

    def to_flat() -> None:
        loader.fetch(lora_id, entry).unlink()

    def in_process() -> None:
        pin_pairs(read_lora(path, targets), torch.bfloat16, is_pinned=False)

    def plain() -> None:
        for tensor in load_file(path).values():
            tensor.to(torch.bfloat16)

    def write() -> None:
        with (tier / "written").open("wb", buffering=0) as file:
            for at in range(0, len(data), 2**20):
                file.write(memoryview(data)[at : at + 2**20])
        (tier / "written").unlink()

    def header() -> None:
        plan_lora("file", parse_header("file", data[LENGTH_BYTES:body_at], len(data), n_dims_max=2), targets)

    flat = loader.fetch(lora_id, entry)
    kept = flat.with_name("kept.flat")
    flat.rename(kept)
    return {
        PLAIN: plain,
        "loader: file to checked flat file in the host tier": to_flat,
        "in process: file to checked buffer (read_lora, pin_pairs)": in_process,
        "worker: map a flat file": lambda: map_flat_lora(kept),
        "worker: map a flat file and read every byte": lambda: map_flat_lora(kept).body.max(),
        "stage read": path.read_bytes,
        "stage header and keys": header,
        "stage sha256": lambda: hashlib.sha256(data),
        "stage finite": lambda: is_finite(bits, "F16"),
        "stage convert fp16 to bf16": lambda: convert(bits, "F16", "BF16"),
        "stage write to the host tier": write,
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sdxl")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir="/dev/shm") as tier:
        timed = cases(Path(folder), Path(tier), given.model, given.rank)
        file_bytes = (Path(folder) / "style.safetensors").stat().st_size
        seconds: dict[str, list[float]] = {name: [] for name in timed}
        for i in range(given.rounds + 1):
            for name, run in timed.items():
                began = time.perf_counter()
                run()
                if i:  # the first round fills caches
                    seconds[name].append(time.perf_counter() - began)
    plain_s = statistics.median(seconds[PLAIN])
    rows = []
    for name, values in seconds.items():
        median_s = statistics.median(values)
        rows.append({
            "case": name,
            "median_s": round(median_s, 4),
            "low_s": round(min(values), 4),
            "high_s": round(max(values), 4),
            "gb_per_s": round(file_bytes / median_s / 1e9, 2),
            "ratio_to_plain": round(median_s / plain_s, 3),
        })  # fmt: skip
        print(
            f"{name:62} {median_s * 1e3:8.1f} ms  ({min(values) * 1e3:.1f}–{max(values) * 1e3:.1f})  {median_s / plain_s:6.2f} × plain"
        )
    report = {
        "benchmark": "lora_load",
        "model": given.model,
        "rank": given.rank,
        "file_bytes": file_bytes,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "machine": platform.machine(),
        "n_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "rounds": given.rounds,
        "rows": rows,
    }
    if given.json is not None:
        beside = given.json.with_name(given.json.name + ".part")
        beside.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        beside.replace(given.json)


if __name__ == "__main__":
    main()
