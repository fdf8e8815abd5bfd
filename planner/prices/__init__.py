"""What a GPU-hour costs: a dated table with a source per row, checked strictly; a price that is not there is refused.

The tables that travel with the package are the JSON files beside this module.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from traces.problems import InputError, Problem, one_problem

SHIPPED: Final = Path(__file__).parent
FILE_BYTES_MAX: Final = 2**20
STALE_AFTER_DAYS: Final = 90
Purchase = Literal["on_demand", "reserved", "spot"]
"""Reserved: paid for every hour of a long term, used or not."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class PriceRow(_Record):
    """One quote."""

    gpu_kind: Annotated[str, Field(min_length=1)]
    purchase: Purchase
    price_usd_per_gpu_hour: Annotated[float, Field(gt=0, le=10_000)]
    source: Annotated[str, Field(min_length=1)]


class PriceTable(_Record):
    """Quotes of one day."""

    schema_version: Literal[1]
    table_id: Annotated[str, Field(min_length=1)]
    as_of: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    """Day on which the quotes were put together."""
    currency: Literal["USD"]
    note: str = ""
    rows: Annotated[tuple[PriceRow, ...], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Price:
    """The price a plan uses, and where it comes from."""

    price_usd_per_gpu_hour: float
    gpu_kind: str
    purchase: Purchase
    source: str
    table_id: str
    as_of: str
    """ISO date; empty if the scenario itself gives the price."""


def shipped_tables() -> dict[str, Path]:
    """Name to file of the price tables that travel with the package."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.json"))}


def load_table(path: Path) -> PriceTable:
    """Reads a price table; raises :class:`InputError` with every problem found."""
    name = path.name
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise one_problem(str(path), f"is {path.stat().st_size} bytes", f"at most {FILE_BYTES_MAX}")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise one_problem(
            str(path), f"cannot be read: {error}", f"a price table or one of the shipped {', '.join(shipped_tables())}",
            "Check prices.table.",
        ) from None  # fmt: skip
    try:
        table = PriceTable.model_validate_json(text)
        datetime.date.fromisoformat(table.as_of)
    except ValidationError as error:
        problems = []
        for item in error.errors(include_url=False):
            field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"]).lstrip(".")
            problems.append(Problem(f"{name} {field}".rstrip(), f"got {item['input']!r:.80}", item["msg"]))
        raise InputError(problems) from None
    except ValueError:
        raise one_problem(
            f"{name} as_of", f"got {json.dumps(table.as_of)}", "a day of the calendar, YYYY-MM-DD"
        ) from None
    keys = [(row.gpu_kind, row.purchase) for row in table.rows]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise InputError(
            [
                Problem(f"{name} rows", f"{kind} {purchase} is listed twice", "each once", "Remove one")
                for kind, purchase in twice
            ]
        )
    return table


def find_price(
    table_path: Path, gpu_kind: str, purchase: Purchase, override_usd_per_gpu_hour: float | None = None
) -> Price:
    """The price of one GPU-hour.

    Raises:
        InputError: the table cannot be used, or has no such row and the scenario gives no price.
    """
    if override_usd_per_gpu_hour is not None:
        return Price(
            override_usd_per_gpu_hour, gpu_kind, purchase, "scenario: prices.price_usd_per_gpu_hour", "scenario", ""
        )
    table = load_table(table_path)
    for row in table.rows:
        if (row.gpu_kind, row.purchase) == (gpu_kind, purchase):
            return Price(row.price_usd_per_gpu_hour, gpu_kind, purchase, row.source, table.table_id, table.as_of)
    rows = ", ".join(f"{row.gpu_kind} {row.purchase}" for row in table.rows)
    raise one_problem(
        f"price table {table_path.name}", f"has no {purchase} price for {gpu_kind!r}", f"one of {rows}",
        "Give prices.price_usd_per_gpu_hour, or a table of your own with prices.table",
    )  # fmt: skip


def age_warning(price: Price, today: datetime.date) -> str:
    """A sentence if the price is older than ``STALE_AFTER_DAYS``; otherwise empty.

    ``today`` is passed in, so that a plan's files never depend on the day they are written.
    """
    if not price.as_of:
        return ""
    age_days = (today - datetime.date.fromisoformat(price.as_of)).days
    if age_days <= STALE_AFTER_DAYS:
        return ""
    return (
        f"The price of {price.gpu_kind} is {age_days} days old (table {price.table_id} of {price.as_of}): check it, "
        "and give prices.price_usd_per_gpu_hour or a table of your own."
    )
