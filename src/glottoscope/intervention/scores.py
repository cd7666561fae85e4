"""Scores of translations, as sums over sentences, so that a paired bootstrap can resample sentences cheaply.

Every metric turns S sentences into rows of sufficient statistics once. Any resample is then a weighted sum of these
rows (`counts_RS @ statistics_SC`), and one call scores all R resamples.

Shapes: S sentences, C statistics of a metric, R resamples, N n-gram orders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import sacrebleu
from sacrebleu.metrics.base import Metric
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from glottoscope.errors import InputError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Totals = IntArray | FloatArray
Better = Literal["higher", "lower"]
TextT = TypeVar("TextT", contravariant=True)

TOKENIZERS = tuple(BLEU.TOKENIZERS)
_OWN_TOKENIZER = {"ja": "ja-mecab", "zh": "zh", "ko": "ko-mecab"}


class SentenceMetric(Protocol[TextT]):
    """A metric over pairs of a hypothesis and a reference whose score depends on sums over sentences only."""

    @property
    def name(self) -> str: ...

    @property
    def better(self) -> Better: ...

    @property
    def signature(self) -> str:
        """What was computed, with the settings that change the number; for provenance."""
        ...

    def statistics(self, hypotheses: Sequence[TextT], references: Sequence[TextT]) -> IntArray:
        """Statistics [S, C] of S sentences."""
        ...

    def score(self, totals_RC: Totals) -> FloatArray:
        """Scores [R] of sums of statistics [R, C]."""
        ...


class _SacrebleuScore:
    """Per-sentence statistics of a sacrebleu metric, and its signature."""

    name: str
    better: Better = "higher"

    def __init__(self, metric: Metric, n_statistics: int) -> None:
        self._metric = metric
        self._n_statistics = n_statistics
        # sacrebleu knows a signature once a corpus was scored.
        score_name = metric.corpus_score(["a"], [["a"]]).name
        self.signature = f"{score_name}|{metric.get_signature()}"

    def statistics(self, hypotheses: Sequence[str], references: Sequence[str]) -> IntArray:
        """Statistics [S, C] of S sentences with one reference each.

        Raises:
            InputError: the installed sacrebleu does not give them.
        """
        _check_lengths(hypotheses, references)
        # Not public in sacrebleu, whose own bootstrap is a Python loop over resamples.
        extract = getattr(self._metric, "_extract_corpus_statistics", None)
        rows = extract(list(hypotheses), [list(references)]) if extract else [[]]
        if any(len(row) != self._n_statistics for row in rows):
            raise InputError(
                f"sacrebleu {sacrebleu.__version__} does not give the statistics of single sentences as 2.6 does: "
                "install sacrebleu 2.6"
            )
        return np.array(rows, dtype=np.int64).reshape(-1, self._n_statistics)


class ChrF(_SacrebleuScore):
    """chrF2 as sacrebleu computes it by default: characters, orders 1 to 6, no white space, one reference; 0 to 100.

    Statistics: for each order the n-grams of hypothesis and reference and those in both (18 in all).
    """

    name = "chrf"

    def __init__(self) -> None:
        metric = CHRF()
        super().__init__(metric, 3 * metric.char_order)
        self._weight = metric.beta**2

    def score(self, totals_RC: Totals) -> FloatArray:
        """Scores [R]; 0 where nothing can be compared, as in sacrebleu."""
        totals_RN3 = _as_totals(totals_RC, self._n_statistics).reshape(len(totals_RC), -1, 3)
        hypothesis_RN, reference_RN, match_RN = np.moveaxis(totals_RN3, 2, 0)
        counted_RN = (hypothesis_RN > 0) & (reference_RN > 0)
        orders_R = np.maximum(counted_RN.sum(axis=1), 1)
        precision_R = _divide(match_RN, hypothesis_RN, counted_RN).sum(axis=1) / orders_R
        recall_R = _divide(match_RN, reference_RN, counted_RN).sum(axis=1) / orders_R
        denominator_R = self._weight * precision_R + recall_R
        return 100 * _divide((1 + self._weight) * precision_R * recall_R, denominator_R, denominator_R > 0)


class Bleu(_SacrebleuScore):
    """Corpus BLEU as sacrebleu computes it by default: orders 1 to 4, exponential smoothing, one reference; 0 to 100.

    Statistics: tokens of the hypothesis, tokens of the reference, n-grams in both by order, n-grams of the hypothesis
    by order (10 in all).

    Args:
        language: code of the target language.
        tokenize: one of sacrebleu's tokenizers, or "auto": ja-mecab for ja and ko-mecab for ko where MeCab is
            installed, else char for these two; zh for zh; 13a for the rest. `self.tokenize` tells which.

    Raises:
        InputError: an unknown tokenizer, or one that cannot be made here.
    """

    name = "bleu"

    def __init__(self, language: str, tokenize: str = "auto") -> None:
        metric, self.tokenize = _make_bleu(language, tokenize)
        super().__init__(metric, 2 + 2 * metric.max_ngram_order)

    def score(self, totals_RC: Totals) -> FloatArray:
        """Scores [R]; 0 where no n-gram matches or no n-gram of some order exists, as in sacrebleu."""
        totals_RC = _as_totals(totals_RC, self._n_statistics)
        hypothesis_R, reference_R = totals_RC[:, 0], totals_RC[:, 1]
        match_RN, count_RN = np.split(totals_RC[:, 2:], 2, axis=1)
        defined_R = np.logical_and((count_RN > 0).all(axis=1), (match_RN > 0).any(axis=1))
        # Smoothing: the k-th order without a match counts as 2^-k matches.
        missing_RN = match_RN == 0
        smoothed_RN = np.where(missing_RN, 0.5 ** missing_RN.cumsum(axis=1), match_RN)
        precision_RN = np.where(defined_R[:, None], smoothed_RN / np.maximum(count_RN, 1), 1.0)
        excess_R = 1 - _divide(reference_R, hypothesis_R, hypothesis_R > 0)
        brevity_R = np.exp(np.minimum(excess_R, 0))
        return np.where(defined_R, 100 * brevity_R * np.exp(np.log(precision_RN).mean(axis=1)), 0.0)


class ExactMatch:
    """Share of sentences equal to their reference, white space stripped and collapsed; 0 to 1, NaN without sentences.

    Statistics: equal (0 or 1), and 1.
    """

    name = "exact"
    better: Better = "higher"
    signature = "exact match after stripping and collapsing white space"

    def statistics(self, hypotheses: Sequence[str], references: Sequence[str]) -> IntArray:
        """Statistics [S, 2]."""
        _check_lengths(hypotheses, references)
        equal_S = [h.split() == r.split() for h, r in zip(hypotheses, references, strict=True)]
        return np.stack([np.array(equal_S, dtype=np.int64), np.ones(len(equal_S), dtype=np.int64)], axis=1)

    def score(self, totals_RC: Totals) -> FloatArray:
        """Scores [R]."""
        return ratio(totals_RC)


class ConceptRecall:
    """Share of the reference's concepts that the hypothesis names, in any order; 0 to 1, NaN without concepts.

    A concept that stands k times in the reference can be hit k times. Statistics: hits, concepts of the reference.
    """

    name = "recall"
    better: Better = "higher"
    signature = "recall of reference concepts, counted with multiplicity"

    def statistics(self, hypotheses: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> IntArray:
        """Statistics [S, 2] of S sentences, each given as the ids of its concepts."""
        _check_lengths(hypotheses, references)
        hits_S = [(Counter(h) & Counter(r)).total() for h, r in zip(hypotheses, references, strict=True)]
        return np.array([hits_S, [len(r) for r in references]], dtype=np.int64).T

    def score(self, totals_RC: Totals) -> FloatArray:
        """Scores [R]."""
        return ratio(totals_RC)


def ratio(totals_RC: Totals) -> FloatArray:
    """First column over second [R], NaN where the second is 0: the score of a metric that is a mean."""
    totals_RC = _as_totals(totals_RC, 2)
    return np.where(totals_RC[:, 1] > 0, totals_RC[:, 0] / np.where(totals_RC[:, 1] > 0, totals_RC[:, 1], 1), np.nan)


def _make_bleu(language: str, tokenize: str) -> tuple[BLEU, str]:
    """sacrebleu's BLEU and the tokenizer that it got."""
    if tokenize != "auto" and tokenize not in TOKENIZERS:
        raise InputError(f"BLEU has no tokenizer {tokenize!r}: use auto or one of {', '.join(TOKENIZERS)}")
    own = _OWN_TOKENIZER.get(language.lower().replace("_", "-").split("-")[0], "13a")
    chosen = own if tokenize == "auto" else tokenize
    try:
        # force: many hypotheses end in " ." because a half-trained model wrote them so, not because of the data.
        return BLEU(tokenize=chosen, force=True), chosen
    except Exception as error:
        # sacrebleu's tokenizers fail in many ways: no MeCab, another dictionary, no network for a subword model.
        if tokenize == "auto" and own.endswith("-mecab"):
            return BLEU(tokenize="char", force=True), "char"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"sacrebleu cannot make its tokenizer {chosen!r} here ({reason}): install it, or use auto or char"
        ) from error


def _as_totals(totals_RC: Totals, n_statistics: int) -> FloatArray:
    totals = np.asarray(totals_RC, dtype=np.float64)
    if totals.ndim != 2 or totals.shape[1] != n_statistics:
        raise ValueError(f"totals of shape {totals.shape}: [R, {n_statistics}] is expected")
    return totals


def _divide(numerator: FloatArray, denominator: FloatArray, where: npt.NDArray[np.bool_]) -> FloatArray:
    """Quotients, 0 where not `where`."""
    return np.divide(numerator, denominator, out=np.zeros(where.shape), where=where)


def _check_lengths(hypotheses: Sequence[object], references: Sequence[object]) -> None:
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references")
