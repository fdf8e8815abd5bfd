"""Every mistake in a file or an option ends with exit code 2, one sentence with the place, and no traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Change = Callable[[Path], None]


def scenario(old: str, new: str) -> Change:
    def change(folder: Path) -> None:
        path = folder / "scenario.yaml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


def more(text: str) -> Change:
    def change(folder: Path) -> None:
        path = folder / "scenario.yaml"
        path.write_text(path.read_text() + text)

    return change


def trace(text: str) -> Change:
    return lambda folder: _write(folder / "trace.csv", text)


def profile(**fields: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "profile.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def law(name: str, **fields: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "profile.json"
        plain = json.loads(path.read_text())
        plain["laws"][name] = {**plain["laws"][name], **fields}
        path.write_text(json.dumps(plain))

    return change


def without_law(name: str) -> Change:
    def change(folder: Path) -> None:
        path = folder / "profile.json"
        plain = json.loads(path.read_text())
        del plain["laws"][name]
        path.write_text(json.dumps(plain))

    return change


def _write(path: Path, text: str) -> None:
    path.write_text(text)


CASES: dict[str, tuple[Change, str]] = {
    # scenarios
    "duplicate key": (more("name: again\n"), "scenario.yaml:11"),
    "unknown key": (more("colour: red\n"), "scenario.yaml:11 colour"),
    "wrong type": (scenario("latency_s: 10", "latency_s: soon"), "scenario.yaml:5 slo.latency_s"),
    "out of range": (scenario("replications: 2", "replications: 1"), "scenario.yaml:10 simulation.replications"),
    "missing key": (scenario("slo:\n  latency_s: 10\n  attainment_ratio: 0.9\n", ""), "scenario.yaml:1 slo"),
    "no such trace": (scenario("trace.csv", "nowhere.csv"), "nowhere.csv"),
    "no such sample": (scenario("trace.csv", "sample:nothing"), "nothing"),
    "no such profile": (scenario("profile.json", "nowhere.json"), "nowhere.json"),
    "no such price table": (more("prices:\n  table: nowhere.json\n"), "nowhere.json"),
    "no such catalogue": (more("add_ons:\n  catalogue: nowhere.json\n"), "nowhere.json"),
    "another GPU kind": (more("gpu:\n  kind: nvidia-h100\n"), "gpu.kind"),
    "window past the end": (scenario("trace.csv", "trace.csv\n  window: {start_h: 1, end_h: 2}"), "traffic.window"),
    "a factor that leaves one request": (scenario("trace.csv", "trace.csv\n  scale_factor: 0.001"), "traffic factor"),
    "a link that decoupling cannot have": (more("policies:\n  link: local\n"), "link"),
    # traces
    "trace without arrivals": (trace("request_id\na\nb\n"), "arrival_s"),
    "trace with a bad cell": (trace("request_id,arrival_s\na,0\nb,soon\n"), "arrival_s"),
    "trace with a negative arrival": (trace("request_id,arrival_s\na,-1\nb,1\n"), "arrival_s"),
    "trace with a request twice": (trace("request_id,arrival_s\na,0\na,1\n"), "request_id"),
    "trace of one request": (trace("request_id,arrival_s\na,0\n"), "trace.csv"),
    "empty trace": (trace(""), "trace.csv"),
    # profiles
    "profile that is not JSON": (lambda folder: _write(folder / "profile.json", "{"), "profile.json"),
    "profile of another version": (profile(schema_version=9), "schema_version"),
    "profile with an unknown field": (profile(colour="red"), "colour"),
    "profile without laws": (profile(laws={}), "has no law"),
    "profile without facts": (profile(facts={}), "fact"),
    "law with a wrong form": (law("engine.unet_step", form="magic"), "laws.engine.unet_step.form"),
    "law without source": (law("engine.unet_step", source=""), "laws.engine.unet_step.source"),
    "law with a text for a number": (
        law("engine.text_encode", parameters={"value_s": "fast"}), "laws.engine.text_encode.parameters.value_s",
    ),
    "law that a request needs is missing": (without_law("engine.vae_decode"), "engine.vae_decode"),
    "requests outside the measured box": (
        law("engine.unet_step", domain={"forward_batch": [4, 8], "megapixels": [1, 1]}), "profile.extrapolate",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda name: name.replace(" ", "-"))
def test_a_malformed_input_ends_with_two_and_names_its_place(
    case: str, diffplan: Callable, question: Path, tmp_path: Path
) -> None:
    change, place = CASES[case]
    change(question.parent)
    done = diffplan("plan", question, "--out", tmp_path / "out", "--jobs", 1)
    assert done.code == 2, done.out + done.err
    assert place in done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    assert not (tmp_path / "out" / "plan.json").exists()


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (["plan", "nowhere.yaml", "--out", "out"], "nowhere.yaml"),
        (["plan", "sample:nothing", "--out", "out"], "sample:nothing"),
        (["plan", "sample:provider"], "--out"),
        (["plan", "sample:provider", "--out", "out", "--jobs", "0"], "--jobs"),
        (["simulate", "sample:provider", "--out", "out", "--topology", "magic", "--replicas", "1"], "--topology"),
        (["simulate", "sample:provider", "--out", "out", "--topology", "colocated"], "--replicas"),
        (["simulate", "sample:provider", "--out", "out", "--allocation", "nowhere.json"], "nowhere.json"),
        (["plan", "sample:small", "--out", "out", "--backend", "magic"], "--backend"),
        (["compare", "nowhere", "nor-here"], "nor-here"),
        (["nonsense"], "nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_ends_with_two_and_is_named(
    arguments: list[str], place: str, diffplan: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    done = diffplan(*arguments)
    assert done.code == 2
    assert place in done.err
    assert "Traceback" not in done.err


def test_a_file_in_place_of_the_output_folder_is_refused(diffplan: Callable, question: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    done = diffplan("plan", question, "--out", tmp_path / "taken", "--jobs", 1)
    assert done.code == 2
    assert "taken" in done.err


def test_a_folder_that_may_not_be_written_is_refused_before_planning(
    diffplan: Callable, question: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # root may write everywhere, so the answer of the system is given here, not a folder's mode
    monkeypatch.setattr("planner.files.os.access", lambda path, mode: False)
    done = diffplan("plan", question, "--out", tmp_path / "out", "--jobs", 1)
    assert done.code == 2
    assert "cannot be written" in done.err
    assert "searched" not in done.err


def test_a_recommendation_without_its_row_is_refused(diffplan: Callable, question: Path, tmp_path: Path) -> None:
    diffplan("plan", question, "--out", tmp_path / "out", "--jobs", 1)
    path = tmp_path / "out" / "plan.json"
    plain = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**plain, "topologies": []}), encoding="utf-8")
    done = diffplan("compare", path)
    assert done.code == 2
    assert "plan.json recommended" in done.err
