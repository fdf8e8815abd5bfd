"""One exception for everything a user can get wrong, so that all problems of an input are shown together (exit code 2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with an input: where it is, what is wrong with the value seen, what is allowed, what to do."""

    where: str
    """File, then line, row, column or field: ``trace.csv row 7 column n_steps`` or ``scenario.yaml:14 slo.latency_s``."""
    what: str
    """What is wrong, the value seen included: ``got 'fast'``."""
    allowed: str = ""
    """What would be right: ``a whole number, 1..1000``."""
    repair: str = ""
    """What to do about it, as an imperative sentence."""

    def __str__(self) -> str:
        allowed = f", needs {self.allowed}" if self.allowed else ""
        repair = f" {self.repair}" if self.repair else ""
        if repair and repair[-1] not in ".?!":
            repair += "."
        return f"{self.where}: {(self.what + allowed).rstrip('.')}.{repair}"


class InputError(Exception):
    """The input cannot be used. Carries every problem found, not only the first one.

    Raised for files, scenarios, profiles and command-line values that a user can repair. The command line prints the
    problems without a traceback and exits with 2.
    """

    SHOWN_MAX = 20

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems: Sequence[Problem] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        if not self.problems:
            raise ValueError("an InputError needs at least one Problem")
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [str(problem) for problem in self.problems[: self.SHOWN_MAX]]
        more = len(self.problems) - self.SHOWN_MAX
        return "\n".join([*lines, f"… and {more} more problems of this input."] if more > 0 else lines)

    def __reduce__(self) -> tuple[type[InputError], tuple[Sequence[Problem]]]:
        return type(self), (self.problems,)


def one_problem(where: str, what: str, allowed: str = "", repair: str = "") -> InputError:
    """Builds the :class:`InputError` for a single problem, ready to be raised."""
    return InputError(Problem(where, what, allowed, repair))
