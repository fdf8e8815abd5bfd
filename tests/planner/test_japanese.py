"""The planner's sentences in Japanese: every sentence has a pattern, every pattern says the same, and no plan comes out half English."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from planner.japanese import PATTERNS, SENTENCES, in_japanese
from planner.japanese.patterns import TEXT_MAX, fields_of, is_english, variants_of
from planner.scenario import load_scenario

ROOT = Path(__file__).resolve().parents[2]
JAPANESE = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")
MODULES = (
    "calibrate/assumed.py", "calibrate/facts.py", "calibrate/fit.py", "calibrate/recipes.py", "calibrate/remarks.py", "calibrate/roofline.py", "calibrate/served.py",
    "planner/addon_placement.py", "planner/addon_rows.py", "planner/autoscaled.py", "planner/candidates.py",
    "planner/checkpoint_placement.py", "planner/confirmation.py", "planner/diagnose.py", "planner/diagnose_changes.py",
    "planner/diagnose_question.py", "planner/evidence.py", "planner/explain.py", "planner/flip_check.py", "planner/flips.py",
    "planner/money/assumptions.py", "planner/money/evidence.py", "planner/money/roi.py", "planner/money/shares.py", "planner/money/tables.py",
    "planner/kind_rows.py", "planner/kind_search.py", "planner/kinds.py", "planner/nearest.py", "planner/plan_fleet.py", "planner/evaluation.py", "planner/selection.py", "planner/topology_search.py", "planner/plan_files.py", "planner/plan_run.py", "planner/purchasing.py", "planner/report_charts.py",
    "planner/report_choices.py", "planner/report_decisions.py", "planner/report_money.py", "planner/report_playbook.py",
    "planner/report_risks.py", "planner/report_sections.py", "planner/report_words.py", "planner/roadmap.py", "planner/roadmap_runs.py",
    "planner/settling.py", "planner/traffic.py", "planner/variations.py", "planner/waterfall.py", "traces/synth.py",
)  # fmt: skip
"""Where the sentences are made that a plan, a report or a page shows."""
NOT_SHOWN = {
    # names of answers in the store and of random streams
    "placed, of {} requests those of {}", "ControlNet {}", "checkpoint {}", "scaled and held {}", "search noise", "confirmation {}",
    "evaluation {} of {} requests", "scenario gpu.others {}: ",
    # what options need
    "1 or more for decoupled", "0 for {} on this traffic",
    # filters of warnings, and file names
    "A worker stopped while some jobs", ".*tasks which were still being processed", "requests.parquet of {}",
    # commands, which are the same in every language
    "diffplan roi PLAN --into-plan", "diffplan roi PLAN", "diffplan plan scenario.resolved.yaml --out AGAIN",
}  # fmt: skip
SAYS_ERRORS = {
    "Problem",
    "one_problem",
    "InputError",
    "ValueError",
    "KeyError",
    "Field",
    "replace",
    "removeprefix",
    "startswith",
}
"""Calls whose texts are no sentences of a plan; what is wrong with an input is said in English."""


def alternatives(node: ast.expr) -> list[str]:
    """The texts that an expression may be: fields as ``{}``, both branches of a choice."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else ["{}"]
    if isinstance(node, ast.IfExp):
        return [*alternatives(node.body), *alternatives(node.orelse)]
    if isinstance(node, ast.JoinedStr):
        found = [""]
        for part in node.values:
            value = part.value if isinstance(part, ast.FormattedValue) else part
            found = [start + end for start in found for end in alternatives(value)]
        return found
    return ["{}"]


