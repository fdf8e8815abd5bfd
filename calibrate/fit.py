"""``calibrate fit``: measurements of one or more sessions in, a :class:`LatencyProfile` with joint bootstrap draws out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from calibrate import remarks
from calibrate.assumed import PUBLISHED, TAKEN_OVER
from calibrate.cells import Cells
from calibrate.compose import STACK_OF, CheckRow, image_s
from calibrate.estimate import IMAGE_OVERHEAD, OVERHEADS, Estimator, Parameters, published_parameters
from calibrate.facts import profile_facts, service_noise
from calibrate.heldout import HeldOutPoint, held_out_points
from calibrate.laws import evaluate
from calibrate.measurement import Measurement, Measurements
from calibrate.profile import (
    LAW_FEATURES,
    READ_LAWS,
    RESIDUAL_LEVELS,
    STACKS,
    Form,
    LatencyProfile,
    Law,
    Status,
    is_of_sizes,
)
from calibrate.recipes import FROM_FILE, SUMMED, Medians, Recipe
from calibrate.served import lora_waits
from traces.problems import InputError, Problem, one_problem

# Sizes of weights differ by headers and alignment; a box in bytes is that much wider than what was measured.
BYTES_BOX_RATIO: Final = 0.02
OF_AN_OLDER_ENGINE: Final = ("engine.checkpoint_load", "engine.controlnet_load", *READ_LAWS)
LENT: Final = ("engine.residual_exchange", *OF_AN_OLDER_ENGINE)
"""What sessions of an older engine may supply where there is nothing newer: links; loads, which count as assumed then."""
LENT_STACKS: Final = ("diffusers", "diffusers_tuned")
"""Stacks that are not ours: of these also single sizes that the newer sessions lack."""
STILL_SERVED: Final = ("serving.denoise", "serving.decode")
"""Stages that run on the GPU alone, so that an engine with a quicker host takes as long for them."""


@dataclass(frozen=True)
class Fitted:
    """A profile, the rows it came from, the comparison with whole images, and what held-out sizes say."""

    profile: LatencyProfile
    measurements: Measurements
    check: tuple[CheckRow, ...]
    held_out: tuple[HeldOutPoint, ...] = ()
    forms: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Why each form was chosen, see :func:`calibrate.remarks.form_table`."""


def fit_profile(
    measurements: Measurements,
    *,
    n_draws: int = 64,
    seed: int = 2026,
    borrowed: Measurements | None = None,
    served_since: str = "",
) -> Fitted:
    """Fits every law that the measurements support; the others are assumed, with their source, or left out and named.

    Args:
        measurements: the sessions to fit.
        n_draws: joint bootstrap draws.
        seed: of the bootstrap.
        borrowed: older sessions of the same GPU and model; of these only ``LENT``, ``LENT_STACKS`` and facts that the others lack are used.
        served_since: UTC, ISO 8601; jobs on the serving path of sessions that began before are of an older engine: of them only
            steps and decoding of kinds that were not served since are used. Empty: all are used.

    Raises:
        InputError: no measurements, or sessions of different GPUs or models.
    """
    measurements = _with_borrowed(measurements, borrowed)
    _check_sessions(measurements)
    rows = tuple(sorted(measurements.rows, key=lambda row: (row.session, row.order)))
    sessions = tuple(sorted(measurements.sessions, key=lambda session: session.session))
    measurements = Measurements(rows, sessions)
    cells = Cells.of(_of_newest_engine(measurements, served_since))
    own, older = (tuple(s for s in sessions if ("borrowed" in s.fingerprint) == is_old) for is_old in (False, True))
    facts = profile_facts(own, older)
    estimator = Estimator.of(cells, facts["residual_bytes_per_sample"].value)
    cells, medians = estimator.cells, estimator.cells.medians()
    estimate = estimator.parameters(medians)
    if "engine.unet_step" not in estimate and "diffusers.unet_step" not in estimate:
        raise one_problem(
            "measurements", "hold no UNet steps", "engine.unet_step or diffusers.unet_step", "Measure the part 'steps'."
        )
    drawn = [estimator.parameters(cells.resampled_medians(seed, k), (seed, k), estimate) for k in range(n_draws)]
    draws = {
        f"{law}:{name}": tuple(one[law][name] for one in drawn)
        for law in sorted(estimate)
        if law in LAW_FEATURES
        for name in estimate[law]
    }
    lenders = {s.session: s.started for s in sessions if "borrowed" in s.fingerprint}
    laws = {law: _law(estimator, law, estimate, lenders) for law in LAW_FEATURES if law in estimate or law in PUBLISHED}
    _widen_decoding(laws)
    _widen_parts_of_steps(laws)
    check = _check(estimator, estimate, medians)
    profile = LatencyProfile(
        architecture=sessions[0].model,
        gpu_kind=sessions[0].gpu_kind,
        laws=laws,
        facts=facts,
        noise_ratio_quantiles=service_noise(cells),
        draws=draws,
        fingerprint=remarks.fingerprint(sessions) | ({"served_since": served_since} if served_since else {}),
        raw_sha256="",
        created=max(session.started for session in sessions),
    )
    held_out = held_out_points(profile, measurements, estimator.choice)
    said = tuple(remarks.notes(estimator, laws, check, held_out, measurements, served_since))
    profile = dataclasses.replace(profile, notes=said)
    return Fitted(profile, measurements, check, held_out, remarks.form_table(estimator))


