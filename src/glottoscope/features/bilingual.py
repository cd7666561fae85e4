"""Translation-pair consistency: does a feature that fires in a sentence fire in its translation?

A feature is **bilingual** when it is mixed and its phi coefficient over held-out aligned sentences, minus the phi
that sentences of like length give when paired at random, reaches a threshold (0.4). Mixed alone is not bilingual: a
language-blind feature is mixed too. Two guards keep out features that follow from translation without meaning
anything: only positions with non-neutral tokens count ("contains four digits" would have phi .92 otherwise), and the
null keeps each pair's length ("is a long sentence" has phi .71).

Our headline, not the paper's: Inaba et al. (arXiv 2503.06394) have no such measure.

Shapes: M token positions, K active features a position, N features, P aligned pairs, E firings (feature, sentence).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse

from glottoscope.features.collect import run_starts
from glottoscope.features.pairs import FiringPositions, firing_positions

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

PHI_THRESHOLD = 0.4
MIN_FIRINGS = 10


class SentenceFirings(NamedTuple):
    """Which features fire in which sentences of one language; every (feature, sentence) once.

    feature, sentence: [E], sorted by feature then sentence by `sentence_firings` (no function relies on the order).
    """

    feature: IntArray
    sentence: IntArray
    n_features: int
    n_sentences: int

    def counts(self) -> IntArray:
        """Firing sentences of every feature, [N]."""
        return np.bincount(self.feature, minlength=self.n_features).astype(np.int64)

    def keys(self) -> IntArray:
        """feature * n_sentences + sentence, [E]: one integer per firing."""
        return self.feature * self.n_sentences + self.sentence


class PairPhi(NamedTuple):
    """phi [N], NaN where a feature fires in no or every sentence of a side; firing sentences n_a, n_b, n_both [N]."""

    phi: FloatArray
    n_a: IntArray
    n_b: IntArray
    n_both: IntArray


def firing_threshold(max_activation: npt.ArrayLike, fraction: float = 0.5) -> FloatArray:
    """Threshold of every feature [N]: `fraction` of its maximum on the test split, infinite for dead features.

    A dead feature has no maximum to take half of, so it never fires and its phi is undefined.
    """
    maximum_N = np.asarray(max_activation, dtype=np.float64)
    return np.where(maximum_N > 0, fraction * maximum_N, np.inf)


def sentence_firings(
    values: npt.ArrayLike,
    indices: npt.ArrayLike,
    sentence: npt.ArrayLike,
    threshold: npt.ArrayLike,
    counted: npt.ArrayLike,
    *,
    n_sentences: int,
) -> SentenceFirings:
    """The (feature, sentence) pairs in which the feature is above its threshold at a counted position.

    Args:
        values, indices: [M, K] TopK activations and features; a pick with value 0 is not active.
        sentence: [M] row of the aligned pair of each position.
        threshold: [N], see `firing_threshold`; "above" is strict.
        counted: [M] True at positions that may count: no padding, no BOS, no neutral token.
        n_sentences: P.
    """
    # Which position of the sentence it is makes no difference here.
    found = firing_positions(values, indices, sentence, sentence, threshold, counted)
    return firing_sentences(found, len(np.asarray(threshold)), n_sentences)


def firing_sentences(positions: FiringPositions, n_features: int, n_sentences: int) -> SentenceFirings:
    """The (feature, sentence) pairs among firing positions."""
    keys = positions.feature.astype(np.int64) * n_sentences + positions.sentence
    return _from_keys(keys, n_features, n_sentences)


def _from_keys(keys: IntArray, n_features: int, n_sentences: int) -> SentenceFirings:
    """Firings of `SentenceFirings.keys`, in any order and more than once; `keys` is sorted in place."""
    keys.sort()
    feature, sentence = np.divmod(keys[run_starts(keys)], n_sentences)
    return SentenceFirings(feature, sentence, n_features, n_sentences)


def merge_firings(parts: list[SentenceFirings]) -> SentenceFirings:
    """The union of chunks of one language's positions; a sentence may be spread over chunks."""
    keys = np.concatenate([part.keys() for part in parts])
    return _from_keys(keys, parts[0].n_features, parts[0].n_sentences)


