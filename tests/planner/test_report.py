"""The report tells the plan's and the return's numbers, in both formats, to a reader without a server; hostile texts stay texts."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from planner import report
from planner.explain import usd
from planner.japanese.patterns import is_english
from planner.money.assumptions import Assumptions
from planner.money.roi import Roi, make_roi
from planner.plan_record import DoubtRow, Estimate, FlipPoint, Infeasible, PlanRecord, SelectionRecord
from planner.report_blocks import Bars, Scatter
from planner.report_charts import cost_against_latency, saving_bars, tornado_bars
from planner.report_risks import risks
from planner.report_words import probability_words
from planner.sentences import decision

HOSTILE = "<script>alert(1)</script>|`x`\n# no heading [link](javascript:alert(1))"
VOID = {"meta"}
TITLES = [
    "Answer", "Question", "Why", "Evidence", "Money", "Risks", "Roadmap", "Playbook", "What reproduces this",
]  # fmt: skip


class Outline(HTMLParser):
    """Titles, tables and texts of a page; complains about tags that are not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.texts: list[str] = []
        self.attributes: set[str] = set()
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)
        self.texts.append(data)


@pytest.fixture(scope="module")
def plan(tiny_plan) -> PlanRecord:
    return tiny_plan.result.record


@pytest.fixture(scope="module")
def roi(tiny_plan) -> Roi:
    return make_roi(tiny_plan.out, Assumptions())


def headings(text: str) -> list[str]:
    return re.findall(r"^## (.+)$", text, re.MULTILINE)


def rows_under(text: str, title: str) -> list[list[str]]:
    """Cells of the first table after a line, header left out."""
    after = text[text.index(title) :]
    table = re.search(r"(?:^\|.*\|\n)+", after, re.MULTILINE)
    assert table is not None
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[0].splitlines()[2:]]


def test_both_formats_tell_the_same_story_in_the_same_order(plan: PlanRecord, roi: Roi) -> None:
    assert headings(report.markdown(plan, roi)) == TITLES
    assert Outline(report.html(plan, roi)).titles == TITLES


def test_the_files_of_a_plan_hold_the_report_with_its_money(tiny_plan, plan: PlanRecord, roi: Roi) -> None:
    assert (tiny_plan.out / "report.md").read_text(encoding="utf-8") == report.markdown(plan, roi)
    assert (tiny_plan.out / "report.html").read_text(encoding="utf-8") == report.html(plan, roi)


def test_the_decision_is_there_in_both_languages(plan: PlanRecord, roi: Roi) -> None:
    said = decision(roi)
    page = report.html(plan, roi)
    assert f'<p class="answer" lang="ja">{said.japanese}</p>' in page
    for text in (report.markdown(plan, roi), page):
        assert said.english in text
        assert said.japanese in text


def test_the_parts_of_the_cost_in_the_report_sum_to_the_total_to_the_cent(plan: PlanRecord, roi: Roi) -> None:
    assert roi.shares is not None
    text = report.markdown(plan, roi)
    for header in ("| add-on | name |", "| checkpoint | name |", "| tenant | name |"):
        cells = [row[-1] for row in rows_under(text, header)]
        assert sum(round(100 * float(cell.replace(",", ""))) for cell in cells) == roi.shares.total_cents


def test_the_full_cost_of_every_topology_that_keeps_the_promise_is_shown(plan: PlanRecord, roi: Roi) -> None:
    text = report.markdown(plan, roi)
    rows = rows_under(text, "### Full cost, USD a month")
    assert [row[6] for row in rows] == [usd(row.cost.total_usd) for row in roi.waterfall]


def test_a_report_without_a_return_says_what_to_type(plan: PlanRecord) -> None:
    text = report.markdown(plan)
    assert "    diffplan roi PLAN\n" in text
    assert "Who the cost is for" not in text


