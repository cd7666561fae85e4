"""What the features stage leaves for a reader: activations by bin, and translation pairs that agree with phi."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from study_fixture import contents, planted, run, text_study

from glottoscope.corpus.tokens import read_aligned_tokens
from glottoscope.study.stages.context import Context
from glottoscope.study.stages.pairs import SHOWN
from glottoscope.study.store import RunStore

WRITTEN = ("cells/**/activations.parquet", "cells/**/pairs.parquet")


def setups(store: RunStore) -> list[Path]:
    found = sorted(store.cells_dir.glob("*/layer_*/seed_*"))
    assert found
    return found


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def both_sides(row: dict[str, Any], n_pairs: int) -> int:
    """Pairs in which a feature fires on both sides, from its phi."""
    a, b = row["n_pairs_a"], row["n_pairs_b"]
    scale = np.sqrt(a * (n_pairs - a)) * np.sqrt(b * (n_pairs - b))
    return round((row["phi"] * scale + a * b) / n_pairs)


def check_activations(store: RunStore) -> None:
    """They are all active positions of a feature, and its strongest one lies in its last bin."""
    context = Context.open(store.root)
    n_positions = sum(context.token_info.counted["test"].values())
    for folder in setups(store):
        histogram, n = rows(folder, "activations"), {}
        keys = [(r["feature"], r["language"], r["bin"]) for r in histogram]
        assert keys == sorted(set(keys)) and all(r["count"] > 0 for r in histogram)
        for r in histogram:
            n[r["feature"]] = n.get(r["feature"], 0) + r["count"]
        for r in rows(folder, "collected"):
            assert n.get(r["feature"], 0) == round(r["density"] * n_positions)
            if r["alive"]:
                strongest = max(x["bin"] for x in histogram if x["feature"] == r["feature"])
                octave, half = divmod(strongest, 2)
                assert 2.0 ** (octave - 12) * (1 + half / 2) <= r["max_activation"] < 2.0 ** (octave - 12) * (1.5 + half / 2)


def check_pairs(store: RunStore) -> None:
    """They are those that phi counts, of features with examples, and show where the feature fires."""
    context = Context.open(store.root)
    aligned, neutral = read_aligned_tokens(store.aligned_dir, "test"), context.neutral()
    n_pairs, seen = len(aligned.article), 0
    for folder in setups(store):
        pairs, by_feature = rows(folder, "pairs"), {}
        assert [(r["feature"], r["rank"]) for r in pairs] == sorted((r["feature"], r["rank"]) for r in pairs)
        for r in pairs:
            by_feature.setdefault(r["feature"], []).append(r)
        with_examples = {r["feature"] for r in rows(folder, "examples")}
        assert set(by_feature) <= with_examples
        collected = rows(folder, "collected")
        for feature in with_examples:
            shown = by_feature.get(feature, [])
            if collected[feature]["phi"] is not None:
                assert len(shown) == min(SHOWN, both_sides(collected[feature], n_pairs))
            assert [r["rank"] for r in shown] == list(range(len(shown)))
            order = [(-min(r["value_a"], r["value_b"]), r["pair"]) for r in shown]
            assert order == sorted(order) and len({r["pair"] for r in shown}) == len(shown)
            bound = context.study.features.phi_firing * collected[feature]["max_activation"]
            for r in shown:
                for side, name in enumerate("ab"):
                    at, level = np.array(r[f"at_{name}"]), np.array(r[f"level_{name}"], np.float32)
                    assert level.max() == np.float32(r[f"value_{name}"]) and len(at) == len(level)
                    assert (level > bound).all() and (np.diff(at) > 0).all()
                    assert (at >= 0).all() and (at < aligned.length[side, r["pair"]]).all()
                    token = aligned.tokens[side, r["pair"], at]
                    assert not neutral[token].any() and not np.isin(token, context.token_info.special_ids).any()
                    seen += 1
    assert seen


def test_activations_of_a_study(tiny: RunStore, text_run: RunStore) -> None:
    check_activations(tiny)
    check_activations(text_run)


def test_pairs_of_a_study(tiny: RunStore, text_run: RunStore) -> None:
    check_pairs(tiny)
    check_pairs(text_run)


@pytest.mark.parametrize("features", [{"rule": "v1"}, {"example_features": 5, "phi_firing": 0.2}], ids=["v1", "fewer"])
def test_pairs_are_of_features_with_examples(tmp_path: Path, features: dict[str, Any]) -> None:
    store = run(planted(features=features), tmp_path / "run")
    check_activations(store)
    check_pairs(store)
    if "example_features" in features:
        assert all(len({r["feature"] for r in rows(folder, "pairs")}) <= 5 for folder in setups(store))


def test_layers_one_by_one_give_the_same_bytes(tiny: RunStore, tmp_path: Path) -> None:
    """As where memory allows no more than one at a time."""
    shutil.copytree(tiny.root, tmp_path / "run")
    store = RunStore(tmp_path / "run")
    for layer in (0, 1):
        for folder in setups(store):
            if folder.parent.name == f"layer_{layer:02d}":
                for name in ("activations", "pairs"):
                    (folder / f"{name}.parquet").unlink()
        run(planted(), store.root)
    assert contents(store.root, WRITTEN) == contents(tiny.root, WRITTEN)


def test_without_aligned_sentences_no_pairs_are_left(text_run: RunStore, text_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(text_run.root, tmp_path / "run")
    store = RunStore(tmp_path / "run")
    assert all((folder / "pairs.parquet").exists() for folder in setups(store))
    run(text_study(text_folder, aligned=False), store.root)
    for folder in setups(store):
        files = json.loads((folder / "done.json").read_text(encoding="utf-8"))["features"]["files"]
        assert not (folder / "pairs.parquet").exists() and "pairs.parquet" not in files
        assert "activations.parquet" in files
    check_activations(store)
