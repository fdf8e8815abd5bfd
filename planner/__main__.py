"""``python -m planner`` is ``diffplan``."""

from planner.cli import main

main()