def test_an_infeasible_plan_says_what_binds_and_has_no_money(plan: PlanRecord) -> None:
    binds = Infeasible(
        binds="slo.latency_s", why="too short", nearest="4 GPUs", nearest_allocation=None, nearest_n_gpus=4, nearest_cost_usd_per_month=99.0
    )  # fmt: skip
    update = {
        "verdict": "infeasible",
        "recommended": None,
        "allocation": None,
        "waterfall": None,
        "selection": None,
        "infeasible": binds,
    }
    infeasible = plan.model_copy(update={**update, "flip_points": ()})
    for text in (report.markdown(infeasible), report.html(infeasible)):
        assert "binding: slo.latency_s" in text
        assert "nearest feasible plan: 4 GPUs ($99 a month)" in text
        assert "Money" not in text
        assert "Roadmap" not in text


def test_hostile_texts_stay_texts_everywhere(plan: PlanRecord, roi: Roi) -> None:
    ids = plan.ids.model_copy(update={"scenario_name": HOSTILE, "price_source": HOSTILE, "profile_name": HOSTILE})
    traffic = plan.traffic.model_copy(update={"trace": HOSTILE, "source": HOSTILE, "notes": (HOSTILE,)})
    rows = tuple(
        row.model_copy(
            update={
                "why": HOSTILE,
                "pools": tuple(pool.model_copy(update={"name": HOSTILE, "hosts": (HOSTILE,)}) for pool in row.pools),
            }
        )
        for row in plan.topologies
    )
    hostile = plan.model_copy(
        update={
            "ids": ids, "traffic": traffic, "topologies": rows, "sentence": HOSTILE, "limited_by": HOSTILE, "notes": (HOSTILE,),
            "runner_up": HOSTILE,
        }
    )  # fmt: skip
    page = report.html(hostile, roi)
    outline = Outline(page)
    assert "<script" not in page
    assert outline.titles == TITLES
    assert not {name for name in outline.attributes if name.startswith("on") or name == "src"}
    assert all(re.fullmatch(r"#part-\d", link) for link in re.findall(r'href="([^"]*)"', page))
    text = report.markdown(hostile, roi)
    assert "<script" not in text
    assert headings(text) == TITLES
    assert not re.search(r"(?<!\\)\[link\]", text)
    tables = [line for line in text.splitlines() if line.startswith("|") and "alert" in line]
    assert tables
    # a bar inside a cell would make a column more than the header has: all bars of hostile texts are escaped
    assert all(re.search(r"\\\|ˋxˋ", line) for line in tables)


def test_the_page_loads_nothing_and_its_policy_forbids_scripts(plan: PlanRecord, roi: Roi) -> None:
    page = report.html(plan, roi)
    assert "default-src 'none'" in page
    assert not re.search(r"src\s*=|href\s*=\s*[^\"]|href=\"[^#]|url\(|@import|<script", page)


def test_the_steps_of_the_saving_chart_lead_from_the_first_cost_to_the_last(plan: PlanRecord) -> None:
    chart = saving_bars(plan)
    assert isinstance(chart, Bars)
    first, *steps, last = chart.bars
    at = first.width_percent
    for step in steps:
        # a saving hangs from where the bar before ended, an extra cost starts there; widths are rounded to 0.01 %
        near = step.left_percent + (step.width_percent if step.shade == "saves" else 0.0)
        assert near == pytest.approx(at, abs=0.02)
        at += -step.width_percent if step.shade == "saves" else step.width_percent
    assert last.width_percent == pytest.approx(at, abs=0.02 * len(chart.bars))


def test_the_tornado_is_on_one_scale_around_the_value_as_assumed(roi: Roi) -> None:
    chart = tornado_bars(roi)
    assert chart is not None
    assert roi.returns is not None
    assert chart.mark_percent is not None
    assert [bar.width_percent for bar in chart.bars] == sorted((bar.width_percent for bar in chart.bars), reverse=True)
    for bar in chart.bars:
        assert 0 <= bar.left_percent <= bar.left_percent + bar.width_percent <= 100.02  # two roundings to 0.01 %
        assert bar.left_percent - 0.02 <= chart.mark_percent <= bar.left_percent + bar.width_percent + 0.02
    assert usd(roi.returns.npv_usd) in chart.title


