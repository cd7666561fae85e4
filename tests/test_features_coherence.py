"""Coherence: the exact expectation against enumeration, exact integers and Monte Carlo; floors; short features."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glottoscope.features.clustering import cluster_tokens, row_labels, shuffled_floor
from glottoscope.features.coherence import coherence, expected_entropy_terms
from glottoscope.features.collect import Groups, group_counts


def groups_of(*counts: list[int]) -> Groups:
    feature = np.concatenate([np.full(len(c), i) for i, c in enumerate(counts)]).astype(np.int64)
    group = np.concatenate([np.arange(len(c)) for c in counts]).astype(np.int64)
    return Groups(feature, group, np.concatenate(counts).astype(np.int64))


def entropy(labels: tuple[int, ...]) -> float:
    p = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(p * np.log(p)).sum())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(2, 5))
def test_the_expectation_equals_the_mean_over_all_draws(counts: list[int], draws: int) -> None:
    labels = [i for i, c in enumerate(counts) for _ in range(c)]
    if len(labels) < draws:
        return
    mean = np.mean([entropy(draw) for draw in combinations(labels, draws)])
    found = coherence(groups_of(counts), 1, draws=draws, min_positions=1)
    assert math.isclose(found.value[0], 1 - mean / math.log(draws), abs_tol=1e-9)
    assert not found.short[0]


def test_the_expectation_equals_monte_carlo() -> None:
    counts = [400, 60, 30, 5, 3, 1, 1]
    rng = np.random.default_rng(0)
    draws = rng.multivariate_hypergeometric(counts, 50, size=20_000) / 50
    h = -np.sum(draws * np.log(np.where(draws > 0, draws, 1)), axis=1)
    found = coherence(groups_of(counts), 1).value[0]
    assert abs(found - (1 - h.mean() / math.log(50))) < 5 * h.std() / math.sqrt(len(h)) / math.log(50)


@pytest.mark.parametrize("n", [50, 51, 1000, 10**6, 10**9])
def test_terms_equal_exact_integer_arithmetic_at_every_size(n: int) -> None:
    c = sorted({min(max(x, 1), n) for x in (1, 2, 49, 50, n // 3, n // 2, n - 1, n)})
    expected = [
        sum(
            float(Fraction(math.comb(k, x) * math.comb(n - k, 50 - x), math.comb(n, 50))) * -(x / 50) * math.log(x / 50)
            for x in range(1, 51)
        )
        for k in c
    ]
    found = expected_entropy_terms(np.full(len(c), n), np.array(c), 50)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-14)


def test_extremes_and_short_features() -> None:
    found = coherence(
        groups_of([80], [1] * 80, [1] * 50, [1] * 20, [20], [10, 10], [9], [5, 5]),
        9,
    )
    np.testing.assert_allclose(found.value[:6], [1, 0, 0, 0, 1, 1 - math.log(2) / math.log(20)], atol=1e-12)
    assert math.isnan(found.value[6]) and math.isnan(found.value[8])
    assert math.isclose(found.value[7], 1 - math.log(2) / math.log(10))
    assert found.short.tolist() == [False, False, False, True, True, True, False, True, False]


def test_more_positions_of_the_same_mixture_leave_coherence_where_it_is() -> None:
    mixture = np.array([10, 5, 3, 1, 1])
    small, large = coherence(groups_of((mixture * 10).tolist(), (mixture * 10_000).tolist()), 2).value
    assert abs(small - large) < 0.02


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_merging_groups_never_lowers_coherence(seed: int) -> None:
    rng = np.random.default_rng(seed)
    fine = group_counts(rng.integers(0, 4, 80), rng.integers(0, 15, 80), rng.integers(1, 6, 80))
    coarse = group_counts(fine.feature, fine.group % 4, fine.count)
    a, b = coherence(fine, 4), coherence(coarse, 4)
    assert np.all((b.value >= a.value - 1e-12) | np.isnan(a.value))
    np.testing.assert_array_equal(a.short, b.short)


def test_shuffled_clusters_are_the_floor() -> None:
    rng = np.random.default_rng(0)
    concept = np.repeat(np.arange(20), 5)
    vectors = rng.standard_normal((20, 32))[concept] + 0.1 * rng.standard_normal((100, 32))
    weights = np.ones(100)
    tokens = Groups(concept, np.arange(100), np.full(100, 20))
    clustering = cluster_tokens(vectors, weights, seed=0, theta=0.5)
    value = {}
    for name, space in (("real", clustering), ("shuffled", shuffled_floor(clustering, weights, seed=0))):
        labels = row_labels(space, tokens, 20)[0]
        value[name] = coherence(group_counts(tokens.feature, labels, tokens.count), 20).value.mean()
    on_tokens = coherence(tokens, 20).value.mean()
    assert value["real"] > 0.999 and on_tokens <= value["shuffled"] < on_tokens + 0.15
