"""The page under Streamlit's own test driver, and questions small enough to be planned in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash

from dashboards.settings import VARIABLE, Settings

APP = Path(__file__).resolve().parents[2] / "dashboards" / "entry" / "app.py"
PAGE_TIMEOUT_S = 120.0
"""Only ever reached if the page hangs: a tiny plan takes seconds."""
QUESTION = """\
name: {name}
traffic:
  trace: trace.csv
slo:
  latency_s: {latency_s}
  attainment_ratio: 0.9
profile:
  name: {profile}
topologies: [colocated, decoupled]
search:
  gpus_max: 20
simulation:
  replications: 2
  warmup_s: 0
"""


def go_to(app: AppTest, name: str) -> AppTest:
    """Opens another page of the app with the next run; its own ``switch_page`` knows pages that are files only."""
    app._page_hash = calc_hash(name)
    return app


def press_plan(app: AppTest) -> AppTest:
    """Has the plan made; one that the server of this test run already has needs no press."""
    button = app.button(key="plan")
    if not button.disabled:
        button.click()
        app.run()
    return app


@pytest.fixture(scope="session")
def trace_csv() -> bytes:
    """Sixty requests, every other one with a ControlNet."""
    arrival_s = np.cumsum(np.random.default_rng(1).exponential(2.0, 60))
    rows = [
        f'r{i},{at:.3f},30,"[{"" if i % 2 else chr(34) * 2 + "depth" + chr(34) * 2}]"' for i, at in enumerate(arrival_s)
    ]
    return ("request_id,arrival_s,n_steps,controlnet_ids\n" + "\n".join(rows) + "\n").encode()


@pytest.fixture
def question(tmp_path: Path, trace_csv: bytes, provisional_profile_path: Path) -> Callable[..., Path]:
    """Writes a question and its trace; gives the scenario file."""
    return question_writer(tmp_path, trace_csv, provisional_profile_path)


def question_writer(folder: Path, trace_csv: bytes, profile: Path) -> Callable[..., Path]:
    """What the fixture ``question`` gives, for another folder."""

    def write(*, name: str = "tiny", latency_s: float = 12.0, file_name: str = "tiny.yaml") -> Path:
        (folder / "trace.csv").write_bytes(trace_csv)
        path = folder / file_name
        path.write_text(QUESTION.format(name=name, latency_s=latency_s, profile=profile), encoding="utf-8")
        return path

    return write


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, provisional_profile_path: Path) -> Callable[..., AppTest]:
    """One page (``at``) as started with these files, at an address with these parameters; not run yet."""

    def open_page(
        *scenarios: Path, profiles: tuple[Path, ...] = (provisional_profile_path,), at: str = "plan", **address: str
    ) -> AppTest:
        monkeypatch.setenv(VARIABLE, Settings(scenarios, profiles, jobs=1).to_variable())
        app = AppTest.from_file(APP, default_timeout=PAGE_TIMEOUT_S)
        go_to(app, at)
        for key, value in address.items():
            app.query_params[key] = value
        return app

    return open_page


@pytest.fixture(scope="session")
def words() -> Callable[[AppTest], str]:
    """Everything the page says, as one text, with Markdown's escapes taken out."""

    def all_words(app: AppTest) -> str:
        kinds = (app.text, app.error, app.warning, app.info, app.success, app.caption, app.markdown, app.subheader)
        return "\n".join(str(element.value) for kind in kinds for element in kind).replace("\\", "")

    return all_words
