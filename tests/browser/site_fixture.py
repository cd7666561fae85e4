"""Runs to look at, web servers for them, and pages that note what they should not have done."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, quote, urlsplit

import pyarrow as pa
from browser_fixture import ID, PIECES, hand_made
from playwright.sync_api import Browser, Dialog, Page, Request
from study_fixture import environment, planted_model, run, text_study, write_text

from glottoscope.atomic import write_table
from glottoscope.report.browser.labels import Label, LabelStore
from glottoscope.report.browser.site import Site
from glottoscope.study.browsing import open_site
from glottoscope.study.store import RunStore, read_parquet

Scheme = Literal["light", "dark"]
MAIN = "m@20/layer_01/seed_0"  # what find.html shows first
STEPS = (0, 10, 20)
ROWS = "#rows tr[data-feature]"  # of find.html

# Until a page has drawn what its address says: nothing is loading any more, and its main parts are there.
READY = """() => {
    const main = document.querySelector('main');
    if (document.getElementById('start') || !main || document.querySelector('[aria-busy]')) return false;
    if (/Loading|loading…|Searching/.test(main.innerText)) return false;
    if (main.querySelector('.failure')) return true;
    const parts = {
        index: '#heatmap a, main .notice', find: '#rows tr[data-feature] , #nothing, #rows .notice', feature: '#place:not(:empty)',
        compare: '#columns li, #relation, #view #example', labels: '#labels, #none',
    };
    const empty = main.querySelector('.examples:empty, .pairs:empty, .glances:empty');
    return main.querySelector(parts[document.body.dataset.page]) !== null && empty === null;
}"""


# ---- runs


def labelled_run(folder: Path) -> RunStore:
    """A study of three checkpoints, two layers and a control, with labels of two raters, most of them alike."""
    write_text(folder, ("en", "ja"), n=120)
    raw = text_study(folder, sae={"n": 72}, models=planted_model(checkpoints=list(STEPS)), controls={"shuffled": True})
    store = run(raw, folder / "run")
    labels = LabelStore(store.labels_path, store)
    for rater, shift in (("ken", 0), ("aiko", 1)):
        for f in range(4, 24):
            grade = 1 + (f + (shift if f % 5 == 0 else 0)) % 4
            note = "both 川 and river" if f == 7 else ""
            time = f"2025-01-31T12:00:{f:02d}Z"
            labels.append(Label(rater=rater, setup=MAIN, feature=f, granularity=grade, note=note, time=time, blind=shift == 1))
    return store


IMAGE = "<img src=x onerror=\"window.hacked=1;alert('img')\">"
SCRIPT = "</script><script>window.hacked=1;alert('script')</script>"
BIDI = "\u202eevil\u2066"
NUL = "nul\x00\x1b[31m"
SURROGATE = b"lone\xed\xa0\x80"  # a surrogate as bytes, which is no UTF-8
HALF = "\ud83d"  # and as JSON may carry it


def hostile_run(root: Path) -> RunStore:
    """The hand-made run with text that wants to be markup wherever a study may hold text of others."""
    store = hand_made(root, f"{IMAGE} {SCRIPT} {BIDI} {NUL}")
    pieces = list(PIECES)
    # Features 0, 1 and 69 fire on these, so that lists, chips and examples show them.
    for name, text in ((" dog", IMAGE.encode()), (" runs", SCRIPT.encode()), ("が", BIDI.encode()), ("é", SURROGATE)):
        pieces[ID[name]] = text
    vocabulary = store.tokens_dir / "vocabulary.parquet"
    table = read_parquet(vocabulary)
    for name, values in (
        ("bytes", pa.array(pieces, pa.binary())),
        ("text", pa.array([x.decode("utf-8", "replace") for x in pieces])),
    ):
        table = table.set_column(table.column_names.index(name), name, values)
    write_table(vocabulary, table)
    documents = store.tokens_dir / "documents.parquet"
    table = read_parquet(documents)
    ids = [f"{IMAGE}{BIDI}{NUL}", SCRIPT, "ja-2", "x"]
    write_table(documents, table.set_column(table.column_names.index("id"), "id", pa.array(ids)))
    labels = LabelStore(store.labels_path, store)
    setup = "m@100/layer_01/seed_0"
    labels.append(Label(rater="ken", setup=setup, feature=0, granularity=3, note=f"{IMAGE} {BIDI} {NUL} {HALF}"))
    labels.append(Label(rater="ken", setup=setup, feature=1, granularity=None, note=f"{SCRIPT} {'w' * 5000}"))
    return store


# ---- servers


@dataclass(frozen=True)
class Place:
    """A site under a URL that ends in "/", and the run that it shows."""

    url: str
    store: RunStore
    rater: str | None = None  # of a served site

    @cached_property
    def site(self) -> Site:
        """The same run as Python reads it."""
        return open_site(self.store.root)

    def get(self, address: str) -> bytes:
        with urllib.request.urlopen(self.url + quote(address, safe="/@?=&,.!%+"), timeout=60) as answer:
            return answer.read()

    def json(self, address: str) -> Any:
        return json.loads(self.get(address))


class _Silent(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Tests show what went wrong."""


