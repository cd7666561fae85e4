"""The browser's pages for everybody: axe-core, narrow and wide screens, light and dark, keyboard alone, languages told."""

from __future__ import annotations

import re
from importlib import resources
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from site_fixture import MAIN, Place, Visits, drawn, settled, with_pairs

from glottoscope.study.store import read_parquet

AXE = (resources.files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")
FEATURE = f"feature.html?f={MAIN}:7"
COMPARED = f"compare.html?f={MAIN}:7"
VIEWS = {
    "overview": "index.html",
    "overview of one measure": "index.html?measure=monosemanticity&x=layers",
    "list": "find.html?q=川&step=all&layer=all&class=ja,mixed&per=20",
    "nothing found": "find.html?q=zzzz&R=abc",
    "feature": FEATURE,
    "dead feature": "feature.html?f=DEAD",
    "counterparts": COMPARED,
    "two features": f"compare.html?a={MAIN}:5&b=m@0/layer_01/seed_0:6",
    "compare": "compare.html",
    "labels": "labels.html",
}
CASES = [("export", name) for name in VIEWS] + [("served", "feature"), ("served", "labels")]


def address(place: Place, name: str) -> str:
    dead = read_parquet(place.store.root / "cells" / MAIN / "features.parquet").to_pylist()
    return place.url + VIEWS[name].replace("DEAD", next(f"{MAIN}:{row['feature']}" for row in dead if not row["alive"]))


@pytest.mark.parametrize(("where", "name"), CASES)
def test_axe_finds_nothing(request: pytest.FixtureRequest, visits: Visits, where: str, name: str) -> None:
    place: Place = request.getfixturevalue(where)
    page = visits.open(address(place, name), 360, 740, bypass_csp=True)
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    settled(page)
    page.add_script_tag(content=AXE)
    found = []
    for width in (360, 1300):
        page.set_viewport_size({"width": width, "height": 740})
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            # Charts and tables follow the new width in the next frames.
            page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 50))))")
            result: dict[str, Any] = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
            assert len(result["passes"]) > 15, "axe looked at next to nothing"
            found += [
                (width, scheme, one["impact"], one["id"], [node["target"] for node in one["nodes"][:3]])
                for one in result["violations"]
            ]
    assert found == []


@pytest.mark.parametrize("name", VIEWS)
def test_no_page_scrolls_sideways(export: Place, visits: Visits, name: str) -> None:
    page = visits.open(address(export, name), 360, 740)
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    settled(page)
    wide = []
    for width in (360, 1300, 2560):
        page.set_viewport_size({"width": width, "height": 900})
        page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 50))))")
        if page.evaluate("document.documentElement.scrollWidth") > width:
            culprits = page.evaluate(
                """width => [...document.querySelectorAll('body *')].filter(each => each.getBoundingClientRect().right > width + 1)
                    .map(each => each.outerHTML.slice(0, 100)).slice(0, 5)""",
                width,
            )
            wide.append((width, culprits))
    assert wide == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_scheme_and_the_button(export: Place, visits: Visits, scheme: Any) -> None:
    page = visits.open(export.url + "find.html", scheme=scheme)

    def is_dark() -> bool:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(x) for x in re.findall(r"\d+", colour)[:3]) < 200

    assert is_dark() == (scheme == "dark")
    for wanted in (False, True):
        page.locator("#theme").click()
        assert is_dark() == wanted
    # Kept for the next page.
    page.goto(export.url + "labels.html")
    drawn(page)
    assert is_dark()


# ---- keyboard


def focused(page: Page) -> str:
    """What has the focus, as "tag#id value"."""
    return page.evaluate(
        "() => { const e = document.activeElement; return `${e.tagName.toLowerCase()}#${e.id} ${e.dataset.value ?? ''}`.trim(); }"
    )


def tab_to(page: Page, wanted: str, most: int = 80) -> None:
    """Press Tab until the focus is there; every stop on the way shows where it is."""
    for _ in range(most):
        page.keyboard.press("Tab")
        assert page.evaluate(
            """() => { const e = document.activeElement, s = getComputedStyle(e), box = e.getBoundingClientRect();
            return e !== document.body && box.width > 0 && (s.outlineStyle !== 'none' || s.boxShadow !== 'none'); }"""
        ), f"no visible focus on {focused(page)}"
        if focused(page) == wanted:
            return
    pytest.fail(f"Tab does not reach {wanted}")


def row_with_focus(page: Page) -> int:
    return page.evaluate(
        "[...document.querySelectorAll('#rows tr[data-feature]')].indexOf(document.activeElement.closest('tr[data-feature]'))"
    )