def sentences_of(path: Path) -> Iterator[str]:
    """Every text of a module that has two words or more of its own; no documentation, no errors."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(node.value)
        if isinstance(node, ast.Raise | ast.Subscript):
            skipped.update(ast.walk(node))
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in SAYS_ERRORS:
                skipped.update(ast.walk(node))
        if isinstance(node, ast.JoinedStr):
            skipped.update(part for part in node.values if isinstance(part, ast.Constant))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant | ast.JoinedStr) and node not in skipped:
            for text in alternatives(node):
                if len(re.findall(r"[A-Za-z]{2,}", text.replace("{}", " "))) >= 2 and " " in text.strip():
                    yield text


def bare(text: str) -> str:
    """Without what a field may hold: a sign of dollars before it, a share that is written out."""
    return re.sub(r"\b\d+(\.\d+)? ?%", "{}", text.replace("${}", "{}").replace(" – ", " {} "))


def unknown_to_the_catalogue(texts: Iterator[str]) -> list[str]:
    patterns = "\n".join(bare(variant) for english in SENTENCES for variant in variants_of(english))
    found = []
    for text in texts:
        own = re.sub(r"^[{} .;]+|[{} .;]+$", "", bare(text))
        wanted = ".+?".join(re.escape(part) for part in own.split("{}"))
        if text not in NOT_SHOWN and not re.search(wanted, patterns, re.IGNORECASE):
            found.append(text)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_every_sentence_that_is_shown_has_its_japanese(module: str) -> None:
    missing = unknown_to_the_catalogue(sentences_of(ROOT / module))
    assert not missing, (
        f"{module} says what planner/japanese does not know; add a pattern there, or name it in NOT_SHOWN"
    )


def test_a_sentence_that_nobody_translated_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "new.py"
    path.write_text(
        'def why(n: int) -> str:\n    """Says why."""\n    return f"The moon took {n} GPU{\'s\' if n > 1 else \'\'} away."\n'
    )
    assert unknown_to_the_catalogue(sentences_of(path)) == ["The moon took {} GPUs away.", "The moon took {} GPU away."]


def test_a_pattern_has_the_same_fields_in_both_languages_and_is_translated() -> None:
    other_fields = {
        english
        for english, japanese in SENTENCES.items()
        if fields_of(english) != set(re.findall(r"\{(\w+)\}", japanese))
    }
    assert not other_fields
    names_only = {
        "{n}. {name}",
        "slo.latency_s",
        "gpu.device_memory_gib",
        "search.gpus_max",
        "slo.attainment_ratio",
        "{topology}",
        "{usd}",
        "×{factor}",
        "sha256",
        "GPU",
    }
    assert not [
        english for english, japanese in SENTENCES.items()
        if not JAPANESE.search(japanese) and re.sub(r"\{\w+(:\w+)?\}|[^A-Za-z]", "", english) and not any(name in japanese for name in names_only)
    ]  # fmt: skip
    assert not [japanese for japanese in SENTENCES.values() if is_english(japanese) and "diffplan" not in japanese]


FILLED = {"int": "12", "num": "3.5", "usd": "$1,200", "pct": "45%", "gpus": "7 GPUs", "est": "5.33 s (5.21–5.45)", "name": "abc_d", "text": "ABC-1", "": "ABC-1"}  # fmt: skip


@pytest.mark.parametrize("english", sorted(SENTENCES))
def test_a_sentence_is_found_by_its_own_pattern(english: str) -> None:
    """So that no pattern hides another: what a pattern makes comes back as that pattern's Japanese."""
    values: dict[str, str] = {}

    def fill(field: re.Match[str]) -> str:
        values[field[1]] = FILLED[field[2] or ""]
        return values[field[1]]

    made = re.sub(r"\{(\w+)(?::(\w+))?\}", fill, re.sub(r"\[(\w+)\]", r"\1", english))
    shown = {"7 GPUs": "GPU 7台", "5.33 s (5.21–5.45)": "5.33秒（5.21–5.45）"}
    wanted = SENTENCES[english].format(**{name: shown.get(value, value) for name, value in values.items()})
    assert in_japanese(made) == wanted


def test_sentences_one_after_the_other_come_out_in_order() -> None:
    said = in_japanese(
        "With 4 GPUs only 84.22% of the requests are in time (95.00% promised). The busiest pool is base, 61% busy."
    )
    assert (
        said
        == "GPU 4台に減らすと、時間内に返せるのは84.22%にとどまります（目標95.00%）。最も忙しいプールはbaseで、稼働率は61%です。"
    )


def test_the_answer_of_a_plan_in_japanese() -> None:
    said = in_japanese(
        "Use 42 GPUs as decoupled (25 base + 17 ControlNet): the only topology that keeps 95 % of the requests within 3 s, at $107,310 a month, "
        "$4.94 per 1000 images in time. Without decoupling the add-ons this engine cannot keep the promise."
    )
    assert said == (
        "decoupledでGPU 42台（内訳: ベース25 + ControlNet 17）を使います。リクエストの95%を3秒以内に返す目標を守る唯一の構成で、月額$107,310、"
        "時間内の画像1000枚あたり$4.94です。アドオンを分離しなければ、本エンジンは目標を守れません。"
    )


@pytest.mark.parametrize(
    "text",
    ["", "vCPUs", "A sentence that is not ours.", "名前", "x" * (TEXT_MAX + 1), "(((((((", "{n} {usd}", "a. B. C. D"],
)
def test_what_is_not_ours_stays_as_it_is(text: str) -> None:
    assert in_japanese(text) == text


def test_a_hostile_text_takes_no_time() -> None:
    """Bounded by count, not by a clock: no pattern may look at a text more often than its length allows."""
    long = ("against a; " * 300)[:TEXT_MAX]
    assert isinstance(PATTERNS.translate(long), str)


SCENARIOS = sorted(
    path
    for folder in ("planner/scenarios", "examples", "examples/suite")
    for path in (ROOT / folder).glob("*.yaml")
    if path.name != "money.yaml"
)


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.name)
def test_a_shipped_scenario_says_what_it_is_in_both_languages(path: Path) -> None:
    scenario, _ = load_scenario(str(path))
    said = in_japanese(scenario.description)
    assert not is_english(said)
    assert not scenario.description or JAPANESE.search(said)
