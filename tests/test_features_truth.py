"""Planted truth of features, AUC by ranks, and the alignment of concepts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glottoscope.features.truth import ConceptMeans, alignment_truth, auc, planted_truth

# Tokens 0-3 are English, 4-7 their Japanese translations (concepts 0-3), 8 and 9 function words without a concept.
CONCEPT = np.array([0, 1, 2, 3, 0, 1, 2, 3, -1, -1])


def truth(entries: list[tuple[int, int, int, int]], n_features: int = 1, **options: Any) -> tuple[list[float], list[bool]]:
    feature, token, language, count = zip(*entries, strict=True)
    result = planted_truth(feature, token, language, count, CONCEPT, n_features=n_features, **options)
    return result.overlap.tolist(), result.bilingual.tolist()


def test_overlap_of_concept_distributions() -> None:
    overlap, bilingual = truth(
        [
            (0, 0, 0, 30), (0, 4, 1, 10),  # dog and 犬: one concept
            (1, 0, 0, 10), (1, 5, 1, 10),  # two concepts, one in each language: mixed, not bilingual
            (2, 0, 0, 10), (2, 1, 0, 10), (2, 4, 1, 10), (2, 6, 1, 10),  # half of each
            (3, 0, 0, 50),  # English
            (4, 8, 0, 10), (4, 9, 1, 10),  # function words of both: no concept at all
            (5, 0, 0, 95), (5, 4, 1, 5),  # one concept, but 5 % Japanese
        ],
        7,
    )  # fmt: skip
    assert overlap[:4] == pytest.approx([1.0, 0.0, 0.5, 0.0])
    assert np.isnan(overlap[4]) and overlap[5] == pytest.approx(1.0)
    assert np.isnan(overlap[6])  # a feature without positions
    assert bilingual == [True, False, True, False, False, False, False]


def test_exposure_and_neutral_tokens_count() -> None:
    entries = [(0, 0, 0, 95), (0, 4, 1, 5)]
    assert truth(entries)[1] == [False]
    assert truth(entries, exposure=[1000, 100])[1] == [True]  # a tenth of the text, half of the rate
    neutral = np.arange(10) == 8
    assert truth([*entries, (0, 8, 1, 20)])[1] == [True]
    assert truth([*entries, (0, 8, 1, 20)], neutral=neutral)[1] == [False]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40))
def test_auc_is_the_pair_count(pairs: list[tuple[int, bool]]) -> None:
    score, labels = np.array([p[0] for p in pairs], float), np.array([p[1] for p in pairs])
    positive, negative = score[labels], score[~labels]
    if not len(positive) or not len(negative):
        assert auc(score, labels) is None
        return
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    assert auc(score, labels) == pytest.approx(wins / (len(positive) * len(negative)))


def test_auc_of_undefined_scores_and_flags() -> None:
    assert auc([np.nan, 0.0, 0.5], [True, False, False]) == 0.0  # no score: not found
    assert auc([np.nan, 0.5], [False, True]) == 1.0
    assert auc([True, True, False, False], [True, False, True, False]) == 0.5


def test_concept_means_do_not_depend_on_chunks() -> None:
    rng = np.random.default_rng(0)
    states, concept, language = rng.standard_normal((200, 5)), rng.integers(-1, 6, 200), rng.integers(0, 2, 200)
    collected = ConceptMeans(2, 7, 5)
    for rows in (slice(0, 3), slice(3, 120), slice(120, 200)):
        collected.update(states[rows], concept[rows], language[rows])
    means = collected.means()
    for g in range(2):
        for c in range(6):
            assert means[g, c] == pytest.approx(states[(concept == c) & (language == g)].mean(axis=0))
    assert (means[:, 6] == 0).all() and (collected.counts_GC[:, 6] == 0).all()


def test_alignment_truth_sees_shared_concepts() -> None:
    rng = np.random.default_rng(1)
    meaning = rng.standard_normal((50, 12))
    means = np.stack([meaning + 4, meaning[:, ::-1] - 3])
    counts = np.full((2, 50), 9)
    unaligned = alignment_truth(means, counts, seed=0)
    aligned = alignment_truth(np.stack([meaning + 4, 2 * meaning - 3]), counts, seed=0)
    assert aligned.value is not None and aligned.value > 0.95
    assert unaligned.value is not None and abs(unaligned.value) < 0.3
    # Concepts that one language never shows are left out.
    counts[1, 40:] = 0
    means_gap = np.stack([meaning + 4, np.where(np.arange(50)[:, None] < 40, 2 * meaning - 3, 0.0)])
    assert (alignment_truth(means_gap, counts, seed=0).value or 0) > 0.95
