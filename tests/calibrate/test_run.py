"""``calibrate run`` end to end on the tiny model, and what it does when parts of it fail."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest

from calibrate.extent import Extent, tiny_extent
from calibrate.fit import fit_profile
from calibrate.measurement import Features, Measurements, RowLog, Session, read_measurements, write_measurements
from calibrate.measuring import Measuring, State
from calibrate.output import write_fit
from calibrate.points import PARTS, Task, schedule, unordered
from calibrate.profile_file import load_profile
from calibrate.rig import RigSetup, Timed
from calibrate.run import RunOptions, run_session
from calibrate.setups import setups
from calibrate.station import InlineStation, Station, StationError
from traces.problems import InputError

ROOT = Path(__file__).resolve().parents[2]
EXTENT = tiny_extent(
    width_px=32, height_px=32, n_steps=2, fit_shapes=((2, 32, 32), (4, 32, 32)), held_out_shapes=((3, 32, 32),),
    candidate_shapes=(), cohosted_shapes=(), stock_shapes=((2, 32, 32),), vae_shapes=((1, 32, 32),),
    held_out_vae_shapes=((2, 32, 32),), n_controlnets=1, lora_ranks=(4,), held_out_lora_ranks=(), n_rounds=1, burst=1,
)  # fmt: skip
TWICE = "engine text_encode"
"""The one task that the session below does in two blocks."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measurements:
    """One session on this machine's CPU, all but the serving path and images in more combinations; each task once."""
    out = tmp_path_factory.mktemp("run")
    parts = tuple(part for part in PARTS if part not in ("serving", "clients", "wide_images"))
    tasks = unordered(schedule(EXTENT, parts))
    blocks = [tasks, [task for task in tasks if task.name == TWICE]]
    return read_measurements(run_session(EXTENT, RunOptions(out, budget_s=900.0, is_inline=True), blocks))


def test_a_session_measures_every_part_without_a_failure(measured: Measurements) -> None:
    assert measured.sessions[0].failures == ()
    quantities = {row.quantity for row in measured.rows}
    for quantity in (
        "diffusers.unet_step", "diffusers.step_with_controlnets", "diffusers.unet_lora_step", "diffusers.lora_attach",
        "diffusers.checkpoint_load", "diffusers.vae_decode", "diffusers_tuned.unet_step", "engine.unet_step",
        "engine.encoder_step", "engine.decoder_step", "engine.controlnet_step", "engine.lora_attach",
        "engine.lora_detach", "engine.checkpoint_load", "lora_fetch.local", "e2e.diffusers", "e2e.diffusers_tuned",
        "e2e.colocated", "engine.lora_map", "engine.loras_attach", "engine.image_to_host", "engine.png_encode",
        "diffusers_tuned.step_with_controlnets", "diffusers_tuned.lora_attach", "engine.controlnet_load",
    ):  # fmt: skip
        assert quantity in quantities


def test_what_is_held_out_shares_no_point_with_what_is_fitted(measured: Measurements) -> None:
    cells = {
        is_held_out: {row.cell for row in measured.rows if row.is_held_out is is_held_out}
        for is_held_out in (True, False)
    }
    assert not cells[True] & cells[False]
    held_out = {(quantity, f.forward_batch) for quantity, _, f in cells[True] if quantity.endswith("unet_step")}
    assert held_out == {("engine.unet_step", 3)}


def test_a_session_says_how_often_it_did_what(measured: Measurements) -> None:
    tasks = dict(measured.sessions[0].tasks)
    assert tasks.pop(TWICE) == 2
    assert set(tasks.values()) == {1}
    assert "stock image forward_batch=2 n_images=1 width_px=32 height_px=32 n_steps=2" in tasks


def test_a_measured_session_becomes_a_profile_that_loads(measured: Measurements, tmp_path: Path) -> None:
    paths = write_fit(fit_profile(measured, n_draws=4), tmp_path / "tiny.json")
    profile = load_profile(str(paths[0]))
    assert (profile.architecture, profile.gpu_kind, profile.n_draws) == ("tiny", "cpu", 4)
    predictor = profile.predictor()
    megapixels = 32 * 32 / 2**20
    assert predictor.seconds("engine.unet_step", forward_batch=2, megapixels=megapixels) > 0
    assert predictor.used["engine.unet_step"] == "measured"


