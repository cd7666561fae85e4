"""The browser's pages in a browser, exported and served: what a reader does, and what the address keeps.

`make test-browser` runs this with the system's Chromium; `make test` does not.
"""

from __future__ import annotations

import csv
import io
import re
from urllib.parse import unquote

import pytest
from playwright.sync_api import Page, expect
from site_fixture import (
    MAIN,
    ROWS,
    STEPS,
    Place,
    Visits,
    asked,
    drawn,
    features,
    found,
    go,
    listed,
    settled,
    with_pairs,
    words,
)

# ---- every page


@pytest.mark.parametrize("name", ["export", "served", "below"])
def test_every_page_opens_and_leads_to_the_others(request: pytest.FixtureRequest, visits: Visits, name: str) -> None:
    place: Place = request.getfixturevalue(name)
    page = visits.open(place.url)  # the folder itself is its first page
    expect(page.locator("h1")).to_have_text("text")
    for here, title in (
        ("find.html", "Find features"),
        ("compare.html", "Compare"),
        ("labels.html", "Labels"),
        ("index.html", "text"),
    ):
        page.locator(f'header nav a[href="{here}"]').click()
        page.wait_for_url(f"{place.url}{here}*")
        drawn(page)
        expect(page.locator("h1")).to_have_text(title)
        assert page.locator("header nav a[aria-current=page]").get_attribute("href") == here
        assert page.title().endswith("text")
    f = with_pairs(place)
    go(page, f"{place.url}feature.html?f={MAIN}:{f}")
    expect(page.locator("h1")).to_have_text(re.compile(f"^Feature {f} "))
    expect(page.locator("footer")).to_contain_text("saved as mari" if place.rater else "exported: labels are read-only")


# ---- a reader's way through the site


def test_find_open_walk_compare_label_and_go_back(place: Place, visits: Visits) -> None:
    page = visits.open(place.url + "find.html?R=0..")
    everything = found(page)
    page.locator("#q").press_sequentially("川", delay=20)
    expected = [row["id"] for row in place.site.find({"R": "0..", "q": "川"})["rows"]]
    expect(page.locator("#found strong")).to_have_text(str(len(expected)))
    assert 3 < len(expected) < everything
    assert (asked(page)["q"], asked(page)["R"]) == ("川", "0..")
    assert listed(page) == expected[:50]
    # What was searched is seen: in a token of the row, or in its piece of text.
    expect(page.locator(f"{ROWS} .snippet").first).to_be_visible()
    assert all("川" in text for text in page.locator(ROWS).all_inner_texts())

    page.locator(ROWS).nth(1).locator("th a").click()
    here = page.locator("h1")
    expect(here).to_have_text(re.compile(f"^Feature {expected[1].rpartition(':')[2]} "))
    expect(page.locator("#place")).to_have_text(f"2 of {len(expected)} in your list")
    assert asked(page)["f"] == expected[1]
    for button, n in (("#next", 2), ("#prev", 1), ("#prev", 0)):
        page.locator(button).click()
        expect(page.locator("#place")).to_have_text(f"{n + 1} of {len(expected)} in your list")
        assert asked(page)["f"] == expected[n]
        expect(here).to_have_text(re.compile(f"^Feature {expected[n].rpartition(':')[2]} "))
    assert page.locator("#prev").get_attribute("aria-disabled") == "true"

    if place.rater:
        _label(page, place, expected[0])
    else:
        assert page.locator("#label-form").count() == 0
        page.keyboard.press("3")

    page.locator("#to-compare").click()
    expect(page.locator("#columns .counterpart h3 + .cosine")).to_have_count(len(STEPS))
    assert asked(page)["f"] == expected[0]
    # Back through every page that was shown, by the browser's own button, and forward again.
    for n in (0, 1, 2, 1):
        page.go_back()
        expect(page.locator("#place")).to_have_text(f"{n + 1} of {len(expected)} in your list")
        assert asked(page)["f"] == expected[n]
    page.go_back()
    expect(page.locator("#found strong")).to_have_text(str(len(expected)))
    assert page.locator("#q").input_value() == "川"
    assert listed(page) == expected[:50]
    page.go_back()
    expect(page.locator("#found strong")).to_have_text(str(everything))
    assert page.locator("#q").input_value() == ""
    page.go_forward()
    expect(page.locator("#found strong")).to_have_text(str(len(expected)))


def _label(page: Page, place: Place, name: str) -> None:
    """Label the feature that is shown; the label is in the run, in labels.json and in labels.csv."""
    setup, _, f = name.rpartition(":")
    status = page.locator("#label-status")
    page.keyboard.press("3")
    expect(status).to_contain_text("Saved: 3")
    page.keyboard.press("n")
    page.keyboard.insert_text("川 <b>river</b>")
    page.locator("h1").click()
    expect(status).to_contain_text("with a note")
    assert page.locator('[data-grade="3"]').get_attribute("aria-pressed") == "true"
    mine = [x for x in place.json("data/labels.json")["labels"] if x["rater"] == place.rater]
    assert [(x["setup"], x["feature"], x["granularity"], x["note"], x["blind"]) for x in mine] == [
        (setup, int(f), 3, "川 <b>river</b>", False)
    ]
    rows = list(csv.DictReader(io.StringIO(place.get("labels.csv").decode())))
    assert [(x["feature"], x["granularity"], x["note"]) for x in rows if x["rater"] == place.rater] == [(f, "3", "川 <b>river</b>")]
    # The same key again takes the grade back, and once more gives it.
    page.keyboard.press("3")
    expect(status).to_contain_text("Saved: no grade")
    page.keyboard.press("3")
    expect(status).to_contain_text("Saved: 3")
    # A page that is opened anew shows it.
    page.reload()
    drawn(page)
    expect(page.locator('[data-grade="3"]')).to_have_attribute("aria-pressed", "true")
    assert page.locator("#note").input_value() == "川 <b>river</b>"
    expect(page.locator("#place")).to_contain_text("in your list")


