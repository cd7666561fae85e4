"""What an intervention's numbers are made of, by hand: dev text for the strength and the mass, the norm of each language, and
the documents and articles that a bootstrap resamples.

Shapes: S conditions, U units, T positions, D d_model, N features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from study_fixture import BRIEF, intervened, text_study
from test_intervene_study import (
    Pair,
    dense_codes,
    documents,
    folder_of,
    forward,
    loss,
    measured,
    members,
    pair_of,
    plan_of,
    row_of,
    rows_of,
    sentences,
)

from glottoscope.study.plan import seed_for
from glottoscope.study.stages.context import Context
from glottoscope.study.store import RunStore

TOKENS = 500
SETTINGS: dict[str, Any] = {**BRIEF, "alphas": [0.25, 1.0], "tokens": TOKENS, "texts": ["documents", "sentences"]}


@pytest.fixture(scope="module")
def planted_run(tiny: RunStore, tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """Tests read it and never write into it."""
    return intervened(tiny, tmp_path_factory.mktemp("numbers") / "run", SETTINGS)


@pytest.fixture(scope="module")
def real_run(text_run: RunStore, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """Real text, where documents of two languages share an id. Tests read it and never write into it."""
    return intervened(text_run, tmp_path_factory.mktemp("real") / "run", SETTINGS, raw=text_study(text_folder))


# ---- dev text


def dev_losses(pair: Pair, units: Sequence[Sequence[int]]) -> np.ndarray:
    """[S, U]: the base, the donor, and all features at each strength, one unit at a time."""
    conditions: list[Mapping[str, Any]] = [{"arm": "baseline", "alpha": None}, {"arm": "donor", "alpha": None}]
    conditions += [{"arm": "part", "alpha": alpha} for alpha in SETTINGS["alphas"]]
    every, found = torch.ones(32, dtype=torch.bool), np.zeros((len(conditions), len(units)))
    for u, ids in enumerate(units):
        donor_TD = forward(pair.donor, ids)[1][1]
        for s, condition in enumerate(conditions):
            change = pair.change(dict(condition), every, ids, donor_TD)
            model = pair.donor if condition["arm"] == "donor" else pair.base
            found[s, u] = loss(forward(model, ids, {1: change})[0], ids)
    return found


@pytest.mark.parametrize("kind", ["documents", "sentences"])
def test_the_strength_is_chosen_on_dev_text(planted_run: RunStore, kind: str) -> None:
    """On the validation split and on aligned dev sentences, neither of which is what the table tells of."""
    pair, read = pair_of(planted_run), documents if kind == "documents" else sentences
    expected = dev_losses(pair, read(planted_run, TOKENS, "validation" if kind == "documents" else "dev"))
    with np.load(folder_of(planted_run) / f"dev_{kind}.npz") as stored:
        np.testing.assert_allclose(stored["nll"], expected, rtol=1e-5)
    plan = plan_of(planted_run)["texts"]
    best = SETTINGS["alphas"][int(expected[2:].sum(axis=1).argmin())]
    assert {plan[text]["alpha"] for text in ([kind] if kind == "documents" else [kind, "translation"])} == {best}
    # The same on the text that the table tells of is something else.
    test_S = dev_losses(pair, read(planted_run, TOKENS)).sum(axis=1)
    assert (abs(test_S - expected.sum(axis=1)) > 1).all()
    rows = {r["alpha"]: r["value"] * r["n_tokens"] for r in rows_of(planted_run, text=kind, arm="part", part="all", metric="nll",
                                                                   language="all")}  # fmt: skip
    np.testing.assert_allclose([rows[alpha] for alpha in SETTINGS["alphas"]], test_S[2:], rtol=1e-5)


def masses_by_hand(store: RunStore, split: str) -> np.ndarray:
    """[N]: summed activations of the donor's features over a split's positions that count."""
    pair, total_N = pair_of(store), np.zeros(32)
    for ids in documents(store, TOKENS, split):
        counted = torch.tensor([i not in pair.special for i in ids])
        total_N += dense_codes(pair.donor_sae, forward(pair.donor, ids)[1][1])[counted].double().sum(dim=0).numpy()
    return total_N


def test_the_mass_of_a_part_is_that_on_the_validation_split(planted_run: RunStore) -> None:
    dev_N, test_N = (masses_by_hand(planted_run, split) for split in ("validation", "test"))
    mixed_N = members(planted_run, "mixed", 20).numpy()
    found = plan_of(planted_run)["mass"]["mixed"]
    assert found == pytest.approx(dev_N[mixed_N].sum() / dev_N.sum(), rel=1e-5)
    assert abs(found - test_N[mixed_N].sum() / test_N.sum()) > 1e-3
    row = row_of(planted_run, text="documents", arm="part", part="mixed", metric="nll", language="all", chosen=True)
    assert row["mass"] == found


# ---- the added norm of each language


@pytest.mark.parametrize("kind", ["documents", "sentences", "dev_documents"])
def test_a_rows_added_norm_is_that_of_its_own_language(planted_run: RunStore, kind: str) -> None:
    pair = pair_of(planted_run)
    part, alpha = ("all" if kind == "dev_documents" else "mixed"), SETTINGS["alphas"][0]
    chosen_N, moved = members(planted_run, part, 20), {"en": list[float](), "ja": list[float]()}
    for ids, language in units_of(planted_run, kind):
        donor_TD, h_TD = forward(pair.donor, ids)[1][1], forward(pair.base, ids)[1][1]
        new_TD = pair.change({"arm": "part", "alpha": alpha}, chosen_N, ids, donor_TD)(h_TD)
        share_T = (new_TD - h_TD).norm(dim=-1) / h_TD.norm(dim=-1)
        moved[language] += [float(x) for x, i in zip(share_T, ids, strict=True) if i not in pair.special]
    expected = {"en": np.mean(moved["en"]), "ja": np.mean(moved["ja"]), "all": np.mean([*moved["en"], *moved["ja"]])}
    assert abs(expected["en"] / expected["ja"] - 1) > 0.001
    for language, norm in expected.items():
        for metric in ("nll", "ppl"):
            row = row_of(planted_run, text=kind, arm="part", part=part, alpha=alpha, metric=metric, language=language)
            assert row["added_norm"] == pytest.approx(norm, rel=1e-5)
            assert row["change_per_norm"] == pytest.approx(row["change"] / norm, rel=1e-5)


def units_of(store: RunStore, kind: str) -> list[tuple[list[int], str]]:
    """Ids of every unit, and its language."""
    if kind == "sentences":
        found = sentences(store, TOKENS)
        return [(ids, "en" if i < len(found) / 2 else "ja") for i, ids in enumerate(found)]
    split = "test" if kind == "documents" else "validation"
    tokens, language = (np.load(store.tokens_dir / f"{split}.{name}.npy") for name in ("tokens", "language"))
    of_row = {tuple(row.tolist()): ("en", "ja")[int(x)] for row, x in zip(tokens, language[:, -1], strict=True)}
    return [(ids, of_row[tuple(ids)]) for ids in documents(store, TOKENS, split)]


# ---- what is resampled


def kept_documents(store: RunStore) -> list[tuple[str, str]]:
    """(id, language) of the test documents that are measured, in their order."""
    table = pq.read_table(store.tokens_dir / "documents.parquet").to_pylist()
    of_row = {r["row"]: (r["id"], r["language"]) for r in table if r["split"] == "test"}
    document, tokens = np.load(store.tokens_dir / "test.document.npy"), np.load(store.tokens_dir / "test.tokens.npy")
    spent, kept = {"en": 0, "ja": 0}, []
    for row in sorted({int(x) for x in document[:, -1]}):
        name, language = of_row[row]
        spent[language] += int((tokens[document[:, -1] == row] != tokens[0, 0]).sum())
        if spent[language] <= TOKENS // 2:
            kept.append((name, language))
    return kept


def test_documents_are_resampled_by_their_id(real_run: RunStore) -> None:
    kept = kept_documents(real_run)
    names = [name for name, _ in kept]
    assert len(set(names)) < len(names)  # some are there in both languages
    for language in ("en", "ja", "all"):
        mine = {name for name, x in kept if language in (x, "all")}
        assert {r["n_units"] for r in rows_of(real_run, text="documents", language=language) if r["value"] is not None} == {
            len(mine)
        }
    check_interval(real_run, "documents", names)


def test_sentences_are_resampled_by_their_article(real_run: RunStore) -> None:
    article = np.load(real_run.aligned_dir / "test.article.npy")
    n = len(sentences_of(real_run))
    articles = article[:n].tolist()
    assert 1 < len(set(articles)) < n
    for language in ("en", "ja", "all"):
        rows = [r for r in rows_of(real_run, text="sentences", language=language) if r["value"] is not None]
        assert {r["n_units"] for r in rows} == {len(set(articles))}
    check_interval(real_run, "sentences", [*articles, *articles])  # a pair's two sentences go together


def sentences_of(store: RunStore) -> list[int]:
    """Pairs whose sentences are measured."""
    length = np.load(store.aligned_dir / "test.length.npy")
    prefix = len({tuple(x) for x in np.load(store.aligned_dir / "test.tokens.npy")[:, :, 0]}) == 1
    assert prefix  # every sentence starts with BOS
    return [p for p in range(length.shape[1]) if (length - 1).sum(axis=0)[: p + 1].sum() <= TOKENS]


def interval(nll_SU: np.ndarray, tokens_U: np.ndarray, names: Sequence[Any], seed: int) -> tuple[float, float]:
    """95 % of the changes of perplexity from the first to the second condition, one resample at a time."""
    random, places = np.random.default_rng(seed), sorted(set(names))
    changes = []
    for _ in range(SETTINGS["bootstrap"]):
        drawn = [places[i] for i in random.integers(0, len(places), size=len(places))]
        times_U = np.array([drawn.count(name) for name in names])
        ppl = [math.exp((times_U * nll_U).sum() / (times_U * tokens_U).sum()) for nll_U in nll_SU]
        changes.append(ppl[1] - ppl[0])
    return float(np.percentile(changes, 2.5)), float(np.percentile(changes, 97.5))


def check_interval(store: RunStore, text: str, names: Sequence[Any]) -> None:
    nll_SU, tokens_U = measured(store, text)
    assert len(names) == len(tokens_U)
    conditions = plan_of(store)["texts"][text]["conditions"]
    row = row_of(store, text=text, arm="part", part="all", metric="ppl", language="all", chosen=True)
    s = next(i for i, c in enumerate(conditions) if c["arm"] == "part" and c["part"] == "all" and c["chosen"])
    seed = seed_for(Context.open(store.root).study, "effects", text) % 2**32
    low, high = interval(nll_SU[[0, s]], tokens_U, names, seed)
    assert (row["change_low"], row["change_high"]) == pytest.approx((low, high), rel=1e-9)
    alone = interval(nll_SU[[0, s]], tokens_U, range(len(names)), seed)  # every unit by itself: another interval
    assert alone != pytest.approx((low, high), rel=1e-3)
