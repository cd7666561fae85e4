"""Clusters of tokens by the cosine of their vectors (METHOD.md section 5; the choices are ours).

Average linkage (UPGMA) on 1 - cosine, cut so that clusters merge while their mean cosine is >= theta. One global
clustering of the tokens that occur, up to `max_tokens`; above that each feature's own most frequent tokens are
clustered, small features in batches (the loop runs over merges, not over features).

A cluster is named by its smallest token id, so a token of no cluster is its own cluster without further bookkeeping.

Shapes: V vocabulary, D vector dimension, N features, R rows of a histogram (feature, token), F features of a batch,
S tokens of a batch's widest feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from glottoscope.features.collect import Groups, run_starts
from glottoscope.features.monosemanticity import sum_by_feature

Array = NDArray[Any]

BATCH_WIDTHS = (2, 4, 8, 16, 32, 64)  # wider features go to scipy one by one: few, and each O(S^2) inside
BATCH_ELEMENTS = 8_000_000
GUESSES = 8192


@dataclass(frozen=True, eq=False, slots=True)
class Clustering:
    """A token space and its threshold: the ruler by which every setup of a study is measured.

    Attributes:
        vectors [V, D]: float32, unit norm (zero vectors stay zero: cosine 0 to everything).
        occurring [V]: bool, tokens that occur; the others are their own cluster.
        theta: clusters merge while their mean cosine is >= theta.
        labels [V]: int64, smallest token id of each token's cluster; None where features are clustered one by one.
        n_clusters: clusters among the occurring tokens; None as above.
    """

    vectors: Array
    occurring: Array
    theta: float
    labels: Array | None
    n_clusters: int | None


def cluster_tokens(
    vectors: Array, weights: Array, *, seed: int, theta: float | None = None, max_tokens: int = 20_000
) -> Clustering:
    """Cluster the tokens that occur.

    Memory: two float64 copies of the pairs, 8 n^2 bytes for n occurring tokens (3.2 GB at 20,000).

    Args:
        vectors [V, D]: float. weights [V]: frequency of each token; 0 = does not occur.
        seed: of the draw of pairs that sets theta. theta: given instead of drawn.
        max_tokens: with more occurring tokens, no global clustering is made (labels None): `row_labels` clusters
            each feature's own tokens.
    """
    unit = unit_rows(vectors)
    if theta is None:
        theta = cosine_threshold(unit, weights, seed=seed)
    return cluster_at(unit, weights, [theta], max_tokens=max_tokens)[0]


def cluster_at(unit: Array, weights: Array, thetas: Sequence[float], *, max_tokens: int = 20_000) -> list[Clustering]:
    """`cluster_tokens` at several thresholds: the tree is built once and cut at each.

    Args:
        unit [V, D]: rows of norm 1. The others as `cluster_tokens`.
    """
    occurring = np.asarray(weights) > 0
    token = np.flatnonzero(occurring)
    if len(token) > max_tokens:
        return [Clustering(unit, occurring, theta, None, None) for theta in thetas]
    found = []
    for theta, representative in zip(thetas, average_linkage_cuts(unit[token], thetas), strict=True):
        labels = np.arange(len(unit))
        labels[token] = token[representative]
        found.append(Clustering(unit, occurring, theta, labels, len(np.unique(representative))))
    return found


def unit_rows(vectors: Array) -> Array:
    """float32 [V, D], rows of norm 1; zero rows stay zero."""
    vectors = np.asarray(vectors, np.float32)
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norm > 0, norm, 1)


def cosine_threshold(unit: Array, weights: Array, *, seed: int, percentile: float = 99.0, n_pairs: int = 200_000) -> float:
    """The percentile of the cosine of pairs of distinct tokens, each drawn by frequency; 1 if no two tokens occur.

    Args:
        unit [V, D]: rows of norm 1. weights [V]: frequencies.
    """
    return cosine_thresholds(unit, weights, [percentile], seed=seed, n_pairs=n_pairs)[0]


def cosine_thresholds(
    unit: Array, weights: Array, percentiles: Sequence[float], *, seed: int, n_pairs: int = 200_000
) -> list[float]:
    """`cosine_threshold` at several percentiles of the same pairs."""
    if np.count_nonzero(weights) < 2:
        return [1.0] * len(percentiles)
    a, b = _draw_tokens(weights, 2 * n_pairs, seed).reshape(2, n_pairs)
    distinct = a != b
    # Frequent tokens meet again and again: each pair's cosine is taken once.
    pairs = np.minimum(a, b)[distinct] * len(unit) + np.maximum(a, b)[distinct]
    if not len(pairs):
        return [1.0] * len(percentiles)
    pairs.sort()
    starts = run_starts(pairs)
    a, b = np.divmod(pairs[starts], len(unit))
    step = max(1, BATCH_ELEMENTS // unit.shape[1])
    cosines = [np.einsum("pd,pd->p", unit[a[i : i + step]], unit[b[i : i + step]]) for i in range(0, len(a), step)]
    cosine = np.repeat(np.concatenate(cosines), np.diff(starts, append=len(pairs)))
    return [float(np.percentile(cosine, percentile)) for percentile in percentiles]


def _draw_tokens(weights: Array, n: int, seed: int) -> Array:
    """int64 [n]: tokens drawn by frequency, at least one of them above 0."""
    bounds = np.concatenate(([0.0], np.cumsum(weights, dtype=np.float64)))
    uniform = np.random.default_rng(seed).random(n)
    draw = uniform * bounds[-1]
    # A table of guesses is right for most draws; only the others are searched, which costs ten times as much.
    centres = (np.arange(GUESSES) + 0.5) * (bounds[-1] / GUESSES)
    token = (np.searchsorted(bounds, centres, side="right") - 1)[(uniform * GUESSES).astype(np.int64)]
    wrong = np.flatnonzero((draw < bounds[token]) | (draw >= bounds[token + 1]))
    token[wrong] = np.searchsorted(bounds, draw[wrong], side="right") - 1
    return token


def average_linkage(unit: Array, theta: float) -> Array:
    """int64 [S]: smallest row of each row's cluster, by scipy's average linkage on 1 - cosine cut at 1 - theta."""
    return average_linkage_cuts(unit, [theta])[0]


def average_linkage_cuts(unit: Array, thetas: Sequence[float]) -> list[Array]:
    """`average_linkage` at several thresholds: the tree is built once and cut at each."""
    if len(unit) < 2:
        return [np.arange(len(unit)) for _ in thetas]
    tree = linkage(_condensed_distances(unit), "average")
    found = []
    for theta in thetas:
        _, first_row, inverse = np.unique(fcluster(tree, 1.0 - theta, "distance"), return_index=True, return_inverse=True)
        found.append(first_row[inverse])
    return found


def _condensed_distances(unit: Array) -> Array:
    """1 - cosine of all pairs in scipy's condensed order: float64 [S (S - 1) / 2]."""
    n = len(unit)
    if n * n <= BATCH_ELEMENTS:
        square = np.empty((n, n))
        square[:-1] = unit[:-1] @ unit.T
        distance = 1.0 - squareform(square, force="tovector", checks=False)
    else:
        distance = np.empty(n * (n - 1) // 2)
        block = max(1, BATCH_ELEMENTS // n)
        for first in range(0, n - 1, block):
            last = min(first + block, n - 1)
            cosine = unit[first:last] @ unit.T
            above = np.arange(n) > np.arange(first, last)[:, None]
            start, stop = _condensed_row(first, n), _condensed_row(last, n)
            distance[start:stop] = 1.0 - cosine[above].astype(np.float64)
    # Rounding puts the cosine of equal vectors an ulp above 1; linkage refuses negative heights in the cut.
    return np.maximum(distance, 0.0, out=distance)


def _condensed_row(row: int, n: int) -> int:
    """Where the pairs (row, row + 1), (row, row + 2), ... start in scipy's condensed order."""
    return row * n - row * (row + 1) // 2


def row_labels(clustering: Clustering, tokens: Groups, n_features: int, *, max_tokens: int = 2_000) -> tuple[Array, Array]:
    """Cluster of every row of a histogram.

    Args:
        tokens: `collect.tokens_of(histogram)`, R rows sorted by feature, then token.
        max_tokens: without a global clustering, a feature's most frequent tokens that are clustered (ties: smaller id).

    Returns:
        (labels int64 [R], unclustered float64 [N]: share of a feature's positions whose token was left a singleton by
        that limit; 0 for a global clustering).
    """
    if clustering.labels is not None:
        return clustering.labels[tokens.group], np.zeros(n_features)
    starts = run_starts(tokens.feature)
    sizes = np.diff(starts, append=len(tokens.feature))
    order = np.lexsort((tokens.group, -tokens.count, tokens.feature))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(starts, sizes)
    beyond = rank >= max_tokens
    total = np.maximum(np.bincount(tokens.feature, weights=tokens.count, minlength=n_features), 1)
    unclustered = sum_by_feature(tokens.feature, np.where(beyond, tokens.count, 0), n_features) / total

    labels = tokens.group.copy()
    row = np.flatnonzero(~beyond)
    starts = run_starts(tokens.feature[row])
    sizes = np.diff(starts, append=len(row))
    narrowest = 2
    for width in BATCH_WIDTHS:
        chosen = np.flatnonzero((sizes >= narrowest) & (sizes <= width))
        step = max(1, BATCH_ELEMENTS // (width * max(width, clustering.vectors.shape[1])))
        for first in range(0, len(chosen), step):
            batch = chosen[first : first + step]
            column = np.arange(width)
            real = column < sizes[batch, None]
            cell = row[np.where(real, starts[batch, None] + column, starts[batch, None])]
            token = tokens.group[cell]
            representative = batched_average_linkage(clustering.vectors[token], real, clustering.theta)
            labels[cell[real]] = np.take_along_axis(token, representative, axis=1)[real]
        narrowest = width + 1
    for start, size in zip(starts[sizes >= narrowest], sizes[sizes >= narrowest], strict=True):
        cell = row[start : start + size]
        token = tokens.group[cell]
        labels[cell] = token[average_linkage(clustering.vectors[token], clustering.theta)]
    return labels, unclustered


def batched_average_linkage(unit: Array, real: Array, theta: float) -> Array:
    """`average_linkage` of F small sets at once: int64 [F, S], smallest column of each column's cluster.

    Args:
        unit [F, S, D]: rows of norm 1. real [F, S]: bool, False for the padding of narrower sets.
    """
    n_sets, width = real.shape
    mean = (unit @ unit.transpose(0, 2, 1)).astype(np.float64)  # mean cosine between clusters
    mean[~(real[:, :, None] & real[:, None, :])] = -np.inf
    mean[:, np.arange(width), np.arange(width)] = -np.inf
    size = np.ones((n_sets, width))
    member = np.tile(np.arange(width), (n_sets, 1))
    out = member.copy()
    going = np.arange(n_sets)  # sets that still merge; the arrays above hold these only
    while len(going):
        best = mean.reshape(len(going), -1).argmax(axis=1)
        first, second = np.divmod(best, width)  # the first of equals lies above the diagonal: first < second
        merges = mean[np.arange(len(going)), first, second] >= theta
        if not merges.all():
            out[going[~merges]] = member[~merges]
            going, mean, size, member = going[merges], mean[merges], size[merges], member[merges]
            first, second = first[merges], second[merges]
        f = np.arange(len(going))
        n_first, n_second = size[f, first, None], size[f, second, None]
        merged = (n_first * mean[f, first] + n_second * mean[f, second]) / (n_first + n_second)
        merged[f, first] = -np.inf
        mean[f, first] = merged
        mean[f, :, first] = merged
        mean[f, second] = -np.inf
        mean[f, :, second] = -np.inf
        size[f, first] += size[f, second]
        member = np.where(member == second[:, None], first[:, None], member)
    return out


def centre_by_language(vectors: Array, language_of_token: Array, occurring: Array) -> Array:
    """float32 [V, D]: vectors minus the mean of their language's occurring tokens (each type once).

    Args:
        language_of_token [V]: uint8; tokens of no language (255) are a group of their own. occurring [V]: bool.
    """
    centred = np.array(vectors, np.float32)
    for language in np.unique(language_of_token[occurring]):
        group = language_of_token == language
        centred[group] -= centred[group & occurring].mean(axis=0, dtype=np.float64).astype(np.float32)
    return centred


def shuffled_floor(clustering: Clustering, weights: Array, *, seed: int, n_strata: int = 1) -> Clustering:
    """Floor: the same clusters with their tokens shuffled, so that cluster sizes stay and meaning goes.

    Args:
        weights [V]: frequencies. n_strata: tokens change places within this many classes of equal size by frequency
            only (1: any; 10: a frequency-matched null).
    """
    token = np.flatnonzero(clustering.occurring)
    by_frequency = token[np.argsort(-np.asarray(weights)[token], kind="stable")]
    stratum = np.arange(len(token)) * n_strata // max(1, len(token))
    shuffled = by_frequency[np.lexsort((np.random.default_rng(seed).random(len(token)), stratum))]
    vectors = clustering.vectors.copy()
    vectors[by_frequency] = clustering.vectors[shuffled]
    labels = None if clustering.labels is None else clustering.labels.copy()
    if labels is not None and clustering.labels is not None:
        labels[by_frequency] = clustering.labels[shuffled]
    return replace(clustering, vectors=vectors, labels=labels)


def random_floor(clustering: Clustering, weights: Array, *, seed: int, max_tokens: int = 20_000) -> Clustering:
    """Floor: Gaussian vectors of the same dimension, clustered by the same recipe (theta drawn anew)."""
    vectors = np.random.default_rng(seed).standard_normal(clustering.vectors.shape, dtype=np.float32)
    return cluster_tokens(vectors, weights, seed=seed, max_tokens=max_tokens)
