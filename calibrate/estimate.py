"""From medians of cells to parameters of every law: direct laws first, then those that are what the others leave over.

What is fitted is decided once on all data (recipes, modes, forms); every bootstrap draw repeats it on its own medians and its
own weights of the sizes, so that all laws of a draw belong together.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from calibrate.assumed import PUBLISHED, TAKEN_OVER
from calibrate.cells import Cell, Cells
from calibrate.compose import QUANTITY_OF, STACK_OF, image_s
from calibrate.laws import POINTS_BEYOND_PARAMETERS, FormChoice, choose_form, evaluate, fit_form
from calibrate.measurement import Features
from calibrate.profile import FORM_PARAMETERS, LAW_FEATURES, Form, is_of_sizes
from calibrate.recipes import (
    SUMMED,
    Medians,
    ModeChoice,
    Recipe,
    Source,
    choose_modes,
    direct_recipes,
    with_controlnet_differences,
)
from calibrate.served import lora_waits, with_served

Floats = npt.NDArray[np.float64]
Parameters = dict[str, dict[str, float]]
MeasuredSteps = dict[str, dict[tuple[float, ...], list[float]]]
OVERHEADS: Final[Mapping[str, str]] = {
    "diffusers": "diffusers",
    "diffusers_tuned": "diffusers_tuned",
    "engine": "colocated",
}
"""Stack to the topology whose whole images say what is beyond their parts."""
IMAGE_OVERHEAD: Final = "engine.image_overhead"
"""Not a law: what an image of our engine takes beyond its parts where it is painted in the measuring process itself."""


@dataclass(frozen=True)
class Estimator:
    """What is fitted, and how."""

    cells: Cells
    choice: ModeChoice
    recipes: Mapping[str, Recipe]
    forms: Mapping[str, FormChoice]
    residual_bytes_per_sample: float

    @classmethod
    def of(cls, cells: Cells, residual_bytes_per_sample: float) -> Estimator:
        """Decides recipes, modes and forms on all data."""
        cells = with_controlnet_differences(cells)
        medians = cells.medians()
        choice = choose_modes(cells, medians)
        recipes = with_served(cells, direct_recipes(cells, medians, choice))
        forms = {}
        for law, recipe in recipes.items():
            x, megapixels = columns(law, recipe.sources)
            y = np.array([source.combine(medians) for source in recipe.sources])
            forms[law] = choose_form(
                x, megapixels, y, has_floor=recipe.has_floor, has_surface=is_of_sizes(LAW_FEATURES[law])
            )
        return cls(cells, choice, recipes, forms, residual_bytes_per_sample)

    def parameters(
        self, medians: Medians, draw: tuple[int, int] | None = None, near: Parameters | None = None
    ) -> Parameters:
        """Parameters of every law that rests on measurements; with a draw's (seed, number), sizes are weighted at random.

        ``near``: parameters that are close, to search from.
        """
        found: Parameters = {}
        for law, recipe in self.recipes.items():
            x, megapixels = columns(law, recipe.sources)
            y = np.array([source.combine(medians) for source in recipe.sources])
            form = self.forms[law].form
            weights = None if draw is None else _size_weights(form, recipe.sources, draw)
            found[law] = fit_form(form, x, y, megapixels, weights, near.get(law) if near else None)
            if not recipe.keeps_fixed:
                found[law]["fixed_s"] = 0.0
            if law in SUMMED and is_one_size(recipe):
                found[law] = {"fixed_s": float(np.median(y)), "per_unit_s": 0.0}
        for law, (origin, _) in TAKEN_OVER.items():
            # an overhead is taken over below, after it is known
            if law not in found and origin in found:
                found[law] = dict(found[origin])
        self._add_overheads(found, medians)
        self._add_join(found, medians)
        self._add_lora_wait(found, medians)
        return found

    def form(self, law: str) -> Form:
        """The form of a law, its own or that of the law it is taken from."""
        if law in self.forms:
            return self.forms[law].form
        if law in TAKEN_OVER and law not in PUBLISHED:
            return self.form(TAKEN_OVER[law][0])
        published = PUBLISHED.get(law)
        return "affine" if published and published.per_byte_s is not None else "constant"

    def measured_steps(self, medians: Medians) -> MeasuredSteps:
        """Steps and decoding at the sizes they were measured at: there they say what was measured."""
        found: MeasuredSteps = {}
        for law, recipe in self.recipes.items():
            if is_of_sizes(LAW_FEATURES[law]):
                for source in recipe.sources:
                    found.setdefault(law, {}).setdefault(source.vector, []).append(source.combine(medians))
                for source in recipe.served:
                    found.setdefault(law, {})[source.vector] = [source.combine(medians)]
        return found

    def seconds(
        self, parameters: Parameters, law: str, measured: MeasuredSteps | None = None, **features: float
    ) -> float:
        """One law at one point, at a measured size as measured; raises KeyError if it is not known."""
        origin = law if law in self.recipes or law not in TAKEN_OVER else TAKEN_OVER[law][0]
        there = (measured or {}).get(origin, {}).get(tuple(features.values()))
        if there:
            return float(np.median(there))
        x = 1.0
        for value in features.values():
            x *= value
        given = parameters.get(law) or published_parameters(law)
        return evaluate(self.form(law), given, x, features.get("megapixels", 1.0))

    def image_cells(self, topology: str, **wanted: int) -> list[Cell]:
        """Images of a topology in the modes that were chosen; stock images were measured in one mode."""
        found = self.cells.matching(
            QUANTITY_OF[topology], lambda f: all(getattr(f, name) == value for name, value in wanted.items())
        )
        if topology == "serving":
            # PNG encoding and shared GPUs are other questions
            found = [cell for cell in found if not cell[2].variant]
        if STACK_OF[topology] != "engine":
            return found
        return [cell for cell in found if cell[1] == self.choice.of(cell[2].forward_batch, [c[1] for c in found])]

    def remote_cells(self) -> list[Cell]:
        """Steps with remote ControlNets, in the mode that was chosen for their batch."""
        found = self.cells.matching("engine.remote_step")
        return [cell for cell in found if cell[1] == self.choice.of(cell[2].forward_batch, [c[1] for c in found])]

    def _add_overheads(self, found: Parameters, medians: Medians) -> None:
        measured = self.measured_steps(medians)
        wanted = {f"{stack}.request_overhead": topology for stack, topology in OVERHEADS.items()}
        for law, topology in (*wanted.items(), (IMAGE_OVERHEAD, "colocated")):
            if law in self.recipes:
                continue
            rests = []
            for cell in self.image_cells(topology, n_controlnets=0, n_loras=0):
                try:
                    composed_s = image_s(
                        lambda name, **features: self.seconds(found, name, measured, **features),
                        topology,
                        cell[2],
                        self.residual_bytes_per_sample,
                        overhead=False,
                    )
                except KeyError:
                    continue
                rests.append(max(0.0, medians[cell] - composed_s))
            if rests:
                found[law] = {"value_s": float(np.median(rests))}
        origin, _ = TAKEN_OVER["diffusers_tuned.request_overhead"]
        if "diffusers_tuned.request_overhead" not in found and origin in found:
            found["diffusers_tuned.request_overhead"] = dict(found[origin])

    def _add_join(self, found: Parameters, medians: Medians) -> None:
        rests = []
        for cell in self.remote_cells():
            f = cell[2]
            step = {"forward_batch": float(f.forward_batch), "megapixels": f.megapixels}
            n_bytes = self.residual_bytes_per_sample * f.forward_batch
            plain = dataclasses.replace(f, n_controlnets=0, n_loras=0, n_bytes=0, n_steps=0, link="", variant="")

            def part(name: str, mode: str = cell[1], at: Features = plain, step: dict[str, float] = step) -> float:
                # in the mode of the remote step, where that was measured: a mixture would blame the join
                same = (f"engine.{name}", mode, at)
                return medians[same] if same in medians else self.seconds(found, f"engine.{name}", None, **step)

            try:
                remote_s = f.n_controlnets * part("controlnet_step") + self.seconds(
                    found, "engine.residual_transfer.nvlink", n_bytes=n_bytes
                )
                hidden_s = max(part("encoder_step"), remote_s)
                rests.append(medians[cell] - hidden_s - part("decoder_step"))
            except KeyError:
                continue
        if rests:
            found["engine.remote_join"] = {"value_s": max(0.0, float(np.median(rests)))}

    def _add_lora_wait(self, found: Parameters, medians: Medians) -> None:
        rests = []
        for cell in lora_waits(self.cells):
            try:
                # several LoRAs are patched together, as one of all their bytes
                n_bytes = float(cell[2].n_loras * cell[2].n_bytes)
                attach_s = self.seconds(found, "engine.lora_attach", n_bytes=n_bytes)
                patched_s = attach_s + self.seconds(found, "engine.lora_detach", n_bytes=n_bytes)
            except KeyError:
                continue
            rests.append(medians[cell] - patched_s)
        if rests:
            found["engine.lora_wait"] = {"value_s": max(0.0, float(np.median(rests)))}


def is_one_size(recipe: Recipe) -> bool:
    """Whether all points of a recipe have the same features."""
    return len({source.vector for source in recipe.sources}) == 1


def columns(law: str, sources: tuple[Source, ...]) -> tuple[Floats, Floats]:
    """x and megapixels of a law's points; ones where the law has no pixels, zeros as x where it has no features."""
    features = LAW_FEATURES[law]
    x = np.array([source.x if source.vector else 0.0 for source in sources])
    if "megapixels" not in features:
        return x, np.ones_like(x)
    index = features.index("megapixels")
    return x, np.array([source.vector[index] for source in sources])


def _size_weights(form: Form, sources: tuple[Source, ...], draw: tuple[int, int]) -> Floats | None:
    """Exponential weights of the measured sizes (the Bayesian bootstrap, Rubin 1981): what the form misses, as uncertainty.

    The same size has the same weight in every law of a draw. Laws with hardly more sizes than parameters keep equal weights.
    """
    sizes = sorted({source.vector for source in sources})
    if len(sizes) < len(FORM_PARAMETERS[form]) + POINTS_BEYOND_PARAMETERS:
        return None
    seed, number = draw

    def weight(vector: tuple[float, ...]) -> float:
        text = "size|" + "|".join(f"{value:.9g}" for value in vector)
        rng = np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(text.encode()), number]))
        return float(rng.standard_exponential()) + 1e-3

    by_size = {size: weight(size) for size in sizes}
    return np.array([by_size[source.vector] for source in sources])


def published_parameters(law: str) -> dict[str, float]:
    """Parameters of a law from somebody else's numbers; raises KeyError if there are none."""
    published = PUBLISHED[law]
    if published.per_byte_s is None:
        return {"value_s": published.fixed_s}
    return {"fixed_s": published.fixed_s, "per_unit_s": published.per_byte_s}
