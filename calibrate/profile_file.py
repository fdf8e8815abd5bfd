"""Profiles as JSON files: canonical writing, so that equal profiles are equal bytes, and reading that names every problem.

Reading has two halves. ``_PROFILE`` is the table of what a file may say; it is checked as a whole, and only a file without a
problem is built into a :class:`LatencyProfile`.
"""

from __future__ import annotations

import json
import math
import reprlib
import sys
from collections.abc import Callable, Container, Iterator, Mapping
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any, Final, get_args

from calibrate.profile import (
    FACTS,
    FORM_PARAMETERS,
    LAW_FEATURES,
    READ_LAWS,
    RESIDUAL_LEVELS,
    STACKS,
    Fact,
    LatencyProfile,
    Law,
    Status,
)
from traces.problems import InputError, Problem, one_problem

SCHEMA_VERSIONS: Final = (1, 2)
"""2 knows forms with attention, a soft floor or tiles, values at measured sizes, errors at left-out sizes, and laws of whole jobs; a profile
without them is written as 1."""
FORMS_OF_1: Final = ("constant", "affine", "floor_affine")
LAWS_SINCE_2: Final = (
    "engine.text_encode_unguided",
    "engine.latent_input",
    "engine.control_input",
    "engine.lora_wait",
    *READ_LAWS,
)
FILE_BYTES_MAX: Final = 64 * 2**20

Check = Callable[[Any, str], Iterator[Problem]]
"""Takes a decoded value and its place, gives what is wrong with it; never raises, whatever the value."""


