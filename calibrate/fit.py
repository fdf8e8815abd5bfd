"""``calibrate fit``: measurements of one or more sessions in, a :class:`LatencyProfile` with joint bootstrap draws out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from calibrate.assumed import PUBLISHED, TAKEN_OVER
from calibrate.cells import Cell, Cells
from calibrate.compose import STACK_OF, CheckRow, image_s
from calibrate.facts import profile_facts, service_noise
from calibrate.laws import evaluate, fit_form, form_for
from calibrate.measurement import Features, Measurements, Session
from calibrate.profile import (
    LAW_FEATURES,
    RESIDUAL_LEVELS,
    STACKS,
    Form,
    LatencyProfile,
    Law,
    Status,
)
from calibrate.recipes import Medians, ModeChoice, Recipe, choose_modes, direct_recipes
from traces.problems import InputError, Problem, one_problem

# Sizes of weights differ by headers and alignment; a box in bytes is that much wider than what was measured.
BYTES_BOX_RATIO: Final = 0.02
Parameters = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Fitted:
    """A profile, the rows it came from, and the comparison with whole images."""

    profile: LatencyProfile
    measurements: Measurements
    check: tuple[CheckRow, ...]


@dataclass(frozen=True)
class _Plan:
    """What is fitted, decided once on all data: the draws repeat it on resampled medians."""

    cells: Cells
    choice: ModeChoice
    recipes: Mapping[str, Recipe]
    forms: Mapping[str, Form]
    residual_bytes_per_sample: float

    def parameters(self, medians: Medians) -> Parameters:
        """Parameters of every law that rests on measurements."""
        found: Parameters = {}
        for law, recipe in self.recipes.items():
            x = np.array([source.x for source in recipe.sources])
            y = np.array([source.combine(medians) for source in recipe.sources])
            found[law] = fit_form(self.forms[law], x, y)
            if not recipe.keeps_fixed:
                found[law]["fixed_s"] = 0.0
        for law, (origin, _) in TAKEN_OVER.items():
            # an overhead is taken over below, after it is known
            if law not in found and origin in found:
                found[law] = dict(found[origin])
        self._add_overheads(found, medians)
        self._add_join(found, medians)
        return found

    def _form(self, law: str) -> Form:
        if law in self.forms:
            return self.forms[law]
        if law in TAKEN_OVER and law not in PUBLISHED:
            return self._form(TAKEN_OVER[law][0])
        published = PUBLISHED.get(law)
        return "affine" if published and published.per_byte_s is not None else "constant"

    def seconds(self, parameters: Parameters, law: str, **features: float) -> float:
        """One law at one point; raises KeyError if it is not known."""
        x = 1.0
        for value in features.values():
            x *= value
        given = parameters.get(law) or _published_parameters(law)
        return evaluate(self._form(law), given, x)

    def image_cells(self, topology: str, **wanted: int) -> list[Cell]:
        """Images of a topology in the modes that were chosen; stock images were measured in one mode."""
        found = self.cells.matching(
            f"e2e.{topology}", lambda f: all(getattr(f, name) == value for name, value in wanted.items())
        )
        if STACK_OF[topology] != "engine":
            return found
        return [cell for cell in found if cell[1] == self.choice.of(cell[2].forward_batch, [c[1] for c in found])]

    def remote_cells(self) -> list[Cell]:
        """Steps with remote ControlNets, in the mode that was chosen for their batch."""
        found = self.cells.matching("engine.remote_step")
        return [cell for cell in found if cell[1] == self.choice.of(cell[2].forward_batch, [c[1] for c in found])]

    def _add_overheads(self, found: Parameters, medians: Medians) -> None:
        for stack, topology in (
            ("diffusers", "diffusers"),
            ("diffusers_tuned", "diffusers_tuned"),
            ("engine", "colocated"),
        ):
            rests = []
            for cell in self.image_cells(topology, n_controlnets=0, n_loras=0):
                try:
                    composed = image_s(
                        lambda law, **features: self.seconds(found, law, **features),
                        topology,
                        cell[2],
                        self.residual_bytes_per_sample,
                        overhead=False,
                    )
                except KeyError:
                    continue
                rests.append(max(0.0, medians[cell] - composed))
            if rests:
                found[f"{stack}.request_overhead"] = {"value_s": float(np.median(rests))}
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
                return medians[same] if same in medians else self.seconds(found, f"engine.{name}", **step)

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


def _published_parameters(law: str) -> dict[str, float]:
    published = PUBLISHED[law]
    if published.per_byte_s is None:
        return {"value_s": published.fixed_s}
    return {"fixed_s": published.fixed_s, "per_unit_s": published.per_byte_s}


def fit_profile(measurements: Measurements, *, n_draws: int = 64, seed: int = 2026) -> Fitted:
    """Fits every law that the measurements support; the others are assumed, with their source, or left out and named.

    Raises:
        InputError: no measurements, or sessions of different GPUs or models.
    """
    _check_sessions(measurements)
    rows = tuple(sorted(measurements.rows, key=lambda row: (row.session, row.order)))
    sessions = tuple(sorted(measurements.sessions, key=lambda session: session.session))
    measurements = Measurements(rows, sessions)
    cells = Cells.of(measurements)
    medians = cells.medians()
    facts = profile_facts(sessions)
    choice = choose_modes(cells, medians)
    recipes = direct_recipes(cells, medians, choice)
    forms = {
        law: form_for(
            np.array([source.x if source.vector else 0.0 for source in recipe.sources]), has_floor=recipe.has_floor
        )
        for law, recipe in recipes.items()
    }
    plan = _Plan(cells, choice, recipes, forms, facts["residual_bytes_per_sample"].value)
    estimate = plan.parameters(medians)
    if "engine.unet_step" not in estimate and "diffusers.unet_step" not in estimate:
        raise one_problem(
            "measurements", "hold no UNet steps", "engine.unet_step or diffusers.unet_step", "Measure the part 'steps'."
        )
    drawn = [plan.parameters(cells.resampled_medians(seed, k)) for k in range(n_draws)]
    draws = {
        f"{law}:{name}": tuple(one[law][name] for one in drawn) for law in sorted(estimate) for name in estimate[law]
    }
    laws = {law: _law(plan, law, estimate) for law in LAW_FEATURES if law in estimate or law in PUBLISHED}
    _widen_decoding(laws)
    check = _check(plan, estimate, medians)
    profile = LatencyProfile(
        architecture=sessions[0].model,
        gpu_kind=sessions[0].gpu_kind,
        laws=laws,
        facts=facts,
        noise_ratio_quantiles=service_noise(cells),
        draws=draws,
        fingerprint=_fingerprint(sessions),
        raw_sha256="",
        created=max(session.started for session in sessions),
        notes=tuple(_notes(plan, laws, check, sessions)),
    )
    return Fitted(profile, measurements, check)


def _widen_decoding(laws: dict[str, Law]) -> None:
    """A stack whose VAE was timed with one image only gets the others' box, by proportion, and then counts as assumed.

    By proportion is on the safe side: the stock VAE takes less than n times as long for n images.
    """
    decoding = {law: laws[law] for law in (f"{stack}.vae_decode" for stack in STACKS) if law in laws}
    most = max((law.domain["n_images"][1] for law in decoding.values() if "n_images" in law.domain), default=1.0)
    for name, law in decoding.items():
        if law.status == "measured" and law.domain["n_images"][1] == 1.0 < most:
            laws[name] = dataclasses.replace(
                law,
                status="assumed",
                source=f"{law.source}; beyond one image by proportion",
                domain={**law.domain, "n_images": (1.0, most)},
            )


def _check_sessions(measurements: Measurements) -> None:
    problems = []
    if not measurements.rows or not measurements.sessions:
        problems.append(Problem("measurements", "hold no rows", "at least one session", "Run 'calibrate run' first."))
    for name in ("gpu_kind", "model"):
        kinds = sorted({str(getattr(session, name)) for session in measurements.sessions})
        if len(kinds) > 1:
            problems.append(
                Problem("measurements", f"mix {name} {' and '.join(kinds)}", "one of them", "Fit them one by one.")
            )
    if problems:
        raise InputError(problems)


def _law(plan: _Plan, law: str, estimate: Parameters) -> Law:
    features = LAW_FEATURES[law]
    recipe = plan.recipes.get(law)
    # tuned Diffusers' LoRA times are sums of stock times: nobody ran it that way
    status: Status = "measured"
    if law in ("diffusers_tuned.lora_attach", "diffusers_tuned.lora_detach"):
        status = "assumed"
    if recipe is not None:
        return _from_recipe(plan, recipe, features, estimate[law], status)
    if law.endswith(".request_overhead") and law in estimate and _has_own_overhead(plan, law):
        topology = {"diffusers": "diffusers", "diffusers_tuned": "diffusers_tuned", "engine": "colocated"}[
            law.split(".")[0]
        ]
        n = sum(plan.cells.pooled(cell).size for cell in plan.image_cells(topology, n_controlnets=0, n_loras=0))
        text = f"median e2e.{topology} without add-ons minus steps and VAE by their laws"
        return Law(law, "constant", features, estimate[law], "measured", text, n_repetitions=n)
    if law == "engine.remote_join" and law in estimate:
        n = sum(plan.cells.pooled(cell).size for cell in plan.remote_cells())
        text = "median engine.remote_step minus max(encoder, ControlNets + transfer) minus decoder, by their laws"
        return Law(law, "constant", features, estimate[law], "measured", text, n_repetitions=n)
    if law in estimate:
        origin, why = TAKEN_OVER[law]
        taken = _law(plan, origin, estimate)
        return Law(law, taken.form, features, estimate[law], "assumed", f"taken from {origin}: {why}", taken.domain)
    published = PUBLISHED[law]
    form: Form = "constant" if published.per_byte_s is None else "affine"
    return Law(law, form, features, _published_parameters(law), "assumed", published.source)


def _has_own_overhead(plan: _Plan, law: str) -> bool:
    topology = {"diffusers": "diffusers", "diffusers_tuned": "diffusers_tuned", "engine": "colocated"}[
        law.split(".")[0]
    ]
    return bool(plan.image_cells(topology, n_controlnets=0, n_loras=0))


def _from_recipe(
    plan: _Plan, recipe: Recipe, features: tuple[str, ...], parameters: dict[str, float], status: Status
) -> Law:
    form = plan.forms[recipe.law]
    domain = {}
    for index, feature in enumerate(features):
        column = [source.vector[index] for source in recipe.sources]
        wider = BYTES_BOX_RATIO if feature == "n_bytes" else 0.0
        domain[feature] = (min(column) * (1 - wider), max(column) * (1 + wider))
    used = {cell for source in recipe.sources for cell in source.cells}
    ratios: tuple[float, ...] = ()
    if recipe.is_direct:
        all_ratios = np.concatenate([
            plan.cells.pooled(source.cells[0]) / evaluate(form, parameters, source.x if source.vector else 1.0)
            for source in recipe.sources
        ])  # fmt: skip
        ratios = tuple(float(value) for value in np.quantile(all_ratios, RESIDUAL_LEVELS))
    return Law(
        name=recipe.law,
        form=form,
        features=features,
        parameters=parameters,
        status=status,
        source=recipe.text,
        domain=domain,
        points=tuple(sorted(source.vector for source in recipe.sources)) if features else (),
        n_repetitions=sum(plan.cells.pooled(cell).size for cell in used),
        residual_ratio_quantiles=ratios,
    )


def _check(plan: _Plan, estimate: Parameters, medians: Medians) -> tuple[CheckRow, ...]:
    rows = []
    for topology in STACK_OF:
        for cell in plan.image_cells(topology):
            f = cell[2]
            try:
                predicted_s = image_s(
                    lambda law, **features: plan.seconds(estimate, law, **features),
                    topology,
                    f,
                    plan.residual_bytes_per_sample,
                )
            except KeyError:
                continue
            held_out = bool(f.n_controlnets or f.n_loras)
            rows.append(
                CheckRow(
                    topology, cell[1], f.n_controlnets, f.n_loras, f.variant, plan.cells.pooled(cell).size,
                    medians[cell], predicted_s, held_out,
                )
            )  # fmt: skip
    return tuple(
        sorted(rows, key=lambda r: (list(STACK_OF).index(r.topology), r.n_controlnets, r.n_loras, r.variant, r.mode))
    )


def _fingerprint(sessions: tuple[Session, ...]) -> dict[str, Any]:
    return {
        "gpu": sessions[0].fingerprint.get("gpu", ""),
        "sessions": [
            {"session": s.session, "started": s.started, "parts_s": dict(s.parts), **s.fingerprint} for s in sessions
        ],
    }


def _notes(
    plan: _Plan, laws: Mapping[str, Law], check: tuple[CheckRow, ...], sessions: tuple[Session, ...]
) -> list[str]:
    notes = [f"engine.* in the fastest mode that was measured: {plan.choice.text}."]
    for topology in STACK_OF:
        gaps = [row.gap_ratio for row in check if row.topology == topology and row.is_held_out]
        if gaps:
            notes.append(
                f"Held-out images, {topology}: composed from laws against measured {min(gaps):+.1%} to {max(gaps):+.1%}, "
                f"median {float(np.median(gaps)):+.1%} ({len(gaps)} kinds)."
            )
    missing = sorted(set(LAW_FEATURES) - set(laws))
    if missing:
        notes.append(f"Not measured and not assumed: {', '.join(missing)}.")
    for name in ("diffusers", "diffusers_tuned", "engine"):
        law = laws.get(f"{name}.request_overhead")
        if law is not None and law.status == "measured" and law.parameters["value_s"] == 0.0:
            notes.append(f"{name}.request_overhead is 0: whole images took less than their parts.")
    n_failures = sum(len(session.failures) for session in sessions)
    if n_failures:
        notes.append(
            f"{n_failures} tasks of {len(sessions)} sessions failed or were left out; the raw data names them."
        )
    return notes
