"""``python -m calibrate``: the same commands as ``diffplan calibrate``, for a GPU host without the planner's packages."""

from calibrate.cli import main

if __name__ == "__main__":
    main()