def test_the_scatter_keeps_every_interval_inside_its_frame(plan: PlanRecord) -> None:
    chart = cost_against_latency(plan)
    assert isinstance(chart, Scatter)
    assert len(chart.points) == sum(row.latency_p50_s.mean is not None for row in plan.topologies)
    for point in chart.points:
        assert chart.left <= point.x_from <= point.x <= point.x_to <= chart.width
        assert 0 <= point.y_to <= point.y <= point.y_from <= chart.bottom
    assert [point.label for point in chart.points if point.shade == "chosen"] == [plan.recommended]


def with_doubt(plan: PlanRecord, own: float, cheaper: float | None, flip_at: float = 8.0) -> PlanRecord:
    """The plan with a recommendation, and a cheaper fleet, that keep the promise with these probabilities."""

    def row(n_gpus: int, probability: float) -> DoubtRow:
        return DoubtRow(
            topology="colocated", pools={"base": n_gpus}, n_gpus=n_gpus, cost_usd_per_month=1_000.0 * n_gpus,
            slo_attainment_ratio=Estimate(mean=0.96, low=0.95, high=0.97), n_repetitions=3, probability_meets_slo=probability,
        )  # fmt: skip

    selection = SelectionRecord(
        probability_of_correct_selection=own * (1 - (cheaper or 0.0)), chosen=row(3, own), cheaper=() if cheaper is None else (row(2, cheaper),),
        runner_up_topology=None, runner_up_gap_usd_per_month=None, checked_by="",
    )  # fmt: skip
    flip = FlipPoint(what="traffic", winner_until=flip_at, then="decoupled", looked_from=0.1, looked_to=10.0, how="reckoned")  # fmt: skip
    return plan.model_copy(update={"selection": selection, "flip_points": (flip,)})


def test_an_unsure_choice_and_a_near_flip_are_risks_and_sure_ones_are_not(plan: PlanRecord, roi: Roi) -> None:
    def said(doubted: PlanRecord) -> str:
        return " ".join(risk.what + risk.shown_by for risk in risks(doubted, roi))

    cheaper = said(with_doubt(plan, 0.9999, 0.82, 1.2))
    assert "A cheaper fleet may keep the promise too" in cheaper
    assert "colocated (2 base), $1,000 a month less, keeps it with probability 82.0 %" in cheaper
    assert "decoupled becomes cheaper if traffic changes" in cheaper
    assert "The recommended fleet may miss the promise.It keeps it with probability 50.0 %" in said(
        with_doubt(plan, 0.5, 0.1)
    )
    assert "may miss" in said(with_doubt(plan, 0.5, None))
    sure = said(with_doubt(plan, 0.9999, 0.0))
    assert "may keep the promise too" not in sure
    assert "may miss" not in sure
    assert "becomes cheaper" not in sure


def test_no_probability_reads_as_certain(plan: PlanRecord) -> None:
    text = report.markdown(with_doubt(plan, 1.0, 0.0))
    assert "with probability more than 99.9 %" in text
    assert "| less than 0.1 % |" in text
    assert "100.0 %" not in text[text.index("### How sure the choice is") : text.index("| allocation |")]
    assert probability_words(0.9989) == "99.8 %"


