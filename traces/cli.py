"""``diffplan trace``: describe, import and synthesise traces. Results on stdout, progress on stderr."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # pandas and pyarrow take a second to import; --help does without them
    from traces.trace import Trace

app = typer.Typer(
    name="trace",
    help="Describe, import and synthesise traces of requests.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
import_app = typer.Typer(help="Turn a request log into a trace.", no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(import_app, name="import")


class ServiceName(StrEnum):
    """The two published services."""

    A = "A"
    B = "B"


class TimeFormatName(StrEnum):
    """How the arrival column is written."""

    AUTO = "auto"
    SECONDS = "seconds"
    EPOCH_S = "epoch_s"
    EPOCH_MS = "epoch_ms"
    ISO = "iso"


OutFile = Annotated[Path, typer.Option("--out", help="Parquet file to write.")]


@app.command("describe")
def describe_command(
    trace: Annotated[str, typer.Argument(help="Trace file (.parquet, .csv[.gz], .jsonl[.gz]) or sample:NAME.")],
    instances: Annotated[
        int | None,
        typer.Option(help="Serving instances the requests are spread over; by default those of the trace, or 1."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show rates, burstiness, add-ons, popularity, and loads per request against cache size."""
    from traces.character import describe
    from traces.reader import read_trace

    description = describe(read_trace(trace), instances)
    if as_json:
        sys.stdout.write(json.dumps(description.to_plain(), ensure_ascii=False, indent=2, allow_nan=False) + "\n")
        return
    from traces.tables import print_description

    print_description(description, trace)


@import_app.command("gentd26")
def import_gentd26_command(
    folder: Annotated[Path, typer.Argument(help="Folder cluster-trace-v2026-GenAI of github.com/alibaba/clusterdata.")],
    out: OutFile,
    succeeded_only: Annotated[
        bool,
        typer.Option("--succeeded-only", help="Leave out requests that did not succeed; they are demand otherwise."),
    ] = False,
) -> None:
    """Import Alibaba's GenTD26, LoRA ids joined from its second table."""
    from traces.importers.gentd26 import import_gentd26

    _say(f"reading {folder} …")
    _save(import_gentd26(folder, succeeded_only=succeeded_only), out)


@import_app.command("csv")
def import_csv_command(
    file: Annotated[Path, typer.Argument(help="CSV file, also .csv.gz.")],
    out: OutFile,
    map_entries: Annotated[
        list[str] | None, typer.Option("--map", help="OURS=THEIRS, once for each column with another name.")
    ] = None,
    time: Annotated[TimeFormatName, typer.Option(help="How arrivals are written.")] = TimeFormatName.AUTO,
    timezone: Annotated[str, typer.Option(help="Zone of timestamps that name none, e.g. Europe/Berlin.")] = "UTC",
    list_separator: Annotated[
        str | None, typer.Option(help="Between the items of list cells, e.g. ';'. JSON lists need none.")
    ] = None,
) -> None:
    """Import any CSV by a map of its columns: --map arrival_s=TIMESTAMP --map n_steps=steps."""
    from traces.importers.columns import ColumnOptions, import_columns, parse_mapping

    options = ColumnOptions(time.value, timezone, list_separator)
    _say(f"reading {file} …")
    _save(import_columns(file, parse_mapping(map_entries or []), options), out)


@app.command("synth")
def synth_command(
    service: Annotated[ServiceName, typer.Option(help="Published service to follow.")],
    out: OutFile,
    requests: Annotated[int, typer.Option(help="Number of requests.")] = 10_000,
    instances: Annotated[int, typer.Option(help="Serving instances; locality is per instance.")] = 10,
    hours: Annotated[float, typer.Option(help="Length of the trace in hours.")] = 24.0,
    seed: Annotated[int, typer.Option(help="Seed; the same one gives the same bytes.")] = 0,
) -> None:
    """Synthesise traffic after the published figures of services A and B of Katz (USENIX ATC 2025)."""
    from traces.synth import synthesise

    _save(synthesise(service.value, requests, instances, hours * 3600.0, seed), out)


@app.command("anonymise")
def anonymise_command(
    trace: Annotated[str, typer.Argument(help="Trace file (.parquet, .csv[.gz], .jsonl[.gz]) or sample:NAME.")],
    out: OutFile,
    key_file: Annotated[
        Path | None,
        typer.Option(
            help="Random bytes, 16 or more, kept by you: the same names in several traces. By default names cannot be linked."
        ),
    ] = None,
    time_step: Annotated[float, typer.Option(min=0, max=86_400, help="Round arrivals down to so many seconds.")] = 0.0,
    drop_tenants: Annotated[bool, typer.Option("--drop-tenants", help="Leave out who asked.")] = False,
) -> None:
    """Take names and dates out of a trace, keep what a plan depends on."""
    from traces.anonymise import Anonymity, anonymise
    from traces.files import read_bytes
    from traces.reader import read_trace

    key = read_bytes(key_file) if key_file is not None else None
    _save(anonymise(read_trace(trace), Anonymity(key, time_step, not drop_tenants)), out)


def _save(trace: Trace, out: Path) -> None:
    from rich.console import Console

    from traces.tables import print_provenance
    from traces.writer import write_trace

    write_trace(trace, out)
    print_provenance(trace, str(out), Console())


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
