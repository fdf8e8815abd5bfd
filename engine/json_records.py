"""Reads JSON files strictly into the engine's own dataclasses: the planner and the GPU host both read them, the latter without pydantic.

Every field is checked against the dataclass' annotation; all problems are reported together.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from traces.problems import InputError, Problem, one_problem

FILE_BYTES_MAX: Final = 16 * 2**20


def read_json(path: Path) -> object:
    """Decodes a JSON file of at most 16 MiB; raises :class:`InputError` if it is missing, too large, too deep or not JSON."""
    try:
        size = path.stat().st_size
        if size > FILE_BYTES_MAX:
            raise one_problem(
                str(path), f"is {size} bytes", f"at most {FILE_BYTES_MAX}", "Check that it is the right file."
            )
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, UnicodeDecodeError) as error:
        raise one_problem(
            str(path), f"cannot be read: {error}", "a readable UTF-8 JSON file", "Check the path."
        ) from None
    except RecursionError:
        raise one_problem(str(path), "is nested too deeply", "an allocation or catalogue", "Repair the file.") from None
    except ValueError as error:
        raise one_problem(str(path), f"is not JSON: {error}", "JSON", "Repair the file.") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number JSON knows")


class RecordReader:
    """Checks decoded JSON against a dataclass' own annotations and collects problems."""

    def __init__(
        self, where: str, choices: Mapping[str, tuple[str, ...]], records: Mapping[str, type[Any]] | None = None
    ) -> None:
        """Starts without problems.

        Args:
            where: names the file.
            choices: the values of every Literal, by its name in annotations.
            records: dataclasses that fields hold, by their name in annotations.
        """
        self._where = where
        self._choices = choices
        self._records = records or {}
        self._problems: list[Problem] = []

    def problem(self, field_name: str, what: str, allowed: str, repair: str = "") -> None:
        self._problems.append(Problem(f"{self._where} {field_name}".rstrip(), what, allowed, repair))

    def finish(self) -> None:
        if self._problems:
            raise InputError(self._problems)

    def table(self, plain: object, known: set[str], where: str) -> Mapping[str, Any]:
        if not isinstance(plain, dict):
            self.problem(where, f"got {type(plain).__name__}", "a JSON object")
            return {}
        for key in sorted(set(plain) - known):
            self.problem(
                f"{where}.{key}".lstrip("."), "is not a known field", f"one of {sorted(known)}", "Remove or rename it."
            )
        return plain

    def items(self, plain: object, where: str) -> list[Any]:
        if isinstance(plain, list):
            return plain
        self.problem(where, f"got {type(plain).__name__ if plain is not None else 'nothing'}", "a list")
        return []

    def version(self, top: Mapping[str, Any], known: tuple[int, ...] = (1,)) -> None:
        version = top.get("schema_version")
        if type(version) is not int or version not in known:
            allowed = " or ".join(str(number) for number in known)
            self.problem("schema_version", f"got {version!r}", allowed, "Use the diffplan that wrote the file.")

    def record(self, cls: type[Any], plain: object, where: str) -> Any:
        fields = {item.name: item for item in dataclasses.fields(cls)}
        table = self.table(plain, set(fields), where)
        values: dict[str, Any] = {}
        n_before = len(self._problems)
        for name, item in fields.items():
            if name in table:
                may_be_empty = item.default == "" or name == "tenant_id"  # requests without a tenant have ''
                values[name] = self._value(str(item.type), table[name], f"{where}.{name}", may_be_empty=may_be_empty)
            elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
                self.problem(f"{where}.{name}", "is missing", self._allowed(str(item.type)), "Add it.")
        return cls(**values) if len(self._problems) == n_before and isinstance(plain, dict) else None

    def _value(self, annotation: str, value: object, where: str, *, may_be_empty: bool) -> Any:
        if annotation.endswith("| None"):
            if value is None:
                return None
            annotation = annotation.removesuffix("| None").strip()
        if annotation in self._records:
            return self.record(self._records[annotation], value, where)
        if annotation.startswith("tuple[") and annotation[6:].partition(",")[0] in self._records:
            cls = self._records[annotation[6:].partition(",")[0]]
            return tuple(self.record(cls, item, f"{where}[{k}]") for k, item in enumerate(self.items(value, where)))
        if annotation == "str" and isinstance(value, str) and (value or may_be_empty):
            return value
        if annotation == "int" and isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        if (
            annotation == "float"
            and isinstance(value, int | float)
            and not isinstance(value, bool)
            and 0 <= value < float("inf")
        ):
            return float(value)
        if annotation == "tuple[str, ...]" and isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        if annotation in self._choices and value in self._choices[annotation]:
            return value
        self.problem(where, f"got {value!r}", self._allowed(annotation))
        return None

    def _allowed(self, annotation: str) -> str:
        if annotation in self._choices:
            return "one of " + ", ".join(self._choices[annotation])
        return {
            "str": "a text that is not empty",
            "int": "a whole number, 0 or more",
            "float": "a finite number, 0 or more",
            "tuple[str, ...]": "a list of texts",
        }.get(annotation, annotation)
