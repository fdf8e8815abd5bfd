"""``python -m engine …``: the same commands as ``diffplan engine …``, without the planner's packages."""

from __future__ import annotations

import sys

from engine.cli import app
from traces.problems import InputError


def main() -> None:
    """Runs the command; bad input is a sentence and exit code 2."""
    try:
        app(prog_name="python -m engine")
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