def _of_newest_engine(measurements: Measurements, served_since: str) -> Measurements:
    """Without what older sessions say about the serving path, where the engine has changed."""
    if not served_since:
        return measurements
    older = {session.session for session in measurements.sessions if session.started < served_since}
    newer_cells = {row.cell for row in measurements.rows if row.session not in older}
    kept = tuple(
        row
        for row in measurements.rows
        if row.session not in older
        or not row.quantity.startswith("serving.")
        or (row.quantity in STILL_SERVED and row.cell not in newer_cells)
    )
    return Measurements(kept, measurements.sessions)


def _with_borrowed(measurements: Measurements, borrowed: Measurements | None) -> Measurements:
    """What the sessions lack from older ones: those given, and those that an earlier fit has marked as such."""
    lenders = {session.session for session in measurements.sessions if "borrowed" in session.fingerprint}
    earlier, measurements = (
        Measurements(
            tuple(row for row in measurements.rows if (row.session in lenders) == is_old),
            tuple(session for session in measurements.sessions if (session.session in lenders) == is_old),
        )
        for is_old in (True, False)
    )
    borrowed = earlier if borrowed is None else earlier.merged(borrowed)
    quantities = {row.quantity for row in measurements.rows}
    cells = {row.cell for row in measurements.rows}
    own = {session.session for session in measurements.sessions}

    def is_wanted(row: Measurement) -> bool:
        if row.session in own:
            return False
        if row.quantity in LENT:
            return row.quantity not in quantities
        return row.quantity.split(".")[0] in LENT_STACKS and row.cell not in cells

    rows = tuple(row for row in borrowed.rows if is_wanted(row))
    wanted = sorted({row.quantity for row in rows})
    sessions = tuple(
        dataclasses.replace(session, parts={}, failures=(), fingerprint={**session.fingerprint, "borrowed": wanted})
        for session in borrowed.sessions
        if session.session in {row.session for row in rows}
    )
    return measurements.merged(Measurements(rows, sessions))


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


def _widen_parts_of_steps(laws: dict[str, Law]) -> None:
    """Beyond the sizes they were timed at, parts of a step go by their form within the box of the step, and count as assumed.

    A control image was timed at one size; reading and laying it out goes by its pixels. Fusing one size of LoRA takes as long as
    fusing another: stock's loading hardly depends on the bytes.
    """
    for name in SUMMED:
        stock, law = laws.get(name.replace("diffusers_tuned", "diffusers")), laws.get(name)
        if stock is None or law is None or dict(stock.domain) == dict(law.domain):
            continue
        if law.status == "measured" and len(law.points) == 1:
            said = f"{law.source}; other sizes take as long"
            laws[name] = dataclasses.replace(law, status="assumed", source=said, domain=stock.domain)
    for name in ("diffusers.controlnet_step", "diffusers.unet_lora_step", "diffusers_tuned.controlnet_step"):
        whole = laws.get(f"{name.split('.')[0]}.unet_step")
        law = laws.get(name)
        if whole is None or law is None or law.status != "measured":
            continue
        box = {
            feature: (min(low, whole.domain[feature][0]), max(high, whole.domain[feature][1]))
            for feature, (low, high) in law.domain.items()
        }
        if box != dict(law.domain):
            said = f"{law.source}; in the rest of {whole.name}'s box by its form"
            laws[name] = dataclasses.replace(law, status="assumed", source=said, domain=box)
    control = laws.get("engine.control_input")
    if control is not None and len(control.points) == 1:
        said = f"{control.source}; other sizes by their pixels"
        laws[control.name] = dataclasses.replace(control, status="assumed", source=said, domain={})


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


