"""Translation-pair phi, its null and guards, and the alignment of hidden states."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glottoscope.features import alignment as alignment_module
from glottoscope.features.alignment import alignment
from glottoscope.features.bilingual import (
    SentenceFirings,
    firing_threshold,
    is_bilingual,
    length_strata,
    merge_firings,
    permute_sentences,
    phi,
    phi_null_exact,
    sentence_firings,
    shift_to_next_sentence,
    supportable,
)


def firings(dense_NP: np.ndarray) -> SentenceFirings:
    feature, sentence = np.nonzero(dense_NP)
    return SentenceFirings(feature.astype(np.int64), sentence.astype(np.int64), *dense_NP.shape)


def dense(sparse: SentenceFirings) -> np.ndarray:
    out = np.zeros((sparse.n_features, sparse.n_sentences), dtype=bool)
    out[sparse.feature, sparse.sentence] = True
    return out


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30), st.floats(0, 1))
def test_phi_is_the_contingency_table(seed: int, n_pairs: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.random((2, 7, n_pairs)) < density
    result = phi(firings(a), firings(b))
    for i in range(7):
        n11, n10 = np.sum(a[i] & b[i]), np.sum(a[i] & ~b[i])
        n01, n00 = np.sum(~a[i] & b[i]), np.sum(~a[i] & ~b[i])
        scale = np.sqrt(float((n11 + n10) * (n01 + n00) * (n11 + n01) * (n10 + n00)))
        if scale == 0:
            assert np.isnan(result.phi[i])
        else:
            assert result.phi[i] == pytest.approx((n11 * n00 - n10 * n01) / scale, abs=1e-12)
    assert (result.n_a == a.sum(1)).all() and (result.n_b == b.sum(1)).all() and (result.n_both == (a & b).sum(1)).all()


def test_firings_need_strength_a_counted_position_and_count_once() -> None:
    threshold = firing_threshold([4.0, 1.0, 0.0])
    assert threshold.tolist() == [2.0, 0.5, np.inf]
    values = np.array([[2.0, 0.6], [2.1, 0.0], [3.0, 0.5], [9.0, 9.0]])
    indices = np.array([[0, 1], [0, 2], [0, 1], [2, 0]])
    got = sentence_firings(values, indices, [0, 1, 1, 1], threshold, [True, True, True, False], n_sentences=3)
    # Feature 0 is at its threshold in sentence 0 (not above), twice above in sentence 1; the last position is neutral.
    assert dense(got).tolist() == [[False, True, False], [True, False, False], [False] * 3]
    assert len(got.feature) == 2


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), m=st.integers(0, 40), k=st.integers(1, 4), cut=st.integers(0, 40))
def test_firings_and_their_chunks_equal_brute_force(seed: int, m: int, k: int, cut: int) -> None:
    rng = np.random.default_rng(seed)
    n_features, n_sentences = 6, 5
    values = rng.integers(0, 4, (m, k)).astype(np.float32)
    indices = np.argsort(rng.random((m, n_features)), axis=1)[:, :k]
    sentence, counted = rng.integers(0, n_sentences, m), rng.random(m) < 0.7
    threshold = np.array([0.0, 0.5, 1.0, 2.0, 2.5, np.inf])
    expected = np.zeros((n_features, n_sentences), bool)
    for i in range(m):
        for value, feature in zip(values[i], indices[i], strict=True):
            expected[feature, sentence[i]] |= counted[i] and value > 0 and value > threshold[feature]
    parts = [
        sentence_firings(values[s], indices[s], sentence[s], threshold, counted[s], n_sentences=n_sentences)
        for s in (slice(None), slice(0, cut), slice(cut, None))
    ]
    for found in (parts[0], merge_firings(parts[1:])):
        feature, where = np.nonzero(expected)
        assert found.feature.tolist() == feature.tolist() and found.sentence.tolist() == where.tolist()
        assert (found.n_features, found.n_sentences) == (n_features, n_sentences)


def test_chunks_merge_to_the_whole() -> None:
    rng = np.random.default_rng(0)
    values, indices = rng.random((50, 4)), rng.integers(0, 9, (50, 4))
    sentence = np.sort(rng.integers(0, 6, 50))
    parts = [
        sentence_firings(values[s], indices[s], sentence[s], np.full(9, 0.5), np.ones(50, bool)[s], n_sentences=6)
        for s in (slice(0, 17), slice(17, 50))
    ]
    whole = sentence_firings(values, indices, sentence, np.full(9, 0.5), np.ones(50, bool), n_sentences=6)
    merged = merge_firings(parts)
    assert (merged.keys() == whole.keys()).all()


def corpus(seed: int = 0, n: int = 1000) -> dict[str, np.ndarray]:
    """Lengths of aligned sentences (the second language 1.6 x as long, with noise) and which hold four digits."""
    rng = np.random.default_rng(seed)
    length_a = rng.integers(4, 60, n)
    length_b = np.maximum(2, np.round(1.6 * length_a * np.exp(0.15 * rng.standard_normal(n)))).astype(int)
    return {"a": length_a, "b": length_b, "digits": rng.random(n) < 0.2, "concept": rng.random(n) < 0.1}


def activations(lengths: np.ndarray, fires_PN: np.ndarray, neutral_N: list[bool]) -> SentenceFirings:
    """Positions of sentences as an SAE gives them; feature i fires at one position of its sentences, neutral or not."""
    sentence = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    values = np.zeros((len(sentence), fires_PN.shape[1]))
    counted = np.ones(len(sentence), bool)
    for i in range(fires_PN.shape[1]):
        rows = starts + (i % np.maximum(lengths - 1, 1))
        if neutral_N[i]:
            rows = starts + lengths - 1  # digits stand at the end, and are neutral tokens
            counted[rows] = False
        values[rows, i] = fires_PN[:, i]
    indices = np.tile(np.arange(fires_PN.shape[1]), (len(sentence), 1))
    threshold = np.full(fires_PN.shape[1], 0.5)
    return sentence_firings(values, indices, sentence, threshold, counted, n_sentences=len(lengths))


def test_digits_and_long_sentences_are_not_bilingual_but_a_concept_is() -> None:
    data = corpus()
    # Feature 0: four digits; 1: longer than the median; 2: a concept, .9 translated; 3: the longest tenth.
    rng = np.random.default_rng(1)
    concept_b = data["concept"] & (rng.random(1000) < 0.9)

    def fires(side: str, concept: np.ndarray) -> np.ndarray:
        length = data[side]
        return np.stack([data["digits"], length > np.median(length), concept, length > np.quantile(length, 0.9)], 1)

    neutral = [True, False, False, False]
    a = activations(data["a"], fires("a", data["concept"]), neutral)
    b = activations(data["b"], fires("b", concept_b), neutral)
    strata = length_strata(data["a"], data["b"])
    pair = phi(a, b)
    null = phi_null_exact(a, b, strata)
    flags = is_bilingual(np.array(["mixed"] * 4), pair.phi, null, pair.n_a, pair.n_b)
    assert flags.tolist() == [False, False, True, False]
    assert np.isnan(pair.phi[0]) and pair.n_a[0] == 0  # only neutral positions
    assert pair.phi[1] > 0.7 and pair.phi[3] > 0.4  # it takes the null to keep length out
    # Without the neutral mask digits would pass: the guard is what stops them.
    unmasked = activations(data["a"], fires("a", data["concept"]), [False] * 4)
    unmasked_b = activations(data["b"], fires("b", concept_b), [False] * 4)
    assert phi(unmasked, unmasked_b).phi[0] > 0.9


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.15, 0.3])
def test_length_features_pass_at_no_cut(noise: float) -> None:
    rng = np.random.default_rng(7)
    length_a = np.maximum(2, np.round(np.exp(3 + 0.5 * rng.standard_normal(1000))))
    length_b = np.maximum(2, np.round(1.6 * length_a * np.exp(noise * rng.standard_normal(1000))))
    cuts = (0.05, 0.3, 0.5, 0.7, 0.9, 0.95, 0.98, 0.985)
    a, b = (firings(np.stack([x > np.quantile(x, cut) for cut in cuts])) for x in (length_a, length_b))
    pair = phi(a, b)
    assert pair.n_a.min() >= 10 and pair.n_b.min() >= 10 and (pair.phi > 0.3).all()
    null = phi_null_exact(a, b, length_strata(length_a, length_b))
    assert not is_bilingual(np.full(len(cuts), "mixed"), pair.phi, null, pair.n_a, pair.n_b).any()
    assert (pair.phi - null).max() < 0.2


def test_a_null_of_small_strata_takes_nothing_from_a_real_feature() -> None:
    real = firings(np.random.default_rng(0).random((200, 1000)) < 0.1)
    null = phi_null_exact(real, real, length_strata(np.arange(1000), np.arange(1000)))
    assert phi(real, real).phi == pytest.approx(np.ones(200))
    assert abs(null.mean()) < 0.01


def test_flag_needs_mixed_enough_sentences_and_a_defined_phi() -> None:
    language = np.array(["mixed", "en", "mixed", "mixed", "mixed"])
    score = np.array([0.5, 0.9, np.nan, 0.9, 0.5])
    null = np.array([0.1, 0.0, np.nan, 0.0, 0.11])
    n_a, n_b = np.array([10, 50, 0, 50, 50]), np.array([10, 50, 50, 9, 50])
    assert is_bilingual(language, score, null, n_a, n_b).tolist() == [True, False, False, False, False]
    assert supportable(n_a, n_b).tolist() == [True, True, False, False, True]


def random_pair(seed: int, n_features: int = 40, n_pairs: int = 300) -> tuple[SentenceFirings, SentenceFirings]:
    a = np.random.default_rng(seed).random((n_features, n_pairs)) < 0.15
    return firings(a), firings(a ^ (np.random.default_rng(seed + 1).random(a.shape) < 0.02))


def drawn_null(a: SentenceFirings, b: SentenceFirings, strata: np.ndarray, *, n_permutations: int, seed: int) -> np.ndarray:
    """Mean phi [N] over shufflings within strata: the null by Monte Carlo."""
    rng = np.random.default_rng(seed)
    return np.mean([phi(a, permute_sentences(b, rng, strata)).phi for _ in range(n_permutations)], axis=0)


def test_exact_null_is_the_mean_over_permutations() -> None:
    a, b = random_pair(0)
    strata = length_strata(np.arange(300), np.arange(300))
    exact = phi_null_exact(a, b, strata)
    assert np.abs(drawn_null(a, b, strata, n_permutations=2000, seed=1) - exact).max() < 0.01


def test_permutations_stay_in_their_strata() -> None:
    strata = np.array([0, 1, 0, 2, 1, 0, 1, 2])
    identity = SentenceFirings(np.zeros(8, np.int64), np.arange(8), 1, 8)
    rng = np.random.default_rng(0)
    seen = np.zeros((8, 8), int)
    for _ in range(400):
        moved = permute_sentences(identity, rng, strata).sentence
        assert sorted(moved) == list(range(8)) and (strata[moved] == strata).all()
        seen[np.arange(8), moved] += 1
    assert seen.diagonal().sum() == 0  # no true pair is left
    assert seen[0, [2, 5]].min() > 150 and seen[3, 7] == 400  # uniform inside


def test_strata_are_equal_groups_of_length() -> None:
    data = corpus()
    strata = length_strata(data["a"], data["b"], n=10)
    assert np.bincount(strata).tolist() == [100] * 10
    means = [data["a"][strata == s].mean() for s in range(10)]
    assert means == sorted(means)
    assert length_strata([3, 1], [1, 3], n=10).max() < 2


def test_shuffled_pairs_and_next_sentences_give_no_bilingual_features() -> None:
    a, b = random_pair(3, n_features=300, n_pairs=1000)
    mixed = np.array(["mixed"] * 300)
    null = phi_null_exact(a, b, np.zeros(1000, np.int64))

    def n_bilingual(other: SentenceFirings) -> int:
        result = phi(a, other)
        return int(is_bilingual(mixed, result.phi, null, result.n_a, result.n_b).sum())

    article = np.repeat(np.arange(20), 50)
    assert n_bilingual(b) == 300
    assert n_bilingual(permute_sentences(b, np.random.default_rng(0))) == 0
    assert n_bilingual(shift_to_next_sentence(b, article)) == 0


def test_next_sentence_closes_each_article() -> None:
    b = SentenceFirings(np.zeros(5, np.int64), np.arange(5), 1, 5)
    assert shift_to_next_sentence(b, ["x", "y", "x", "x", "z"]).sentence.tolist() == [3, 1, 0, 2, 4]  # x: 0, 2, 3


def test_full_size_is_sparse_in_time_and_memory() -> None:
    rng = np.random.default_rng(0)
    n_features, n_pairs, n_positions = 32768, 1000, 30_000
    sides = []
    tracemalloc.start()
    clock = time.perf_counter()
    for _ in range(2):
        sides.append(
            sentence_firings(
                rng.random((n_positions, 32), dtype=np.float32),
                rng.integers(0, n_features, (n_positions, 32), dtype=np.int32),
                np.sort(rng.integers(0, n_pairs, n_positions)),
                np.full(n_features, 0.8),
                np.ones(n_positions, bool),
                n_sentences=n_pairs,
            )
        )
    strata = length_strata(rng.integers(5, 50, n_pairs), rng.integers(5, 50, n_pairs))
    a, b = sides
    result = phi(a, b)
    null = phi_null_exact(a, b, strata)
    seconds = time.perf_counter() - clock
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.phi.shape == null.shape == (n_features,)
    assert peak < 120e6 and seconds < 20  # a dense float [P, N] is 262 MB


def test_alignment_finds_translations_and_only_them() -> None:
    rng = np.random.default_rng(0)
    meaning = rng.standard_normal((400, 16))
    a = meaning + 0.3 * rng.standard_normal((400, 16)) + 5  # each language sits at its own place
    b = 3 * meaning + 0.9 * rng.standard_normal((400, 16)) - 7
    articles = np.repeat(np.arange(40), 10)
    value, low, high = alignment(a, b, articles, seed=0)
    assert value is not None and low is not None and high is not None
    assert low < value < high and value > 0.8
    assert alignment(a, b, articles, seed=0) == (value, low, high)
    shuffled = alignment(a, b[rng.permutation(400)], articles, seed=0)
    assert abs(shuffled.value or 0) < 0.05
    assert shuffled.low is not None and shuffled.high is not None and shuffled.low < 0 < shuffled.high


def test_alignment_is_brute_force() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 9, 4))
    unit_a, unit_b = ((x - x.mean(0)) / np.linalg.norm(x - x.mean(0), axis=1, keepdims=True) for x in (a, b))
    cosine = unit_a @ unit_b.T
    expected = np.diag(cosine).mean() - cosine[~np.eye(9, dtype=bool)].mean()
    result = alignment(a, b, seed=0)
    assert result.value == pytest.approx(expected)
    assert alignment(a, b, np.zeros(9), seed=0) == (pytest.approx(expected), None, None)
    assert alignment(a[:1], b[:1], seed=0) == (None, None, None)


def test_draws_in_chunks_are_the_kept_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, 60, 4))
    whole = alignment(a, b, np.arange(60) // 3, n_boot=200, seed=5)
    monkeypatch.setattr(alignment_module, "CHUNK_ENTRIES", 20 * 7)
    assert alignment(a, b, np.arange(60) // 3, n_boot=200, seed=5) == pytest.approx(whole, rel=1e-9)
