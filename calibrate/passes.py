"""A session's order said on the command line: passes over chosen tasks, for what a standard session has left open. Torch-free.

    --passes "loads:engine,brief,3*cells:engine:01c+cells:tuned:01c"

Passes are separated by commas and done in that order. A pass is one or more groups joined by ``+``, whose tasks are mixed at random;
``3*`` does it three times. A group may be narrowed by ``:`` and the beginning of a station's name, numbers of ControlNets
(``01c``: none and one) or of LoRAs (``12l``).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Final

from calibrate.extent import Extent
from calibrate.points import (
    Task,
    change_tasks,
    client_tasks,
    decode_tasks,
    fit_step_task,
    image,
    load_tasks,
    lora_tasks,
    memory_tasks,
    our_images,
    peer_images,
    remote_tasks,
    serving_tasks,
    start_tasks,
    step_tasks,
    wide_image_tasks,
)
from traces.problems import InputError, Problem

TIMES_MAX: Final = 50
N_LORAS_MAX: Final = 2
_TIMES: Final = re.compile(r"(?:(\d{1,3})\*)?(.*)")
_COUNTS: Final = re.compile(r"([0-3]{1,4})([cl])")


def cell_tasks(extent: Extent) -> list[Task]:
    """One image of every kind, 0 to all ControlNets and 0 to 2 LoRAs, on every stack; the peers' LoRAs fused."""
    found = []
    for nets in range(extent.n_controlnets + 1):
        for n_loras in range(N_LORAS_MAX + 1):
            fused = image(extent, nets, n_loras, "fused" if n_loras else "")
            ours = dataclasses.replace(fused, variant="")
            found.append(Task("cells", "engine", "image", ours, 1, "colocated", cost_s=2 + 0.8 * nets))
            if extent.tuned_batches and nets <= extent.n_tuned_controlnets:
                tuned = "tuned-controlnets" if nets else "tuned-2"
                cost_s = 2 + 0.9 * nets + 1.5 * n_loras
                found.append(Task("cells", tuned, "image", fused, 1, "diffusers_tuned", cost_s=cost_s))
            cost_s = 4 + 1.7 * nets + 1.6 * n_loras
            found.append(Task("cells", "stock", "image", fused, 1, "diffusers", cost_s=cost_s))
    return found


GROUPS: Final[Mapping[str, Callable[[Extent], list[Task]]]] = {
    "steps": step_tasks,
    "candidates": lambda extent: [fit_step_task(extent, shape) for shape in extent.candidate_shapes],
    "held_out": lambda extent: [fit_step_task(extent, shape, is_held_out=True) for shape in extent.held_out_shapes],
    "images": lambda extent: [*our_images(extent), *peer_images(extent)],
    "wide_images": wide_image_tasks,
    "cells": cell_tasks,
    "decode": decode_tasks,
    "memory": memory_tasks,
    "loras": lora_tasks,
    "loads": load_tasks,
    "brief": lambda extent: serving_tasks(extent)[0],
    "whole": lambda extent: serving_tasks(extent)[1],
    "shared": lambda extent: [task for block in serving_tasks(extent)[2:-1] for task in block],
    "changes": change_tasks,
    "clients": client_tasks,
    "remote": remote_tasks,
    "start": start_tasks,
}
"""What a pass may be of; ``brief``, ``whole``, ``shared``, ``changes`` and ``clients`` are on the serving path."""


def passes(extent: Extent, text: str) -> list[list[Task]]:
    """The blocks of a session.

    Raises:
        InputError: a pass names no group, narrows it to nothing, or is repeated too often; every problem is named.
    """
    problems: list[Problem] = []
    # the tiny model's first guesses: everything is quick
    pace = 1.0 if extent.model == "sdxl" else 0.05
    blocks: list[list[Task]] = []
    for one in (item.strip() for item in text.split(",") if item.strip()):
        matched = _TIMES.fullmatch(one)
        times, groups = (int(matched[1] or 1), matched[2]) if matched else (1, one)
        if not 1 <= times <= TIMES_MAX:
            problems.append(Problem(f"--passes {one[:60]!r}", f"is repeated {times} times", f"1..{TIMES_MAX}"))
        tasks = [task for group in groups.split("+") for task in _group(extent, group.strip(), problems)]
        block = [dataclasses.replace(task, cost_s=task.cost_s * pace) for task in tasks]
        blocks += [block] * min(times, TIMES_MAX)
    if not blocks and not problems:
        problems.append(Problem("--passes", "names nothing", f"some of {sorted(GROUPS)}"))
    if problems:
        raise InputError(problems)
    return blocks


def _group(extent: Extent, text: str, problems: list[Problem]) -> list[Task]:
    name, *filters = text.split(":")
    if name not in GROUPS:
        problems.append(Problem(f"--passes {text[:60]!r}", f"{name[:60]!r} is no group", f"one of {sorted(GROUPS)}"))
        return []
    tasks = GROUPS[name](extent)
    for narrowed in filters:
        counts = _COUNTS.fullmatch(narrowed)
        if counts is None:
            tasks = [task for task in tasks if narrowed and task.station.startswith(narrowed)]
        else:
            allowed, what = {int(digit) for digit in counts[1]}, "n_controlnets" if counts[2] == "c" else "n_loras"
            tasks = [task for task in tasks if getattr(task.features, what) in allowed]
    if not tasks:
        problems.append(
            Problem(f"--passes {text[:60]!r}", "leaves no task", "a station's name, numbers of ControlNets (01c) or LoRAs (12l)",
                    "Take a filter away; --tuned-batches and --gpus decide which stations there are.")
        )  # fmt: skip
    return tasks
