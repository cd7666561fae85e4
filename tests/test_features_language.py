"""Language rules: v1 exactly as published, document and script rules, neutral tokens, Wilson interval."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from glottoscope.errors import InputError
from glottoscope.features.collect import FeatureCollector
from glottoscope.features.language import (
    NEUTRAL,
    Z_95,
    classify,
    count_languages,
    document_languages,
    neutral_tokens,
    script_language,
    script_languages,
    token_language,
    wilson,
)
from glottoscope.features.v1 import (
    v1_class,
    v1_classify,
    v1_counts,
    v1_example_language,
    v1_examples,
    v1_position_language,
    v1_token_tables,
)

SHARED = Path(__file__).parents[2] / "shared" / "features"


@pytest.mark.parametrize("step", [10, 1000, 100000])
def test_v1_reproduces_the_published_counts(step: int) -> None:
    path = SHARED / f"llm-jp-3-1.8b_layer12_step{step}.jsonl"
    if not path.exists():
        pytest.skip("the published features are not beside this project")
    classes: Counter[str] = Counter()
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found = Counter(v1_example_language(e["tokens"], e["activations"]) for e in row["examples"])
        assert {"en": found["en"], "ja": found["ja"]} == row["language"], row["feature"]
        classes[v1_class(found["en"], found["ja"])] += 1
    assert (
        classes
        == {
            10: {"mixed": 67, "ja": 20, "en": 13},
            1000: {"mixed": 18, "ja": 29, "en": 51},
            100000: {"mixed": 7, "ja": 42, "en": 51},
        }[step]
    )


@pytest.mark.parametrize(
    ("tokens", "at", "language"),
    [
        (["the", "猫"], 0, "en"),
        (["the", "猫"], 1, "ja"),
        (["the", " 7", "5"], 2, "en"),  # again and again
        (["猫", " 7", "5"], 2, "ja"),
        (["7", "the", "猫"], 0, "ja"),  # position 0 wraps to the last
        (["7", "猫", "the", "5"], 0, "en"),  # and goes on from there
        (["the", ":"], 1, "ja"),
        (["the", "é"], 1, "ja"),
        (["the", "<0x0A>"], 1, "ja"),
        (["the", " "], 1, "ja"),  # nothing is left after strip
        (["猫", ' (Mr. O\'Neil-"x"),'], 1, "en"),
        (["the", "７"], 1, "ja"),  # a full-width digit is no digit to the rule
        (["7", "5"], 0, "ja"),
    ],
)
def test_v1_example_language(tokens: list[str], at: int, language: str) -> None:
    assert v1_example_language(tokens, [float(i == at) for i in range(len(tokens))]) == language


def test_v1_takes_the_first_of_equal_maxima() -> None:
    assert v1_example_language(["the", "猫"], [1.0, 1.0]) == "en"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_v1_position_language_equals_the_rule_told_in_words(seed: int) -> None:
    rng = np.random.default_rng(seed)
    english, digits = v1_token_tables(["a", "猫", "1", "2"])
    tokens, mask = rng.integers(0, 4, (6, 5)), rng.random((6, 5)) < 0.8
    found = v1_position_language(tokens, english, digits, mask)
    for b, row in enumerate(tokens):
        seen = [int(v) for v, m in zip(row, mask[b], strict=True) if m]
        for i, t in enumerate(np.flatnonzero(mask[b])):
            j = i
            for _ in seen:
                if not digits[seen[j]]:
                    break
                j -= 1  # -1 is the last one: the wrap
            assert found[b, t] == (0 if english[seen[j]] else 1)


def test_v1_class_is_strict() -> None:
    assert [v1_class(*c) for c in ((46, 4), (45, 5), (4, 46), (5, 45), (1, 0))] == ["en", "mixed", "ja", "mixed", "en"]
    with pytest.raises(InputError, match="without examples"):
        v1_class(0, 0)
    with pytest.raises(InputError, match="2 tokens and 1 activations"):
        v1_example_language(["a", "b"], [1.0])


def test_v1_in_the_stream_equals_v1_on_examples() -> None:
    texts = ["cat", "猫", "7", ":", "the"]
    rng = np.random.default_rng(0)
    b, t, n, k = 80, 6, 9, 3
    tokens = rng.integers(0, len(texts), (b, t))
    values = rng.exponential(1, (b * t, k)).astype(np.float32)
    indices = np.argsort(rng.random((b * t, n)), axis=1)[:, :k]
    collector = FeatureCollector(n, 2, len(texts))
    collector.update(values, indices, np.arange(b * t), tokens.reshape(-1), np.zeros(b * t, np.uint8))
    maxima = collector.max_activation * rng.choice([0.5, 1.0, 1.2, 2.0], n).astype(np.float32)
    collector.update_max(maxima)
    collected = collector.finish()

    dense = np.zeros((b * t, n), np.float32)
    np.put_along_axis(dense, indices, values, axis=1)
    dense = dense.reshape(b, t, n)
    reference = np.maximum(dense.max(axis=(0, 1)), maxima).astype(np.float64)
    expected = np.zeros((n, 2), np.int64)
    for f in range(n):
        blocks = [i for i in range(b) if (dense[i, :, f] > 0.7 * reference[f]).any()][:10]
        for i in blocks:
            language = v1_example_language([texts[v] for v in tokens[i]], dense[i, :, f].tolist())
            expected[f, ("en", "ja").index(language)] += 1
    position_language = v1_position_language(tokens, *v1_token_tables(texts))
    counts = v1_counts(v1_examples(collected, t, n=10), position_language, n)
    np.testing.assert_array_equal(counts, expected)
    names = v1_classify(np.array([[46, 4], [45, 5], [0, 3], [0, 0], [9, 9]]), np.array([1, 1, 1, 1, 0], bool))
    assert names.tolist() == ["en", "mixed", "ja", "unclassified", "dead"]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.floats(0, 1))
def test_wilson_solves_its_own_equation(n: int, part: float) -> None:
    share = round(part * n) / n
    low, high = (float(x[0]) for x in wilson(np.array([share]), np.array([n])))

    def score(p: float) -> float:  # the interval holds every p that a score test would not reject
        return (share - p) ** 2 - Z_95**2 * p * (1 - p) / n

    assert 0 <= low <= share <= high <= 1
    if share > 0:
        assert math.isclose(low, brentq(score, 0, share - 1e-12), abs_tol=1e-9)  # pyright: ignore[reportArgumentType]
    if share < 1:
        assert math.isclose(high, brentq(score, share + 1e-12, 1), abs_tol=1e-9)  # pyright: ignore[reportArgumentType]


def test_classes_in_their_order() -> None:
    n_lang = np.array([[99, 0], [1, 1], [10, 9], [19, 1], [18, 2], [1, 19], [30, 30], [0, 0]])
    n_neutral = np.array([0, 2, 0, 0, 19, 0, 60, 5])
    alive = np.array([False, *[True] * 7])
    found = classify(n_lang, n_neutral, np.array([500, 500]), alive, ("en", "ja"))
    expected = ["dead", "neutral", "unclassified", "en", "mixed", "ja", "neutral", "neutral"]
    assert found.language.tolist() == expected  # 18 of 20 is .9 and not above it
    assert np.isnan(found.share[-1]) and found.share[3] == 0.95


def test_shares_are_rates_under_unequal_exposure() -> None:
    found = classify(np.array([[90, 90]]), np.zeros(1), np.array([100, 1000]), np.ones(1, bool), ("en", "ja"))
    assert math.isclose(found.share[0], 10 / 11) and found.language[0] == "en"


def test_a_language_code_may_not_be_a_class_and_every_language_needs_text() -> None:
    counts = (np.zeros((1, 2)), np.zeros(1))
    with pytest.raises(InputError, match="'mixed' is the name of a class"):
        classify(*counts, np.array([1, 1]), np.ones(1, bool), ("en", "mixed"))
    with pytest.raises(InputError, match="language ja"):
        classify(*counts, np.array([1, 0]), np.ones(1, bool), ("en", "ja"))


def test_neutral_tokens_and_their_positions() -> None:
    has_letters = np.array([True, True, True, False, True, True])
    counts = np.array([[100, 0], [100, 10], [100, 9], [50, 0], [5, 5], [0, 0]])
    neutral = neutral_tokens(has_letters, counts, np.array([1000, 1000]))
    assert neutral.tolist() == [False, True, False, True, False, False]
    # The same counts from ten times the Japanese text: the rate of token 1 falls below a tenth.
    assert not neutral_tokens(has_letters, counts, np.array([1000, 10_000]))[1]
    assert token_language(counts, np.array([10, 10]), neutral).tolist() == [0, 255, 0, 255, 0, 255]

    collector = FeatureCollector(2, 2, 6)
    one = np.ones((4, 1), np.float32)
    feature = np.array([[0], [0], [0], [1]])
    collector.update(one, feature, np.arange(4), np.array([0, 1, 2, 3]), np.array([0, 0, 1, 1]))
    collected = collector.finish()
    n_lang, n_neutral = count_languages(collected.feature, document_languages(collected, neutral), 2, 2)
    assert n_lang.tolist() == [[1, 1], [0, 0]] and n_neutral.tolist() == [1, 1]


def test_script_rule() -> None:
    mapping = script_languages(("en", "ja"))
    texts = [" cat", "猫", "ねこ", "ネコ", "ー", "々", "ｶﾅ", "Ａ", "é", "123", "、", "Tシャツ", "кот", ""]
    found = [0, 1, 1, 1, 1, 1, 1, 0, 0, NEUTRAL, NEUTRAL, 1, NEUTRAL, NEUTRAL]
    assert [script_language(text, mapping) for text in texts] == found
    assert script_languages(("ko", "ru"))["Hangul"] == 0
    assert script_languages(("ja", "zh")) == {"Han": 0, "Hiragana": 0, "Katakana": 0, "Bopomofo": 1}
    with pytest.raises(InputError, match="cannot tell fr"):
        script_languages(("en", "fr"))
