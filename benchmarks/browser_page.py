"""How long the list page of an exported site takes in the system's Chromium, each time with nothing cached.

From the start of the navigation until the first rows are painted and the page answers: two animation frames after them.
The files come from disk through Python's own server on loopback.
"""

from __future__ import annotations

import functools
import http.server
import shutil
import statistics
import threading
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
ROUNDS = 5
_PAINTED = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now()))))"
_CLICK = "() => { document.querySelector('[data-facet=class] button').click(); return performance.now() }"


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """No line per request."""


def list_page_seconds(site: Path, setup: str) -> tuple[float, float] | None:
    """(median seconds to a usable list of `setup`, median seconds to the list under another class); None without a browser."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        return None
    model, rest = setup.split("@")
    step, layer, seed = (part.split("_")[-1] for part in rest.split("/"))
    query = f"find.html?model={model}&step={step}&layer={int(layer)}&seed={seed}"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    opened, filtered = [], []
    try:
        with sync_playwright() as driver:
            chromium = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
            for _ in range(ROUNDS):
                context = chromium.new_context(viewport={"width": 1300, "height": 900})
                page = context.new_page()
                page.goto(f"http://127.0.0.1:{server.server_port}/{query}", wait_until="commit")
                page.wait_for_selector("#rows tr[data-feature]")
                opened.append(page.evaluate(_PAINTED) / 1000)
                page.wait_for_load_state("networkidle")
                before = page.inner_text("#found")
                start = page.evaluate(_CLICK)
                page.wait_for_function("before => document.querySelector('#found').innerText !== before", arg=before)
                filtered.append((page.evaluate(_PAINTED) - start) / 1000)
                context.close()
            chromium.close()
    finally:
        server.shutdown()
    return statistics.median(opened), statistics.median(filtered)
