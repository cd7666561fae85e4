"""Scores of translations: equal to sacrebleu's own on every resample, and plain counting for the rest."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.base import Metric
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from glottoscope.errors import InputError
from glottoscope.intervention.scores import Bleu, ChrF, ConceptRecall, ExactMatch, SentenceMetric, ratio

WORDS = ("the", "cat", "sat", "on", "mat", ".", "a", "b,c", "x-y", "Ünïcode", "12.5")
JAPANESE = ("猫", "が", "座った", "。", "東京", "は", "日本", "の", "首都", "です", "　", "カメラ", "ａｂ")
MIXED = st.lists(st.sampled_from(WORDS + JAPANESE), max_size=9)
TEXTS = st.one_of(MIXED.map(" ".join), MIXED.map("".join), st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
CORPORA = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6)
TOKENIZERS = ("none", "13a", "char", "intl", "zh", "ja-mecab")
EN = ["the cat sat on the mat .", "a dog barks at the moon", "rain falls", "", "he reads a long book in the garden"]
EN_REFERENCES = ["the cat sat on a mat .", "the dog barked at the moon", "it rains", "nothing", ""]
JA = ["猫がマットに座った。", "犬は月に吠える", "雨が降る", "", "彼は庭で長い本を読む"]
JA_REFERENCES = ["猫はマットの上に座った。", "犬が月に向かって吠えた", "雨です", "何もない", ""]


def resampled(pairs: list[tuple[str, str]], counts_S: np.ndarray) -> tuple[list[str], list[str]]:
    drawn = [pair for pair, count in zip(pairs, counts_S, strict=True) for _ in range(count)]
    return [h for h, _ in drawn], [r for _, r in drawn]


def check(ours: ChrF | Bleu, theirs: Metric, pairs: list[tuple[str, str]], seed: int) -> None:
    """The full set and resamples with multiplicity, against sacrebleu on the texts themselves."""
    counts_RS = np.random.default_rng(seed).multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), size=4)
    counts_RS = np.concatenate([np.ones((1, len(pairs)), dtype=np.int64), counts_RS])
    statistics_SC = ours.statistics([h for h, _ in pairs], [r for _, r in pairs])
    got_R = ours.score(counts_RS @ statistics_SC)
    expected_R = []
    for counts_S in counts_RS:
        hypotheses, references = resampled(pairs, counts_S)
        expected_R.append(theirs.corpus_score(hypotheses, [references]).score)
    np.testing.assert_allclose(got_R, expected_R, rtol=0, atol=1e-9)
    # Float counts, as a bootstrap multiplies them with BLAS, change nothing.
    np.testing.assert_array_equal(got_R, ours.score(counts_RS.astype(float) @ statistics_SC.astype(float)))


@settings(max_examples=150, deadline=None)
@given(CORPORA, st.integers(0, 2**32 - 1))
@example([("", "")], 0)
@example([("", "cat")], 0)
@example([("cat", "")], 0)
@example([("猫が座った", "猫が座った"), ("", "")], 0)
def test_chrf_is_sacrebleus(pairs: list[tuple[str, str]], seed: int) -> None:
    check(ChrF(), CHRF(), pairs, seed)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(CORPORA, st.integers(0, 2**32 - 1))
@example([("", "")], 0)
@example([("", "cat")], 0)
@example([("cat", "")], 0)
@example([("the cat", "the cat")], 0)
@example([("the cat sat on the mat", "a cat sits here")], 0)
def test_bleu_is_sacrebleus(tokenizer: str, pairs: list[tuple[str, str]], seed: int) -> None:
    check(Bleu("xx", tokenizer), BLEU(tokenize=tokenizer), pairs, seed)


@pytest.mark.parametrize(("language", "texts", "references"), [("en", EN, EN_REFERENCES), ("ja", JA, JA_REFERENCES)])
def test_real_sentences_score_between_the_ends(language: str, texts: list[str], references: list[str]) -> None:
    """A check on the checks: these scores are neither 0 nor 100, and the same text scores 100."""
    metrics: list[tuple[ChrF | Bleu, Metric]] = [(ChrF(), CHRF()), (Bleu(language), BLEU(trg_lang=language))]
    for ours, theirs in metrics:
        score = ours.score(ours.statistics(texts, references).sum(axis=0, keepdims=True))[0]
        assert 5 < score < 95
        check(ours, theirs, list(zip(texts, references, strict=True)), 0)
        assert ours.score(ours.statistics(references, references).sum(axis=0, keepdims=True)) == pytest.approx([100])


def test_the_signature_is_sacrebleus_and_names_the_tokenizer() -> None:
    ours, theirs = Bleu("ja"), BLEU(trg_lang="ja")
    theirs.corpus_score(JA, [JA_REFERENCES])
    assert ours.tokenize == "ja-mecab"
    assert ours.signature == f"BLEU|{theirs.get_signature()}"
    assert "|tok:ja-mecab-" in ours.signature
    assert ChrF().signature.startswith("chrF2|nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")


@pytest.mark.parametrize(
    ("language", "tokenizer"), [("en", "13a"), ("de", "13a"), ("ja-JP", "ja-mecab"), ("zh", "zh"), ("zh_Hant", "zh"), ("x", "13a")]
)
def test_auto_goes_by_the_target_language(language: str, tokenizer: str) -> None:
    assert Bleu(language).tokenize == tokenizer


def test_without_mecab_auto_counts_characters_and_ja_mecab_is_refused() -> None:
    code = """
