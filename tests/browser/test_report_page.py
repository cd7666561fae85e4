"""The report in a real browser: whole from disk, without network or script, from 360 px to wide screens, light and dark.

`make test-browser` runs this with the system's Chromium; `make test` does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urldefrag

import pytest
from playwright.sync_api import Browser, Dialog, Page, Request
from report_fixture import report_data

from glottoscope.report.page import PAPER_URL, build_report
from glottoscope.report.summary import answer
from glottoscope.report.webfont import FAMILY

WIDTHS = (360, 768, 1300, 2560)
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
JAPANESE = "その古い川は冷たかった"  # of the synthetic examples


@dataclass(slots=True)
class Tab:
    """An open page and what it did that it should not have done."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def run(self, script: str, argument: Any = None) -> Any:
        return self.page.evaluate(script, argument)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report(report_data(), tmp_path_factory.mktemp("report"))


class Tabs:
    """Opens the report; every tab is closed, and found silent and offline, when the test ends."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.browser, self.url, self.tabs = browser, url, list[Tab]()

    def open(self, width: int = 1300, height: int = 900, *, scheme: Literal["light", "dark"] = "light", script: bool = True) -> Tab:
        # Without page scripts Playwright can still look at the page: its own evaluation is not the page's.
        context = self.browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, java_script_enabled=script
        )
        tab = Tab(context.new_page())

        def requested(request: Request) -> None:
            if not request.url.startswith("data:"):  # bytes that the page carries
                tab.requests.append(request.url)

        def dialog_opened(dialog: Dialog) -> None:
            tab.complaints.append(f"dialog: {dialog.message}")
            dialog.dismiss()

        tab.page.on("request", requested)
        tab.page.on("console", lambda message: tab.complaints.append(f"console {message.type}: {message.text}"))
        tab.page.on("pageerror", lambda error: tab.complaints.append(f"error: {error}"))
        tab.page.on("requestfailed", lambda request: tab.complaints.append(f"failed: {request.url}"))
        tab.page.on("dialog", dialog_opened)
        tab.page.goto(self.url, wait_until="load")
        self.tabs.append(tab)
        return tab

    def check(self) -> None:
        for tab in self.tabs:
            tab.page.context.close()
            assert tab.complaints == []
            assert tab.requests == [self.url], "the page asked for more than its own file"


@pytest.fixture
def tabs(browser: Browser, report: Path) -> Iterator[Tabs]:
    opened = Tabs(browser, report.as_uri())
    yield opened
    opened.check()


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_answer_is_on_the_first_screen(tabs: Tabs, scheme: Literal["light", "dark"]) -> None:
    page = tabs.open(1300, 900, scheme=scheme).page
    expected = answer(report_data())
    shown = [page.locator("h1"), *page.locator("p.answer").all()]
    assert [words(each.inner_text()) for each in shown] == [words(t) for t in (expected.headline, *expected.sentences)]
    boxes = [each.bounding_box() for each in shown]
    for box in boxes:
        assert box is not None and box["y"] >= 0 and box["y"] + box["height"] <= 900 and box["x"] + box["width"] <= 1300
    for above, below in pairwise(box for box in boxes if box is not None):
        assert above["y"] + above["height"] <= below["y"], "headline and answers overlap"
    stats = page.locator("dl.stats").bounding_box()
    assert stats is not None and stats["y"] + stats["height"] <= 900


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_never_scrolls_sideways(tabs: Tabs, width: int) -> None:
    tab = tabs.open(width, 800)
    tab.run("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    assert tab.run("document.documentElement.scrollWidth") <= width
    wide = tab.run(
        """width => [...document.querySelectorAll('body *')].filter(each => {
            const box = each.getBoundingClientRect();
            return box.width > 0 && box.right > width + 1 && !each.closest('.scroll, svg');
        }).map(each => each.outerHTML.slice(0, 80))""",
        width,
    )
    assert wide == []
    # What is wider than its box scrolls there, and a keyboard reaches the box.
    boxes = tab.run(
        """[...document.querySelectorAll('.scroll')].map(each =>
            [each.scrollWidth > each.clientWidth + 1, getComputedStyle(each).overflowX, each.tabIndex, each.ariaLabel])"""
    )
    assert boxes and all(overflow == "auto" and index == 0 and label for _, overflow, index, label in boxes)
    assert width > 360 or any(wider for wider, *_ in boxes)


def test_row_names_leave_room_for_the_numbers_on_a_telephone(tabs: Tabs) -> None:
    """The first column stays in place while a table scrolls: it must not cover the rest."""
    tab = tabs.open(360, 740)
    shares = tab.run(
        """[...document.querySelectorAll('table.num')].filter(each => each.offsetWidth).map(each =>
            each.querySelector('tbody th').offsetWidth / each.closest('.scroll').clientWidth)"""
    )
    assert shares and max(shares) <= 0.5


def test_readable_without_script(tabs: Tabs) -> None:
    tab = tabs.open(script=False)
    text = words(tab.page.locator("body").inner_text())
    for expected in (
        *answer(report_data()).sentences,
        "The curves",
        "Classes at the last step",
        "Mixed is not bilingual",
        JAPANESE,
    ):
        assert words(expected) in text, expected
    assert tab.page.locator("figure svg").count() >= 10
    for figure in tab.page.locator("figure svg").all():
        box = figure.bounding_box()
        assert box is not None and box["width"] > 300 and box["height"] > 150
    # Folded parts unfold without script.
    fold = tab.page.locator("#settings details")
    assert not fold.locator("table").first.is_visible()
    fold.locator("summary").first.click()
    assert fold.locator("table").first.is_visible()
    assert tab.page.locator("script").count() == 0


def test_links_stay_inside(tabs: Tabs, report: Path) -> None:
    tab = tabs.open()
    found = tab.run(
        """[...document.querySelectorAll('*')].flatMap(each => ['href', 'xlink:href', 'src', 'srcset', 'action', 'data', 'poster']
            .map(name => each.getAttribute(name)).filter(value => value !== null))"""
    )
    assert found
    for link in set(found) - {PAPER_URL}:
        file, fragment = urldefrag(link)
        assert ":" not in file and not file.startswith("/"), link
        assert (report.parent / file).is_file() or file == ""
        assert not fragment or tab.run("name => document.getElementById(name) !== null", fragment), link
    for link in set(re.findall(r"url\(([^)]*)\)|@import", report.read_text(encoding="utf-8"))):
        assert link.startswith(("#", "data:font/woff;base64,")), link
    # A link of the contents brings its section on screen.
    tab.page.locator("nav a", has_text="The numbers").click()
    assert -2 < tab.run("document.getElementById('tables').getBoundingClientRect().top") < 450


def test_hostile_text_is_text(tabs: Tabs) -> None:
    tab = tabs.open()
    shown = words(tab.page.locator("#patterns").inner_text())
    for text in ("<script>alert(1)</script>", "‹U+202E›evil‹U+0000›", "$x^2$ &"):
        assert text in shown
    assert "planted <demo>" in tab.page.locator("header").inner_text()
    assert tab.run("document.scripts.length") == 0
    assert tab.run("document.querySelector('demo') === null")
    assert tab.page.title() == "planted <demo>: glottoscope report"


def test_japanese_has_glyphs(tabs: Tabs) -> None:
    """The page's own font draws every Japanese character in its own way, and none as a missing glyph."""
    tab = tabs.open()
    faces = tab.run(
        "([font, text]) => document.fonts.load(font, text).then(faces => faces.map(face => [face.family, face.status]))",
        [f'32px "{FAMILY}"', JAPANESE],
    )
    assert [(family.strip('"'), status) for family, status in faces] == [(FAMILY, "loaded")]
    pixels = tab.run(
        """([family, chars]) => chars.map(char => {
            const canvas = Object.assign(document.createElement('canvas'), {width: 48, height: 48});
            const context = canvas.getContext('2d', {willReadFrequently: true});
            context.font = `32px "${family}"`;
            context.fillText(char, 6, 36);
            return context.getImageData(0, 0, 48, 48).data.filter((_, i) => i % 4 == 3).join();
        })""",
        [FAMILY, [*sorted(set(JAPANESE)), "\U00020bb7", "\U00030edd", " "]],
    )
    *drawn, absent, other_absent, blank = pixels
    assert len(set(drawn)) == len(drawn)
    assert not {absent, other_absent, blank} & set(drawn)