def test_the_decisions_beside_the_fleet_are_in_the_report(plan: PlanRecord, roi: Roi) -> None:
    assert plan.autoscaling is not None
    assert plan.add_ons is not None
    text = report.markdown(plan, roi)
    assert plan.autoscaling.why in text
    if plan.autoscaling.tried:
        rows = rows_under(text, "### Fixed size, or scaling by itself")
        assert [row[4] for row in rows] == [usd(plan.autoscaling.fixed_cost_usd_per_month), *(usd(row.cost_usd_per_month) for row in plan.autoscaling.tried)]  # fmt: skip
    placed = rows_under(text, "### Where each add-on should live")
    assert [(row[0], row[6]) for row in placed] == [(row.add_on_id, row.placement) for row in plan.add_ons.rows]
    older = plan.model_copy(update={"autoscaling": None, "add_ons": None})
    assert "Where each add-on should live" not in report.markdown(older, roi)


def test_the_playbook_is_filled_with_the_plans_own_figures(plan: PlanRecord, roi: Roi) -> None:
    text = report.markdown(plan, roi)
    page = text[text.index("## Playbook") :]
    assert plan.recommended is not None
    row = plan.row(plan.recommended)
    assert report.share_words(row.slo_attainment_ratio) in page
    assert report.seconds_words(row.latency_p95_s) in page
    assert all(f"{pool.name} {pool.busy_ratio:.0%}" in page for pool in row.pools)
    assert roi.returns is not None
    assert f"--topology {roi.returns.today_topology} --replicas {roi.returns.today_gpus}" in page


def figures_of(text: str) -> set[str]:
    """Every figure with a dollar sign, a per cent sign or three digits and more."""
    return set(re.findall(r"\$\d(?:[\d,]*\d)?(?:\.\d+)?", text)) | set(re.findall(r"\d[\d.,]*(?= ?%)|\d{3,}", text))


def english_lines(text: str) -> list[str]:
    """Lines with a sentence in English: no commands, and not what the profile's author wrote into it."""
    own = ("diffplan ", "Provisional, for tests only.")
    return [line for line in text.splitlines() if is_english(line) and not any(words in line for words in own)]


def test_the_japanese_report_has_the_same_parts_and_figures_and_no_english_sentence(
    tiny_plan, plan: PlanRecord, roi: Roi
) -> None:
    english, text, page = report.markdown(plan, roi), report.markdown(plan, roi, "ja"), report.html(plan, roi, "ja")
    assert len(headings(text)) == len(TITLES)
    assert Outline(page).titles == headings(text)
    assert '<html lang="ja">' in page
    assert decision(roi).japanese in text
    assert decision(roi).english not in text  # said once, in the reader's language
    assert english_lines(text) == []
    # the English decision rounds its gains; all other figures are the same
    of_decision = figures_of(decision(roi).english)
    assert figures_of(english) - figures_of(text) <= of_decision
    assert figures_of(text) - figures_of(english) <= figures_of(decision(roi).japanese)
    for name, made in report.reports(plan, roi).items():
        assert (tiny_plan.out / name).read_text(encoding="utf-8") == made


def test_a_japanese_report_without_a_recommendation_says_what_binds(plan: PlanRecord) -> None:
    found = Infeasible(
        binds="search.gpus_max", why="no allocation of up to 4 GPUs meets the SLO", nearest="search.gpus_max of 9, as colocated", nearest_allocation=None,
        nearest_n_gpus=9, nearest_cost_usd_per_month=12_000.0,
    )  # fmt: skip
    sentence = f"No plan keeps the promise of 90 % of the requests within 5 s: {found.binds} binds ({found.why}). Nearest: {found.nearest}."
    infeasible = plan.model_copy(
        update={"recommended": None, "verdict": "infeasible", "infeasible": found, "sentence": sentence}
    )
    text = report.markdown(infeasible, None, "ja")
    assert "GPU 4台までの構成では目標を守れません" in text
    assert "search.gpus_maxを9にする（colocatedの場合）（月額$12,000）" in text
    assert english_lines(text) == []


def test_a_hostile_name_stays_a_text_in_japanese_too(plan: PlanRecord, roi: Roi) -> None:
    hostile = plan.model_copy(update={"ids": plan.ids.model_copy(update={"scenario_name": HOSTILE})})
    page = report.html(hostile, roi, "ja")
    Outline(page)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
