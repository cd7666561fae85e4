"""Agreement of raters and of measures with labels, against scikit-learn and against counting by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score, confusion_matrix, roc_auc_score

from glottoscope.features.agreement import confusion, measure_agreement, rater_agreement, weighted_auc

LABELS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=40)


def kappa_by_hand(pairs: list[tuple[int, int]], weights: str) -> float | None:
    """1 - observed / expected disagreement, over all pairs of (first's label, second's label)."""

    def distance(a: int, b: int) -> int:
        return abs(a - b) if weights == "linear" else int(a != b)

    observed = sum(distance(a, b) for a, b in pairs) / len(pairs)
    expected = sum(distance(a, b) for (a, _), (_, b) in itertools.product(pairs, pairs)) / len(pairs) ** 2
    return None if expected == 0 else 1 - observed / expected


@settings(max_examples=100, deadline=None)
@given(LABELS)
def test_kappa_is_the_definition_and_sklearns(pairs: list[tuple[int, int]]) -> None:
    first, second = zip(*pairs, strict=True)
    found = rater_agreement(first, second, n_boot=20, seed=0)
    assert found.n == len(pairs)
    assert found.agreement == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert found.confusion.tolist() == confusion_matrix(first, second, labels=[1, 2, 3, 4]).tolist()
    for kappa, weights in ((found.kappa, None), (found.weighted_kappa, "linear")):
        expected = kappa_by_hand(pairs, weights or "none")
        if expected is None:
            assert kappa == (None, None, None)
            continue
        assert kappa.value == pytest.approx(expected, abs=1e-12)
        theirs = cohen_kappa_score(first, second, labels=[1, 2, 3, 4], weights=weights)
        assert kappa.value == pytest.approx(theirs, abs=1e-12)
        assert kappa.low is None or (kappa.high is not None and kappa.low <= kappa.high)


def test_known_kappas() -> None:
    # Cohen's textbook table: 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: po = .7, pe = .5, kappa = .4.
    first, second = [1] * 25 + [2] * 25, [1] * 20 + [2] * 5 + [1] * 10 + [2] * 15
    found = rater_agreement(first, second, categories=(1, 2), seed=0)
    assert (found.agreement, found.kappa.value) == (pytest.approx(0.7), pytest.approx(0.4))
    assert found.confusion.tolist() == [[20, 5], [10, 15]]
    # Neighbours confused: the weighted kappa forgives, the plain one does not.
    near = rater_agreement([1, 2, 3, 4] * 5, [2, 1, 4, 3] * 5, seed=0)
    assert near.kappa.value is not None and near.kappa.value < 0
    assert near.weighted_kappa.value is not None and near.weighted_kappa.value > 0
    same = rater_agreement([1, 2, 3, 4], [1, 2, 3, 4], seed=0)
    assert (same.kappa.value, same.weighted_kappa.value, same.agreement) == (1.0, 1.0, 1.0)
    # Raters who never vary: nothing but chance could be seen.
    assert rater_agreement([2, 2, 2], [2, 2, 2], seed=0).kappa == (None, None, None)
    assert rater_agreement([], [], seed=0)[:3] == (0, None, (None, None, None))


def test_the_interval_of_kappa_is_a_bootstrap_over_features() -> None:
    rng = np.random.default_rng(3)
    first = rng.integers(1, 5, 120)
    second = np.where(rng.random(120) < 0.6, first, rng.integers(1, 5, 120))
    found = rater_agreement(first, second, n_boot=4000, seed=0)
    draws = [cohen_kappa_score(first[d], second[d]) for d in (rng.integers(0, 120, 120) for _ in range(2000))]
    assert found.kappa[1:] == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.015)
    assert rater_agreement(first, second, n_boot=4000, seed=0).kappa == found.kappa
    assert rater_agreement(first, second, n_boot=4000, seed=1).kappa[1:] != found.kappa[1:]


def test_labels_that_are_no_category_are_refused() -> None:
    for first, second in (([0, 1], [1, 1]), ([1, 1], [1, 5]), ([1], [1, 2])):
        with pytest.raises(ValueError, match=r"label"):
            confusion(first, second)
    # The order of the categories is the order of rows and columns, whatever the numbers are.
    assert confusion([9, 2], [2, 2], (9, 2)).tolist() == [[0, 1], [0, 1]]


# ---- measures


SCORES = st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 5)), st.booleans()), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(SCORES)
def test_auc_is_the_pair_count_and_sklearns(rows: list[tuple[int | None, bool]]) -> None:
    score = np.array([np.nan if s is None else s for s, _ in rows], dtype=float)
    truth = np.array([t for _, t in rows])
    (found,) = measure_agreement(score[:, None], truth, n_boot=5, seed=0)
    known = ~np.isnan(score)
    assert (found.n, found.n_positive) == (known.sum(), (known & truth).sum())
    positive, negative = score[known & truth], score[known & ~truth]
    if not len(positive) or not len(negative):
        assert found.auc == (None, None, None)
        return
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    assert found.auc.value == pytest.approx(wins / (len(positive) * len(negative)))
    assert found.auc.value == pytest.approx(roc_auc_score(truth[known], score[known]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 3)), st.booleans(), st.integers(0, 3)), min_size=1, max_size=25))
def test_weighted_auc_is_the_auc_of_repeated_rows(rows: list[tuple[int | None, bool, int]]) -> None:
    """What a bootstrap draw gives is what the rows it drew would give."""
    score = np.array([np.nan if s is None else s for s, _, _ in rows], dtype=float)
    truth, weight = np.array([t for _, t, _ in rows]), np.array([w for _, _, w in rows])
    (found,) = weighted_auc(score, truth, weight[None].astype(float))
    keep = np.repeat(np.arange(len(rows)), weight)
    keep = keep[~np.isnan(score[keep])]
    if len(set(truth[keep].tolist())) < 2:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(roc_auc_score(truth[keep], score[keep]))


def test_the_interval_of_auc_is_a_bootstrap_over_features() -> None:
    rng = np.random.default_rng(4)
    truth = rng.random(150) < 0.4
    informed = truth + rng.normal(0, 1, 150)
    partly = np.where(rng.random(150) < 0.3, np.nan, informed)
    scores = np.stack([informed, partly, rng.normal(0, 1, 150), np.full(150, np.nan)], axis=1)
    found = measure_agreement(scores, truth, n_boot=3000, seed=0)
    assert [x.n for x in found] == [150, int((~np.isnan(partly)).sum()), 150, 0]
    for m in (0, 1):
        draws = []
        for _ in range(2000):
            drawn = rng.integers(0, 150, 150)
            drawn = drawn[~np.isnan(scores[drawn, m])]
            draws.append(roc_auc_score(truth[drawn], scores[drawn, m]))
        assert found[m].auc[1:] == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.015)
    low, high = found[2].auc.low, found[2].auc.high
    assert low is not None and high is not None and low < 0.5 < high
    assert found[3] == (0, 0, (None, None, None))


def test_auc_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from glottoscope.features import agreement

    rng = np.random.default_rng(5)
    scores, truth = rng.normal(size=(40, 2)), rng.random(40) < 0.5
    whole = measure_agreement(scores, truth, n_boot=30, seed=2)
    monkeypatch.setattr(agreement, "_CHUNK_ENTRIES", 80)
    parts = measure_agreement(scores, truth, n_boot=30, seed=2)
    for a, b in zip(parts, whole, strict=True):
        assert a.auc == pytest.approx(b.auc)
    assert measure_agreement(np.zeros((0, 2)), np.zeros(0, dtype=bool), seed=0) == [(0, 0, (None, None, None))] * 2
