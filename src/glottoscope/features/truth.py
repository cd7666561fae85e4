"""What is true of a feature in the planted world, where every token's concept is known, and how well a score finds it.

A feature is bilingual in truth when it answers to the same concepts in both languages: the overlap of its two concept
distributions, sum_c min(p_a(c), p_b(c)), is at least one half, and each language has at least a tenth of its positions.

Shapes: E histogram entries, N features, V vocabulary, C concepts, G languages, D d_model.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from glottoscope.features.alignment import Interval, alignment

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

MIN_OVERLAP = 0.5
MIN_LANGUAGE_SHARE = 0.1


class PlantedTruth(NamedTuple):
    """overlap [N] (NaN without any concept position), minor_share [N] (NaN without any position), bilingual [N]."""

    overlap: FloatArray
    minor_share: FloatArray
    bilingual: BoolArray


def planted_truth(
    feature: npt.ArrayLike,
    token: npt.ArrayLike,
    language: npt.ArrayLike,
    count: npt.ArrayLike,
    concept_of_token: npt.ArrayLike,
    *,
    n_features: int,
    exposure: npt.ArrayLike | None = None,
    neutral: npt.ArrayLike | None = None,
) -> PlantedTruth:
    """Planted truth of every feature from its histogram of strongly activating tokens.

    Args:
        feature, token, language, count: [E] the histogram (positions above 0.7 of the maximum); language is 0 or 1.
        concept_of_token: [V] concept of a token, -1 for none.
        n_features: N.
        exposure: [2] counted positions of each language in the test split; None for equal exposure.
        neutral: [V] tokens that are counted for neither language; None for none.
    """
    feature_E, token_E, language_E = (np.asarray(x, dtype=np.int64) for x in (feature, token, language))
    count_E = np.asarray(count, dtype=np.float64)
    if neutral is not None:
        keep = ~np.asarray(neutral, dtype=bool)[token_E]
        feature_E, token_E, language_E, count_E = feature_E[keep], token_E[keep], language_E[keep], count_E[keep]

    rate_2 = np.ones(2) if exposure is None else np.asarray(exposure, dtype=np.float64)
    positions_N2 = _sum_by_language(feature_E, language_E, count_E, n_features) / np.maximum(rate_2, 1)
    total_N = positions_N2.sum(axis=1)
    minor_share_N = np.divide(positions_N2.min(axis=1), total_N, out=np.full(n_features, np.nan), where=total_N > 0)

    concept_E = np.asarray(concept_of_token, dtype=np.int64)[token_E]
    known = concept_E >= 0
    feature_E, concept_E, language_E, count_E = feature_E[known], concept_E[known], language_E[known], count_E[known]
    n_concepts = int(concept_E.max(initial=0)) + 1
    # One row per (feature, concept) that occurs: U rows instead of N x C.
    key_U, row_E = np.unique(feature_E * n_concepts + concept_E, return_inverse=True)
    counts_U2 = _sum_by_language(row_E, language_E, count_E, len(key_U))
    feature_U = key_U // n_concepts
    total_N2 = _sum_by_language(feature_E, language_E, count_E, n_features)
    share_U2 = counts_U2 / np.maximum(total_N2[feature_U], 1e-300)
    overlap_N = np.bincount(feature_U, weights=share_U2.min(axis=1), minlength=n_features).astype(np.float64)
    overlap_N[total_N2.sum(axis=1) == 0] = np.nan
    with np.errstate(invalid="ignore"):
        bilingual_N = (overlap_N >= MIN_OVERLAP) & (minor_share_N >= MIN_LANGUAGE_SHARE)
    return PlantedTruth(overlap_N, minor_share_N, bilingual_N)


def _sum_by_language(
    row_E: npt.NDArray[np.int64], language_E: npt.NDArray[np.int64], weight_E: FloatArray, n_rows: int
) -> FloatArray:
    sums = np.bincount(row_E * 2 + language_E, weights=weight_E, minlength=2 * n_rows)
    return sums.astype(np.float64).reshape(n_rows, 2)


def auc(score: npt.ArrayLike, truth: npt.ArrayLike) -> float | None:
    """Area under the ROC curve by ranks (Mann-Whitney), ties counted one half; None when truth is all one value.

    A NaN score (undefined phi) ranks below every other: a feature without a score is not found. Boolean scores are
    allowed; theirs is the balanced accuracy of the flag.
    """
    score_N = np.asarray(score, dtype=np.float64)
    truth_N = np.asarray(truth, dtype=bool)
    n_true, n_false = int(truth_N.sum()), int((~truth_N).sum())
    if n_true == 0 or n_false == 0:
        return None
    from scipy.stats import rankdata  # it takes a second to import

    rank_N = rankdata(np.where(np.isnan(score_N), -np.inf, score_N))
    return float((rank_N[truth_N].sum() - n_true * (n_true + 1) / 2) / (n_true * n_false))


class ConceptMeans:
    """Mean hidden state of every concept in every language, collected in chunks (float64 sums)."""

    def __init__(self, n_languages: int, n_concepts: int, d_model: int) -> None:
        self.sums_GCD: FloatArray = np.zeros((n_languages, n_concepts, d_model))
        self.counts_GC: npt.NDArray[np.int64] = np.zeros((n_languages, n_concepts), dtype=np.int64)

    def update(self, states: npt.ArrayLike, concept: npt.ArrayLike, language: npt.ArrayLike) -> None:
        """Add states [M, D] at positions with `concept` [M] (-1: left out) and `language` [M]."""
        concept_M, language_M = np.asarray(concept, dtype=np.int64), np.asarray(language, dtype=np.int64)
        known = concept_M >= 0
        n_languages, n_concepts, d_model = self.sums_GCD.shape
        row_M = language_M[known] * n_concepts + concept_M[known]
        order = np.argsort(row_M, kind="stable")
        row, start, count = np.unique(row_M[order], return_index=True, return_counts=True)
        if len(row):
            sums = np.add.reduceat(np.asarray(states, dtype=np.float64)[known][order], start, axis=0)
            self.sums_GCD.reshape(n_languages * n_concepts, d_model)[row] += sums
            self.counts_GC.reshape(-1)[row] += count

    def means(self) -> FloatArray:
        """[G, C, D]; zero for a concept that a language never showed."""
        return self.sums_GCD / np.maximum(self.counts_GC, 1)[..., None]


def alignment_truth(
    mean_states: npt.ArrayLike, counts: npt.ArrayLike, *, n_boot: int = 1000, seed: int, min_count: int = 1
) -> Interval:
    """Mean cosine of the same concept in two languages minus that of different concepts, each language centred.

    Args:
        mean_states: [2, C, D] and counts: [2, C], as `ConceptMeans` has them; concepts seen fewer than `min_count`
            times in either language are left out. The interval resamples concepts.
    """
    means_2CD, counts_2C = np.asarray(mean_states, dtype=np.float64), np.asarray(counts)
    seen_C = (counts_2C >= min_count).all(axis=0)
    return alignment(means_2CD[0, seen_C], means_2CD[1, seen_C], n_boot=n_boot, seed=seed)
