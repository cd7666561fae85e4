"""Entropies, R_mono and clusterings against brute force, scipy and the cut criterion."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage

from glottoscope.features import clustering as clustering_module
from glottoscope.features.clustering import (
    average_linkage,
    batched_average_linkage,
    centre_by_language,
    cluster_at,
    cluster_tokens,
    cosine_threshold,
    cosine_thresholds,
    random_floor,
    row_labels,
    shuffled_floor,
    unit_rows,
)
from glottoscope.features.collect import Groups, group_counts
from glottoscope.features.monosemanticity import entropies, monosemanticity


def random_groups(rng: np.random.Generator, n_features: int, n_tokens: int, rows: int) -> Groups:
    feature, token = rng.integers(0, n_features, rows), rng.integers(0, n_tokens, rows)
    return group_counts(feature, token, rng.integers(1, 9, rows))


def brute_entropy(counts: list[int]) -> float:
    return -sum(c / sum(counts) * math.log(c / sum(counts)) for c in counts)


def partition(labels: NDArray[np.int64]) -> set[frozenset[int]]:
    groups: dict[int, set[int]] = defaultdict(set)
    for i, label in enumerate(labels.tolist()):
        groups[label].add(i)
    return {frozenset(group) for group in groups.values()}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), rows=st.integers(0, 60))
def test_entropies_and_r_equal_brute_force(seed: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    n_features, n_tokens = 5, 12
    tokens = random_groups(rng, n_features, n_tokens, rows)
    cluster = rng.integers(0, 4, n_tokens)
    mono = monosemanticity(tokens, cluster[tokens.group], n_features)
    for f in range(n_features):
        of_token = {int(t): int(c) for i, t, c in zip(tokens.feature, tokens.group, tokens.count, strict=True) if i == f}
        if not of_token:
            assert all(np.isnan(column[f]) for column in (mono.h_token, mono.h_semantic, mono.r))
            assert not mono.single_token[f]
            continue
        of_cluster: Counter[int] = Counter()
        for t, c in of_token.items():
            of_cluster[int(cluster[t])] += c
        h_token, h_semantic = brute_entropy(list(of_token.values())), brute_entropy(list(of_cluster.values()))
        assert math.isclose(mono.h_token[f], h_token, abs_tol=1e-12)
        assert math.isclose(mono.h_semantic[f], h_semantic, abs_tol=1e-12)
        assert mono.single_token[f] == (len(of_token) == 1)
        assert math.isclose(mono.r[f], 1 - h_semantic / h_token if h_token else 1.0, abs_tol=1e-9)
        assert 0 <= mono.r[f] <= 1


def test_single_token_features_have_r_one() -> None:
    # 0: one token; 1: 49 x "the" + 1 x "cat"; 2: two tokens of one cluster; 3: no position
    tokens = Groups(np.array([0, 1, 1, 2, 2]), np.array([7, 1, 2, 3, 4]), np.array([50, 49, 1, 10, 10]))
    mono = monosemanticity(tokens, np.array([7, 1, 2, 3, 3]), 4)
    assert mono.h_token[0] == 0.0 and mono.r[0] == 1.0
    assert mono.single_token.tolist() == [True, False, False, False]
    assert mono.r[1] == 0.0 and mono.r[2] == 1.0 and np.isnan(mono.r[3])
    h = brute_entropy([49, 1])
    np.testing.assert_allclose(mono.effective_tokens[:3], [1, math.exp(h), 2])
    np.testing.assert_allclose(mono.effective_meanings[2], 1)
    assert np.isnan(entropies(tokens, 4)[3])


def blobs(rng: np.random.Generator, n: int, d: int = 6) -> NDArray[np.float32]:
    centres = rng.standard_normal((4, d))
    return unit_rows(centres[rng.integers(0, 4, n)] + 0.6 * rng.standard_normal((n, d)))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(2, 40), theta=st.floats(-0.5, 0.95))
def test_average_linkage_merges_exactly_while_the_mean_cosine_reaches_theta(seed: int, n: int, theta: float) -> None:
    unit = blobs(np.random.default_rng(seed), n)
    labels = average_linkage(unit, theta)
    cosine = (unit @ unit.T).astype(np.float64)
    # the criterion told in words: merge the closest pair of clusters while its mean cosine is >= theta
    clusters = [{i} for i in range(n)]
    while len(clusters) > 1:
        best, a, b = max(
            (cosine[np.ix_(sorted(x), sorted(y))].mean(), i, j)
            for i, x in enumerate(clusters)
            for j, y in enumerate(clusters)
            if i < j
        )
        if best < theta:
            break
        clusters[a] |= clusters.pop(b)
    assert partition(labels) == {frozenset(c) for c in clusters}
    assert all(label == min(np.flatnonzero(labels == label)) for label in labels)
    distance = 1 - cosine[np.triu_indices(n, 1)]
    reference = fcluster(linkage(np.maximum(distance, 0), "average"), 1 - theta, "distance")
    assert partition(labels) == partition(reference)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), theta=st.floats(-0.5, 0.95))
def test_batched_linkage_equals_scipy(seed: int, theta: float) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 13, 9)
    unit = np.stack([blobs(rng, 12) for _ in sizes])
    real = np.arange(12) < sizes[:, None]
    labels = batched_average_linkage(unit, real, theta)
    for f, size in enumerate(sizes):
        np.testing.assert_array_equal(labels[f, :size], average_linkage(unit[f, :size], theta))


def test_features_clustered_one_by_one_equal_scipy_on_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering_module, "BATCH_ELEMENTS", 600)  # several batches of every width
    rng = np.random.default_rng(0)
    vectors, n_features = blobs(rng, 150), 30
    rows = [(f, t) for f in range(n_features) for t in rng.permutation(150)[: rng.integers(0, 1 + 5 * f)]]
    feature, token = np.array(rows).T
    tokens = group_counts(feature, token, rng.integers(1, 30, len(rows)))
    weights = np.ones(150)
    clustering = cluster_tokens(vectors, weights, seed=0, theta=0.5, max_tokens=10)
    assert clustering.labels is None and clustering.n_clusters is None
    labels, unclustered = row_labels(clustering, tokens, n_features, max_tokens=80)
    assert {int(s > 64) for s in np.bincount(feature)} == {0, 1}  # both ways were taken
    for f in range(n_features):
        row = np.flatnonzero(tokens.feature == f)
        order = row[np.lexsort((tokens.group[row], -tokens.count[row]))]
        kept, beyond = np.sort(order[:80]), order[80:]
        if len(kept):
            token = tokens.group[kept]
            np.testing.assert_array_equal(labels[kept], token[average_linkage(clustering.vectors[token], 0.5)])
            assert math.isclose(unclustered[f], tokens.count[beyond].sum() / tokens.count[row].sum())
        np.testing.assert_array_equal(labels[beyond], tokens.group[beyond])
    assert unclustered.max() > 0


def test_global_clustering_leaves_out_tokens_that_do_not_occur() -> None:
    rng = np.random.default_rng(1)
    vectors = blobs(rng, 60)
    vectors[5] = 0
    weights = (rng.random(60) < 0.7) * rng.integers(1, 50, 60)
    weights[5] = 3
    clustering = cluster_tokens(vectors, weights, seed=0, theta=0.6)
    assert clustering.labels is not None
    occurring = np.flatnonzero(weights > 0)
    np.testing.assert_array_equal(clustering.labels[occurring], occurring[average_linkage(vectors[occurring], clustering.theta)])
    np.testing.assert_array_equal(clustering.labels[weights == 0], np.flatnonzero(weights == 0))
    assert clustering.labels[5] == 5  # a zero vector is like nothing
    assert clustering.n_clusters == len(set(clustering.labels[occurring].tolist()))
    tokens = random_groups(rng, 4, 60, 30)
    labels, unclustered = row_labels(clustering, tokens, 4)
    np.testing.assert_array_equal(labels, clustering.labels[tokens.group])
    assert not unclustered.any()


def test_theta_is_the_percentile_over_frequency_weighted_pairs_of_distinct_tokens() -> None:
    rng = np.random.default_rng(2)
    unit, weights = blobs(rng, 30), rng.integers(0, 20, 30)
    p = np.outer(weights, weights).astype(float)
    np.fill_diagonal(p, 0)
    cosine = unit @ unit.T
    order = np.argsort(cosine, axis=None)
    exact = cosine.ravel()[order][np.searchsorted(np.cumsum(p.ravel()[order]) / p.sum(), 0.9)]
    found = cosine_threshold(unit, weights, seed=0, percentile=90)
    assert abs(found - exact) < 0.01
    assert found == cosine_threshold(unit, weights, seed=0, percentile=90) != cosine_threshold(unit, weights, seed=1)
    assert cosine_threshold(unit, np.eye(30)[0], seed=0) == 1.0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), n_tokens=st.integers(2, 60), skew=st.floats(0, 3))
def test_thresholds_are_percentiles_over_the_drawn_pairs(seed: int, n_tokens: int, skew: float) -> None:
    rng = np.random.default_rng(seed)
    unit, n_pairs = blobs(rng, n_tokens), 500
    weights = np.floor(1000 * rng.random(n_tokens) / np.arange(1, n_tokens + 1) ** skew)
    weights[:2] += 1
    cumulative = np.cumsum(weights)
    draw = np.random.default_rng(seed).random((2, n_pairs)) * cumulative[-1]
    a, b = np.searchsorted(cumulative, draw, side="right")
    cosine = np.einsum("pd,pd->p", unit[a[a != b]], unit[b[a != b]])
    if not len(cosine):
        return
    percentiles = (50.0, 95.0, 99.0)
    found = cosine_thresholds(unit, weights, percentiles, seed=seed, n_pairs=n_pairs)
    assert found == [float(np.percentile(cosine, p)) for p in percentiles]
    assert found[1] == cosine_threshold(unit, weights, seed=seed, percentile=95.0, n_pairs=n_pairs)


def test_one_tree_cut_at_several_thresholds_is_several_clusterings(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    unit = blobs(rng, 90)
    weights = (rng.random(90) < 0.8) * rng.integers(1, 50, 90)
    thetas = (-0.2, 0.3, 0.9)
    cuts = cluster_at(unit, weights, thetas)
    assert len({c.n_clusters for c in cuts}) == 3
    for block in (clustering_module.BATCH_ELEMENTS, 700):  # the distances at once, and a few rows at a time
        monkeypatch.setattr(clustering_module, "BATCH_ELEMENTS", block)
        for theta, cut in zip(thetas, cuts, strict=True):
            alone = cluster_tokens(unit, weights, seed=0, theta=theta)
            assert cut.theta == theta and cut.n_clusters == alone.n_clusters
            assert cut.labels is not None and alone.labels is not None
            np.testing.assert_array_equal(cut.labels, alone.labels)
    assert [c.labels for c in cluster_at(unit, weights, thetas, max_tokens=10)] == [None] * 3


def test_centring_uses_each_language_own_occurring_tokens() -> None:
    vectors = np.array([[1, 1], [3, 1], [9, 9], [5, 5], [2, 2]], np.float32)
    language = np.array([0, 0, 0, 1, 255], np.uint8)
    centred = centre_by_language(vectors, language, np.array([True, True, False, True, True]))
    assert centred.tolist() == [[-1, 0], [1, 0], [7, 8], [0, 0], [0, 0]]
    assert vectors[0, 0] == 1


def test_floors_keep_the_sizes_and_lose_the_meaning() -> None:
    rng = np.random.default_rng(3)
    concept = np.repeat(np.arange(20), 5)
    vectors = rng.standard_normal((20, 32))[concept] + 0.1 * rng.standard_normal((100, 32))
    weights = rng.integers(1, 100, 100)
    tokens = Groups(concept, np.arange(100), np.full(100, 10))  # feature i fires on the five tokens of concept i
    for max_tokens in (20_000, 10):  # a global clustering, and features one by one
        clustering = cluster_tokens(vectors, weights, seed=0, theta=0.5, max_tokens=max_tokens)
        shuffled = shuffled_floor(clustering, weights, seed=0)
        matched = shuffled_floor(clustering, weights, seed=0, n_strata=10)
        random = random_floor(clustering, weights, seed=0, max_tokens=max_tokens)
        r = [float(monosemanticity(tokens, row_labels(c, tokens, 20)[0], 20).r.mean()) for c in (clustering, shuffled)]
        assert r[0] > 0.999 and r[1] < 0.3
        assert monosemanticity(tokens, row_labels(matched, tokens, 20)[0], 20).r.mean() < 0.4
        assert monosemanticity(tokens, row_labels(random, tokens, 20)[0], 20).r.mean() < 0.4
        if clustering.labels is not None and shuffled.labels is not None:
            sizes = [sorted(np.unique(c, return_counts=True)[1]) for c in (clustering.labels, shuffled.labels)]
            assert sizes[0] == sizes[1]
        # frequency-matched: a token changes places within its tenth by frequency only
        rank = np.argsort(np.argsort(-weights, kind="stable"))
        moved = (matched.vectors[:, None] == clustering.vectors[None]).all(-1).argmax(axis=1)
        assert (rank // 10 == rank[moved] // 10).all() and (moved != np.arange(100)).any()
