"""Commands about finished profiles: ``calibrate diff`` and ``calibrate transfer``. Importing it imports no torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from traces.problems import one_problem


def diff(
    before: Annotated[str, typer.Argument(help="A shipped profile's name, or a file.")],
    after: Annotated[str, typer.Argument(help="The profile to compare with it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Explain what changed between two profiles: laws, whole images, hardware, software, engine."""
    from calibrate.diff import profile_difference
    from calibrate.diff_text import plain_difference, print_difference
    from calibrate.profile_file import load_profile

    one, other = load_profile(before), load_profile(after)
    difference = profile_difference(one, other)
    if as_json:
        sys.stdout.write(json.dumps(plain_difference(difference), indent=1, ensure_ascii=False) + "\n")
    else:
        print_difference(one, other, difference)


def transfer(
    profile: Annotated[str, typer.Argument(help="A measured profile: a shipped name, or a file.")],
    to: Annotated[str, typer.Option(help="The other GPU: H100, H800, A100, L40S, A10G, B200 or H200.")],
    out: Annotated[Path, typer.Option(help="The profile to write.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the stated intervals.")] = 2026,
) -> None:
    """Carry a profile over to a GPU that is not at hand, by datasheet rates; every law of it is assumed."""
    from calibrate.output import replace_text
    from calibrate.profile_file import load_profile, to_json
    from calibrate.roofline import transfer_profile

    if out.suffix != ".json":
        raise one_problem("--out", f"got {str(out)!r}", "a file name that ends in .json")
    moved = transfer_profile(load_profile(profile), to, seed=seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, to_json(moved))
    sys.stderr.write(f"wrote {out}\n" + "".join(f"{note}\n" for note in moved.notes))
    sys.stdout.write(f"{moved.profile_id}\n")


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command()(diff)
    app.command()(transfer)
