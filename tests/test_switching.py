from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glottoscope.corpus import switching
from glottoscope.corpus.switching import Dictionary, mine_dictionary, swap_tokens, word_tokens
from glottoscope.errors import InputError

KYOTO = Path(__file__).parents[2] / "shared" / "corpora" / "kyoto" / "parallel.train.jsonl"
SENTENCES = st.lists(st.lists(st.integers(0, 11), max_size=6), min_size=1, max_size=25)


def brute_force(
    pairs_a: list[list[int]],
    pairs_b: list[list[int]],
    is_word: np.ndarray,
    min_phi: float,
    min_count: int,
    shared: float,
) -> list[tuple[int, int, float]]:
    n, size = len(pairs_a), is_word.size
    has = [np.array([[v in s for v in range(size)] for s in side], dtype=float) for side in (pairs_a, pairs_b)]
    count = [side.sum(axis=0) for side in has]
    candidates = [
        [v for v in range(size) if is_word[v] and own[v] >= min_count and other[v] <= shared * own[v]]
        for own, other in (count, count[::-1])
    ]

    def phi(a: int, b: int) -> float:
        n_a, n_b, both = count[0][a], count[1][b], float(has[0][:, a] @ has[1][:, b])
        spread = np.sqrt(n_a * (n - n_a)) * np.sqrt(n_b * (n - n_b))
        return (n * both - n_a * n_b) / spread if spread > 0 else -np.inf

    def best(scores: list[tuple[int, float]]) -> int:
        return max(scores, key=lambda item: item[1])[0]  # max keeps the first of equals

    found = []
    for a in candidates[0]:
        if not candidates[1]:
            break
        b = best([(b, phi(a, b)) for b in candidates[1]])
        if phi(a, b) > min_phi and best([(x, phi(x, b)) for x in candidates[0]]) == a:
            found.append((a, b, phi(a, b)))
    return found


@settings(deadline=None)
@given(pairs_a=SENTENCES, pairs_b=SENTENCES, words=st.integers(0, 2**12 - 1), shared=st.sampled_from([0.1, 0.5, 9.0]))
@pytest.mark.parametrize("chunk_entries", [1, 1 << 22])
def test_mining_equals_brute_force(
    pairs_a: list[list[int]], pairs_b: list[list[int]], words: int, shared: float, chunk_entries: int
) -> None:
    n = min(len(pairs_a), len(pairs_b))
    pairs_a, pairs_b = pairs_a[:n], pairs_b[:n]
    is_word = np.array([words >> v & 1 for v in range(12)], dtype=bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(switching, "CHUNK_ENTRIES", chunk_entries)
        mined = mine_dictionary(pairs_a, pairs_b, vocab_size=12, is_word=is_word, min_phi=0.25, min_count=2, max_shared=shared)
    expected = brute_force(pairs_a, pairs_b, is_word, 0.25, 2, shared)
    assert list(zip(mined.a.tolist(), mined.b.tolist(), strict=True)) == [(a, b) for a, b, _ in expected]
    np.testing.assert_allclose(mined.phi, [phi for _, _, phi in expected])
    assert mined.a.dtype == mined.b.dtype == np.int32


def test_planted_translations_are_found_and_shared_tokens_are_not() -> None:
    rng = np.random.default_rng(0)
    concepts = [rng.choice(20, size=4, replace=False) for _ in range(2000)]
    # English 0..19, Japanese 20..39, and a name 40 that both languages write alike; every sentence ends with 41.
    pairs_a = [[*concept.tolist(), *([40] if 0 in concept else []), 41] for concept in concepts]
    pairs_b = [[*(concept + 20).tolist(), *([40] if 0 in concept else []), 41] for concept in concepts]
    mined = mine_dictionary(pairs_a, pairs_b, vocab_size=42, is_word=np.ones(42, dtype=bool))
    assert mined.a.tolist() == list(range(20))
    assert mined.b.tolist() == list(range(20, 40))
    np.testing.assert_allclose(mined.phi, 1)


def test_word_tokens_are_letters_alone() -> None:
    pieces = [
        b" Kyoto",
        "京都".encode(),
        "カード".encode(),
        b"s",
        "café".encode(),
        b" ",
        b"",
        b" 1",
        b"a1",
        b".",
        b"'s",
    ]
    pieces += ["京".encode()[:2], "、".encode(), b"  a", "１".encode()]
    assert word_tokens(pieces).tolist() == [True] * 5 + [False] * 10


PARTNERS = Dictionary(np.array([2, 3], np.int32), np.array([7, 8], np.int32), np.array([0.5, 0.9])).partners(10)


@given(st.lists(st.integers(0, 9), min_size=1), st.integers(0, 2**32))
def test_switching_with_certainty_is_its_own_inverse(tokens: list[int], seed: int) -> None:
    original = np.array(tokens, dtype=np.uint32).reshape(1, -1)
    before = original.copy()
    rng = np.random.default_rng(seed)
    switched = swap_tokens(original, PARTNERS, 1.0, rng)
    swap = {2: 7, 7: 2, 3: 8, 8: 3}
    assert switched.tolist() == [[swap.get(token, token) for token in tokens]]
    assert switched.dtype == np.uint32
    np.testing.assert_array_equal(original, before)
    np.testing.assert_array_equal(swap_tokens(switched, PARTNERS, 1.0, rng), original)
    np.testing.assert_array_equal(swap_tokens(original, PARTNERS, 0.0, rng), original)


def test_switching_reaches_its_probability_in_both_directions_and_follows_its_seed() -> None:
    tokens = np.tile(np.array([2, 8, 5]), (20_000, 1))
    switched = swap_tokens(tokens, PARTNERS, 0.4, np.random.default_rng(1))
    share = (switched != tokens).mean(axis=0)
    assert share == pytest.approx([0.4, 0.4, 0], abs=0.015)
    np.testing.assert_array_equal(switched, swap_tokens(tokens, PARTNERS, 0.4, np.random.default_rng(1)))


def test_bad_input_is_named() -> None:
    words = np.ones(4, dtype=bool)
    with pytest.raises(InputError, match="differ in number: 1 and 2"):
        mine_dictionary([[1]], [[1], [2]], vocab_size=4, is_word=words)
    with pytest.raises(InputError, match="is_word"):
        mine_dictionary([[1]], [[1]], vocab_size=5, is_word=words)
    with pytest.raises(InputError, match="outside the vocabulary of 4"):
        mine_dictionary([[1]], [[9]], vocab_size=4, is_word=words)


@pytest.mark.skipif(not KYOTO.exists(), reason="needs the Kyoto corpus in shared/corpora")
def test_words_of_the_kyoto_corpus_are_translated() -> None:
    with open(KYOTO, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, 12_000)]
    english = [row["en"].replace(".", " .").replace(",", " ,").split() for row in rows]
    japanese = [list(row["ja"]) for row in rows]  # one character a token: no tokenizer needed
    vocabulary = {word: index for index, word in enumerate(sorted({w for s in english + japanese for w in s}))}
    is_word = word_tokens([word.encode() for word in vocabulary])
    mined = mine_dictionary(
        [[vocabulary[word] for word in sentence] for sentence in english],
        [[vocabulary[word] for word in sentence] for sentence in japanese],
        vocab_size=len(vocabulary),
        is_word=is_word,
    )
    words = list(vocabulary)
    found = {(words[a], words[b]) for a, b in zip(mined.a, mined.b, strict=True)}
    assert {("tea", "茶"), ("water", "水"), ("white", "白"), ("Castle", "城"), ("century", "紀")} <= found
    assert len(found) > 300
    assert all(text.isalpha() for pair in found for text in pair)