def test_japanese_examples_are_drawn_with_a_japanese_font(browser: Browser, report: Path) -> None:
    """The fonts that Chromium reports: one of the reader's that the style names, or the one that the page carries."""
    # Outside `tabs`: asking for the fonts makes the inspector read the file again, which the console notes.
    page = browser.new_page()
    page.goto(report.as_uri())
    session = page.context.new_cdp_session(page)
    session.send("DOM.enable")
    session.send("CSS.enable")
    root = session.send("DOM.getDocument")["root"]["nodeId"]
    for node in session.send("DOM.querySelectorAll", {"nodeId": root, "selector": '#patterns bdi[lang="ja"]'})["nodeIds"]:
        for font in session.send("CSS.getPlatformFontsForNode", {"nodeId": node})["fonts"]:
            own = font["isCustomFont"] and font["familyName"] == "IPAexGothic"
            assert own or font["familyName"] in ("Noto Sans CJK JP", "Hiragino Sans", "Yu Gothic"), font
    page.close()


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2) of `rgb(r, g, b)`."""
    channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_colours_follow_the_scheme_and_stay_legible(tabs: Tabs, scheme: Literal["light", "dark"]) -> None:
    tab = tabs.open(scheme=scheme)
    colours = tab.run(
        """['h1', '.answer', '.eyebrow', '.stats dt', '.stats dd', 'nav a', 'figcaption', 'h2', 'td', 'td small', '.code']
            .map(selector => [selector, getComputedStyle(document.querySelector(selector)).color])"""
    )
    back = luminance(tab.run("getComputedStyle(document.body).backgroundColor"))
    card = luminance(tab.run("getComputedStyle(document.querySelector('.stats div')).backgroundColor"))
    assert back < 0.05 if scheme == "dark" else back > 0.9
    for selector, colour in colours:
        for under in (back, card):
            low, high = sorted((under, luminance(colour)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, f"{selector} {colour}"
    # Figures are drawn on the page's paper, not as white sheets in the dark.
    paper = tab.run("getComputedStyle(document.querySelector('figure svg path')).fill")
    assert (luminance(paper) < 0.05) == (scheme == "dark")
