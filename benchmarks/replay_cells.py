"""Writes a small trace with every number of ControlNets and LoRAs, and an allocation and a catalogue to replay it with.

    python benchmarks/replay_cells.py --model sdxl --seconds 90 --per-s 0.4 --out cells     # prints the replay's command
    python -m engine replay --trace cells/trace.csv --allocation cells/allocation.json --catalogue cells/catalogue.json \\
        --model sdxl --devices cuda:0,cuda:0 --out replayed

Requests use 0 to 3 ControlNets and 0 to 2 LoRAs, each of the twelve combinations equally often, at Poisson arrivals; all
weights are random. ``--bases`` replicas share one ControlNet worker: with four GPUs, three of them. Needs neither pydantic
nor a GPU; the same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np

from engine.allocation import Allocation, Policies, Pool, to_json
from engine.catalogue import Catalogue, CatalogueEntry

SIZES_PX: Final = {"featherweight": 64, "tiny": 64, "sdxl": 1024}
CELLS: Final = tuple(product(range(4), range(3)))
NETS: Final = ("net-0", "net-1", "net-2")
LORAS: Final = tuple(f"lora-{number}" for number in range(6))


def trace_text(options: argparse.Namespace) -> str:
    """The requests as CSV; list cells hold JSON."""
    arrivals, choices = (
        np.random.default_rng(seed) for seed in np.random.SeedSequence([options.seed, 0x63656C6C]).spawn(2)
    )
    n = max(len(CELLS), round(options.seconds * options.per_s))
    cells = np.resize(np.arange(len(CELLS)), n)
    choices.shuffle(cells)
    arrival_s = np.sort(arrivals.uniform(0.0, options.seconds, n))
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow([
        "request_id", "arrival_s", "base_model_id", "n_steps", "width_px", "height_px", "n_images", "guidance_scale",
        "controlnet_ids", "lora_ids", "lora_scales",
    ])  # fmt: skip
    for place, cell in enumerate(cells):
        n_controls, n_loras = CELLS[cell]
        nets = sorted(choices.choice(NETS, n_controls, replace=False).tolist())
        loras = choices.choice(LORAS, n_loras, replace=False).tolist()
        size_px = SIZES_PX[options.model]
        rows.writerow([
            f"{n_controls}C{n_loras}L-{place}", f"{arrival_s[place]:.3f}", "default", options.steps, size_px, size_px, 1, 5.0,
            json.dumps(nets), json.dumps(loras), json.dumps([0.8] * n_loras),
        ])  # fmt: skip
    return out.getvalue()


def allocation(n_bases: int) -> Allocation:
    """Base replicas and one ControlNet worker that all of them share."""
    return Allocation(
        (
            Pool("base", "base", n_bases, "any", 1, "decoupled", base_model_ids=("default",), controlnet_ids=()),
            Pool("controlnets", "controlnet", 1, "any", 1, "decoupled", controlnet_ids=NETS),
        ),
        policies=Policies(lora_patch_by_step=10),
    )


def catalogue() -> Catalogue:
    """Random weights under every name of the trace."""
    entries = [CatalogueEntry("default", "base", file="seed:0")]
    entries += [CatalogueEntry(name, "controlnet", file=f"seed:{1 + place}") for place, name in enumerate(NETS)]
    entries += [CatalogueEntry(name, "lora", file=f"seed:{11 + place}") for place, name in enumerate(LORAS)]
    return Catalogue(MappingProxyType({entry.id: entry for entry in entries}))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SIZES_PX), default="tiny")
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--per-s", type=float, default=0.4, help="requests a second")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--bases", type=int, default=1, help="base replicas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("trace.csv", trace_text(options)),
        ("allocation.json", to_json(allocation(options.bases))),
        ("catalogue.json", to_json(catalogue())),
    ):
        (options.out / name).write_text(text, encoding="utf-8")
    device = "cuda:0" if options.model == "sdxl" else "cpu"
    out = options.out
    print(
        f"python -m engine replay --trace {out}/trace.csv --allocation {out}/allocation.json --catalogue {out}/catalogue.json "
        f"--model {options.model} --devices {','.join([device] * (options.bases + 1))} --out replayed"
    )


if __name__ == "__main__":
    main()