def test_a_blind_label_is_kept_as_such(served: Place, visits: Visits) -> None:
    setup = "m@0/layer_01/seed_0"
    f = next(row["feature"] for row in features(served, setup) if row["alive"])
    page = visits.open(f"{served.url}feature.html?f={setup}:{f}&blind=1")
    for hidden in ("#class-words", "#measures", "#near", "#over", "#histogram"):
        assert page.locator(hidden).count() == 0
    page.locator('[data-grade="4"]').click()
    expect(page.locator("#label-status")).to_contain_text("Saved: 4")
    entry = next(x for x in served.json("data/labels.json")["labels"] if x["setup"] == setup)
    assert (entry["feature"], entry["granularity"], entry["blind"], entry["rater"]) == (f, 4, True, "mari")


# ---- the address holds the state


STATES = {
    "find": "find.html?step=0,20&layer=all&class=ja,mixed&flag=!single_token&R=0.1..0.9&positions=2..&sort=-phi&page=2&per=25",
    "feature": f"feature.html?f={MAIN}:7&from=class%3Dja",
    "compare": f"compare.html?a={MAIN}:5&b=m@0/layer_01/seed_0:6",
    "index": "index.html?measure=share_mixed&layer=0&x=layers&controls=0&heat=fvu&heat_model=m-shuffled",
    "labels": "labels.html?rater=ken&label=2",
}
SHOWN = """() => [...document.querySelectorAll('main input, main select, main button[aria-pressed]')].map(each =>
    [each.id || each.name, each.value, each.checked, each.getAttribute('aria-pressed')])"""


@pytest.mark.parametrize("name", STATES)
def test_the_address_alone_restores_the_page(export: Place, visits: Visits, name: str) -> None:
    """Led astray and back by the browser's history, and opened anew, the page is the same."""
    page = visits.open(export.url + STATES[name])
    settled(page)
    first = (page.locator("main").inner_text(), page.evaluate(SHOWN))
    assert page.locator("#problems li, #problems .notice").count() == 0
    if name == "find":
        page.locator('[data-facet="class"] [data-value="en"]').click()
    elif name == "feature":
        page.locator("#near li a").first.click()
    elif name == "compare":
        page.locator("#pick #b").fill(f"{export.url}feature.html?f={MAIN}:9&from=q%3D川")
        page.locator("#pick button").click()
        expect(page.locator("#side-b h2")).to_contain_text("Feature 9")
    elif name == "index":
        page.locator("#measure").select_option("alive")
    else:
        page.locator("#rater").select_option("aiko")
    astray = page.url
    assert astray != export.url + STATES[name]
    drawn(page)
    settled(page)
    second = (page.locator("main").inner_text(), page.evaluate(SHOWN))
    page.go_back()
    expect(page.locator("main")).to_have_text(first[0], use_inner_text=True)
    assert page.evaluate(SHOWN) == first[1]
    assert unquote(page.url) == unquote(export.url + STATES[name])
    page.go_forward()
    expect(page.locator("main")).to_have_text(second[0], use_inner_text=True)
    assert page.url == astray
    again = visits.open(astray)
    expect(again.locator("main")).to_have_text(second[0], use_inner_text=True)
    assert again.evaluate(SHOWN) == page.evaluate(SHOWN) == second[1]


def test_what_cannot_be_read_in_an_address_is_said(export: Place, visits: Visits) -> None:
    page = visits.open(export.url + "find.html?R=abc&class=fish&colour=red&step=x&page=0")
    said = page.locator("#problems li").all_inner_texts()
    assert [line.split(" ")[0] for line in said] == ["R=abc", "class=fish", "colour", "step=x", "page=0"]
    assert found(page) == sum(row["alive"] for row in features(export))
    go(page, export.url + "index.html?measure=happiness&layer=9&colour=red")
    assert page.locator("#problems .notice").count() == 3
    go(page, export.url + "find.html?step=7")
    assert "No setup of this run has step 7" in words(page.locator("#rows").inner_text())
    for address in (
        "feature.html?f=nonsense",
        f"feature.html?f={MAIN}:72",
        f"compare.html?a={MAIN}:1&b=x:2",
        "feature.html?f=q@1/layer_01/seed_0:1",
    ):
        shown = visits.open(export.url + address, quiet=False)
        assert re.search(r"names no feature|has no feature 72|has no setup", shown.locator(".failure").inner_text())