def to_json(profile: LatencyProfile) -> str:
    """Canonical JSON, one law a line: sorted, final newline; the same profile always gives the same bytes."""
    laws = {
        name: {
            "form": law.form,
            "features": list(law.features),
            "parameters": {key: float(value) for key, value in sorted(law.parameters.items())},
            "status": law.status,
            "source": law.source,
            "domain": {key: [float(bound) for bound in law.domain[key]] for key in sorted(law.domain)},
            "points": [[float(value) for value in point] for point in law.points],
            "n_repetitions": law.n_repetitions,
            "residual_ratio_quantiles": list(law.residual_ratio_quantiles),
            **({"point_ratios": [float(ratio) for ratio in law.point_ratios]} if law.point_ratios else {}),
            **({"left_out_error_ratio": float(law.left_out_error_ratio)} if law.left_out_error_ratio else {}),
        }
        for name, law in sorted(profile.laws.items())
    }
    top: dict[str, Any] = {
        "schema_version": _schema_version(profile),
        "architecture": profile.architecture,
        "gpu_kind": profile.gpu_kind,
        "created": profile.created,
        "fingerprint": dict(sorted(profile.fingerprint.items())),
        "raw_sha256": profile.raw_sha256,
        "notes": list(profile.notes),
    }
    nested: dict[str, dict[str, Any]] = {
        "facts": {
            k: {"value": float(f.value), "status": f.status, "source": f.source}
            for k, f in sorted(profile.facts.items())
        },
        "laws": laws,
        "noise_ratio_quantiles": {
            key: [float(value) for value in values] for key, values in sorted(profile.noise_ratio_quantiles.items())
        },
        "draws": {key: list(values) for key, values in sorted(profile.draws.items())},
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in top.items()]
    for key, table in nested.items():
        rows = ",\n".join(
            f"    {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in table.items()
        )
        lines.append(f"  {json.dumps(key)}: {{\n{rows}\n  }}" if rows else f"  {json.dumps(key)}: {{}}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _schema_version(profile: LatencyProfile) -> int:
    """The oldest version that can say what the profile says, so that an older reader still reads it."""
    is_old = all(
        law.form in FORMS_OF_1 and name not in LAWS_SINCE_2 and not law.left_out_error_ratio and not law.point_ratios
        for name, law in profile.laws.items()
    )
    return 1 if is_old else 2


def shipped_profiles() -> dict[str, Path]:
    """Name to file of the measured profiles that travel with the package; files beside them (``h200.heldout.json``) are none."""
    folder = resources.files("calibrate") / "profiles"
    return {
        Path(str(item)).stem: Path(str(item))
        for item in sorted(folder.iterdir() if folder.is_dir() else (), key=str)
        if item.name.count(".") == 1 and item.name.endswith(".json")
    }


def profile_path(name_or_path: str) -> Path:
    """The file of a shipped profile, or the path as given."""
    return shipped_profiles().get(name_or_path, Path(name_or_path))


def load_profile(name_or_path: str) -> LatencyProfile:
    """Reads a shipped profile by name, or any profile by path.

    Raises:
        InputError: no such profile, or the file is not a profile; every problem is named.
    """
    shipped = shipped_profiles()
    path = shipped.get(name_or_path, Path(name_or_path))
    where = f"profile {name_or_path}" if name_or_path in shipped else str(path)
    allowed = f"a profile file or one of the shipped {sorted(shipped)}"
    try:
        if not path.is_file():  # before reading: a pipe or a device would never end
            what = "is not a file" if path.exists() else "there is no such file"
            raise one_problem(where, what, allowed, "Check the name.")
        if path.stat().st_size > FILE_BYTES_MAX:
            raise one_problem(where, f"is {path.stat().st_size} bytes", f"at most {FILE_BYTES_MAX}")
        plain = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise one_problem(where, f"cannot be read: {error.strerror}", allowed, "Check the name.") from None
    except (ValueError, RecursionError) as error:
        raise one_problem(where, f"is not JSON: {error}", "a profile written by 'diffplan calibrate fit'") from None
    return profile_from_plain(plain, where)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number JSON knows")


def profile_from_plain(plain: object, where: str) -> LatencyProfile:
    """Builds a profile from decoded JSON; raises :class:`InputError` with every problem found."""
    problems = list(_PROFILE(plain, f"{where} "))
    if problems:
        raise InputError(problems)
    top: dict[str, Any] = plain  # type: ignore[assignment]
    return LatencyProfile(
        architecture=top["architecture"],
        gpu_kind=top["gpu_kind"],
        laws={name: _law_from(name, entry) for name, entry in top["laws"].items()},
        facts={k: Fact(float(f["value"]), f["status"], f["source"]) for k, f in top["facts"].items()},
        noise_ratio_quantiles={k: _floats(values) for k, values in top.get("noise_ratio_quantiles", {}).items()},
        draws={k: _floats(values) for k, values in top.get("draws", {}).items()},
        fingerprint=top.get("fingerprint", {}),
        raw_sha256=top.get("raw_sha256", ""),
        created=top.get("created", ""),
        notes=tuple(top.get("notes", ())),
    )


def _law_from(name: str, entry: Mapping[str, Any]) -> Law:
    return Law(
        name=name,
        form=entry["form"],
        features=LAW_FEATURES[name],
        parameters={key: float(entry["parameters"][key]) for key in FORM_PARAMETERS[entry["form"]]},
        status=entry["status"],
        source=entry["source"],
        domain={key: (float(low), float(high)) for key, (low, high) in entry.get("domain", {}).items()},
        points=tuple(_floats(point) for point in entry.get("points", ())),
        point_ratios=_floats(entry.get("point_ratios", ())),
        n_repetitions=entry.get("n_repetitions", 0),
        residual_ratio_quantiles=_floats(entry.get("residual_ratio_quantiles", ())),
        left_out_error_ratio=float(entry.get("left_out_error_ratio", 0.0)),
    )


def _floats(values: list[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


_repr = reprlib.Repr()
_repr.maxstring, _repr.maxlist, _repr.maxlong = 80, 8, 40


def _wrong(place: str, value: object, allowed: str, repair: str = "") -> Problem:
    """What was got and what is allowed; a value of any size or depth is shown in a few words."""
    return Problem(place.rstrip(), f"got {_repr.repr(value)}", allowed, repair)


def _under(place: str, key: object) -> str:
    name = str(key) if str(key).isprintable() else ascii(key)
    return f"{place}{'' if place.endswith(' ') else '.'}{name}"


def _scalar(is_right: Callable[[Any], bool], allowed: str, repair: str = "") -> Check:
    def check(value: Any, place: str) -> Iterator[Problem]:
        if not is_right(value):
            yield _wrong(place, value, allowed, repair)

    return check


def _number(low: float = -sys.float_info.max, allowed: str = "a finite number") -> Check:
    # Comparing refuses NaN, infinities and integers that no float can hold without converting any of them.
    return _scalar(lambda value: type(value) in {int, float} and low <= value <= sys.float_info.max, allowed)


def _one_of(*allowed: str) -> Check:
    return _scalar(lambda value: isinstance(value, str) and value in allowed, f"one of {list(allowed)}")


def _is_plain(value: object) -> bool:
    """Whether it can be written: JSON that is UTF-8, so no NaN and no half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _list_of(check_item: Check, what: str, lengths: Container[int] | None = None) -> Check:
    def check(value: Any, place: str) -> Iterator[Problem]:
        if not isinstance(value, list) or (lengths is not None and len(value) not in lengths):
            yield _wrong(place, value, what)
        else:
            yield from chain.from_iterable(check_item(item, place) for item in value)

    return check


def _table(fields: Mapping[str, Check], what: str, required: Container[str] = (), allowed: str = "") -> Check:
    """An object with these fields and no others; ``what`` is the word for one field, ``allowed`` says which there are."""
    allowed = allowed or f"one of {sorted(fields)}"

    def check(value: Any, place: str) -> Iterator[Problem]:
        if not isinstance(value, dict):
            yield Problem(place.rstrip(), f"got {type(value).__name__}", "a JSON object")
            return
        for key, item in value.items():
            if key in fields:
                yield from fields[key](item, _under(place, key))
            else:
                yield Problem(_under(place, key), f"is not a known {what}", allowed, "Rename it.")
        for key in fields:
            if key in required and key not in value:
                yield Problem(_under(place, key), "is missing", repair=f"Add the {what}")

    return check


_NUMBER: Final = _number()
_ANYTHING: Final = _scalar(lambda value: True, "")


def _text(n_characters_min: int, repair: str = "") -> Check:
    return _scalar(
        lambda value: isinstance(value, str) and len(value) >= n_characters_min and _is_plain(value),
        "a text that is not empty" if n_characters_min else "a text",
        repair,
    )


_SOURCE: Final = _text(1, "Say which measurements, or whose figure")
_STATUS: Final = _one_of(*get_args(Status))
_BOX: Final = "[low, high], two finite numbers"


def _interval(value: Any, place: str) -> Iterator[Problem]:
    found = list(_list_of(_NUMBER, _BOX, {2})(value, place))
    yield from found
    if not found and value[0] > value[1]:
        yield _wrong(place, value, "[low, high] with low at most high")


def _ratios(check_item: Check) -> Check:
    n = len(RESIDUAL_LEVELS)
    return _list_of(check_item, f"no or {n} numbers, one for each level of {list(RESIDUAL_LEVELS)}", {0, n})


def _law(features: tuple[str, ...]) -> Check:
    """A law of these features; which parameters it has depends on the form it says."""
    n = len(features)
    forms = [form for form, names in FORM_PARAMETERS.items() if "megapixels" in features or "attention_s" not in names]
    if "forward_batch" not in features:
        forms = [form for form in forms if form != "tiles"]
    fields: dict[str, Check] = {
        "form": _one_of(*forms),
        "features": _scalar(lambda value: value in (list(features), []), f"{list(features)}"),
        "status": _STATUS,
        "source": _SOURCE,
        "domain": _table(dict.fromkeys(features, _interval), "feature of the law"),
        "points": _list_of(_list_of(_NUMBER, f"{n} numbers, one for each of {list(features)}", {n}), "a list of lists"),
        "point_ratios": _list_of(_number(math.ulp(0.0), "a number above 0"), "a list of numbers above 0"),
        "n_repetitions": _scalar(lambda value: type(value) is int and 0 <= value <= 2**53, "a whole number, 0 or more"),
        "residual_ratio_quantiles": _ratios(_NUMBER),
        "left_out_error_ratio": _number(0.0, "a finite number, 0 or more"),
    }
    required = ("form", "features", "parameters", "status", "source")
    parameters = {
        form: _table(dict.fromkeys(names, _NUMBER), f"parameter of form {form}", names)
        for form, names in FORM_PARAMETERS.items()
    }

    def check(value: Any, place: str) -> Iterator[Problem]:
        form = value.get("form") if isinstance(value, dict) else None
        of_form = parameters.get(form, _ANYTHING) if isinstance(form, str) else _ANYTHING
        found = list(_table({**fields, "parameters": of_form}, "field", required)(value, place))
        yield from found
        if not found and len(value.get("point_ratios", [])) not in {0, len(value.get("points", []))}:
            yield Problem(_under(place, "point_ratios"), "are not one for each of points", "as many as points, or none")

    return check


_DRAWS: Final = _table(
    {
        f"{law}:{parameter}": _list_of(_NUMBER, "a list of numbers")
        for law in LAW_FEATURES
        for parameter in dict.fromkeys(chain(*FORM_PARAMETERS.values()))
    },
    "parameter of a law",
    allowed="LAW:PARAMETER",
)


def _draws(value: Any, place: str) -> Iterator[Problem]:
    yield from _DRAWS(value, place)
    lists = [item for item in value.values() if isinstance(item, list)] if isinstance(value, dict) else []
    if len({len(item) for item in lists}) > 1:
        yield Problem(place, "have different lengths", "joint draws: every list equally long")


_FACT: Final = _table(
    {"value": _number(0.0, "a finite number, 0 or more"), "status": _STATUS, "source": _SOURCE},
    "field",
    ("value", "status", "source"),
)
_PROFILE: Final = _table(
    {
        "schema_version": _scalar(
            lambda value: type(value) is int and value in SCHEMA_VERSIONS, f"one of {list(SCHEMA_VERSIONS)}"
        ),
        "architecture": _text(1),
        "gpu_kind": _text(1),
        "created": _text(0),
        "fingerprint": _scalar(lambda value: isinstance(value, dict) and _is_plain(value), "a JSON object"),
        "raw_sha256": _text(0),
        "notes": _list_of(_text(0), "a list of texts"),
        "facts": _table(dict.fromkeys(FACTS, _FACT), "fact"),
        "laws": _table({name: _law(features) for name, features in LAW_FEATURES.items()}, "law"),
        "noise_ratio_quantiles": _table(
            dict.fromkeys(STACKS, _ratios(_number(math.ulp(0.0), "a number above 0"))), "stack"
        ),
        "draws": _draws,
    },
    "field",
    ("schema_version", "architecture", "gpu_kind", "facts", "laws"),
)
