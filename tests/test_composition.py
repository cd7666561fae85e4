from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glottoscope.corpus.composition import ORDERS, BilingualText
from glottoscope.corpus.switching import Dictionary
from glottoscope.errors import InputError

# Tokens spell out where they come from: 1 BOS, 2 line break; language g has 1000 (g + 1) + ..., so a token tells its
# language; in the parallel text each sentence is one token repeated: 10_000 (g + 1) + 100 article + sentence.
BOS, BREAK, VOCAB = 1, 2, 40_000


def documents(language: int, n: int = 40, length: int = 50) -> list[np.ndarray]:
    return [1000 * (language + 1) + np.arange(i * 7, i * 7 + length) % 997 for i in range(n)]


def articles(n: int = 12, n_pairs: int = 5, languages: int = 2, length: int = 3) -> list[list[tuple[np.ndarray, ...]]]:
    return [
        [
            tuple(np.full(length + g, 10_000 * (g + 1) + 100 * article + sentence) for g in range(languages))
            for sentence in range(n_pairs)
        ]
        for article in range(n)
    ]


def text(**options: Any) -> BilingualText:
    options = {"bos_id": BOS, "seed": 0, "context_length": 16, "separator": [BREAK], **options}
    monolingual = options.pop("monolingual", {"en": documents(0), "ja": documents(1)})
    return BilingualText(monolingual, options.pop("aligned", articles()), options.pop("dictionary", None), **options)


