"""One real browser drives the real server: every page, good and hostile uploads, a link that is shared, a phone, the dark."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dashboards.frame import PAGES
from tests.ui.conftest import QUESTION

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright, which drives the browser")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium, such as Debian's package 'chromium'")
WAIT_MS = 60_000
"""Only ever reached if a page hangs."""
SCENARIO = b'name: mine\ntraffic: {trace: "sample:katz_a_hour"}\nslo: {latency_s: 25}\nprofile: {name: h200}\n'
HOSTILE = {
    "markup.yaml": (b"name: <script>document.title='owned'</script>\nslo: $x$\n", "slo"),
    "tag.yaml": (b"name: !!python/object/apply:os.system ['true']\n", "tag.yaml"),
    "path.yaml": (SCENARIO.replace(b"sample:katz_a_hour", b"/etc/passwd"), "names the file '/etc/passwd'"),
    "bomb.yaml": (b"a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
                  b"d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d,*d]\n", "too many"),
    "binary.yaml": (b"\xff\xfe\x00PAR1", "is not UTF-8"),
}  # fmt: skip
Open = Callable[..., "sync_api.Page"]


@pytest.fixture(scope="module")
def address(
    tmp_path_factory: pytest.TempPathFactory, trace_csv: bytes, provisional_profile_path: Path
) -> Iterator[str]:
    """The dashboard on a free port of this machine, with one more scenario that is planned in seconds."""
    folder = tmp_path_factory.mktemp("browser")
    (folder / "trace.csv").write_bytes(trace_csv)
    tiny = folder / "tiny.yaml"
    tiny.write_text(QUESTION.format(name="tiny", latency_s=12.0, profile=provisional_profile_path), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    log = folder / "log"
    with log.open("w") as stream:
        command = [
            sys.executable,
            "-m",
            "planner",
            "dashboard",
            "--port",
            str(port),
            "--jobs",
            "1",
            "--scenario",
            str(tiny),
        ]
        command += ["--profile", str(provisional_profile_path)]
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    try:
        deadline_s = time.monotonic() + WAIT_MS / 1000
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=5):
                    break
            except urllib.error.URLError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline_s, log.read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as driver:
        # a container's root has no user namespaces for the sandbox, and no large /dev/shm; nothing but our own page is opened
        found = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield found
        found.close()


@pytest.fixture
def visit(browser: sync_api.Browser, address: str) -> Iterator[Open]:
    """Opens a page as a visitor of their own; an error of the page, or a request to another machine, fails the test."""
    contexts, faults = [], []

    def open_page(where: str, *, width: int = 1280, theme: str = "light") -> sync_api.Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, locale="en-US")
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "request", lambda request: request.url.startswith((address, "blob:", "data:")) or faults.append(request.url)
        )
        page.goto(f"{address}/{where}", wait_until="domcontentloaded")
        settle(page)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


def settle(page: sync_api.Page) -> None:
    """Waits until the script has run to its end and what it drew is there."""
    page.wait_for_selector("h1")
    page.wait_for_function(
        "() => document.querySelector('[data-testid=\"stApp\"]')?.dataset.testScriptState === 'notRunning'"
    )
    page.wait_for_function("() => !document.querySelector('[data-stale=\"true\"]')")


def main_text(page: sync_api.Page) -> str:
    return str(page.locator('[data-testid="stMain"]').inner_text())


def query_of(page: sync_api.Page) -> dict[str, str]:
    return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(page.url).query))


def walk(page: sync_api.Page) -> Iterator[str]:
    """Goes through the menu, page by page."""
    for name in list(PAGES)[1:]:
        title = page.locator("h1").inner_text()
        folded = page.get_by_test_id("stExpandSidebarButton")
        if folded.is_visible():  # as on a phone
            folded.click()
        page.locator(f'[data-testid="stSidebarNav"] a[href*="/{name}"]').click()
        page.wait_for_function("title => document.querySelector('h1')?.innerText !== title", arg=title)
        settle(page)
        yield name


@pytest.mark.parametrize(("width", "theme", "language"), [(390, "dark", "ja"), (1280, "light", "en")])
def test_every_page_opens_from_the_menu_and_keeps_the_question(
    visit: Open, width: int, theme: str, language: str
) -> None:
    page = visit(f"?scenario=small&slo=22&lang={language}", width=width, theme=theme)
    for name in walk(page):
        assert urllib.parse.urlsplit(page.url).path == f"/{name}"
        assert {"scenario": "small", "slo": "22", "lang": language}.items() <= query_of(page).items()
        assert page.locator('[data-testid="stException"]').count() == 0
        for chart in page.locator('[data-testid="stPlotlyChart"]').all():
            assert len(chart.get_attribute("aria-label") or "") > 20, name
        main = page.locator('[data-testid="stMain"]')
        assert main.evaluate("node => node.scrollWidth <= node.clientWidth"), f"{name} scrolls sideways"


def test_a_slider_is_moved_and_the_link_shows_the_same_numbers_to_another_visitor(visit: Open) -> None:
    page = visit("what_if?scenario=small&profile=h200&ws=20&topology=decoupled&baseline=colocated")
    table = page.locator('[data-testid="stTable"]').first
    before = table.inner_text()
    slider = page.locator('[data-testid="stSlider"] input[type="range"]').first
    slider.focus()
    for reached in (r"1\.05", r"1\.1"):
        # One at a time: what is pressed while the page is being drawn anew may be lost.
        slider.press("ArrowRight")
        page.wait_for_url(re.compile(rf"[?&]wt={reached}(&|$)"))
        settle(page)
    page.wait_for_function(
        "text => document.querySelector('[data-testid=\"stTable\"]')?.innerText !== text", arg=before
    )
    settle(page)
    other = visit(page.url.partition("127.0.0.1")[2].partition("/")[2])
    assert other.locator('[data-testid="stTable"]').first.inner_text() == table.inner_text() != before
    assert query_of(other) == query_of(page)


def wait_for_words(page: sync_api.Page, words: str) -> None:
    """Waits until the page says this; a run that was only just asked for may not have begun, so the state of the script says nothing."""
    page.wait_for_function(
        "text => document.querySelector('[data-testid=\"stMain\"]').innerText.includes(text)", arg=words
    )
    settle(page)


def test_good_and_hostile_uploads(visit: Open) -> None:
    page = visit("plan?profile=h200")
    page.get_by_role("combobox", name=re.compile("Scenario")).first.click()
    page.get_by_role("option", name="A file of my own…").click()
    wait_for_words(page, "Choose a scenario file")
    uploader = page.locator(".st-key-scenario_file")
    chooser = uploader.locator('input[type="file"]')
    for name, (content, said) in HOSTILE.items():
        chooser.set_input_files({"name": name, "mimeType": "application/yaml", "buffer": content})
        wait_for_words(page, said)
        assert "This question cannot be planned yet." in main_text(page)
        assert page.title() != "owned"
        assert page.locator('[data-testid="stMain"] script').count() == 0
        uploader.get_by_role("button", name=re.compile("Remove|Delete")).first.click()
        wait_for_words(page, "Choose a scenario file")
    chooser.set_input_files({"name": "mine.yaml", "mimeType": "application/yaml", "buffer": SCENARIO})
    wait_for_words(page, "Press Plan")
    assert "scenario" not in query_of(page)


def test_a_plan_is_made_and_taken_away(visit: Open, tmp_path: Path) -> None:
    page = visit("plan?scenario=tiny.yaml&profile=provisional_profile.json")
    page.get_by_role("button", name="Plan", exact=True).click()
    page.wait_for_function(
        "() => document.querySelector('[data-testid=\"stMain\"]').innerText.match(/Use [0-9]+ GPUs? as /)"
    )
    settle(page)
    with page.expect_download() as waiting:
        page.get_by_role("button", name="plan.json").click()
    waiting.value.save_as(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["verdict"] == "recommended"
