"""What the browser's pages show against what the run holds, and their JavaScript against the Python that serves the same."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow.compute as pc
import pytest
from playwright.sync_api import expect
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
    number,
    with_pairs,
    words,
)

from glottoscope.report.browser.codec import unpack
from glottoscope.study.store import read_parquet

# ---- lists


def test_facets_count_what_the_table_holds(place: Place, visits: Visits) -> None:
    table = features(place)
    page = visits.open(place.url + "find.html")

    def shown(facet: str) -> dict[str, int]:
        return dict(page.locator(f'[data-facet="{facet}"] button[data-value]').evaluate_all(
            "all => all.map(each => [each.dataset.value, Number(each.querySelector('.n').textContent.replaceAll(',', ''))])"
        ))  # fmt: skip

    def counted(rows: list[dict[str, Any]]) -> dict[str, int]:
        some = Counter(row["language"] for row in rows)
        return {name: some[name] for name in ("en", "ja", "mixed", "neutral", "unclassified", "dead")}

    def flags(rows: list[dict[str, Any]]) -> dict[str, int]:
        names = ("bilingual", "bilingual_paper", "supportable", "single_token")
        return {f"{'' if wanted else '!'}{x}": sum(row[x] is wanted for row in rows) for x in names for wanted in (True, False)}

    alive = [row for row in table if row["alive"]]
    assert found(page) == len(alive) < len(table)
    # Dead features are not in the list, but their number is told.
    assert shown("class") == counted(table)
    assert shown("flag") == flags(alive)

    # Each facet counts under all other filters, not under its own.
    go(page, place.url + "find.html?class=ja&R=0.55..&flag=!single_token")
    under = [row for row in alive if (row["monosemanticity"] or 0) >= 0.55]
    wanted = [row for row in under if row["single_token"] is False]
    assert found(page) == len([row for row in wanted if row["language"] == "ja"])
    assert shown("class") == counted(wanted)
    ja = [row for row in under if row["language"] == "ja"]
    assert {x: n for x, n in shown("flag").items() if x.endswith("single_token")} == {
        x: n for x, n in flags(ja).items() if x.endswith("single_token")
    }
    assert {x: n for x, n in shown("flag").items() if not x.endswith("single_token")} == {
        x: n for x, n in flags([row for row in ja if row["single_token"] is False]).items() if not x.endswith("single_token")
    }


def test_a_row_shows_the_numbers_of_the_table(export: Place, visits: Visits) -> None:
    page = visits.open(export.url + "find.html?sort=-phi&per=200")
    rows = {row["feature"]: row for row in features(export)}
    shown = [int(name.rpartition(":")[2]) for name in listed(page)]
    known = [rows[f]["phi"] for f in shown if rows[f]["phi"] is not None]
    assert len(shown) == sum(row["alive"] for row in rows.values())
    assert [rows[f]["phi"] is None for f in shown] == sorted(rows[f]["phi"] is None for f in shown)
    assert known == sorted(known, reverse=True)
    for f in shown[:10]:
        line = page.locator(f'{ROWS}[data-feature="{f}"]')
        assert line.locator("[data-class]").get_attribute("data-class") == rows[f]["language"]
        for column in ("monosemanticity", "phi"):
            text = line.locator(f'[data-measure="{column}"]').inner_text()
            if rows[f][column] is None:
                assert text.startswith("–")
            else:
                assert number(text) == pytest.approx(rows[f][column], abs=0.0051)


QUERIES = (
    "",
    "q=寺",
    "q=RIVER&lang=en",
    "text=ｔｅｍｐｌｅ&class=en,mixed&sort=-density",
    "token=川&alive=all",
    "class=dead",
    "flag=!single_token,supportable&R=..0.8&sort=phi",
    "model=all&control=all&step=all&layer=all&bilingual=1&sort=-R&per=25&page=3",
    "step=0,10&layer=0&coherence=0.2..&positions=5..50&sort=-positions",
    "label=any&sort=feature&rater=ken",
    "label=2",
    "label=note",
    "label=none&class=ja&sort=-max",
    "control=shuffled&model=m-shuffled&share=0.9..",
    "alive=0&step=all&layer=all",
    "step=all&sort=-step",
    "sort=class",
    "sort=-label",
)


def test_the_list_is_that_of_the_server(served: Place, visits: Visits) -> None:
    """find.html in JavaScript against data/find.json in Python: the same features in the same order."""
    page = visits.open(served.url + "find.html")
    differ = []
    for query in QUERIES:
        paged = "page=" in query
        go(page, served.url + "find.html?" + query + ("" if paged else "&per=1000"))
        record = served.json("data/find.json?" + quote(query, safe="=&,.!"))
        rows = [row["id"] for row in record["rows"]]
        if (found(page), listed(page)) != (record["total"], rows):
            differ.append((query, found(page), record["total"], listed(page)[:5], rows[:5], record["problems"]))
        problems = page.locator("#problems li").count()
        if problems != len(record["problems"]):
            differ.append((query, page.locator("#problems").inner_text(), record["problems"]))
    assert differ == []


def test_json_twins_open(served: Place, visits: Visits) -> None:
    # Not quiet: for JSON, which names no icon, Chromium asks for /favicon.ico by itself.
    page = visits.open(served.url + "find.html?q=川&class=ja", quiet=False)
    shown = listed(page)
    address = page.locator("#json").get_attribute("href")
    assert address is not None
    page.goto(served.url + address)
    assert [row["id"] for row in json.loads(page.locator("body").inner_text())["rows"]] == shown
    f = with_pairs(served)
    go(page, f"{served.url}feature.html?f={MAIN}:{f}")
    page.locator("#json").click()
    page.wait_for_url("**/*.json")
    record = json.loads(page.locator("body").inner_text())
    assert record == json.loads(json.dumps(served.site.feature(MAIN, f)))
    assert record["examples"] and record["pairs"]
    for name in ("overview", "tokens", f"cells/{MAIN}/list", f"cells/{MAIN}/features/64-71"):
        answer = page.goto(f"{served.url}data/{name}.json")
        assert answer is not None
        assert answer.status == 200
        assert json.loads(page.locator("body").inner_text()) == json.loads(unpack(served.site.read(f"data/{name}.json.gz")))


def test_an_exported_page_hands_out_the_servers_json(export: Place, visits: Visits, tmp_path: Path) -> None:
    for f in (with_pairs(export), 3):
        page = visits.open(f"{export.url}feature.html?f={MAIN}:{f}")
        with page.expect_download() as download:
            page.locator("#json").click()
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        twin = json.loads(json.dumps(export.site.feature(MAIN, f)))
        assert differences(json.loads(path.read_text("utf-8")), twin) == []


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """Where two values of JSON differ by more than the rounding of their last digit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [x for name in a for x in differences(a[name], b[name], f"{at}.{name}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [x for n, (one, other) in enumerate(zip(a, b, strict=True)) for x in differences(one, other, f"{at}[{n}]")]
    if isinstance(a, float) or isinstance(b, float):
        return [] if a == pytest.approx(b, rel=0.005) else [f"{at}: {a} {b}"]
    return [] if a == b and type(a) is type(b) else [f"{at}: {a} {b}"]


def test_a_feature_page_shows_the_run(export: Place, visits: Visits) -> None:
    f = with_pairs(export)
    twin = export.site.feature(MAIN, f)
    pieces = read_parquet(export.store.tokens_dir / "vocabulary.parquet")["bytes"].to_pylist()
    tokens_of = np.load(export.store.tokens_dir / "test.tokens.npy")
    page = visits.open(f"{export.url}feature.html?f={MAIN}:{f}")
    for code in ("en", "ja"):
        tokens = page.locator(f'#tokens [data-language="{code}"] tbody tr')
        assert [int(number(x)) for x in tokens.locator(".num").all_inner_texts()] == [x["count"] for x in twin["tokens"][code]]
    for line in page.locator(".example").all():
        kept = twin["examples"][int(line.get_attribute("data-example") or -1)]
        assert line.get_attribute("data-language") == kept["language"]
        shown = line.locator(".text").evaluate(
            "text => [...text.childNodes].filter(x => !x.classList?.contains('sr') && !x.classList?.contains('docbreak'))"
            ".map(x => x.textContent).join('')"
        )
        # Bytes of a character that are tokens of their own are one character again.
        ids = tokens_of[kept["block"]][: len(kept["tokens"])]
        assert shown == b"".join(pieces[x] for x in ids).decode(errors="replace")
        peak = line.locator(".peak")
        assert peak.count() == 1
        assert peak.inner_text().strip(" ▲") in kept["tokens"][kept["activations"].index(max(kept["activations"]))]
        # The peak is told without colour: by weight and a line under it.
        look = peak.evaluate(
            "x => { const of = part => getComputedStyle(x, part);"
            "return [of(null).fontWeight, of('::before').content + of('::after').content]; }"
        )
        assert int(look[0]) >= 600
        assert "▲" in look[1]
    assert page.locator("#pairs li").count() == len(twin["pairs"])
    assert [f"{MAIN}:{x}" for x in page.locator("#near li").evaluate_all("all => all.map(x => x.dataset.feature)")] == [
        x["id"] for x in twin["near"]
    ]
    assert page.locator("#over tbody tr").evaluate_all("all => all.map(x => `${x.dataset.setup}:${x.dataset.feature}`)") == [
        x["id"] for x in sorted(twin["over"], key=lambda x: x["step"])
    ]
    positions = sum(sum(twin["activations"][code]) for code in ("en", "ja"))
    said = re.findall(r"([\d,]+) active positions", page.locator("#histogram svg").text_content() or "")
    assert sum(int(number(x)) for x in said) == positions


def test_counterparts_are_those_of_the_run(place: Place, visits: Visits) -> None:
    f = with_pairs(place)
    over = {x["step"]: x for x in place.site.feature(MAIN, f)["over"]}
    page = visits.open(f"{place.url}compare.html?f={MAIN}:{f}")
    columns = page.locator(".counterpart").evaluate_all(
        "all => all.map(x => [x.dataset.step, x.dataset.feature, x.dataset.cosine].map(Number))"
    )
    assert [int(step) for step, *_ in columns] == list(STEPS)
    for step, other, cosine in columns[:-1]:
        assert f"m@{int(step)}/layer_01/seed_0:{int(other)}" == over[step]["id"]
        assert cosine == pytest.approx(over[step]["cosine"])
    assert columns[-1][1:] == [f, 1]
    assert page.locator("#strip .plot svg").is_visible()
    # Two features side by side, with their measures.
    first, second = f"{MAIN}:{f}", over[0]["id"]
    page.locator("#a").fill(first)
    page.locator("#b").fill(second)
    page.locator("#pick button").click()
    expect(page.locator("#both")).to_be_visible()
    assert asked(page) == {"a": first, "b": second}
    values = [
        number(x.lstrip("▲ "))
        for x in page.locator('#both tr[data-measure="density"] td').evaluate_all("all => all.map(x => x.lastChild.textContent)")
    ]
    setup, _, other = second.rpartition(":")
    assert values == pytest.approx([features(place)[f]["density"], features(place, setup)[int(other)]["density"]], abs=1e-5)


# ---- overview and labels


def test_the_overview_shows_the_table_of_setups(place: Place, visits: Visits) -> None:
    rows = place.store.table("evolution")
    rows = {(r["step"], r["layer"]): r for r in rows.filter(pc.field("control") == "none").to_pylist()}
    page = visits.open(place.url + "index.html")
    total = sum(r["n_features"] for r in place.store.table("evolution").to_pylist())
    assert page.locator('[data-stat="features"] dd').inner_text() == f"{total} features"
    assert page.locator("#evolution-chart .plot svg").is_visible()
    page.locator("#measure").select_option("share_mixed")
    expect(page.locator("#evolution h3")).to_contain_text("mixed share")
    assert asked(page)["measure"] == "share_mixed"
    cells = page.locator("#heatmap a[data-step]").evaluate_all(
        "all => all.map(x => [x.dataset.step, x.dataset.layer, x.textContent].map(Number))"
    )
    assert {(step, layer) for step, layer, _ in cells} == {(step, layer) for step in STEPS for layer in (0, 1)}
    for step, layer, value in cells:
        assert value == pytest.approx(rows[int(step), int(layer)]["share_mixed"], abs=0.0051)

    # The keyboard reads the curve: each step of the cursor says its values.
    cursor = page.locator("#evolution .cursor").first
    cursor.focus()
    page.keyboard.press("Home")
    for step in STEPS:
        row = rows[step, 1]
        text = cursor.get_attribute("aria-valuetext") or ""
        assert f"step {step} " in text
        for part in ("share_mixed", "share_mixed_low", "share_mixed_high"):
            assert f"{row[part]:.2f}" in text, (part, text)
        page.keyboard.press("ArrowRight")

    # A cell leads to the features behind it.
    page.locator('#heatmap a[data-step="10"][data-layer="0"]').click()
    page.wait_for_url("**/find.html?*")
    drawn(page)
    assert {name.rpartition(":")[0] for name in listed(page)} == {"m@10/layer_00/seed_0"}
    assert {row.get_attribute("data-class") for row in page.locator(f"{ROWS} .class [data-class]").all()} == {"mixed"}
    alive = [row for row in features(place, "m@10/layer_00/seed_0") if row["alive"]]
    assert found(page) == sum(row["language"] == "mixed" for row in alive)


def test_the_labels_page_lists_and_compares_raters(export: Place, visits: Visits) -> None:
    record = export.site.labels_record()
    page = visits.open(export.url + "labels.html")
    assert page.locator("#labels tr[data-feature]").count() == len(record["labels"]) == 40
    pair = record["agreement"]["pairs"][0]
    said = words(page.locator("#between-raters .pair p").inner_text())
    assert f"{pair['n']} features graded by both: the same grade for {round(100 * pair['agreement'])} %" in said
    assert f"kappa {pair['kappa']:.2f} ({pair['kappa_low']:.2f} to {pair['kappa_high']:.2f})" in said
    grid = page.locator(".confusion tbody tr").evaluate_all(
        "all => all.map(x => [...x.querySelectorAll('td')].map(y => Number(y.textContent)))"
    )
    assert grid == pair["confusion"]
    measures = {x["measure"] for x in record["agreement"]["measures"]}
    assert {x.get_attribute("data-measure") for x in page.locator("#with-measures tr[data-measure]").all()} == measures != set()
    page.locator("#rater").select_option("ken")
    page.locator("#grade").select_option("note")
    expect(page.locator("#labels tr[data-feature]")).to_have_count(1)
    assert "both 川 and river" in page.locator("#labels .note").inner_text()
    with page.expect_download() as download:
        page.locator("#csv").click()
    assert download.value.path().read_bytes() == export.site.read("labels.csv")
    page.locator("#labels tr[data-feature] th a").click()
    drawn(page)
    assert asked(page)["f"] == f"{MAIN}:7"
    said = words(page.locator("#labels").inner_text())
    assert "ken: 4 token-level" in said
    assert "aiko: 4 token-level, blind" in said