def language_of(tokens: np.ndarray) -> np.ndarray:
    """0, 1, ... for monolingual text, 10, 11, ... for parallel text, -1 for BOS and breaks."""
    tokens = tokens.astype(np.int64)
    return np.where(tokens >= 10_000, tokens // 10_000 + 9, tokens // 1000 - 1)


def kind(row: np.ndarray) -> str:
    found = set(language_of(row).tolist()) - {-1}
    return {frozenset({0}): "en", frozenset({1}): "ja"}.get(frozenset(found), "parallel")


def test_shares_are_exact_and_every_row_starts_with_bos() -> None:
    source = text()
    rows = np.concatenate([source.lm_batch(step, 16) for step in range(20)])
    assert rows.dtype == np.uint32
    assert rows.shape == (320, 16)
    assert (rows[:, 0] == BOS).all()
    kinds = [kind(row) for row in rows]
    assert (kinds.count("parallel"), kinds.count("en"), kinds.count("ja")) == (160, 80, 80)


@settings(deadline=None)
@given(step=st.integers(0, 10_000), share=st.sampled_from([0.0, 0.3, 0.5, 1.0]), batch_size=st.integers(1, 9))
def test_batches_depend_on_seed_and_step_alone(step: int, share: float, batch_size: int) -> None:
    pair = Dictionary(np.array([1001], np.int32), np.array([2001], np.int32), np.array([1.0]))
    options: dict[str, Any] = {"parallel_share": share, "dictionary": pair, "vocab_size": VOCAB}
    fresh, used = text(**options), text(**options)
    for other in (0, 3, step + 50):
        used.lm_batch(other, batch_size)
    np.testing.assert_array_equal(fresh.lm_batch(step, batch_size), used.lm_batch(step, batch_size))


def test_seeds_differ() -> None:
    assert (text(seed=0).lm_batch(0, 8) != text(seed=1).lm_batch(0, 8)).any()


@pytest.mark.parametrize("order", ORDERS)
def test_an_epoch_reads_everything_once(order: str) -> None:
    source = text(order=order, monolingual={"en": documents(0), "ja": documents(1)}, parallel_share=0.5)
    english = np.concatenate(documents(0))
    n_blocks = (english.size + 40) // 15
    rows = source.lm_batch(0, 4 * n_blocks)
    read = rows[[kind(row) == "en" for row in rows]][:, 1:]
    assert read.shape[0] == n_blocks
    left_over = (english.size + 40) - read.size
    read_count, all_count = (np.bincount(x[x != BOS].ravel(), minlength=VOCAB) for x in (read, english))
    assert (read_count <= all_count).all()
    assert (all_count - read_count).sum() <= left_over

    aligned = [t for article in articles() for pair in article for t in pair]
    sentences = np.concatenate(aligned)
    n_tokens = sentences.size + len(aligned) + 12
    rows = source.lm_batch(0, 2 * (n_tokens // 15))
    read = rows[[kind(row) == "parallel" for row in rows]][:, 1:]
    read_count, all_count = (np.bincount(x[x >= 10_000], minlength=VOCAB) for x in (read, sentences))
    assert (read_count <= all_count).all()
    assert (all_count - read_count).sum() <= n_tokens - read.size + 12  # twelve more BOS when alternating


def read_documents(order: str | tuple[str, ...], languages: int = 2) -> list[list[tuple[int, int, int]]]:
    """Whole parallel documents as (language, article, sentence): context long enough for all of them in one block."""
    aligned = articles(languages=languages)
    n_tokens = sum(len(t) + 1 for article in aligned for pair in article for t in pair) + len(aligned)
    monolingual = {f"l{g}": documents(g) * 4 for g in range(languages)}
    source = text(order=order, monolingual=monolingual, aligned=aligned, context_length=n_tokens + 1, parallel_share=1.0)
    row = source.lm_batch(0, 1)[0, 1:]
    out: list[list[tuple[int, int, int]]] = []
    for part in np.split(row, np.flatnonzero(row == BOS))[1:]:
        ends = np.flatnonzero(part == BREAK)
        sentences = [part[end - 1] for end in ends]
        out.append([(int(t) // 10_000 - 1, int(t) % 10_000 // 100, int(t) % 100) for t in sentences])
    return out


@pytest.mark.parametrize("languages", [2, 3])
def test_fixed_order_keeps_one_order_of_languages_per_article(languages: int) -> None:
    found = read_documents("fixed", languages)
    assert len(found) == 12
    for document in found:
        assert len({article for _, article, _ in document}) == 1
        assert [sentence for _, _, sentence in document] == [s for s in range(5) for _ in range(languages)]
        orders = {tuple(lang for lang, _, s in document if s == sentence) for sentence in range(5)}
        assert len(orders) == 1
    assert len({document[0][0] for document in found}) > 1  # both directions occur


def test_random_order_varies_within_articles() -> None:
    found = read_documents("random")
    orders = [{tuple(lang for lang, _, s in d if s == sentence) for sentence in range(5)} for d in found]
    assert set().union(*orders) == {(0, 1), (1, 0)}
    assert sum(len(order) == 2 for order in orders) > 6


@pytest.mark.parametrize("languages", [2, 3])
def test_alternating_changes_the_language_with_every_sentence(languages: int) -> None:
    found = read_documents("alternating", languages)
    whole = [document for document in found if len(document) == 5]
    assert len(whole) >= 12 * languages - 2  # the tail of the epoch may be cut
    for document in whole:
        assert [sentence for _, _, sentence in document] == list(range(5))
        spoken = [lang for lang, _, _ in document]
        assert all(a != b for a, b in pairwise(spoken))
        assert len(set(spoken)) == languages
    assert len({(document[0][0], document[0][1]) for document in whole}) == len(whole)


def test_a_mixture_of_orders_has_each_of_them() -> None:
    found = read_documents(ORDERS)[:-1]
    alternating = [d for d in found if len({s for _, _, s in d}) == len(d)]
    assert 0 < len(alternating) < len(found)


def test_switching_touches_its_share_of_all_rows() -> None:
    # Every token of the parallel text and of the monolingual text has a translation of its own.
    a = np.concatenate([np.arange(1000, 1997), np.arange(10_000, 20_000)]).astype(np.int32)
    b = np.concatenate([np.arange(2000, 2997), np.arange(20_000, 30_000)]).astype(np.int32)
    pairs = Dictionary(a, b, np.ones(a.size))
    plain, switched = text(), text(dictionary=pairs, vocab_size=VOCAB)
    before = np.concatenate([plain.lm_batch(step, 16) for step in range(200)])
    after = np.concatenate([switched.lm_batch(step, 16) for step in range(200)])
    changed_rows = (before != after).any(axis=1)
    for of_kind in ("en", "ja", "parallel"):
        rows = np.array([kind(row) == of_kind for row in before])
        assert changed_rows[rows].mean() == pytest.approx(0.5, abs=0.06)
        words = language_of(before[rows & changed_rows]) >= 0
        assert (before != after)[rows & changed_rows][words].mean() == pytest.approx(0.4, abs=0.02)
    assert ((before == BOS) == (after == BOS)).all()


def test_without_pairs_and_dictionary_it_is_monolingual_one_to_one() -> None:
    source = text(aligned=[], dictionary=None)
    kinds = [kind(row) for row in source.lm_batch(3, 40)]
    assert (kinds.count("en"), kinds.count("ja")) == (20, 20)
    assert source.epochs(40).keys() == {"en", "ja"}
    rows = source.lm_batch(0, 8)
    assert all(len(set(language_of(row).tolist()) - {-1}) == 1 for row in rows)


def test_epochs_counts_readings() -> None:
    source = text()
    blocks_en = (40 * 50 + 40) // 15
    assert source.epochs(4 * blocks_en)["en"] == pytest.approx(1, abs=0.02)


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="language 'ja': 0 tokens"):
        text(monolingual={"en": documents(0), "ja": []})
    with pytest.raises(InputError, match="order 'sideways'"):
        text(order=("fixed", "sideways"))
    with pytest.raises(InputError, match="parallel_share is"):
        text(parallel_share=1.5)
    with pytest.raises(InputError, match="one text for each language"):
        text(aligned=articles(languages=3))
    with pytest.raises(InputError, match="aligned sentences: "):
        text(aligned=articles(n=1, n_pairs=1, length=1), context_length=64)
    with pytest.raises(InputError, match="vocab_size is None"):
        text(dictionary=Dictionary(np.array([1], np.int32), np.array([2], np.int32), np.ones(1)))
