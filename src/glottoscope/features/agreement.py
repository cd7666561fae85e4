"""Agreement of human labels: between two raters (Cohen's kappa), and of measures with labels (AUC).

Kappa is Cohen (1960), linearly weighted Cohen (1968). Intervals are 95 % percentile bootstrap over the labelled features:
they say what another sample of features would have given, with these raters. They are null for few features, and have no
width where agreement is perfect.

Shapes: N features, K categories, M measures, R bootstrap draws, G groups of tied scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from glottoscope.features.alignment import Interval
from glottoscope.features.bootstrap import multinomial_weights, percentile_interval
from glottoscope.features.truth import auc

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

MIN_RATED = 10  # features below which two raters get no interval,
MIN_SIDE = 5  # and of either kind, below which a measure gets none: draws from so few are too much alike
_CHUNK_ENTRIES = 4_000_000  # weights in memory at a time: 32 MB


class RaterAgreement(NamedTuple):
    """Two raters on the n features that both labelled.

    agreement is the share of equal labels; kappa and weighted_kappa (linear) are null where chance alone would agree
    always; confusion [K, K] counts labels of the first rater (rows) against those of the second.
    """

    n: int
    agreement: float | None
    kappa: Interval
    weighted_kappa: Interval
    confusion: IntArray


class MeasureAgreement(NamedTuple):
    """How well a measure tells the n_positive features of a kind from the other n - n_positive: AUC, 0.5 is chance."""

    n: int
    n_positive: int
    auc: Interval


def rater_agreement(
    first: npt.ArrayLike, second: npt.ArrayLike, *, categories: Sequence[int] = (1, 2, 3, 4), n_boot: int = 1000, seed: int
) -> RaterAgreement:
    """Agreement of two raters.

    Args:
        first, second: [N] their labels of the same features, each one of `categories`.
        categories: the K labels in order; the weights of weighted kappa are distances in this order.

    Raises:
        ValueError: a label that is no category, or arrays of different lengths.
    """
    confusion_KK = confusion(first, second, categories)
    n = int(confusion_KK.sum())
    if n == 0:
        nothing = Interval(None, None, None)
        return RaterAgreement(0, None, nothing, nothing, confusion_KK)
    # Features drawn with replacement: what counts of them is their cell of the table, so the table is multinomial.
    rng = np.random.default_rng(seed)
    draws_RKK = rng.multinomial(n, confusion_KK.ravel() / n, size=n_boot).reshape(n_boot, *confusion_KK.shape)
    kappas = [
        _interval(_kappa(confusion_KK[None], weights)[0], _kappa(draws_RKK, weights), n >= MIN_RATED)
        for weights in (_unweighted(len(categories)), _linear(len(categories)))
    ]
    return RaterAgreement(n, float(np.trace(confusion_KK) / n), kappas[0], kappas[1], confusion_KK)


def confusion(first: npt.ArrayLike, second: npt.ArrayLike, categories: Sequence[int] = (1, 2, 3, 4)) -> IntArray:
    """[K, K] how often the first rater's label (row) met the second's (column).

    Raises:
        ValueError: as `rater_agreement`.
    """
    first_N, second_N = np.asarray(first, dtype=np.int64), np.asarray(second, dtype=np.int64)
    if first_N.shape != second_N.shape or first_N.ndim != 1:
        raise ValueError(f"labels of shapes {first_N.shape} and {second_N.shape}: one label of each rater per feature")
    known, k = np.asarray(categories, dtype=np.int64), len(categories)
    if not np.isin(first_N, known).all() or not np.isin(second_N, known).all():
        raise ValueError(f"labels other than {list(categories)}")
    order = np.argsort(known)
    row_N, column_N = (order[np.searchsorted(known, x, sorter=order)] for x in (first_N, second_N))
    return np.bincount(row_N * k + column_N, minlength=k * k).reshape(k, k)


def _unweighted(k: int) -> FloatArray:
    return 1.0 - np.eye(k)


def _linear(k: int) -> FloatArray:
    return np.abs(np.subtract.outer(np.arange(k), np.arange(k))).astype(np.float64)


def _kappa(tables_RKK: npt.NDArray[np.int64], disagreement_KK: FloatArray) -> FloatArray:
    """[R] 1 - observed / expected disagreement; NaN where the expected one is 0."""
    counts_RKK = tables_RKK.astype(np.float64)
    n_R = counts_RKK.sum(axis=(1, 2))
    observed_R = (counts_RKK * disagreement_KK).sum(axis=(1, 2)) / n_R
    # Two thin products instead of one of [R, K, K]: row totals x weights x column totals.
    expected_R = ((counts_RKK.sum(axis=2) @ disagreement_KK) * counts_RKK.sum(axis=1)).sum(axis=1) / n_R**2
    return 1 - np.divide(observed_R, expected_R, out=np.full(len(n_R), np.nan), where=expected_R > 0)


def measure_agreement(scores: npt.ArrayLike, positive: npt.ArrayLike, *, n_boot: int = 1000, seed: int) -> list[MeasureAgreement]:
    """AUC of every measure against one yes-no question about the features.

    Features without a measure (NaN) are left out of it, so `n` differs between measures; the draws are shared.

    Args:
        scores: [N, M] the measures, NaN where undefined.
        positive: [N] the answer.

    Returns: one of each measure; a null AUC where all its features have one answer.
    """
    scores_NM, positive_N = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    n, n_measures = scores_NM.shape
    draws_MR = np.full((n_measures, n_boot), np.nan)
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_ENTRIES // max(n, 1))
    for start in range(0, n_boot if n else 0, chunk):
        weights_RN = multinomial_weights(rng, min(chunk, n_boot - start), n)
        for m in range(n_measures):
            draws_MR[m, start : start + len(weights_RN)] = weighted_auc(scores_NM[:, m], positive_N, weights_RN)
    found = []
    for m in range(n_measures):
        known_N = ~np.isnan(scores_NM[:, m])
        value = auc(scores_NM[known_N, m], positive_N[known_N])
        n_known, n_positive = int(known_N.sum()), int((known_N & positive_N).sum())
        enough = min(n_positive, n_known - n_positive) >= MIN_SIDE
        found.append(MeasureAgreement(n_known, n_positive, _interval(math.nan if value is None else value, draws_MR[m], enough)))
    return found


def weighted_auc(score: FloatArray, positive: BoolArray, weights: FloatArray) -> FloatArray:
    """[R] AUC of scores [N] against positive [N] under weights [R, N], ties one half; NaN where one side has no weight.

    Features with a NaN score have no part in it.
    """
    order_N = np.argsort(score, kind="stable")[: int((~np.isnan(score)).sum())]
    if not len(order_N):
        return np.full(len(weights), np.nan)
    sorted_N = score[order_N]
    starts_G = np.flatnonzero(np.concatenate([[True], sorted_N[1:] != sorted_N[:-1]]))
    weights_RN, positive_N = weights[:, order_N], positive[order_N]
    positive_RG = np.add.reduceat(weights_RN * positive_N, starts_G, axis=1)
    negative_RG = np.add.reduceat(weights_RN * ~positive_N, starts_G, axis=1)
    below_RG = np.cumsum(negative_RG, axis=1) - negative_RG / 2
    pairs_R = positive_RG.sum(axis=1) * negative_RG.sum(axis=1)
    return np.divide((positive_RG * below_RG).sum(axis=1), pairs_R, out=np.full(len(pairs_R), np.nan), where=pairs_R > 0)


def _interval(value: float, draws_R: FloatArray, enough: bool) -> Interval:
    if math.isnan(value):
        return Interval(None, None, None)
    ends = percentile_interval(draws_R) if enough else None
    return Interval(float(value), *(ends or (None, None)))