def _marked_as_lent(estimator: Estimator, recipe: Recipe, law: Law, lenders: Mapping[str, str]) -> Law:
    """Says where the rows are from if all are from sessions that were borrowed."""
    used = {name for source in recipe.sources for cell in source.cells for name in estimator.cells.values[cell]}
    if not used <= set(lenders):
        return law
    said = (
        f"{law.source}; measured on {', '.join(sorted({lenders[name][:10] for name in used}))}, before the other rows"
    )
    if law.name not in OF_AN_OLDER_ENGINE:
        return dataclasses.replace(law, source=said)
    is_straight = all(cell[2].variant.endswith(FROM_FILE) for source in recipe.sources for cell in source.cells)
    how = "with an older engine" + (" that loaded straight to the GPU" if is_straight else "")
    return dataclasses.replace(law, status="assumed", source=f"{said}, {how}")


def _law(estimator: Estimator, law: str, estimate: Parameters, lenders: Mapping[str, str]) -> Law:
    features = LAW_FEATURES[law]
    recipe = estimator.recipes.get(law)
    if recipe is not None:
        # sums of stock times: nobody ran tuned Diffusers that way
        status: Status = "assumed" if law in SUMMED and not recipe.is_direct else "measured"
        fitted = _from_recipe(estimator, recipe, features, estimate[law], status)
        return _marked_as_lent(estimator, recipe, fitted, lenders)
    stack, _, ending = law.partition(".")
    if ending == "request_overhead" and law in estimate:
        topology = OVERHEADS[stack]
        used = estimator.image_cells(topology, n_controlnets=0, n_loras=0)
        if used:
            n = sum(estimator.cells.pooled(cell).size for cell in used)
            text = f"median e2e.{topology} without add-ons minus steps and VAE by their laws"
            return Law(law, "constant", features, estimate[law], "measured", text, n_repetitions=n)
    if law == "engine.remote_join" and law in estimate:
        n = sum(estimator.cells.pooled(cell).size for cell in estimator.remote_cells())
        text = "median engine.remote_step minus max(encoder, ControlNets + transfer) minus decoder, by their laws"
        return Law(law, "constant", features, estimate[law], "measured", text, n_repetitions=n)
    if law == "engine.lora_wait" and law in estimate:
        n = sum(estimator.cells.pooled(cell).size for cell in lora_waits(estimator.cells))
        text = "median over kinds of jobs of serving.lora_wait minus lora_attach and lora_detach of their bytes, by their laws"
        return Law(law, "constant", features, estimate[law], "measured", text, n_repetitions=n)
    if law in estimate:
        origin, why = TAKEN_OVER[law]
        taken = _law(estimator, origin, estimate, lenders)
        return Law(
            law, taken.form, features, estimate[law], "assumed", f"taken from {origin}: {why}", taken.domain,
            points=taken.points if taken.point_ratios else (), point_ratios=taken.point_ratios,
        )  # fmt: skip
    published = PUBLISHED[law]
    form: Form = "constant" if published.per_byte_s is None else "affine"
    return Law(law, form, features, published_parameters(law), "assumed", published.source)