def test_a_residual_takes_the_bytes_that_the_engine_sends(measured: Measurements) -> None:
    # 9 skips and the middle of channels (32, 64, 64) at latents of 16 x 16, 8 x 8 and 4 x 4, fp32
    by_hand = 4 * (3 * 32 * 16 * 16 + (32 + 64 + 64) * 8 * 8 + (64 + 64 + 64 + 64) * 4 * 4)
    assert measured.sessions[0].facts["engine.residual_bytes_per_sample"] == by_hand


class _FakeStation(InlineStation):
    """A station that answers, fails or dies, by its name."""

    def ask(self, method: str, features: Features, n_repeats: int, timeout_s: float) -> list[Timed]:
        if self.setup.name == "dies":
            self.is_alive = False
            raise StationError("ended with code -9")
        if method == "fails":
            raise StationError("RuntimeError: out of memory")
        values = (1.0, 1.0, 1.0, 2.0) if method == "wavers" else (1.0,) * n_repeats
        return [Timed("engine.unet_step", "eager", features, values)]


class _Fakes:
    """Two of them."""

    def __init__(self) -> None:
        self._stations = {name: _FakeStation(RigSetup(name, "engine")) for name in ("works", "dies")}

    def get(self, name: str) -> Station | None:
        return self._stations.get(name)

    def is_built(self, name: str) -> bool:
        return name in self._stations

    def start(self, name: str, timeout_s: float) -> list[Timed]:
        raise StationError("nothing starts here")


def _run_fakes(
    tmp_path: Path,
    tasks: list[Task],
    seconds: float = 100.0,
    *,
    fills: bool = False,
    before: dict[str, int] | None = None,
) -> State:
    now = time.perf_counter()
    state = State(RowLog(tmp_path, "s"), now, now + seconds, done_before=before or {})
    Measuring(_Fakes(), EXTENT, state, lambda: Session("s", "tiny", "cpu", "", 0)).run([tasks], fills_budget=fills)
    return state


def test_a_task_that_fails_is_recorded_and_the_others_still_run(tmp_path: Path) -> None:
    tasks = [Task("steps", "works", method, Features(forward_batch=2), 2) for method in ("fails", "unet_step")]
    state = _run_fakes(tmp_path, tasks)
    assert [row.value_s for row in state.log.rows] == [1.0, 1.0]
    assert [(f.part, f.error) for f in state.failures] == [
        ("steps: works fails forward_batch=2", "RuntimeError: out of memory")
    ]


def test_a_station_that_dies_hands_its_images_to_its_fallback(tmp_path: Path) -> None:
    tasks = [Task("images", "dies", "unet_step", Features(n_images=n), 1, fallback="works") for n in (1, 2, 3)]
    state = _run_fakes(tmp_path, tasks)
    assert len(state.log.rows) == 2
    assert any("has ended" in failure.error for failure in state.failures)


def test_tasks_that_fit_no_more_are_left_out_and_said_so(tmp_path: Path) -> None:
    tasks = [Task("steps", "works", "unet_step", Features(n_images=n), 1, cost_s=1e4) for n in (1, 2)]
    state = _run_fakes(tmp_path, tasks)
    assert state.log.rows == []
    assert state.failures[0].error == "2 tasks were left out: the budget was spent"


def test_repetitions_that_scatter_are_flagged_and_kept(tmp_path: Path) -> None:
    tasks = [Task("steps", "works", method, Features(forward_batch=2), 4) for method in ("wavers", "unet_step")]
    rows = _run_fakes(tmp_path, tasks).log.rows
    assert sorted((row.value_s, row.flags) for row in rows) == [(1.0, "")] * 4 + [(1.0, "noisy")] * 3 + [(2.0, "noisy")]


def test_a_resumed_session_leaves_out_what_was_done(tmp_path: Path) -> None:
    task, other = (Task("steps", "works", "unet_step", Features(forward_batch=n), 1) for n in (2, 4))
    state = _run_fakes(tmp_path, [task, task, other], before={task.name: 1, other.name: 1})
    assert [row.features.forward_batch for row in state.log.rows] == [2]


