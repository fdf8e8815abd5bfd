"""How each law comes out of measured cells: which cells, how they are combined, and which form they get.

A recipe turns the medians of one bootstrap draw into points ``(x, seconds)``; the same recipe serves the estimate and every
draw, so that a law built from others (an overhead, a join) stays consistent with them inside a draw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from calibrate.cells import Cell, Cells
from calibrate.measurement import Features
from calibrate.profile import LAW_FEATURES, STACKS

Medians = Mapping[Cell, float]
SUMMED: Final[Mapping[str, tuple[str, str]]] = {
    "diffusers_tuned.lora_attach": ("diffusers.lora_attach", "diffusers.lora_fuse"),
    "diffusers_tuned.lora_detach": ("diffusers.lora_unfuse", "diffusers.lora_detach"),
}
"""Laws that may be the sum of two others' measurements; then they count as assumed."""
DIFFERENCE: Final = "controlnet_difference"
"""Made of two quantities, see :func:`with_controlnet_differences`."""
MODES: Final = ("compiled", "graph", "eager", "")
FROM_HOST_TIER: Final = "_host"
INTO_HOST_TIER: Final = "_store"
IN_ONE: Final = "_serving"
FROM_FILE: Final = "_file"
"""Endings of ``variant`` of a load's rows: what was loaded from where, see :func:`how_loaded`."""


@dataclass(frozen=True, slots=True)
class Source:
    """One point of a law: its feature vector, the cells it comes from, and how they combine."""

    vector: tuple[float, ...]
    cells: tuple[Cell, ...]
    combine: Callable[[Medians], float]

    @property
    def x(self) -> float:
        """Product of the features, what a form is evaluated at."""
        product = 1.0
        for value in self.vector:
            product *= value
        return product


@dataclass(frozen=True)
class Recipe:
    """Where the points of one law come from."""

    law: str
    sources: tuple[Source, ...]
    text: str
    """For the profile: which measurements."""
    is_direct: bool = True
    """Whether single repetitions of the cells are repetitions of the law (residuals can be taken)."""
    has_floor: bool = False
    keeps_fixed: bool = True
    """False: only the slope of the fitted line is the law's."""
    served: tuple[Source, ...] = ()
    """Sizes that were also served: there this is what the law says, while the form is fitted to ``sources``."""


@dataclass(frozen=True)
class ModeChoice:
    """The mode our engine is taken in, by forward batch, and by number of images for the VAE: the fastest that was measured."""

    by_batch: Mapping[int, str] = field(default_factory=dict)

    def of(self, batch: int, available: list[str]) -> str:
        """The chosen mode if it is available, else the first available in the order compiled, graph, eager."""
        chosen = self.by_batch.get(batch)
        return chosen if chosen in available else next(mode for mode in MODES if mode in available)

    @property
    def text(self) -> str:
        """``compiled for forward batch 2, 4; graph for 8``."""
        modes = sorted(set(self.by_batch.values()), key=MODES.index)
        groups = {mode: [str(b) for b, m in sorted(self.by_batch.items()) if m == mode] for mode in modes}
        return "; ".join(f"{mode} for forward batch {', '.join(batches)}" for mode, batches in groups.items())


def choose_modes(cells: Cells, medians: Medians) -> ModeChoice:
    """Per forward batch the mode with the lowest median of ``engine.unet_step``."""
    fastest: dict[int, tuple[float, str]] = {}
    for cell in cells.matching("engine.unet_step", _is_plain_step):
        batch, candidate = cell[2].forward_batch, (medians[cell], cell[1])
        fastest[batch] = min(fastest.get(batch, candidate), candidate)
    return ModeChoice({batch: mode for batch, (_, mode) in sorted(fastest.items())})


def _is_plain_step(features: Features) -> bool:
    return not (features.n_controlnets or features.n_loras or features.variant or features.link)


def _one(cell: Cell) -> Callable[[Medians], float]:
    return lambda medians: medians[cell]


def _sum_of(cells: tuple[Cell, ...]) -> Callable[[Medians], float]:
    return lambda medians: sum(medians[cell] for cell in cells)


def _of_variants(variants: set[str]) -> Callable[[Features], bool]:
    return lambda features: features.variant in variants


def _ends_with(ending: str) -> Callable[[Features], bool]:
    return lambda features: features.variant.endswith(ending)


def _by(found: list[Cell], key: Callable[[Features], object]) -> dict[object, list[Cell]]:
    groups: dict[object, list[Cell]] = {}
    for cell in found:
        groups.setdefault(key(cell[2]), []).append(cell)
    return groups


def _pick(group: list[Cell], batch: int, choice: ModeChoice) -> Cell:
    mode = choice.of(batch, [cell[1] for cell in group])
    return next(cell for cell in group if cell[1] == mode)


