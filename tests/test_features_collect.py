"""Collection: one pass, any chunking, any merge = brute force; histograms and examples = brute force."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import fields
from itertools import pairwise
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glottoscope.errors import InputError
from glottoscope.features import collect as collect_module
from glottoscope.features.collect import (
    BINS,
    Collected,
    FeatureCollector,
    activation_edges,
    activation_histogram,
    first_examples,
    restrict,
    strict_bound,
    token_histogram,
    tokens_of,
    top_examples,
)

N, K, V, G, BLOCK = 7, 3, 5, 2, 4


def random_stream(seed: int, m: int, *, coarse: bool, ordered: bool = False) -> dict[str, Any]:
    """M positions; `coarse` values are multiples of 0.1 in float32, so ties and values at the bound are common."""
    rng = np.random.default_rng(seed)
    values = rng.exponential(1, (m, K)).astype(np.float32)
    if coarse:
        values = (rng.integers(0, 11, (m, K)) * 0.1).astype(np.float32)
    return {
        "values": values,
        "indices": np.argsort(rng.random((m, N)), axis=1)[:, :K],
        "position_ids": (np.arange(m) * 2 if ordered else rng.permutation(2 * m)[:m]).astype(np.int64),
        "tokens": rng.integers(0, V, m).astype(np.uint32),
        "language": rng.integers(0, G, m).astype(np.uint8),
    }


def collect(stream: dict[str, Any], cuts: list[int], *, buffer: int = 1, collectors: int = 1) -> Collected:
    m = len(stream["values"])
    edges = [0, *sorted(c % (m + 1) for c in cuts), m]
    parts = [FeatureCollector(N, G, V, buffer_entries=buffer) for _ in range(collectors)]
    for i, (a, b) in enumerate(pairwise(edges)):
        parts[i % collectors].update(**{name: column[a:b] for name, column in stream.items()})
    for other in parts[1:]:
        parts[0].merge(other)
    return parts[0].finish()


def brute_entries(stream: dict[str, Any], threshold: float = 0.7) -> list[tuple[int, int, int, int, float]]:
    triples = [
        (int(f), int(p), int(t), int(g), v)
        for vs, fs, p, t, g in zip(*(stream[c] for c in stream), strict=True)
        for v, f in zip(vs, fs, strict=True)
        if v > 0
    ]
    maxima: dict[int, float] = defaultdict(float)
    for f, *_, v in triples:
        maxima[f] = max(maxima[f], float(v))
    return sorted(e for e in triples if float(e[4]) > threshold * maxima[e[0]])


def assert_same(a: Collected, b: Collected) -> None:
    for field in fields(Collected):
        x, y = getattr(a, field.name), getattr(b, field.name)
        np.testing.assert_array_equal(x, y, err_msg=field.name)
        assert getattr(x, "dtype", None) == getattr(y, "dtype", None)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    m=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 40), max_size=8),
    buffer=st.integers(1, 60),
    collectors=st.integers(1, 3),
    coarse=st.booleans(),
    ordered=st.booleans(),
)
def test_any_chunking_and_merge_equals_brute_force(
    seed: int, m: int, cuts: list[int], buffer: int, collectors: int, coarse: bool, ordered: bool
) -> None:
    stream = random_stream(seed, m, coarse=coarse, ordered=ordered)
    whole = collect(stream, [])
    assert_same(whole, collect(stream, cuts, buffer=buffer, collectors=collectors))

    entries = list(zip(whole.feature, whole.position, whole.token, whole.language, whole.value, strict=True))
    assert entries == brute_entries(stream)
    active = stream["values"] > 0
    np.testing.assert_array_equal(whole.n_active, np.bincount(stream["indices"][active], minlength=N))
    np.testing.assert_array_equal(whole.alive, whole.n_active > 0)
    assert whole.n_positions_total == m == whole.exposure.sum()
    np.testing.assert_array_equal(whole.exposure, np.bincount(stream["language"], minlength=G))
    np.testing.assert_array_equal(whole.n_positions, np.bincount(whole.feature, minlength=N))


def test_edges_are_half_octaves() -> None:
    edges = activation_edges()
    assert edges.shape == (BINS + 1,)
    assert edges[:4].tolist() == [2.0**-12, 1.5 * 2.0**-12, 2.0**-11, 1.5 * 2.0**-11]
    assert edges[-2:].tolist() == [48.0, 64.0]


def around_an_edge() -> st.SearchStrategy[float]:
    """Float32 at, just below and just above the edges of bins."""
    steps = st.sampled_from([-np.inf, 0.0, np.inf])
    edges = st.sampled_from(activation_edges().tolist())
    return st.builds(lambda e, to: float(np.nextafter(np.float32(e), np.float32(to)) if to else e), edges, steps)


VALUES = st.one_of(
    around_an_edge(), st.floats(0, 100, width=32), st.sampled_from([0.0, -0.0, -1.0, 1e-45, 3e38, np.inf, np.nan, -np.nan])
)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), m=st.integers(0, 12), cut=st.integers(0, 12), seed=st.integers(0, 2**32), narrow=st.sampled_from([4, 2**31]))
def test_activations_are_counted_as_brute_force_counts_them(data: st.DataObject, m: int, cut: int, seed: int, narrow: int) -> None:
    stream = random_stream(seed, m, coarse=False)
    stream["values"] = np.array(data.draw(st.lists(VALUES, min_size=m * K, max_size=m * K)), np.float32).reshape(m, K)
    expected, edges = Counter(), activation_edges()
    for values, features, language in zip(stream["values"], stream["indices"], stream["language"], strict=True):
        for value, feature in zip(values, features, strict=True):
            if value > 0:
                place = sum(float(value) >= e for e in edges) - 1
                expected[int(feature), int(language), min(max(place, 0), BINS - 1)] += 1
    with mock.patch.object(collect_module, "_NARROW", narrow):  # beyond it the counts are wider
        whole, parts = collect(stream, []), collect(stream, [cut], collectors=2)
    assert_same(whole, parts)
    found = activation_histogram(whole)
    keys = list(zip(found.feature, found.language, found.bin, strict=True))
    assert keys == sorted(keys)
    assert dict(zip(keys, found.count, strict=True)) == expected
    assert whole.activation_counts.shape == (N, G, BINS)
    np.testing.assert_array_equal(whole.n_active, whole.activation_counts.sum((1, 2)))


def test_counts_go_beyond_int32() -> None:
    row = {"values": [[1.0]], "indices": [[2]], "position_ids": [0], "tokens": [0], "language": [1]}
    collector = FeatureCollector(N, G, V)
    collector.update(**{name: np.array(value) for name, value in row.items()})
    # As if all that int32 holds had been seen.
    collector._counts_BGN[collector._counts_BGN > 0] = collector.n_positions_total = 2**31 - 1
    collector.update(**{name: np.array(value) for name, value in row.items()})
    assert collector.finish().n_active.tolist() == [0, 0, 2**31, 0, 0, 0, 0]


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 2.0**100, width=32), st.floats(0, 0.99), st.integers(-3, 3))
def test_the_float32_bound_decides_as_float64_does(maximum: float, threshold: float, steps: int) -> None:
    value = np.float32(maximum * threshold)
    for _ in range(abs(steps)):
        value = np.nextafter(value, np.float32(np.inf if steps > 0 else -np.inf))
    bound = strict_bound(np.array([maximum], np.float32), threshold)
    assert bool(value > bound[0]) == (float(value) > threshold * maximum)


def test_order_of_the_stream_does_not_matter() -> None:
    stream = random_stream(1, 50, coarse=True)
    order = np.random.default_rng(0).permutation(50)
    shuffled = {name: column[order] for name, column in stream.items()}
    assert_same(collect(stream, [10, 20]), collect(shuffled, [7, 33], buffer=5))


def test_features_beyond_16_bits_are_sorted_as_the_others() -> None:
    rng = np.random.default_rng(0)
    feature = rng.permutation(2**16 + 50)[:200].reshape(100, 2)
    collector = FeatureCollector(2**16 + 50, 1, 1)
    collector.update(np.ones((100, 2)), feature, np.arange(100), np.zeros(100), np.zeros(100, np.uint8))
    found = collector.finish()
    np.testing.assert_array_equal(found.feature, np.sort(feature.reshape(-1)))
    np.testing.assert_array_equal(found.position, np.argsort(feature.reshape(-1)) // 2)


def test_memory_stays_bounded_by_the_survivors_and_the_buffer() -> None:
    rng = np.random.default_rng(0)
    collector = FeatureCollector(50, 1, 3, buffer_entries=1000)
    held = 0
    for i in range(100):
        values = rng.exponential(1, (200, 4)).astype(np.float32)
        indices = np.argsort(rng.random((200, 50)), axis=1)[:, :4]
        zeros = np.zeros(200, np.int64)
        collector.update(values, indices, np.arange(200) + 200 * i, zeros, zeros)
        held = max(held, collector._n_entries)
    assert len(collector.finish().value) < 1000
    assert held <= 1000 + 200 * 4 < 80_000


def test_external_maxima_restrict_without_touching_our_own() -> None:
    stream = random_stream(3, 60, coarse=False)
    collector = FeatureCollector(N, G, V)
    collector.update(**stream)
    collector.update_max(np.full(N, 0.1))
    collector.update_max(np.full(N, 3.0))
    collected = collector.finish()
    assert_same(restrict(collected, collected.max_activation), collected)
    v1 = restrict(collected, collected.encoder_max)
    np.testing.assert_array_equal(collected.encoder_max, np.maximum(collected.max_activation, 3.0))
    expected = collected.value.astype(float) > 0.7 * collected.encoder_max[collected.feature].astype(float)
    np.testing.assert_array_equal(v1.value, collected.value[expected])
    np.testing.assert_array_equal(v1.alive, collected.alive)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), m=st.integers(1, 40))
def test_histogram_equals_brute_force(seed: int, m: int) -> None:
    collected = collect(random_stream(seed, m, coarse=True), [])
    histogram = token_histogram(collected)
    keys = list(zip(histogram.feature, histogram.token, histogram.language, strict=True))
    assert keys == sorted(keys)
    counts = Counter(zip(collected.feature, collected.token, collected.language, strict=True))
    assert dict(zip(keys, histogram.count, strict=True)) == counts
    tokens = tokens_of(histogram)
    pairs = Counter(zip(collected.feature, collected.token, strict=True))
    assert dict(zip(zip(tokens.feature, tokens.group, strict=True), tokens.count, strict=True)) == pairs


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), m=st.integers(1, 60), n=st.integers(1, 5), each=st.integers(0, 4))
def test_examples_equal_brute_force(seed: int, m: int, n: int, each: int) -> None:
    collected = collect(random_stream(seed, m, coarse=True), [])
    blocks: dict[int, dict[int, tuple[float, int, int]]] = defaultdict(dict)
    for f, p, v, g in zip(collected.feature, collected.position, collected.value, collected.language, strict=True):
        block, t = divmod(int(p), BLOCK)
        best = blocks[int(f)].get(block)
        if best is None or v > best[0]:  # positions rise: the first of equals stays
            blocks[int(f)][block] = (float(v), t, int(g))

    def rows(f: int, chosen: list[int]) -> list[tuple[int, int, int, int, float, int]]:
        found = blocks[f]
        return [(f, rank, b, found[b][1], found[b][0], found[b][2]) for rank, b in enumerate(chosen)]

    first, top, both = [], [], []
    for f, found in sorted(blocks.items()):
        first += rows(f, sorted(found)[:n])
        strongest = sorted(found, key=lambda b: (-found[b][0], b))
        top += rows(f, strongest[:n])
        wanted = set(strongest[:n])
        for g in range(G):
            wanted |= set([b for b in strongest if found[b][2] == g][:each])
        both += rows(f, [b for b in strongest if b in wanted])
    assert list(zip(*first_examples(collected, n, BLOCK), strict=True)) == first
    assert list(zip(*top_examples(collected, n, BLOCK), strict=True)) == top
    assert list(zip(*top_examples(collected, n, BLOCK, each), strict=True)) == both


def test_nothing_collected() -> None:
    collected = FeatureCollector(N, G, V).finish()
    assert not collected.alive.any() and len(token_histogram(collected).count) == 0
    assert len(tokens_of(token_histogram(collected)).count) == len(activation_histogram(collected).count) == 0
    assert len(top_examples(collected, 3, BLOCK).rank) == len(first_examples(collected, 3, BLOCK).rank) == 0


def test_a_threshold_that_nothing_can_pass_is_refused() -> None:
    with pytest.raises(InputError, match="threshold is 1"):
        FeatureCollector(N, G, V, threshold=1.0)