def phi(firings_a: SentenceFirings, firings_b: SentenceFirings) -> PairPhi:
    """Phi coefficient (Pearson's r of two binary variables) of every feature over the aligned pairs.

    phi = (P n_11 - n_a n_b) / sqrt(n_a (P - n_a) n_b (P - n_b)); sentence p of one side translates p of the other.
    """
    n_a, n_b = firings_a.counts(), firings_b.counts()
    n_both = _both(firings_a, firings_b).counts()
    return PairPhi(_phi_from_counts(n_both, n_a, n_b, firings_a.n_sentences), n_a, n_b, n_both)


def _phi_from_counts(n_both: npt.ArrayLike, n_a: npt.ArrayLike, n_b: npt.ArrayLike, n: npt.ArrayLike) -> FloatArray:
    """Phi from contingency counts, broadcast; NaN where a margin is empty."""
    both, a, b, total = (np.asarray(x, dtype=np.float64) for x in (n_both, n_a, n_b, n))
    # Two square roots, not one of the product: exact for phi = 1 at any count, and far from overflow.
    scale = np.sqrt(a * (total - a)) * np.sqrt(b * (total - b))
    numerator = total * both - a * b
    return np.divide(numerator, scale, out=np.full(np.shape(numerator), np.nan), where=scale > 0)