def step_recipe(cells: Cells, law: str, choice: ModeChoice, accept: Callable[[Features], bool]) -> Recipe | None:
    """A law over ``forward_batch`` and ``megapixels``."""
    groups = _by(cells.matching(law, accept), lambda f: (f.forward_batch, f.width_px, f.height_px))
    used = [_pick(group, group[0][2].forward_batch, choice) for group in groups.values()]
    if not used:
        return None
    sources = [Source((float(cell[2].forward_batch), cell[2].megapixels), (cell,), _one(cell)) for cell in used]
    modes = "; ".join(
        f"{mode} at {', '.join(str(c[2].forward_batch) for c in used if c[1] == mode)}"
        for mode in sorted({cell[1] for cell in used}, key=MODES.index)
    )
    return Recipe(law, tuple(sources), f"medians of {law} by forward batch ({modes})", has_floor=True)


def with_controlnet_differences(cells: Cells) -> Cells:
    """The cells, and what each ControlNet adds to a step where it was timed inside the pipeline.

    Each repetition with ControlNets minus the median without them of the same session: between sessions, eager execution differs by
    more than a ControlNet takes. Where most steps with one were no longer than those without, the host's launches were all that was
    timed: nothing is known of the ControlNet then, and a law of sizes must not be drawn through it.
    """
    found = dict(cells.values)
    for stack in STACKS:
        for cell in cells.matching(f"{stack}.step_with_controlnets", lambda f: not (f.link or f.n_loras)):
            plain = cells.values.get((f"{stack}.unet_step", cell[1], dataclasses.replace(cell[2], n_controlnets=0)), {})
            added = {
                session: np.maximum((values - float(np.median(plain[session]))) / cell[2].n_controlnets, 1e-6)
                for session, values in cells.values[cell].items()
                if session in plain and float(np.median(values)) > float(np.median(plain[session]))
            }
            if added:
                found[f"{stack}.{DIFFERENCE}", cell[1], cell[2]] = added
    return dataclasses.replace(cells, values=found)


def difference_recipe(cells: Cells, law: str, stack: str) -> Recipe | None:
    """A ControlNet's step where it was timed inside the pipeline: see :func:`with_controlnet_differences`."""
    found = cells.matching(f"{stack}.{DIFFERENCE}")
    sources = tuple(Source((float(cell[2].forward_batch), cell[2].megapixels), (cell,), _one(cell)) for cell in found)
    text = (
        f"medians of {stack}.step_with_controlnets minus median {stack}.unet_step of the same session, by forward batch, "
        "where it is above zero"
    )
    return Recipe(law, sources, text, is_direct=False, has_floor=True) if sources else None


def bytes_recipe(
    cells: Cells, law: str, quantities: tuple[str, ...], accept: Callable[[Features], bool], *, adds: bool = False
) -> Recipe | None:
    """A law over ``n_bytes``: cells of the quantities as points, or (``adds``) their sum at each size."""
    if adds:
        first = cells.matching(quantities[0], accept)
        sources = []
        for cell in first:
            parts = [(quantity, cell[1], cell[2]) for quantity in quantities]
            if all(part in cells.values for part in parts):
                sources.append(Source((float(cell[2].n_bytes),), tuple(parts), _sum_of(tuple(parts))))
        text = f"sum of medians of {' and '.join(quantities)}, by size"
    else:
        found = [cell for quantity in quantities for cell in cells.matching(quantity, accept)]
        fastest = [min(group, key=lambda c: MODES.index(c[1])) for group in _by(found, lambda f: f).values()]
        sources = [Source((float(cell[2].n_bytes),), (cell,), _one(cell)) for cell in fastest]
        kinds = sorted({cell[2].variant for cell in fastest if cell[2].variant})
        text = f"medians of {' and '.join(quantities)}, by size" + (f" ({', '.join(kinds)})" if kinds else "")
    return Recipe(law, tuple(sources), text, is_direct=not adds) if sources else None


def how_loaded(cells: Cells) -> str:
    """Ending of the variants that our engine's loads are taken from: the way its workers really load, as far as that was measured.

    In two parts where both were; else read, checked and copied in one; else straight from the file to the device. Never a mixture: a
    read in a load would count twice, or not at all.
    """

    def has(part: str, ending: str) -> bool:
        return any(cells.matching(f"engine.{kind}_{part}", _ends_with(ending)) for kind in ("checkpoint", "controlnet"))

    if has("load", FROM_HOST_TIER) and has("read", INTO_HOST_TIER):
        return FROM_HOST_TIER
    return IN_ONE if cells.matching("engine.checkpoint_load", _ends_with(IN_ONE)) else FROM_FILE


def load_recipes(cells: Cells, stack: str, part: str, ending: str) -> list[Recipe | None]:
    """Checkpoints and ControlNets, loaded or read. One module or four go the same way, so both laws share sizes of single modules."""
    quantities = (f"{stack}.checkpoint_{part}", f"{stack}.controlnet_{part}")
    single = {f"{module}{ending}" for module in ("unet", "text_encoder_2", "vae", "controlnet")}
    return [
        bytes_recipe(cells, quantities[0], quantities, _of_variants({f"checkpoint{ending}"} | single)),
        bytes_recipe(cells, quantities[1], quantities, _of_variants(single)),
    ]


