"""Takes the pictures of the dashboard that the documentation shows: ``python docs/make_dashboard_pictures.py`` (playwright, a Chromium).

Starts the real server, makes the real plan of the shipped samples, and writes ``docs/dashboard.png`` and ``docs/screenshots/*.png``.
To be run again when the shipped profile or the pages change.
"""

from __future__ import annotations

import io
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

DOCS = Path(__file__).parent
WAIT_MS = 300_000
SMALL = "scenario=small&profile=h200"


@dataclass(frozen=True, slots=True)
class Shot:
    """One picture: where, how high, and what is pressed first."""

    file: str
    address: str
    height_px: int
    button: str = ""
    wait_for: str = '[data-testid="stMetric"]'
    """Of the button: what is there when it is done."""
    top: str = ""
    """Text of the heading that the picture begins with; else the page's top."""
    width_px: int = 1280
    theme: str = "light"


SHOTS = (
    Shot("dashboard.png", "plan?scenario=provider&profile=h200&lang=en", 1240, "Plan"),
    Shot("screenshots/start.png", f"?{SMALL}&lang=en", 1160),
    Shot("screenshots/traffic.png", f"traffic?{SMALL}&lang=en", 1330),
    Shot("screenshots/diagnosis.png", f"traffic?{SMALL}&lang=en", 900, "Diagnose", "text=One change at a time", "Where time goes today"),
    Shot("screenshots/what-if.png", f"what_if?{SMALL}&lang=en&wt=1.1&baseline=colocated&topology=decoupled&wn=4&wk=3", 1560),
    Shot("screenshots/plan-ja-dark.png", f"plan?{SMALL}&lang=ja", 1160, "計画する", theme="dark"),
    Shot("screenshots/time-line.png", f"timeline?{SMALL}&lang=en", 1320),
    Shot("screenshots/allocation.png", "allocation?scenario=provider&profile=h200&lang=en", 1160),
    Shot("screenshots/roi.png", f"roi?{SMALL}&lang=en", 1560),
    Shot("screenshots/accuracy.png", f"accuracy?{SMALL}&lang=en", 1400),
    Shot("screenshots/export.png", f"export?{SMALL}&lang=en&to=kubernetes,json&c_image=registry.example.com/engine:1&c_volume=models", 1060),
    Shot("screenshots/phone-ja-dark.png", f"what_if?{SMALL}&lang=ja&topology=decoupled&baseline=colocated", 1500, width_px=390, theme="dark"),
)  # fmt: skip
"""In this order: later ones show the plans that earlier ones made."""


def settled(page: Page) -> None:
    """Waits until the script has ended and everything is drawn."""
    page.wait_for_timeout(300)
    page.wait_for_function(
        "() => document.querySelector('[data-testid=\"stApp\"]')?.dataset.testScriptState === 'notRunning'"
    )
    page.wait_for_function('() => !document.querySelector(\'[data-testid="stSkeleton"], [data-stale="true"]\')')
    page.wait_for_timeout(1500)


def take(browser: Browser, base: str, shot: Shot) -> bytes:
    """The picture as PNG."""
    context = browser.new_context(
        viewport={"width": shot.width_px, "height": shot.height_px}, color_scheme="dark" if shot.theme == "dark" else "light", locale="en-US"
    )  # fmt: skip
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    page.goto(f"{base}/{shot.address}")
    page.wait_for_selector("h1")
    settled(page)
    if shot.button:
        button = page.get_by_role("button", name=shot.button, exact=True)
        if button.count():  # a plan that is known needs no press
            button.click()
            page.wait_for_selector(shot.wait_for)
            settled(page)
            page.mouse.move(shot.width_px - 5, 5)
            if shot.wait_for.startswith("["):
                page.reload()  # as everybody sees it who comes later
                page.wait_for_selector("h1")
                settled(page)
    if shot.top:
        page.get_by_role("heading", name=shot.top, exact=True).evaluate("node => node.scrollIntoView()")
        page.wait_for_timeout(1000)
    picture = page.screenshot()
    context.close()
    return picture


def smaller(picture: bytes) -> bytes:
    """The picture with 256 colours; an octree keeps the few colours of small marks, which a median cut would mix with others."""
    stream = io.BytesIO()
    few = (
        Image.open(io.BytesIO(picture))
        .convert("RGB")
        .quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    )
    few.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def main() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (DOCS / "screenshots").mkdir(exist_ok=True)
    process = subprocess.Popen([sys.executable, "-m", "planner", "dashboard", "--port", str(port)])  # noqa: S603
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=5).close()
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        with sync_playwright() as driver:
            browser = driver.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
            )  # fmt: skip
            for shot in SHOTS:
                content = smaller(take(browser, f"http://127.0.0.1:{port}", shot))
                (DOCS / shot.file).write_bytes(content)
                print(shot.file, len(content))
            browser.close()
    finally:
        process.terminate()
        process.wait(timeout=30)


if __name__ == "__main__":
    main()