import sys
sys.modules["MeCab"] = sys.modules["mecab_ko"] = None  # as if neither were installed
from glottoscope.errors import InputError
from glottoscope.intervention.scores import Bleu
print(Bleu("ja").tokenize, Bleu("ko").tokenize, "tok:char" in Bleu("ja").signature)
try:
    Bleu("ja", "ja-mecab")
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "char char True"
    assert "ja-mecab" in second and "sacrebleu[ja]" in second


def test_an_unknown_tokenizer_is_refused() -> None:
    with pytest.raises(InputError, match="no tokenizer 'mecab': use auto or one of none, zh, 13a"):
        Bleu("ja", "mecab")


def test_a_sacrebleu_without_sentence_statistics_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistics come from a private method of sacrebleu. If this test fails at delattr, sacrebleu changed."""
    ours = ChrF()
    monkeypatch.delattr(Metric, "_extract_corpus_statistics")
    with pytest.raises(InputError, match=r"sacrebleu .* does not give the statistics .*: install sacrebleu 2\.6"):
        ours.statistics(["a"], ["a"])


def metrics() -> list[SentenceMetric[str]]:
    return [ChrF(), Bleu("en"), ExactMatch()]


def test_one_interface_for_all() -> None:
    for metric in metrics():
        statistics_SC = metric.statistics(EN, EN_REFERENCES)
        assert statistics_SC.dtype == np.int64 and len(statistics_SC) == len(EN)
        totals_RC = np.stack([statistics_SC.sum(axis=0), statistics_SC[:2].sum(axis=0)])
        assert metric.score(totals_RC).shape == (2,)
        assert metric.better == "higher" and metric.signature
        assert metric.statistics([], []).shape == (0, statistics_SC.shape[1])
        with pytest.raises(ValueError, match="1 hypotheses for 2 references"):
            metric.statistics(["a"], ["a", "b"])
        with pytest.raises(ValueError, match="is expected"):
            metric.score(totals_RC[0])
    concepts: SentenceMetric[list[int]] = ConceptRecall()
    assert concepts.statistics([], []).shape == (0, 2)
    assert [metric.name for metric in metrics()] + [concepts.name] == ["chrf", "bleu", "exact", "recall"]


def test_exact_match_looks_past_white_space() -> None:
    metric = ExactMatch()
    statistics_SC = metric.statistics([" a  b\n", "ab", "", "猫"], ["a b", "a b", " ", "猫　"])
    assert statistics_SC.tolist() == [[1, 1], [0, 1], [1, 1], [1, 1]]
    assert metric.score(statistics_SC.sum(axis=0, keepdims=True)).tolist() == [0.75]


@given(st.lists(st.tuples(st.lists(st.integers(0, 4), max_size=6), st.lists(st.integers(0, 4), max_size=6)), max_size=5))
def test_concept_recall_counts_with_multiplicity(pairs: list[tuple[list[int], list[int]]]) -> None:
    metric = ConceptRecall()
    statistics_SC = metric.statistics([h for h, _ in pairs], [r for _, r in pairs])
    for (hypothesis, reference), (hits, concepts) in zip(pairs, statistics_SC.tolist(), strict=True):
        left = list(hypothesis)
        for concept in reference:
            if concept in left:
                left.remove(concept)
        assert hits == len(hypothesis) - len(left)
        assert concepts == len(reference)
    total, expected = statistics_SC.sum(axis=0), sum(len(r) for _, r in pairs)
    score = metric.score(total[None])[0]
    assert np.isnan(score) if not expected else score == total[0] / expected


def test_a_ratio_without_a_denominator_is_undefined() -> None:
    assert ratio(np.array([[1.5, 3.0], [0.0, 2.0]])).tolist() == [0.5, 0.0]
    assert np.isnan(ratio(np.array([[0, 0]]))).all()