def fetch_recipe(cells: Cells, law: str) -> Recipe | None:
    """A LoRA from this host until a worker can patch it: laid out in the host tier, then mapped and registered there.

    None where the mapping was not measured apart.
    """
    maps = {cell[2].n_bytes: cell for cell in cells.matching("engine.lora_map")}
    sources = []
    for cell in cells.matching(law):
        if cell[2].n_bytes in maps:
            parts = (cell, maps[cell[2].n_bytes])
            sources.append(Source((float(cell[2].n_bytes),), parts, _sum_of(parts)))
    text = f"sum of medians of {law} and engine.lora_map, by size"
    return Recipe(law, tuple(sources), text, is_direct=False) if sources else None


def transfer_recipe(cells: Cells) -> Recipe | None:
    """Residuals between GPUs: the slope of an exchange over its bytes.

    An exchange is asked for by a message through the store, which a step does not send; so its fixed part is left out. What
    a real step waits beyond the bytes is in ``engine.remote_join``, measured where residuals really travel.
    """
    found = cells.matching("engine.residual_exchange", lambda f: f.link == "nvlink")
    if len({cell[2].n_bytes for cell in found}) < 2:
        return None
    sources = tuple(Source((float(cell[2].n_bytes),), (cell,), _one(cell)) for cell in found)
    text = "slope of median engine.residual_exchange over its bytes; its latency is in engine.remote_join"
    law = "engine.residual_transfer.nvlink"
    return Recipe(law, sources, text, is_direct=False, keeps_fixed=False)


def constant_recipe(cells: Cells, law: str, choice: ModeChoice) -> Recipe | None:
    """A law without features: the cell of the chosen mode, or of the best one measured."""
    found = cells.matching(law)
    if not found:
        return None
    cell = _pick(found, 2, choice)
    mode = f" ({cell[1]})" if cell[1] else ""
    return Recipe(law, (Source((), (cell,), _one(cell)),), f"median of {law}{mode}")


def decode_recipe(cells: Cells, law: str, medians: Medians) -> Recipe | None:
    """The VAE: per number of images the fastest mode that was measured."""
    groups = _by(cells.matching(law), lambda f: (f.n_images, f.width_px, f.height_px))
    used = [min(group, key=lambda c: (medians[c], c[1])) for group in groups.values()]
    sources = [Source((float(cell[2].n_images), cell[2].megapixels), (cell,), _one(cell)) for cell in used]
    modes = "; ".join(f"{cell[1]} at {cell[2].n_images}" for cell in used)
    return Recipe(law, tuple(sources), f"medians of {law} by number of images ({modes})") if sources else None


def direct_recipes(cells: Cells, medians: Medians, choice: ModeChoice) -> dict[str, Recipe]:
    """Every law that the measurements support without the help of another law."""
    found: list[Recipe | None] = []
    for stack in STACKS:
        found.append(step_recipe(cells, f"{stack}.unet_step", choice, _is_plain_step))
        direct = step_recipe(cells, f"{stack}.controlnet_step", choice, _is_plain_step)
        found.append(direct or difference_recipe(cells, f"{stack}.controlnet_step", stack))
        found.append(constant_recipe(cells, f"{stack}.text_encode", choice))
        found.append(constant_recipe(cells, f"{stack}.worker_start", choice))
        found.append(decode_recipe(cells, f"{stack}.vae_decode", medians))
        for quantity in ("lora_attach", "lora_detach"):
            found.append(bytes_recipe(cells, f"{stack}.{quantity}", (f"{stack}.{quantity}",), lambda f: True))
    found.append(
        step_recipe(cells, "diffusers.unet_lora_step", choice, lambda f: f.n_loras == 1 and not f.n_controlnets)
    )
    for law in ("engine.encoder_step", "engine.decoder_step"):
        found.append(step_recipe(cells, law, choice, _is_plain_step))
    how = how_loaded(cells)
    found += load_recipes(cells, "diffusers", "load", "")
    found += load_recipes(cells, "engine", "load", how)
    if how == FROM_HOST_TIER:
        found += load_recipes(cells, "engine", "read", INTO_HOST_TIER)
    for law in ("lora_fetch.local", "lora_fetch.disk"):
        found.append(fetch_recipe(cells, law) or bytes_recipe(cells, law, (law,), lambda f: True))
    found.append(transfer_recipe(cells))
    # tuned Diffusers fuses its LoRAs; where nobody timed that, it is stock loading and stock fusing
    measured = {recipe.law for recipe in found if recipe is not None}
    for law, parts in SUMMED.items():
        if law not in measured:
            found.append(bytes_recipe(cells, law, parts, lambda f: True, adds=True))
    kept: dict[str, Recipe] = {}
    for recipe in found:
        if recipe is not None and recipe.law in LAW_FEATURES:
            kept[recipe.law] = recipe
    return kept