def _from_recipe(
    estimator: Estimator, recipe: Recipe, features: tuple[str, ...], parameters: dict[str, float], status: Status
) -> Law:
    choice = estimator.forms[recipe.law]
    domain = {}
    for index, feature in enumerate(features):
        column = [source.vector[index] for source in (*recipe.sources, *recipe.served)]
        wider = BYTES_BOX_RATIO if feature == "n_bytes" else 0.0
        domain[feature] = (min(column) * (1 - wider), max(column) * (1 + wider))
    used = {cell for source in (*recipe.sources, *recipe.served) for cell in source.cells}
    ratios: tuple[float, ...] = ()
    if recipe.is_direct:
        all_ratios = np.concatenate([
            estimator.cells.pooled(source.cells[0])
            / evaluate(choice.form, parameters, source.x if source.vector else 1.0, _megapixels(features, source.vector))
            for source in recipe.sources
        ])  # fmt: skip
        ratios = tuple(float(value) for value in np.quantile(all_ratios, RESIDUAL_LEVELS))
    points = tuple(sorted({source.vector for source in (*recipe.sources, *recipe.served)})) if features else ()
    return Law(
        name=recipe.law,
        form=choice.form,
        features=features,
        parameters=parameters,
        status=status,
        source=recipe.text,
        domain=domain,
        points=points,
        point_ratios=_point_ratios(estimator, recipe, parameters, points) if is_of_sizes(features) else (),
        n_repetitions=sum(estimator.cells.pooled(cell).size for cell in used),
        residual_ratio_quantiles=ratios,
        left_out_error_ratio=_left_out_error(estimator, recipe),
    )


def _point_ratios(
    estimator: Estimator, recipe: Recipe, parameters: dict[str, float], points: tuple[tuple[float, ...], ...]
) -> tuple[float, ...]:
    """measured / form at each size of a law of a batch and pixels: as served, else the median over the sources of that size."""
    medians = estimator.cells.medians()
    form = estimator.forms[recipe.law].form
    found = []
    for point in points:
        sources = [source for source in recipe.served if source.vector == point] or recipe.sources
        measured = [source.combine(medians) for source in sources if source.vector == point]
        batch, megapixels = point
        said = evaluate(form, parameters, batch * megapixels, megapixels)
        found.append(float(f"{np.median(measured) / said:.9g}") if said > 0 else 1.0)
    return tuple(found)


def _megapixels(features: tuple[str, ...], vector: tuple[float, ...]) -> float:
    return vector[features.index("megapixels")] if "megapixels" in features else 1.0


def _left_out_error(estimator: Estimator, recipe: Recipe) -> float:
    left_out_s = estimator.forms[recipe.law].left_out_s
    if not left_out_s:
        return 0.0
    medians = estimator.cells.medians()
    y = np.array([source.combine(medians) for source in recipe.sources])
    return float(f"{np.sqrt(np.mean((np.array(left_out_s) / y - 1) ** 2)):.6g}")


def _check(estimator: Estimator, estimate: Parameters, medians: Medians) -> tuple[CheckRow, ...]:
    in_process = {**estimate, "engine.request_overhead": estimate.get(IMAGE_OVERHEAD, {"value_s": 0.0})}
    measured = estimator.measured_steps(medians)
    rows = []
    for topology in STACK_OF:
        # images in the measuring process pass no front and no wire
        known = estimate if topology == "serving" or IMAGE_OVERHEAD not in estimate else in_process
        for cell in estimator.image_cells(topology):
            f = cell[2]
            try:
                predicted_s = image_s(
                    lambda law, known=known, **features: estimator.seconds(known, law, measured, **features),
                    topology,
                    f,
                    estimator.residual_bytes_per_sample,
                )
            except KeyError:
                continue
            held_out = bool(f.n_controlnets or f.n_loras) and topology != "serving"
            rows.append(
                CheckRow(
                    topology, cell[1], f.n_controlnets, f.n_loras, f.variant, estimator.cells.pooled(cell).size,
                    medians[cell], predicted_s, held_out, f.n_images, f.n_steps, f.forward_batch, f.megapixels,
                )
            )  # fmt: skip

    def order(row: CheckRow) -> tuple[float | int | str, ...]:
        size = (row.megapixels < 1, -row.n_steps, row.n_images, row.forward_batch)
        return (*size, row.n_controlnets, row.n_loras, row.variant, row.mode)

    return tuple(row for topology in STACK_OF for row in sorted((r for r in rows if r.topology == topology), key=order))
