"""Takes the pictures of the dashboard that the documentation shows: ``python docs/make_dashboard_pictures.py`` (playwright, a Chromium).

Starts the real server, makes the real plan of the shipped sample, and writes ``docs/dashboard.png`` and ``docs/dashboard-what-if.png``.
To be run again when the shipped profile or the pages change.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).parent
WIDTH_PX = 1280
WAIT_MS = 300_000
SHOTS = (
    ("plan?scenario=provider&lang=en", "dashboard.png", 1240, "Plan"),
    ("what_if?scenario=small&lang=en&wt=1.1&baseline=colocated&topology=decoupled&wn=4&wk=3", "dashboard-what-if.png", 1560, ""),
)  # fmt: skip
"""Address, file, height in pixels, and the button that is pressed first."""


def settled(page: Page) -> None:
    """Waits until the script has ended and everything is drawn."""
    page.wait_for_function(
        "() => document.querySelector('[data-testid=\"stApp\"]')?.dataset.testScriptState === 'notRunning'"
    )
    page.wait_for_function('() => !document.querySelector(\'[data-testid="stSkeleton"], [data-stale="true"]\')')
    page.wait_for_timeout(1500)


def main() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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
            for address, file, height_px, button in SHOTS:
                page = browser.new_page(viewport={"width": WIDTH_PX, "height": height_px})
                page.set_default_timeout(WAIT_MS)
                page.goto(f"http://127.0.0.1:{port}/{address}")
                page.wait_for_selector("h1")
                settled(page)
                if button:
                    page.get_by_role("button", name=button, exact=True).click()
                    page.wait_for_selector('[data-testid="stMetric"]')
                    page.mouse.move(WIDTH_PX - 5, 5)
                settled(page)
                page.screenshot(path=DOCS / file)
                page.close()
            browser.close()
    finally:
        process.terminate()
        process.wait(timeout=30)


if __name__ == "__main__":
    main()
