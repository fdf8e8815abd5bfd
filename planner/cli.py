"""The root command ``diffplan``: finds sub-commands by entry point, loads one only when it is called, maps errors to exit codes.

Exit codes: 0 ok · 1 our fault (prints how to replay) · 2 bad input · 3 infeasible · 4 validation drift.
"""

from __future__ import annotations

import io
import os
import shlex
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

import click
import typer
from typer.main import get_command as click_command_of

from planner import __version__
from traces.problems import InputError

COMMAND_GROUP = "diffplan.commands"
# Newer typer carries a click of its own, whose exceptions are not click's; in older ones both names are the same class.
USAGE_ERRORS: tuple[type[click.ClickException], ...] = (
    click.ClickException,
    *(base for base in cast(Any, typer.BadParameter).__mro__ if base.__name__ == "ClickException"),
)
# One line each, so that --help loads no sub-command.
SUMMARIES = {
    "trace": "Describe, import and synthesise traces of requests.",
    "engine": "Run the serving engine.",
    "addons": "Govern the add-ons that the engine may load: versions, stages, tenants, audit.",
    "calibrate": "Measure the engine and fit latency profiles.",
    "diagnose": "Say where time and money of the present service go, and what would help.",
    "simulate": "Simulate one allocation of a scenario.",
    "plan": "Recommend an allocation for a scenario.",
    "compare": "Put plans side by side.",
    "sweep": "Simulate many allocations into a store that survives interruption.",
    "theory": "Hold the simulator against queueing theory.",
    "validate": "Hold the simulator against replays of the engine.",
    "export": "Write a plan as files for a cluster, monitoring and finance.",
    "observe": "Read what a serving engine did back into tables.",
    "watch": "Compare a serving engine with its plan.",
    "roi": "Say what a plan costs in full and what changing to it returns.",
    "ab": "Judge a test on live traffic from two logs.",
    "dashboard": "Open the dashboard on this machine.",
}
ORDER = list(SUMMARIES)


class LazyGroup(click.Group):
    """A command group whose commands are entry points of the group ``diffplan.commands``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        names = {entry.name for entry in _commands()}
        return sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for entry in _commands():
            if entry.name == cmd_name:
                return _load(entry)
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, SUMMARIES.get(name, "")) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _commands() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=COMMAND_GROUP))


def _load(entry: EntryPoint) -> click.Command:
    try:
        loaded = entry.load()
    except ModuleNotFoundError as error:
        extra = {"engine": "engine", "calibrate": "engine", "dashboard": "dash"}.get(entry.name, entry.name)
        raise click.ClickException(
            f"'diffplan {entry.name}' needs the package {error.name!r}, which is not installed. "
            f"Install it with: pip install 'diffplan[{extra}]'"
        ) from None
    if isinstance(loaded, typer.Typer):
        command = click_command_of(loaded)
    else:
        app = typer.Typer(add_completion=False)
        app.command(name=entry.name)(loaded)
        command = click_command_of(app)
    command.name = entry.name
    return cast(click.Command, command)


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="diffplan")
def root() -> None:
    """Capacity planning for text-to-image services: which GPUs should run what, and does decoupling the add-ons pay?"""


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that is not UTF-8 shows '?' for what it lacks
            stream.reconfigure(errors="replace")
    code: Any
    stdout = sys.stdout
    try:
        code = root.main(standalone_mode=False)
        sys.stdout.flush()  # here, where a pipe without a reader is understood
    except SystemExit as stop:
        # When the reader of a pipe has gone, rich and click end the process with 1; click puts a wrapper in stdout's place.
        is_reader_gone = sys.stdout is not stdout or isinstance(stop.__context__, BrokenPipeError)
        code = 0 if is_reader_gone else stop.code
    except (click.exceptions.Exit, typer.Exit) as stop:
        code = stop.exit_code
    except (click.exceptions.Abort, typer.Abort):
        _say("Interrupted.")
        code = 130
    except USAGE_ERRORS as error:
        error.show()
        code = 2
    except InputError as error:
        _say(str(error))
        code = 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:  # our fault: keep the traceback, say how to see it again
        import traceback

        traceback.print_exc()
        _say(
            f"\nThis is a fault of diffplan {__version__} ({type(error).__name__}). Replay it with: {shlex.join(sys.argv)}"
        )
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    main()
