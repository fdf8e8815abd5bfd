"""What jobs on the serving path say: whole requests' stages through real processes, alone on the engine.

A step as served differs from one timed in a burst: steps are waited for one by one, the GPU's clock depends on how long it has been
busy, and the host does other work. What is planned is the engine as it serves, so where a size was served, that is the law's point
there. Jobs with LoRAs, with PNGs or on a shared GPU say nothing here but how long LoRAs keep a job waiting.

Each figure is the median over kinds of jobs, a kind's being the median of its repetitions: kinds that were repeated more often count as
much as the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from calibrate.cells import Cell, Cells
from calibrate.measurement import Features
from calibrate.recipes import Medians, Recipe, Source

Combine = Callable[[Medians], float]


def with_served(cells: Cells, recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """The recipes, with served points in those of steps and decoding, and with laws that only whole jobs can tell."""
    found = dict(recipes)
    for law, served in (
        ("engine.unet_step", _per_step(cells)),
        ("engine.controlnet_step", _per_controlnet(cells)),
        ("engine.vae_decode", _per_decode(cells)),
    ):
        if law in found and served:
            text = f"{found[law].text}; as served at {len(served)} of the sizes"
            found[law] = dataclasses.replace(found[law], served=served, text=text)
    made = (_overhead(cells), *_texts(cells), _control_input(cells))
    return found | {recipe.law: recipe for recipe in made if recipe is not None}


def lora_waits(cells: Cells) -> list[Cell]:
    """How long jobs waited for LoRAs that were on the host and mapped."""
    return cells.matching("serving.lora_wait", lambda f: f.n_loras > 0 and not f.variant)


def _plain(cells: Cells, quantity: str, accept: Callable[[Features], bool] = lambda _: True) -> list[Cell]:
    """Jobs without LoRAs, without PNG, alone on their GPU."""
    return cells.matching(quantity, lambda f: not (f.variant or f.n_loras) and accept(f))


def _median_of(parts: list[Combine]) -> Combine:
    return lambda medians: float(np.median([part(medians) for part in parts]))


def _share(cell: Cell, n: int = 1) -> Combine:
    """One of n that the cell's seconds are for."""
    return lambda medians: medians[cell] / n


def _grouped(found: Mapping[Cell, tuple[tuple[float, ...], tuple[Cell, ...], Combine]]) -> tuple[Source, ...]:
    """One source for each feature vector, the median over its kinds."""
    groups: dict[tuple[float, ...], list[tuple[tuple[Cell, ...], Combine]]] = {}
    for vector, used, combine in found.values():
        groups.setdefault(vector, []).append((used, combine))
    return tuple(
        Source(vector, tuple(cell for used, _ in group for cell in used), _median_of([combine for _, combine in group]))
        for vector, group in sorted(groups.items())
    )


def _per_step(cells: Cells) -> tuple[Source, ...]:
    found = {}
    for cell in _plain(cells, "serving.denoise", lambda f: f.n_controlnets == 0 and f.n_steps > 0):
        f = cell[2]
        found[cell] = ((float(f.forward_batch), f.megapixels), (cell,), _share(cell, f.n_steps))
    return _grouped(found)


def _per_controlnet(cells: Cells) -> tuple[Source, ...]:
    found = {}
    for cell in _plain(cells, "serving.denoise", lambda f: f.n_controlnets > 0 and f.n_steps > 0):
        f, without = cell[2], _without(cell)
        if without in cells.values:
            combine = _difference(cell, without, f.n_steps * f.n_controlnets)
            found[cell] = ((float(f.forward_batch), f.megapixels), (cell, without), combine)
    return _grouped(found)


def _difference(more: Cell, less: Cell, n: int) -> Combine:
    """What one of n more takes."""
    return lambda medians: max(1e-6, (medians[more] - medians[less]) / n)


def _per_decode(cells: Cells) -> tuple[Source, ...]:
    found = {}
    for cell in _plain(cells, "serving.decode", lambda f: f.n_controlnets == 0):
        found[cell] = ((float(cell[2].n_images), cell[2].megapixels), (cell,), _share(cell))
    return _grouped(found)


def _without(cell: Cell) -> Cell:
    return (cell[0], cell[1], dataclasses.replace(cell[2], n_controlnets=0))


def _overhead(cells: Cells) -> Recipe | None:
    """What a job takes beyond its stages; 0 to 3 ControlNets, whose images travel with it."""
    used = tuple(_plain(cells, "serving.overhead"))
    if not used:
        return None
    source = Source((), used, _median_of([_share(cell) for cell in used]))
    return Recipe(
        "engine.request_overhead", (source,), "median over kinds of jobs of serving.overhead", is_direct=False
    )


def _texts(cells: Cells) -> tuple[Recipe, ...]:
    """The text stage of jobs without ControlNets: two prompts or one, and what grows with the pixels of all images.

    Median slopes (Theil-Sen) over pairs of kinds with the same number of prompts; what is left over at each kind is the text.
    """
    jobs = _plain(cells, "serving.text", lambda f: f.n_controlnets == 0)
    guided = [cell for cell in jobs if cell[2].forward_batch != cell[2].n_images]
    unguided = [cell for cell in jobs if cell[2].forward_batch == cell[2].n_images]
    if not guided:
        return ()

    def size(cell: Cell) -> float:
        return cell[2].n_images * cell[2].megapixels

    pairs = [
        (small, large)
        for group in (guided, unguided)
        for small in group
        for large in group
        if size(large) > size(small)
    ]

    def slope(medians: Medians) -> float:
        found = [(medians[large] - medians[small]) / (size(large) - size(small)) for small, large in pairs]
        return max(0.0, float(np.median(found))) if found else 0.0

    def text(group: list[Cell]) -> Combine:
        return lambda m: max(1e-6, float(np.median([m[cell] - slope(m) * size(cell) for cell in group])))

    def rising(by: float) -> Combine:
        return lambda m: max(1e-9, slope(m) * by)

    recipes = []
    for law, group in (("engine.text_encode", guided), ("engine.text_encode_unguided", unguided)):
        if group:
            beyond = " less latent_input" if pairs else ""
            words = f"median over kinds of jobs without ControlNets of serving.text{beyond}"
            recipes.append(Recipe(law, (Source((), tuple(group), text(group)),), words, is_direct=False))
    if pairs:
        used = tuple(dict.fromkeys(cell for pair in pairs for cell in pair))
        vectors = sorted({(float(cell[2].n_images), cell[2].megapixels) for cell in used})
        sources = tuple(Source(vector, used, rising(vector[0] * vector[1])) for vector in vectors)
        words = "median slope of serving.text over images x megapixels, between kinds of jobs"
        recipes.append(Recipe("engine.latent_input", sources, words, is_direct=False))
    return tuple(recipes)


def _control_input(cells: Cells) -> Recipe | None:
    """Reading one control image: what the text stage of a job takes longer with a ControlNet than without."""
    found = {}
    for cell in _plain(cells, "serving.text", lambda f: f.n_controlnets > 0):
        without = _without(cell)
        if without in cells.values:
            combine = _difference(cell, without, cell[2].n_controlnets)
            found[cell] = ((cell[2].megapixels,), (cell, without), combine)
    text = "median over kinds of jobs: serving.text with ControlNets minus without, by megapixels of the image"
    return Recipe("engine.control_input", _grouped(found), text, is_direct=False) if found else None