def length_strata(lengths_a: npt.ArrayLike, lengths_b: npt.ArrayLike, n: int | None = None) -> IntArray:
    """Stratum [P] of each pair: `n` equal groups by the mean rank of its two lengths (tokens, counted positions only).

    Ranks, because the two languages need different numbers of tokens for the same sentence. By default strata of about
    `MIN_FIRINGS` pairs: with ten strata of 100, "is among the longest 5 %" keeps phi - phi_null = .44 and would pass; a
    feature must fire in at least `MIN_FIRINGS` sentences, so strata of that size leave it no room.
    """
    a, b = np.asarray(lengths_a), np.asarray(lengths_b)
    n = max(1, len(a) // MIN_FIRINGS) if n is None else n
    combined = _fractional_rank(a) + _fractional_rank(b)
    order = np.argsort(combined, kind="stable")
    stratum_P = np.empty(len(a), dtype=np.int64)
    stratum_P[order] = np.arange(len(a)) * min(n, len(a)) // len(a)
    return stratum_P


def _fractional_rank(x: npt.NDArray[np.generic]) -> FloatArray:
    _, inverse, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[inverse]


def permute_sentences(
    firings: SentenceFirings, rng: np.random.Generator, strata: npt.NDArray[np.int64] | None = None
) -> SentenceFirings:
    """One shuffling of the pairs: one side's sentences move along a random circle, within `strata` [P] if given.

    A circle, because it leaves no true pair in place: in a stratum of ten an ordinary permutation would keep a tenth of
    them and take that much of a real feature's phi for chance. (A stratum of one pair keeps it.)
    """
    n = firings.n_sentences
    stratum_P = np.zeros(n, dtype=np.int64) if strata is None else strata
    return _move_along_circles(firings, np.lexsort((rng.random(n), stratum_P)), stratum_P)


def _move_along_circles(firings: SentenceFirings, order: IntArray, group_P: npt.NDArray[np.int64]) -> SentenceFirings:
    """Each sentence's firings move to the one before it in `order` (sorted by group), a group's first to its last."""
    sorted_group = group_P[order]
    first = np.r_[True, sorted_group[1:] != sorted_group[:-1]]
    last = np.r_[first[1:], True]
    target_P = np.empty(len(order), dtype=np.int64)
    target_P[order[1:]] = order[:-1]
    target_P[order[first]] = order[last]
    return firings._replace(sentence=target_P[firings.sentence])


def phi_null_exact(firings_a: SentenceFirings, firings_b: SentenceFirings, strata: npt.NDArray[np.int64]) -> FloatArray:
    """Expected phi [N] of pairs shuffled within strata: what the mean over `permute_sentences` tends to, without draws.

    Phi is linear in n_11 when the margins are fixed. Pairing the P_s sentences of a stratum at random, true pairs left
    out, gives E[n_11] = sum_s (n_a,s n_b,s - n_11,s) / (P_s - 1).
    """
    stratum_P = np.unique(strata, return_inverse=True)[1]
    size_S = np.bincount(stratum_P)
    n_strata = len(size_S)
    a_NS, b_NS, both_NS = (
        _group_counts(firings, stratum_P, n_strata) for firings in (firings_a, firings_b, _both(firings_a, firings_b))
    )
    # A pair alone in its stratum has no other to be paired with: it stays.
    alone_S = (size_S == 1).astype(np.float64)
    others_S = (1 - alone_S) / np.maximum(size_S - 1, 1)
    expected_N = (a_NS.multiply(b_NS) - both_NS) @ others_S + both_NS @ alone_S
    return _phi_from_counts(expected_N, firings_a.counts(), firings_b.counts(), firings_a.n_sentences)


def _both(firings_a: SentenceFirings, firings_b: SentenceFirings) -> SentenceFirings:
    """The firings that a sentence and its translation share."""
    rows = np.isin(firings_a.keys(), firings_b.keys(), assume_unique=True)
    return firings_a._replace(feature=firings_a.feature[rows], sentence=firings_a.sentence[rows])


def _group_counts(firings: SentenceFirings, group_P: IntArray, n_groups: int) -> sparse.csr_matrix:
    """Firing sentences of every feature in every group of sentences, sparse [N, groups]."""
    ones = np.ones(len(firings.feature))
    shape = (firings.n_features, n_groups)
    return sparse.csr_matrix((ones, (firings.feature, group_P[firings.sentence])), shape=shape)


def shift_to_next_sentence(firings: SentenceFirings, article: npt.ArrayLike) -> SentenceFirings:
    """Control: each sentence is paired with the *next* one of its article instead of its translation.

    The firings of sentence p move to the sentence before it in the same article; the last one of an article closes the
    circle (with the first), so that every margin stays as it was. What survives is topic, not translation. A sentence
    alone in its article keeps its own translation: leave such articles out.
    """
    article_P = np.unique(np.asarray(article), return_inverse=True)[1]
    return _move_along_circles(firings, np.argsort(article_P, kind="stable"), article_P)


def supportable(n_a: npt.ArrayLike, n_b: npt.ArrayLike, min_firings: int = MIN_FIRINGS) -> BoolArray:
    """[N] True where the aligned sentences could support a bilingual feature: `min_firings` on each side."""
    return (np.asarray(n_a) >= min_firings) & (np.asarray(n_b) >= min_firings)


def is_bilingual(
    language: npt.ArrayLike,
    phi: npt.ArrayLike,
    phi_null: npt.ArrayLike,
    n_a: npt.ArrayLike,
    n_b: npt.ArrayLike,
    *,
    threshold: float = PHI_THRESHOLD,
    min_firings: int = MIN_FIRINGS,
) -> BoolArray:
    """[N] bilingual = class `mixed`, phi - phi_null >= threshold, and at least `min_firings` sentences on each side.

    Args:
        language: [N] class names; phi, phi_null: [N], NaN where undefined (never bilingual); n_a, n_b: [N].
    """
    with np.errstate(invalid="ignore"):
        consistent = np.asarray(phi, dtype=np.float64) - np.asarray(phi_null, dtype=np.float64) >= threshold
    return (np.asarray(language) == "mixed") & consistent & supportable(n_a, n_b, min_firings)