@contextlib.contextmanager
def static(folder: Path) -> Iterator[str]:
    """Any web server: Python's own, without a word about gzip."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Silent, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def browsed(root: Path, rater: str) -> Iterator[str]:
    """`glottoscope browse` in a process of its own; it must end well, without a traceback."""
    arguments = [sys.executable, "-m", "glottoscope.cli", "browse", str(root), "--port", "0", "--rater", rater]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment())
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        try:
            assert url.startswith("http://127.0.0.1:"), url
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            finally:
                process.kill()
            errors.seek(0)
            said = errors.read()
        assert "Traceback" not in said, said


# ---- pages


@dataclass(slots=True)
class Visit:
    """An open page and what it did that it should not have done."""

    page: Page
    quiet: bool
    complaints: list[str] = field(default_factory=list)
    trespasses: list[str] = field(default_factory=list)


class Visits:
    """Opens pages, and checks at the end what each of them did."""

    def __init__(self, browser: Browser, patience: int) -> None:
        self.browser, self.patience, self.all = browser, patience, list[Visit]()

    def open(
        self,
        url: str,
        width: int = 1300,
        height: int = 900,
        *,
        scheme: Scheme = "light",
        quiet: bool = True,
        ready: bool = True,
        bypass_csp: bool = False,
    ) -> Page:
        """A page in a browser that knows nothing yet.

        Args:
            quiet: the page must have nothing to say: no failure shown, no line in the console, no refused request.
            ready: wait until the page has drawn itself.
            bypass_csp: let the test bring in scripts.
        """
        context = self.browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, bypass_csp=bypass_csp, accept_downloads=True
        )
        context.set_default_timeout(self.patience)
        visit = Visit(context.new_page(), quiet)
        self.all.append(visit)
        page, complaints, trespasses = visit.page, visit.complaints, visit.trespasses

        def requested(request: Request) -> None:
            there = urlsplit(request.url)
            own = urlsplit(url)
            if there.scheme not in ("data", "blob") and (there.scheme, there.netloc) != (own.scheme, own.netloc):
                trespasses.append(f"request: {request.url}")

        def dialog_opened(dialog: Dialog) -> None:
            trespasses.append(f"dialog: {dialog.message}")
            dialog.dismiss()

        def failed(request: Request) -> None:
            # What is still on its way when a page is left is aborted, which is no failure.
            if request.failure != "net::ERR_ABORTED":
                complaints.append(f"failed: {request.url} {request.failure}")

        page.on("request", requested)
        page.on("websocket", lambda socket: trespasses.append(f"socket: {socket.url}"))
        page.on("popup", lambda popup: trespasses.append(f"window: {popup.url}"))
        page.on("dialog", dialog_opened)
        page.on("console", lambda message: complaints.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("requestfailed", failed)
        page.on("response", lambda answer: complaints.append(f"{answer.status}: {answer.url}") if answer.status >= 400 else None)
        page.goto(url, wait_until="load")
        if ready:
            drawn(page)
        return page

    def check(self) -> None:
        for visit in self.all:
            failures = [] if visit.page.is_closed() else visit.page.locator(".failure").all_inner_texts()
            visit.page.context.close()
            wrong = [*visit.trespasses, *((*visit.complaints, *failures) if visit.quiet else ())]
            assert not wrong, wrong


def drawn(page: Page) -> None:
    """Wait until the page has drawn what its address says."""
    page.wait_for_function(READY)


def settled(page: Page) -> None:
    """Wait until what the page shows no longer changes: pieces of text come after the list."""
    page.wait_for_function(
        """() => {
            const now = document.querySelector('main').innerText;
            const same = window.shownBefore === now;
            window.shownBefore = now;
            return same;
        }""",
        polling=400,
    )


def go(page: Page, url: str) -> None:
    """Another address in the same tab."""
    page.goto(url, wait_until="load")
    drawn(page)


def words(text: str) -> str:
    return " ".join(text.split())


def with_pairs(place: Place) -> int:
    """A feature of the main setup that has examples and sentence pairs: it fires in both languages."""
    folder = place.store.root / "cells" / MAIN
    shown = set(read_parquet(folder / "examples.parquet")["feature"].to_pylist())
    return next(f for f in read_parquet(folder / "pairs.parquet")["feature"].to_pylist() if f in shown)


# ---- what pages and runs hold


def asked(page: Page) -> dict[str, str]:
    """The query of the address."""
    return {name: values[-1] for name, values in parse_qs(urlsplit(page.url).query).items()}


def listed(page: Page) -> list[str]:
    """The features of find.html, in order."""
    return page.locator(ROWS).evaluate_all("rows => rows.map(row => `${row.dataset.setup}:${row.dataset.feature}`)")


def found(page: Page) -> int:
    return int(page.locator("#found strong").inner_text().replace(",", ""))


def number(text: str) -> float:
    """A number as the pages write it."""
    return float(text.replace("−", "-").replace(",", ""))


def features(place: Place, setup: str = MAIN) -> list[dict[str, Any]]:
    """Rows of a setup's features.parquet."""
    return read_parquet(place.store.root / "cells" / setup / "features.parquet").to_pylist()