def test_the_keyboard_alone_is_enough(place: Place, visits: Visits) -> None:
    page = visits.open(place.url + "find.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.classList.contains('skip')")
    tab_to(page, "button# ja")
    page.keyboard.press("Enter")
    expect(page.locator('[data-facet="class"] [data-value="ja"]')).to_have_attribute("aria-pressed", "true")
    page.wait_for_url("**/find.html?class=ja")
    drawn(page)
    assert focused(page) == "button# ja"
    order = page.locator("#rows tr[data-feature]").evaluate_all("all => all.map(x => x.dataset.feature)")
    for key, row in (("j", 0), ("j", 1), ("j", 2), ("k", 1)):
        page.keyboard.press(key)
        assert row_with_focus(page) == row
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text(re.compile(f"^Feature {order[1]} "))
    drawn(page)
    for key, n in (("j", 2), ("k", 1), ("ArrowRight", 2), ("ArrowLeft", 1)):
        page.keyboard.press(key)
        expect(page.locator("#place")).to_contain_text(f"{n + 1} of ")
        expect(page.locator("h1")).to_have_text(re.compile(f"^Feature {order[n]} "))
    if place.rater:
        for grade in "1234":
            page.keyboard.press(grade)
            expect(page.locator("#label-status")).to_contain_text(f"Saved: {grade}")
        mine = [x for x in place.json("data/labels.json")["labels"] if x["rater"] == place.rater]
        assert {"4"} == {str(x["granularity"]) for x in mine if (x["setup"], str(x["feature"])) == (MAIN, order[1])}
        # In a field a digit is a digit.
        page.keyboard.press("n")
        page.keyboard.press("1")
        assert page.locator("#note").input_value() == "1"
        page.keyboard.press("Escape")
        expect(page.locator("#label-status")).to_contain_text("with a note")
    page.keyboard.press("?")
    assert page.locator("dialog#help").is_visible()
    assert ("label" in page.locator("#help").inner_text()) == bool(place.rater)
    page.keyboard.press("Escape")
    expect(page.locator("dialog#help")).to_have_count(0)
    page.keyboard.press("c")
    page.wait_for_url(re.compile(r"/compare\.html\?"))
    drawn(page)
    assert page.locator("h1").inner_text().startswith(f"Feature {order[1]} ")


def test_the_keyboard_moves_in_the_map_of_steps_and_layers(export: Place, visits: Visits) -> None:
    page = visits.open(export.url + "index.html")
    assert page.locator('#heatmap a[tabindex="0"]').count() == 1
    page.locator('#heatmap a[tabindex="0"]').focus()
    place = "[document.activeElement.dataset.step, document.activeElement.dataset.layer].map(Number)"
    assert page.evaluate(place) == [0, 1]
    for key, wanted in (("ArrowRight", [10, 1]), ("ArrowDown", [10, 0]), ("End", [20, 0]), ("ArrowUp", [20, 1])):
        page.keyboard.press(key)
        assert page.evaluate(place) == wanted
    page.keyboard.press("Enter")
    page.wait_for_url("**/find.html?*")


# ---- languages


JAPANESE = re.compile("[\u3040-\u30ff\u3400-\u9fff]")


@pytest.mark.parametrize("view", ["find.html?q=川&layer=all", f"feature.html?f={MAIN}:PAIRS", f"compare.html?f={MAIN}:PAIRS"])
def test_every_piece_of_text_tells_its_language(export: Place, visits: Visits, view: str) -> None:
    page = visits.open(export.url + view.replace("PAIRS", str(with_pairs(export))))
    settled(page)
    assert page.evaluate("document.documentElement.lang") == "en"
    # Texts of the documents say their language themselves, not the page's.
    found = page.evaluate(
        """() => [...document.querySelectorAll('main .text, main .snippet, main .chip:not(.bytes) bdi')].map(each => {
            const place = each.closest('[data-language], [data-snippet]')?.dataset;
            return [each.lang, place?.language ?? place?.snippet];
        })"""
    )
    assert len(found) > 5
    assert {lang for lang, _ in found} == {"en", "ja"}
    assert all(lang == column for lang, column in found if column)
    # And no Japanese stands in English text, but for what people wrote in their notes.
    texts = page.evaluate(
        """() => { const found = [], walker = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT);
        while (walker.nextNode()) {
            const { data, parentElement } = walker.currentNode;
            if (!parentElement.closest('.note')) found.push([data, parentElement.closest('[lang]').lang]);
        }
        return found; }"""
    )
    japanese = [lang for text, lang in texts if JAPANESE.search(text)]
    assert len(japanese) > 5
    assert set(japanese) == {"ja"}
