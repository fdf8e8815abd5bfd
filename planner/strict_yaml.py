"""Reads a YAML file strictly and checks it against a pydantic model, naming file, line and field of every problem at once.

YAML 1.2 (``yes`` is a text); duplicate keys, tags, several documents and files over the size cap are refused.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from traces.problems import InputError, Problem, one_problem

FILE_BYTES_MAX: Final = 2**20
NODES_MAX: Final = 20_000
"""Aliases can make a small file expand without bound; a scenario has a few hundred nodes."""
DEPTH_MAX: Final = 12
FLOW_DEPTH_MAX: Final = 100
"""Looked at before parsing: the parser takes seconds over a thousand open brackets."""
Model = TypeVar("Model", bound=BaseModel)
Place = tuple[str | int, ...]


@dataclass(slots=True)
class _Plain:
    """Plain values of a YAML tree, and the line each field stands on."""

    lines: dict[Place, int] = field(default_factory=dict)
    n_nodes: int = 0

    def value(self, node: Any, place: Place) -> Any:
        self.n_nodes += 1
        if self.n_nodes > NODES_MAX or len(place) > DEPTH_MAX:
            raise _TooLargeError
        if isinstance(node, CommentedMap):
            out = {}
            for key, item in node.items():
                name = str(key)
                here = (*place, name)
                self.lines[here] = node.lc.data[key][0] + 1 if key in node.lc.data else self.lines.get(place, 1)
                out[name] = self.value(item, here)
            return out
        if isinstance(node, CommentedSeq):
            items = []
            for index, item in enumerate(node):
                here = (*place, index)
                spots = node.lc.data or {}  # none for a list that carries a tag
                self.lines[here] = spots[index][0] + 1 if index in spots else self.lines.get(place, 1)
                items.append(self.value(item, here))
            return tuple(items)
        for kind in (bool, int, float, str):  # ruamel's scalars are subclasses that remember their style
            if isinstance(node, kind):
                return kind(node)
        return node

    def line_of(self, place: Place) -> int:
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)


class _TooLargeError(Exception):
    pass


def read_strict(path: Path, model: type[Model]) -> Model:
    """Reads ``path`` into ``model``.

    Raises:
        InputError: the file cannot be read, is too large, is not one YAML document, or breaks the model; every problem found
            carries ``file:line field``.
    """
    try:
        size = path.stat().st_size
        if size > FILE_BYTES_MAX:
            raise one_problem(
                str(path), f"is {size} bytes", f"at most {FILE_BYTES_MAX}", "Check that it is the right file."
            )
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise one_problem(
            str(path), f"cannot be read: {error.strerror}", "a readable YAML file", "Check the path."
        ) from None
    except UnicodeDecodeError as error:
        raise one_problem(str(path), f"is not UTF-8: {error.reason}", "UTF-8 text", "Save it as UTF-8.") from None
    return parse_strict(text, model, path.name)


def parse_strict(text: str, model: type[Model], name: str) -> Model:
    """As :func:`read_strict`, on text; ``name`` stands for the file in the problems."""
    if _flow_depth(text) > FLOW_DEPTH_MAX:
        raise one_problem(name, "is nested too deep", f"at most {DEPTH_MAX} levels")
    try:
        tree = YAML(typ="rt", pure=True).load(text)
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        what = str(error.problem).split(" with value")[0]
        raise one_problem(f"{name}:{line}", what, "every key once", "Remove one of the two.") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise one_problem(
            f"{name}:{line}", f"is not YAML: {error.problem}", "one YAML document", "Repair the line."
        ) from None
    except RecursionError:
        raise one_problem(name, "is nested too deep", f"at most {DEPTH_MAX} levels") from None
    except (YAMLError, ValueError) as error:
        raise one_problem(name, f"is not YAML: {error}", "one YAML document", "Repair the file.") from None
    if not isinstance(tree, CommentedMap):
        seen = "nothing" if tree is None else type(tree).__name__.removeprefix("Commented").lower()
        raise one_problem(f"{name}:1", f"got {seen}", "fields such as 'name:' and 'traffic:'", "See examples/.")
    plain = _Plain()
    try:
        values = plain.value(tree, ())
    except (_TooLargeError, RecursionError):
        raise one_problem(
            name, "expands to too many or too deep values", f"at most {NODES_MAX}, {DEPTH_MAX} deep"
        ) from None
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise InputError(_problems(error, model, name, plain)) from None


def _flow_depth(text: str) -> int:
    """Brackets that are open at once, those in quotes included."""
    depth = deepest = 0
    for found in re.finditer(r"[\[\]{}]", text):
        depth = max(0, depth + (1 if found[0] in "[{" else -1))
        deepest = max(deepest, depth)
    return deepest


def _problems(error: ValidationError, model: type[BaseModel], name: str, plain: _Plain) -> list[Problem]:
    found = []
    for item in error.errors(include_url=False):
        place = tuple(
            part for part in item["loc"] if isinstance(part, int) or not part.startswith(("function-", "tuple["))
        )
        where = f"{name}:{plain.line_of(place)} {_dotted(place)}".rstrip()
        parent = _model_at(model, place[:-1])
        if item["type"] == "extra_forbidden":
            known = sorted(parent.model_fields) if parent else []
            near = difflib.get_close_matches(str(place[-1]), known, n=1)
            repair = f"Did you mean {near[0]!r}?" if near else "Remove it"
            found.append(Problem(where, "is not a known field", f"one of {', '.join(known)}", repair))
        elif item["type"] == "missing":
            found.append(Problem(where, "is missing", _allowed(model, place), "Add it"))
        elif item["type"] in {"value_error", "assertion_error"}:
            what, _, repair = str(item["ctx"]["error"]).partition("|")
            found.append(Problem(where, what, "", repair))
        else:
            found.append(Problem(where, f"got {_shown(item['input'])}", _allowed(model, place) or item["msg"]))
    return sorted(found, key=lambda problem: _line_number(problem.where))


def _line_number(where: str) -> int:
    digits = where.partition(":")[2].partition(" ")[0]
    return int(digits) if digits.isdigit() else 0


def _shown(value: object) -> str:
    text = repr(value) if not isinstance(value, dict | tuple) else ("a table" if isinstance(value, dict) else "a list")
    return text if len(text) <= 80 else text[:77] + "…"


def _dotted(place: Sequence[str | int]) -> str:
    out = ""
    for part in place:
        out += f"[{part}]" if isinstance(part, int) else f".{part}" if out else str(part)
    return out


def _model_at(model: type[BaseModel], place: Sequence[str | int]) -> type[BaseModel] | None:
    current: type[BaseModel] | None = model
    for part in place:
        if current is None or not isinstance(part, str) or part not in current.model_fields:
            return None
        current = _inner_model(current.model_fields[part].annotation)
    return current


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            return inner
    return None


def _allowed(model: type[BaseModel], place: Sequence[str | int]) -> str:
    """What a field accepts, in words: its type, its range and its unit, all from the model itself."""
    names = [part for part in place if isinstance(part, str)]
    parent = _model_at(model, names[:-1])
    if parent is None or not names or names[-1] not in parent.model_fields:
        return ""
    info = parent.model_fields[names[-1]]
    low, high = "", ""
    for rule in info.metadata:
        if isinstance(rule, annotated_types.Ge):
            low = f"{rule.ge:g}"
        elif isinstance(rule, annotated_types.Gt):
            low = f"over {rule.gt:g}"
        elif isinstance(rule, annotated_types.Le):
            high = f"{rule.le:g}"
        elif isinstance(rule, annotated_types.Lt):
            high = f"under {rule.lt:g}"
    bounds = f" {low}..{high}" if low and high else f" {low} or more" if low else f" up to {high}" if high else ""
    return f"{_type_words(info.annotation)}{bounds}"


_WORDS: Final[Mapping[Any, str]] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _type_words(annotation: Any) -> str:
    if annotation in _WORDS:
        return _WORDS[annotation]
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join("null" if inner is type(None) else _type_words(inner) for inner in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"a list, each {_type_words(get_args(annotation)[0])}"
    model = _inner_model(annotation)
    return f"a table with {', '.join(model.model_fields)}" if model else "a value"
