"""The return of real plans: sums to the cent, the same bytes twice, and refusals in one sentence."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.attribution import Attribution
from planner.cli import main
from planner.money.assumptions import Assumptions, read_assumptions, stated
from planner.money.lines import CostLines
from planner.money.roi import make_roi
from planner.money.shares import divide
from planner.money.value import value_lines
from planner.plan_record import read_plan
from planner.workload import Workload
from traces.problems import InputError


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["diffplan", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def assumed(tmp_path: Path, text: str) -> Assumptions:
    path = tmp_path / "assumptions.yaml"
    path.write_text(text, encoding="utf-8")
    return read_assumptions(path)


def uneven(n: int, seed: int) -> Attribution:
    """n requests with up to three add-ons each, and GPU times without any pattern."""
    rng = np.random.default_rng(seed)
    controlnets = tuple(tuple(rng.integers(0, 4, rng.integers(0, 3)).tolist()) for _ in range(n))
    loras = tuple(tuple(rng.integers(0, 30, rng.integers(0, 3)).tolist()) for _ in range(n))
    ones = np.ones(n, dtype=np.int64)
    workload = Workload(
        tuple(map(str, range(n))), np.arange(n, dtype=np.uint64), np.arange(n, dtype=np.float64), rng.integers(0, 3, n), controlnets,
        tuple(((0, 30),) * len(used) for used in controlnets), loras, 30 * ones, ones, 2 * ones, np.ones(n), np.full(n, np.nan),
        rng.integers(0, 25, n), ones, ("a", "b", "c"), ("w", "x", "y", "z"), tuple(f"l{i}" for i in range(30)),
        tuple(f"t{i}" for i in range(25)), float(n),
    )  # fmt: skip
    gpu = rng.integers(0, 10**9, (n, 10))
    n_controlnets, n_loras = sum(map(len, controlnets)), sum(map(len, loras))
    return Attribution(
        workload, gpu.copy(), gpu, rng.integers(0, 10**8, n), rng.integers(0, 10**7, n_controlnets), rng.integers(0, 10**8, n_controlnets),
        rng.integers(0, 10**7, n_loras), rng.integers(0, 10**8, n_loras), int(gpu.sum()) * 2 + 10**10,
    )  # fmt: skip


@settings(deadline=None)
@given(
    st.integers(1, 60), st.integers(0, 2**32 - 1), st.floats(0.01, 1e6), st.floats(0, 1e4), st.floats(0, 1e4), st.floats(0, 1e4)
)  # fmt: skip
def test_every_division_sums_to_the_total_to_the_cent(
    n: int, seed: int, gpu_usd: float, storage_usd: float, egress_usd: float, operation_usd: float
) -> None:
    lines = CostLines(gpu_usd, 0.0, storage_usd, egress_usd, operation_usd)
    shares = divide(uneven(n, seed), lines)
    assert shares.total_cents == round(100 * lines.total_usd)
    for rows in (shares.add_ons, shares.checkpoints, shares.tenants):
        assert sum(row.cost_cents for row in rows) == shares.total_cents
        assert all(row.cost_cents >= 0 for row in rows)


@pytest.mark.parametrize("service", ["katz_a", "katz_b"])
def test_the_division_of_a_real_plan_sums_to_its_full_cost(service: str, request: pytest.FixtureRequest) -> None:
    roi = make_roi(request.getfixturevalue(service), Assumptions())
    assert roi.shares is not None
    new = next(row for row in roi.waterfall if row.is_recommended)
    assert roi.shares.total_cents == round(100 * new.cost.total_usd)
    for rows in (roi.shares.add_ons, roi.shares.checkpoints, roi.shares.tenants):
        assert sum(row.cost_cents for row in rows) == roi.shares.total_cents
    assert {row.kind for row in roi.shares.add_ons} >= {"controlnet", "lora group", "images", "idle"}


def test_the_waterfall_sums_and_gives_decoupling_only_what_it_adds_to_the_same_engine(katz_a: Path) -> None:
    roi = make_roi(katz_a, Assumptions())
    assert [row.topology for row in roi.waterfall] == ["diffusers", "diffusers_tuned", "colocated", "decoupled"]
    totals = [row.cost.total_usd for row in roi.waterfall]
    savings = [row.saving_usd_per_month or 0.0 for row in roi.waterfall]
    assert savings[0] == 0.0
    # differences of sums of doubles below 1e6: rounding stays under 1e-9
    assert sum(savings) == pytest.approx(totals[0] - totals[-1], abs=1e-6)
    assert savings[3] == pytest.approx(totals[2] - totals[3], abs=1e-6)
    # two services instead of one: 8 more hours at 100 USD
    assert roi.waterfall[3].cost.operation_usd - roi.waterfall[2].cost.operation_usd == 800.0


def test_a_fleet_that_alone_keeps_the_promise_has_no_saving_to_state(katz_b: Path) -> None:
    roi = make_roi(katz_b, Assumptions())
    assert [row.topology for row in roi.waterfall] == ["decoupled"]
    assert roi.returns is None
    assert any("no saving to state" in note for note in roi.notes)


def test_todays_fleet_can_be_counted_instead_of_sized(katz_a: Path, tmp_path: Path) -> None:
    given_fleet = assumed(tmp_path, "today:\n  topology: diffusers_tuned\n  n_gpus: 9\n")
    roi = make_roi(katz_a, given_fleet)
    assert roi.returns is not None
    assert (roi.returns.today_gpus, roi.returns.today_topology) == (9, "diffusers_tuned")
    assert "gpu_time_today" not in {swing.factor for swing in roi.returns.tornado}


def test_whole_hosts_are_paid_for(katz_a: Path, tmp_path: Path) -> None:
    roi = make_roi(katz_a, assumed(tmp_path, "purchase:\n  gpus_per_host: 8\n"))
    new = next(row for row in roi.waterfall if row.is_recommended)
    per_gpu = new.cost.gpu_usd / new.n_gpus
    assert new.cost.unused_host_gpu_usd == pytest.approx((8 - new.n_gpus % 8) % 8 * per_gpu, rel=1e-12)


def test_reserved_gpus_lower_the_mean_price(katz_a: Path, tmp_path: Path) -> None:
    text = "purchase:\n  reserved_ratio: 0.5\n  reserved_price_usd_per_gpu_hour: 2.5\n"
    roi = make_roi(katz_a, assumed(tmp_path, text))
    assert roi.price_usd_per_gpu_hour == 0.5 * roi.plan.ids.price_usd_per_gpu_hour + 0.5 * 2.5


def test_latency_earns_nothing_until_a_curve_is_switched_on(katz_a: Path, tmp_path: Path) -> None:
    off = make_roi(katz_a, Assumptions())
    assert all(row.value is None for row in off.waterfall)
    text = "value:\n  completion:\n    is_on: true\n    value_usd_per_image: 0.01\n"
    on = make_roi(katz_a, assumed(tmp_path, text))
    by_name = {row.topology: row.value for row in on.waterfall}
    slow, fast = by_name["diffusers"], by_name["colocated"]
    assert slow is not None
    assert fast is not None
    assert fast.completion_usd > slow.completion_usd > 0
    assert on.returns is not None
    assert off.returns is not None
    assert on.returns.saving_usd_per_month > off.returns.saving_usd_per_month


def test_a_level_completion_curve_is_its_level_times_the_offered_images(katz_a: Path, tmp_path: Path) -> None:
    text = "value:\n  completion:\n    is_on: true\n    value_usd_per_image: 2\n    latency_s: [1, 9]\n    completion_ratio: [0.5, 0.5]\n"
    plan = read_plan(katz_a)
    row = plan.row("colocated")
    lines = value_lines(row, assumed(tmp_path, text).value, 730.0)
    assert lines is not None
    assert row.in_slo_images_per_s.mean is not None
    assert row.slo_attainment_ratio.mean is not None
    images = row.in_slo_images_per_s.mean / row.slo_attainment_ratio.mean * 3600 * 730
    assert lines.completion_usd == pytest.approx(images, rel=1e-9)  # 0.5 of them at 2 USD; a mean of 2001 equal values


def test_every_default_has_a_source_and_what_is_given_says_so(tmp_path: Path) -> None:
    rows = {row["field"]: row for row in stated(assumed(tmp_path, "horizon:\n  n_months: 12\n"))}
    assert all(row["source"] for row in rows.values())
    assert rows["horizon.n_months"] == {"field": "horizon.n_months", "value": 12, "is_given": True, "source": "given"}
    assert not rows["value.completion.is_on"]["value"]
    assert not rows["operation.engineer_usd_per_hour"]["is_given"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("horizon:\n  months: 3\n", "horizon.months"),
        ("purchase:\n  reserved_ratio: 0.5\n", "reserved_price_usd_per_gpu_hour"),
        ("value:\n  completion:\n    is_on: true\n", "value_usd_per_image"),
        ("value:\n  churn:\n    is_on: true\n", "two points"),
        ("value:\n  completion:\n    latency_s: [3, 1]\n    completion_ratio: [1, 1]\n", "must grow"),
        ("uncertainty:\n  traffic_ratio: [1.2, 1.5]\n", "1 must lie between"),
        ("operation:\n  engineer_usd_per_hour: .nan\n", "operation.engineer_usd_per_hour"),
        ("horizon:\n  n_months: '12'\n", "horizon.n_months"),
        ("ownership:\n  gpu_purchase_usd: 30000\n", "together"),
    ],
)
def test_a_wrong_assumption_is_named_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        assumed(tmp_path, text)
    assert "assumptions.yaml:" in str(refused.value)


def test_the_files_are_the_same_bytes_twice_and_figures_are_finite(
    katz_a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        assert run(monkeypatch, "roi", katz_a, "--out", tmp_path / name) == 0
    for file in ("roi.json", "roi.md"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    plain = json.loads((tmp_path / "one" / "roi.json").read_text(encoding="utf-8"))
    assert len(plain["roadmap"]) == 4
    assert "NaN" not in (tmp_path / "one" / "roi.json").read_text(encoding="utf-8")
    text = (tmp_path / "one" / "roi.md").read_text(encoding="utf-8")
    for heading in (
        "Where the saving comes from",
        "The change as an investment",
        "Who the cost is for",
        "Roadmap",
        "Playbook",
        "Assumptions",
    ):
        assert f"## {heading}" in text


def test_a_lone_plan_json_still_has_a_return_and_says_what_is_left_out(
    katz_a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(katz_a / "plan.json", tmp_path / "plan.json")
    assert run(monkeypatch, "roi", tmp_path / "plan.json") == 0
    said = capsys.readouterr()
    assert "requests.parquet of the plan's folder is not there" in said.out
    assert "No roadmap" in said.err
    assert run(monkeypatch, "roi", tmp_path / "plan.json", "--into-plan") == 2


def test_records_of_another_plan_are_not_divided(katz_a: Path, katz_b: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(katz_a, mixed)
    shutil.copy(katz_b / "requests.parquet", mixed / "requests.parquet")
    roi = make_roi(mixed, Assumptions())
    assert roi.shares is None
    assert any("cannot be used" in note for note in roi.notes)


def test_an_unreadable_plan_is_refused_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.json").write_text("[]", encoding="utf-8")
    assert run(monkeypatch, "roi", tmp_path) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_page_shows_the_example_and_the_example_can_be_used(katz_a: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "money.md").read_text(encoding="utf-8")
    example = root / "examples" / "money.yaml"
    shown = page.split("```yaml\n")[1].split("```")[0]
    lines = [line for line in example.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert shown.splitlines() == lines
    roi = make_roi(katz_a, read_assumptions(example))
    assert roi.returns is not None
    assert roi.returns.today_topology == "diffusers_tuned"
