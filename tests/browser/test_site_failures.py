"""The browser's pages where something is wrong: text that wants to be markup, runs and sites that are not whole, file://."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from site_fixture import BIDI, HALF, IMAGE, MAIN, NUL, SCRIPT, Visits, browsed, go, settled, static
from study_fixture import glottoscope

from glottoscope.report.browser.site import STATIC
from glottoscope.study.store import RunStore

FEATURE = f"feature.html?f={MAIN}:7"

# ---- hostile text

HOSTILE_SETUP = "m@100/layer_01/seed_0"
SEEN_BIDI = "‹U+202E›evil‹U+2066›"
SEEN_NUL = "nul‹U+0000›‹U+001B›[31m"
HIDDEN = re.compile("[\u202a-\u202e\u2066-\u2069\u0000-\u0008\u000b-\u001f\ue000-\uf8ff\ud800-\udfff]")


def assert_text_is_text(page: Page) -> str:
    """Nothing on the page was made from the text of others; returns what it shows."""
    settled(page)
    assert page.evaluate("window.hacked") is None
    made = page.evaluate(
        "[...document.querySelectorAll('img, iframe, object, embed, body script, [onerror], [onload]')].map(x => x.outerHTML)"
    )
    assert made == []
    assert page.evaluate("[...document.scripts].every(x => x.src.startsWith(location.origin) && x.text === '')")
    text = page.locator("body").inner_text()
    everything = page.evaluate(
        """() => { const found = [document.title], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_ALL);
        while (walker.nextNode()) {
            const node = walker.currentNode;
            if (node.nodeType === 3) found.push(node.data);
            else for (const name of ['title', 'aria-label', 'placeholder', 'alt']) found.push(node.getAttribute?.(name) ?? '');
        }
        return found; }"""
    )
    assert [x for x in everything if HIDDEN.search(x)] == []
    return text


@pytest.mark.parametrize("where", ["export", "served"])
def test_hostile_text_is_text(hostile: RunStore, visits: Visits, tmp_path: Path, where: str) -> None:
    if where == "export":
        done = glottoscope("export", hostile.root, tmp_path / "site")
        assert done.returncode == 0, done.stderr
        server = static(tmp_path / "site")
    else:
        server = browsed(hostile.root, rater="mari")
    with server as url:
        page = visits.open(f"{url}find.html?alive=all&q=x%20onerror")
        text = assert_text_is_text(page)
        assert "onerror=" in text  # of the token, in a chip and in the piece of text
        assert SEEN_BIDI in (page.locator("footer").text_content() or "")
        assert IMAGE in (page.locator("footer").text_content() or "")
        for f in (0, 1, 69):
            go(page, f"{url}feature.html?f={HOSTILE_SETUP}:{f}")
            text = assert_text_is_text(page)
            tokens = page.locator("#examples").text_content() or ""
            if f == 0:
                assert IMAGE in tokens
                assert SCRIPT in tokens
                assert "a" * 300 + "… (10,000 characters)" in tokens
                assert "a" * 2001 not in (page.locator("body").text_content() or "")
                assert SEEN_BIDI in tokens
                labels = page.locator("#labels").text_content() or ""
                assert f"{IMAGE} {SEEN_BIDI} {SEEN_NUL} \ufffd" in labels
                # A document's id, too.
                assert f"{IMAGE}{SEEN_BIDI}{SEEN_NUL}" in tokens
            if f == 1:
                assert SCRIPT in (page.locator("#labels").text_content() or "")
        for address in (
            "index.html", "labels.html", "compare.html", f"compare.html?f={HOSTILE_SETUP}:0",
            f"compare.html?a={HOSTILE_SETUP}:0&b={HOSTILE_SETUP}:1",
        ):  # fmt: skip
            go(page, url + address)
            text = assert_text_is_text(page)
            if address == "labels.html":
                assert f"{IMAGE} {SEEN_BIDI} {SEEN_NUL}" in text
                page.set_viewport_size({"width": 360, "height": 740})
            # 10,000 characters without a space do not widen the page.
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        if where == "served":
            go(page, f"{url}feature.html?f={HOSTILE_SETUP}:69")
            page.evaluate("text => { document.getElementById('note').value = text; }", f"{IMAGE} {SCRIPT} {BIDI} {NUL}")
            page.evaluate("half => { document.getElementById('note').value += half; }", HALF)
            page.locator("#note").dispatch_event("change")
            expect(page.locator("#label-status")).to_contain_text("with a note")
            go(page, url + "labels.html")
            assert f"{IMAGE} {SCRIPT} {SEEN_BIDI} {SEEN_NUL}\ufffd" in assert_text_is_text(page)


def test_hostile_addresses_are_text(exported: Path, visits: Visits) -> None:
    with static(exported) as url:
        for address in (
            "find.html?q=<img src=x onerror=alert(1)>&R=<script>alert(1)</script>&%E2%80%AE=1&text=%00%ED%A0%80",
            "index.html?measure=<img src=x onerror=alert(1)>%E2%80%AE",
            "labels.html?rater=<img src=x onerror=alert(1)>",
        ):
            assert_text_is_text(visits.open(url + address))
        for address in ("feature.html?f=<img src=x onerror=alert(1)>%E2%80%AE:1", "compare.html?f=javascript:alert(1):1"):
            page = visits.open(url + address, quiet=False)
            assert_text_is_text(page)
            assert page.locator(".failure").count() == 1


# ---- runs and sites that are not whole


def test_a_partial_run_says_what_is_missing(hostile: RunStore, tmp_path: Path, visits: Visits) -> None:
    root = shutil.copytree(hostile.root, tmp_path / "run")
    (root / "cells" / "m@0" / "layer_01" / "seed_0" / "features.parquet").unlink()
    (root / "tables" / "evolution.parquet").unlink()
    shutil.rmtree(root / "labels")
    with browsed(root, rater="mari") as url:
        page = visits.open(url + "index.html")
        said = page.locator("#partial").inner_text()
        assert "1 of 2 setups have no scored features yet (the first: m@0/layer_01/seed_0)" in said
        assert "glottoscope run" in said
        assert "run the study to its end" in page.locator("main").inner_text()
        go(page, url + "find.html?step=all")
        assert page.locator("#rows tr[data-feature]").count() == 50
        assert page.locator("#partial").is_visible()
        go(page, f"{url}compare.html?f={HOSTILE_SETUP}:0")
        assert "no other checkpoint" in page.locator("#story").inner_text()
        go(page, url + "labels.html")
        assert page.locator("#none").inner_text() == "No feature of this run has a label yet."
        assert "glottoscope label" in page.locator("#how").inner_text()


def _remove(path: Path) -> None:
    path.unlink()


def _damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _no_json(path: Path) -> None:
    path.write_bytes(gzip.compress(b"<html>"))


def _newer(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "schema": 2}), encoding="utf-8")


AGAIN = "glottoscope export"
BROKEN: list[tuple[str, Callable[[Path], None], str, str, str]] = [
    ("data/overview.json.gz", _remove, "index.html", "data/overview.json.gz is missing.", AGAIN),
    ("data/site.json", _remove, "find.html", "data/site.json is missing.", AGAIN),
    ("data/site.json", _newer, "labels.html", "data/site.json has schema 2; these pages know schema 1.", "into an empty folder"),
    (f"data/cells/{MAIN}/list.json.gz", _damage, "find.html", f"data/cells/{MAIN}/list.json.gz is damaged", AGAIN),
    (f"data/cells/{MAIN}/snippets.json.gz", _remove, "find.html?q=寺", f"{MAIN}/snippets.json.gz is missing.", AGAIN),
    (f"data/cells/{MAIN}/features/0-63.json.gz", _remove, FEATURE, f"{MAIN}/features/0-63.json.gz is missing.", AGAIN),
    ("data/text/0.json.gz", _remove, FEATURE, "data/text/0.json.gz is missing.", AGAIN),
    ("data/tokens.json.gz", _no_json, f"compare.html?f={MAIN}:7", "data/tokens.json.gz is damaged", AGAIN),
]


@pytest.mark.parametrize(("file", "harm", "address", "message", "remedy"), BROKEN, ids=[f"{b[1].__name__}-{b[0]}" for b in BROKEN])
def test_a_site_that_is_not_whole_says_so(
    exported: Path, tmp_path: Path, visits: Visits, file: str, harm: Callable[[Path], None], address: str, message: str, remedy: str
) -> None:
    folder = shutil.copytree(exported, tmp_path / "site")
    harm(folder / file)
    with static(folder) as url:
        page = visits.open(url + address, quiet=False, ready=False)
        failure = page.locator(".failure").first
        expect(failure).to_contain_text(message)
        expect(failure).to_contain_text(remedy)
        # The way to the other pages is there.
        expect(page.locator('header nav a[href="index.html"]')).to_be_visible()


def test_a_site_without_labels_is_whole(exported: Path, tmp_path: Path, visits: Visits) -> None:
    folder = shutil.copytree(exported, tmp_path / "site")
    (folder / "data" / "labels.json").unlink()
    (folder / "data" / "live.json").unlink()
    with static(folder) as url:
        for address, shown in (("labels.html", "#none"), (FEATURE, ".example"), ("find.html", "#rows tr[data-feature]")):
            page = visits.open(url + address, quiet=False)
            expect(page.locator(shown).first).to_be_visible()
            assert page.locator(".failure").count() == 0


@pytest.mark.parametrize("name", ["index.html", "find.html", "feature.html", "compare.html", "labels.html"])
def test_from_a_file_the_page_says_that_it_needs_a_server(exported: Path, visits: Visits, name: str) -> None:
    page = visits.open((exported / name).as_uri(), quiet=False, ready=False)
    start = page.locator("#start")
    expect(start).to_be_visible()
    said = start.inner_text()
    assert "This page needs a web server" in said
    assert "python3 -m http.server" in said
    # Shown to those who need it, after a moment.
    page.wait_for_function("getComputedStyle(document.getElementById('start')).opacity === '1'")


# ---- what is not ours


def test_vendored_files_are_those_of_their_authors() -> None:
    vendor = STATIC / "vendor"
    rows = re.findall(r"\| `([^`]+)` \|.*`(LICENSE[^`]*)`.*`([0-9a-f]{64})`", (vendor / "README.md").read_text(encoding="utf-8"))
    assert {file for file, *_ in rows} == {p.name for p in vendor.iterdir() if p.suffix in (".js", ".css")}
    for file, licence, digest in rows:
        assert hashlib.sha256((vendor / file).read_bytes()).hexdigest() == digest, file
        assert len((vendor / licence).read_text(encoding="utf-8")) > 300