def test_a_run_that_was_cut_short_is_resumed_and_both_sessions_are_in_the_result(tmp_path: Path) -> None:
    options = RunOptions(tmp_path, budget_s=900.0, parts=("decode",), is_inline=True)
    extent = dataclasses.replace(EXTENT, tuned_batches=(), n_controlnets=0)
    first = read_measurements(run_session(extent, options))
    with pytest.raises(InputError, match="holds a run already"):
        run_session(extent, options)
    # as if the machine had gone after the first two blocks
    cut = Measurements(first.rows[:3], (dataclasses.replace(first.sessions[0], tasks={"engine text_encode": 1}),))
    (tmp_path / "measurements.parquet").unlink()
    write_measurements(cut, tmp_path / "measurements.parquet")
    whole = read_measurements(run_session(extent, dataclasses.replace(options, resume=tmp_path)))
    assert len(whole.sessions) == 2
    assert whole.rows[:3] == cut.rows
    second = [row.quantity for row in whole.rows if row.session == whole.sessions[1].session]
    assert "engine.vae_decode" in second
    assert "engine.text_encode" not in second
    assert not (tmp_path / "previous.parquet").exists()


def test_a_run_of_other_sources_is_not_resumed(tmp_path: Path, measured: Measurements) -> None:
    session = measured.sessions[0]
    other = dataclasses.replace(session, fingerprint={**session.fingerprint, "engine_sources": "000000000000"})
    write_measurements(Measurements(measured.rows, (other,)), tmp_path / "measurements.parquet")
    with pytest.raises(InputError, match="its engine_sources is '000000000000'"):
        run_session(EXTENT, RunOptions(tmp_path, parts=("decode",), is_inline=True, resume=tmp_path))


def test_every_task_has_a_station_that_is_built() -> None:
    for extent in (EXTENT, Extent(), Extent(n_gpus=2), Extent(n_gpus=2, compiled_batches=(2,), tuned_batches=())):
        built = {setup.name for setup in setups(extent, "")}
        for block in schedule(extent, PARTS):
            assert {task.station for task in block} <= built
            assert {task.fallback for task in block} - {""} <= built


def test_the_standard_session_holds_out_a_hundred_points() -> None:
    held_out = {task.key: task for block in schedule(Extent(), PARTS) for task in block if task.is_held_out}
    # a step task gives unet, encoder, decoder, ControlNet and joined step; a LoRA task fetch (two ways), map, attach, detach
    points = {"steps": 5, "lora": 5, "vae_decode": 1, "load": 1}
    images = {task.features for block in schedule(Extent(), PARTS) for task in block if task.method == "image"}
    assert sum(points[task.method] for task in held_out.values()) + len(images) >= 100


def test_our_images_come_in_five_rounds_and_the_slow_peers_in_three() -> None:
    images = [task.name for block in schedule(Extent(), PARTS) for task in block if task.part == "images"]
    counts = {name: images.count(name) for name in images}
    assert {count for name, count in counts.items() if name.startswith("engine ")} == {5}
    assert {count for name, count in counts.items() if not name.startswith("engine ")} == {3}


BLOCKED = "import sys; [sys.modules.__setitem__(name, None) for name in {names!r}]; "


def _python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("command", [[], ["run"], ["fit"], ["show"]])
def test_help_works_on_a_host_without_the_planners_packages(command: list[str]) -> None:
    # newer typer itself parses options with pydantic; `--help` of the group and every module of ours do without
    names = ["simpy", "streamlit", "torch", "ruamel", "joblib", "plotly", *([] if command else ["pydantic"])]
    code = BLOCKED.format(names=names)
    done = _python(code + "sys.argv[0] = 'calibrate'; from calibrate.cli import main; main()", *command, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_the_measuring_half_imports_no_pydantic_and_no_simpy() -> None:
    code = BLOCKED.format(names=["pydantic", "simpy", "streamlit"])
    done = _python(
        code
        + "import calibrate.run, calibrate.fit, calibrate.ours, calibrate.tuned, calibrate.clients, calibrate.remote"
    )
    assert done.returncode == 0, done.stderr


def test_wrong_options_are_all_named_with_exit_code_2() -> None:
    done = _python(
        "import sys; sys.argv[0] = 'calibrate'; from calibrate.cli import main; main()",
        "run", "--out", "x", "--model", "flux", "--device", "tpu", "--parts", "lunch", "--compiled-batches", "3",
    )  # fmt: skip
    assert done.returncode == 2
    for option in ("--model", "--device", "--parts", "--compiled-batches"):
        assert option in done.stderr
    assert "Traceback" not in done.stderr


def test_show_lists_every_law_of_a_profile(provisional_profile_path: Path) -> None:
    done = _python(
        "import sys; sys.argv[0] = 'calibrate'; from calibrate.cli import main; main()",
        "show", str(provisional_profile_path), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert '"engine.unet_step"' in done.stdout
