"""``calibrate run`` end to end on the tiny model, and what it does when parts of it fail."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from calibrate.fit import fit_profile
from calibrate.measurement import Features, Measurements, RowLog, Session, read_measurements
from calibrate.output import write_fit
from calibrate.points import PARTS, Task, schedule, setups, tiny_extent
from calibrate.profile_file import load_profile
from calibrate.rig import RigSetup, Timed
from calibrate.run import RunOptions, _measure, _Starter, _State, run_session
from calibrate.station import InlineStation, StationError

ROOT = Path(__file__).resolve().parents[2]
EXTENT = tiny_extent(
    width_px=32, height_px=32, n_steps=2, graph_batches=(2, 4), n_controlnets=1, lora_ranks=(2, 4), n_rounds=1, burst=1
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measurements:
    """One session on this machine's CPU."""
    out = tmp_path_factory.mktemp("run")
    return read_measurements(run_session(EXTENT, RunOptions(out, budget_s=120.0, parts=PARTS, is_inline=True)))


def test_a_session_measures_every_part_without_a_failure(measured: Measurements) -> None:
    assert measured.sessions[0].failures == ()
    quantities = {row.quantity for row in measured.rows}
    for quantity in (
        "diffusers.unet_step", "diffusers.step_with_controlnets", "diffusers.unet_lora_step", "diffusers.lora_attach",
        "diffusers.checkpoint_load", "diffusers.vae_decode", "diffusers_tuned.unet_step", "engine.unet_step",
        "engine.encoder_step", "engine.decoder_step", "engine.controlnet_step", "engine.lora_attach",
        "engine.lora_detach", "engine.checkpoint_load", "lora_fetch.local", "e2e.diffusers", "e2e.diffusers_tuned",
        "e2e.colocated",
    ):  # fmt: skip
        assert quantity in quantities


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
        return [Timed("engine.unet_step", "eager", features, (1.0,) * n_repeats)]


def _run_fakes(tmp_path: Path, tasks: list[Task], seconds: float = 100.0) -> _State:
    now = time.perf_counter()
    state = _State(RowLog(tmp_path, "s"), now, now + seconds)
    stations = {name: _FakeStation(RigSetup(name, "engine")) for name in ("works", "dies")}
    starter = _Starter(EXTENT, tmp_path, tmp_path)
    _measure([tasks], stations, starter, EXTENT, state, lambda: Session("s", "tiny", "cpu", "", 0))
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


def test_every_task_has_a_station_that_is_built() -> None:
    from calibrate.points import Extent

    for extent in (EXTENT, Extent(), Extent(n_gpus=2), Extent(n_gpus=2, compiled_batches=(), tuned_batches=())):
        built = {setup.name for setup in setups(extent, "")}
        for block in schedule(extent, PARTS):
            assert {task.station for task in block} <= built
            assert {task.fallback for task in block} - {""} <= built


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
    done = _python(code + "import calibrate.run, calibrate.fit, calibrate.ours, calibrate.stock, calibrate.station")
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
