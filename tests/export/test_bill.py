"""The bill says what the plan says, in two formats, to the cent."""

from __future__ import annotations

import csv
import io
import json

from engine.allocation import Allocation
from planner.export.bill import bill_csv, bill_json, read_bill_csv, read_bill_json
from planner.export.counts import counts_of
from tests.export.plans import HOURS, PRICE_USD, decoupled, pool, source_of


def test_the_bill_adds_up_to_the_plans_cost() -> None:
    source = source_of(decoupled(4, 2))
    plain = json.loads(bill_json(source))
    # exact: the bill multiplies decimals, the expected value is a product of small binary fractions
    assert plain["total"] == {
        "n_gpus": 6,
        "gpu_hours_per_month": 6 * HOURS,
        "cost_usd_per_month": 6 * HOURS * PRICE_USD,
        "planned_cost_usd_per_month": 6 * HOURS * PRICE_USD,
    }
    assert sum(row["cost_usd_per_month"] for row in plain["rows"]) == source.cost_usd_per_month
    assert plain["provenance"]["plan_id"] == source.provenance.plan_id


def test_both_formats_read_back_to_the_plans_counts() -> None:
    source = source_of(decoupled(4, 2))
    assert read_bill_json(bill_json(source)) == read_bill_csv(bill_csv(source)) == counts_of(source.allocation)


def test_a_replica_that_shares_a_gpu_is_billed_by_the_gpu() -> None:
    rows = json.loads(bill_json(source_of(Allocation((pool(n=5, workers_per_gpu=4),)))))["rows"]
    assert (rows[0]["n_replicas"], rows[0]["n_gpus"]) == (5, 2)


def test_no_cell_of_the_csv_is_a_spreadsheet_formula() -> None:
    source = source_of(Allocation((pool("=cmd|' /C calc'!A0"), pool("'@x"))))
    rows = list(csv.reader(io.StringIO(bill_csv(source), newline="")))
    assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert read_bill_csv(bill_csv(source)) == counts_of(source.allocation)


def test_every_row_of_the_csv_says_where_it_comes_from() -> None:
    source = source_of(decoupled(4, 2))
    for row in csv.DictReader(io.StringIO(bill_csv(source))):
        assert row["plan_id"] == source.provenance.plan_id
        assert row["price_date"] == "2026-11-22"
        assert row["command"] == source.provenance.command
