"""From sparse activations to the positions that define a feature, in one pass and bounded memory.

The counted positions of a feature are those above `threshold` x its maximum over the test split (METHOD.md section 5;
0.7 in the paper's first version). The maximum is known only at the end, but it never falls: an entry at or below
`threshold` x the running maximum is out for good, so dropping it early changes nothing. What `finish` returns is the
same for every chunking, every order of chunks and every split over collectors that are merged afterwards.

All active positions, strong or weak, are counted besides by feature, language and half octave of the activation.

Shapes: M rows of a chunk, K top-k, N features, V vocabulary, G languages, E entries kept, BINS half octaves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glottoscope.errors import InputError

Array = NDArray[Any]

BUFFER_ENTRIES = 4_000_000  # 84 MB: large enough that pruning is rare, small beside one layer's SAE

# Half octaves of the absolute activation, from 2^-12 to 2^6: inputs have norm 1, what is active lies far inside.
LOWEST, HIGHEST = -12, 6
BINS = 2 * (HIGHEST - LOWEST)
# The upper bits of a positive float32, down to the first one of its mantissa, count half octaves; 127 is the exponent's bias.
_HALF_OCTAVE = 22
_FIRST = 2 * (LOWEST + 127)
_NARROW = 2**31 - 1  # positions up to which int32 holds every count, in half the memory and with faster access


def activation_edges() -> Array:
    """float64 [BINS + 1]: 2^e and 1.5 x 2^e in turn. Bin b holds edge_b <= activation < edge_b+1.

    The first bin also takes all that is weaker, the last one all that is stronger.
    """
    octave, half = np.divmod(np.arange(BINS + 1), 2)
    return 2.0 ** (octave + LOWEST) * (1 + half / 2)


class Entries(NamedTuple):
    """Activations kept: five arrays of one length E, 21 bytes an entry."""

    feature: Array  # int32
    position: Array  # int64, block * block_length + t
    token: Array  # int32
    language: Array  # uint8
    value: Array  # float32, > 0

    def take(self, rows: Array) -> Entries:
        """The entries at `rows` (indices or a mask)."""
        return Entries(*(column[rows] for column in self))


EMPTY = Entries(*(np.empty(0, t) for t in (np.int32, np.int64, np.int32, np.uint8, np.float32)))


@dataclass(frozen=True, eq=False, slots=True)
class Collected:
    """What one pass over the test split leaves of every feature.

    Attributes:
        threshold: entries are strictly above threshold x max_activation.
        alive [N]: bool, active at least once. n_active [N]: int64, positions with a value > 0.
        n_positions_total: counted positions seen. density = n_active / n_positions_total.
        max_activation [N]: float32, after TopK, 0 where dead.
        encoder_max [N]: float32, maximum before TopK where `update_max` supplied it (v1's m_i), else max_activation.
        token_counts [V, G]: int64, counted positions by token and document language; its column sums are `exposure`.
        activation_counts [N, G, BINS]: int64, active positions by document language and bin of `activation_edges`.
        feature, position, token, language, value [E]: the entries, sorted by feature, then position.
    """

    threshold: float
    alive: Array
    n_active: Array
    n_positions_total: int
    max_activation: Array
    encoder_max: Array
    token_counts: Array
    activation_counts: Array
    feature: Array
    position: Array
    token: Array
    language: Array
    value: Array

    @property
    def n_features(self) -> int:
        return len(self.alive)

    @property
    def vocab_size(self) -> int:
        return self.token_counts.shape[0]

    @property
    def n_languages(self) -> int:
        return self.token_counts.shape[1]

    @property
    def exposure(self) -> Array:
        """int64 [G]: counted positions of each language."""
        return self.token_counts.sum(axis=0)

    @property
    def density(self) -> Array:
        """float64 [N]: share of the counted positions at which a feature is active."""
        return self.n_active / max(1, self.n_positions_total)

    @property
    def n_positions(self) -> Array:
        """int64 [N]: entries of each feature."""
        return np.bincount(self.feature, minlength=self.n_features)


class FeatureCollector:
    """Collects sparse activations chunk by chunk.

    Memory: 21 bytes an entry, for the entries above threshold x running maximum (at most K a position) plus a buffer
    of at least `buffer_entries`, and N x G x BINS counts of 4 bytes; nothing of size tokens x features.

    Args:
        n_features, n_languages, vocab_size: N, G, V.
        threshold: share of a feature's maximum above which a position counts, 0 <= threshold < 1.
        buffer_entries: entries held before the collection is pruned; never changes the result.

    Raises:
        InputError: a threshold outside [0, 1), above which no position can lie.
    """

    def __init__(
        self,
        n_features: int,
        n_languages: int,
        vocab_size: int,
        *,
        threshold: float = 0.7,
        buffer_entries: int = BUFFER_ENTRIES,
    ) -> None:
        if not 0 <= threshold < 1:
            raise InputError(f"activation threshold is {threshold}: it is a share of the maximum, 0 <= threshold < 1")
        self.threshold = threshold
        self.max_activation = np.zeros(n_features, np.float32)
        self.encoder_max = np.zeros(n_features, np.float32)
        self.token_counts = np.zeros((vocab_size, n_languages), np.int64)
        self.n_positions_total = 0
        # Bins first: activations crowd in a few of them, which then lie side by side and stay in the cache.
        self._counts_BGN = np.zeros((BINS, n_languages, n_features), np.int32)
        self._bound = np.zeros(n_features, np.float32)
        self._chunks: list[Entries] = []
        self._n_entries = 0
        self._buffer_entries = buffer_entries
        self._prune_at = buffer_entries

    def update(self, values: Array, indices: Array, position_ids: Array, tokens: Array, language: Array) -> None:
        """Add M counted positions (masked positions are the caller's to leave out).

        Args:
            values [M, K]: float, TopK activations; a value of 0 is never active. indices [M, K]: int, their features.
            position_ids [M]: int64, block * block_length + t, each position once over the whole pass.
            tokens [M]: int. language [M]: uint8 index of the document's language.
        """
        k = values.shape[1]
        value = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
        feature = np.ascontiguousarray(indices).reshape(-1)
        self._see(len(values))
        self._count(value, feature, np.asarray(language), k)
        token_language = np.asarray(tokens, np.int64) * self.token_counts.shape[1] + language
        np.add.at(self.token_counts.reshape(-1), token_language, 1)

        # A value that raises the maximum is above the bound too, so one gather serves both.
        rows = np.flatnonzero(value > self._bound.take(feature))
        kept_value, kept_feature = value.take(rows), feature.take(rows)
        rising = np.flatnonzero(kept_value > self.max_activation.take(kept_feature))
        if len(rising):
            risen = kept_feature.take(rising)
            np.maximum.at(self.max_activation, risen, kept_value.take(rising))
            self._bound[risen] = strict_bound(self.max_activation.take(risen), self.threshold)
            rows = rows.take(np.flatnonzero(kept_value > self._bound.take(kept_feature)))
        m = rows // k
        self._append(
            Entries(
                feature.take(rows).astype(np.int32),
                np.asarray(position_ids).take(m).astype(np.int64),
                np.asarray(tokens).take(m).astype(np.int32),
                np.asarray(language).take(m).astype(np.uint8),
                value.take(rows),
            )
        )

    def _see(self, positions: int) -> None:
        self.n_positions_total += positions
        if self.n_positions_total > _NARROW:  # a feature is active once at a position: no count is above their number
            self._counts_BGN = self._counts_BGN.astype(np.int64, copy=False)

    def _count(self, value: Array, feature: Array, language: Array, k: int) -> None:
        """Count active positions by bin, language and feature; `value` and `feature` are [M * K]."""
        counts = self._counts_BGN.reshape(-1)
        _, n_languages, n_features = self._counts_BGN.shape
        # In place and narrow as long as it can be: counting is about half of an update.
        narrow = value.view(np.int32) >> _HALF_OCTAVE
        narrow -= _FIRST
        np.clip(narrow, 0, BINS - 1, out=narrow)
        narrow *= n_languages * n_features
        by_row = narrow.reshape(-1, k)
        by_row += (language.astype(np.int32) * n_features)[:, None]
        key = narrow.astype(np.int64)
        key += feature
        np.add.at(counts, key, counts.dtype.type(1))
        if not value.min(initial=np.inf) > 0:
            np.subtract.at(counts, key[~(value > 0)], counts.dtype.type(1))

    def update_max(self, maxima: Array) -> None:
        """Raise the maxima before TopK (v1's m_i): `maxima` [N], ReLU'd, over a chunk. The entries stay as they are."""
        np.maximum(self.encoder_max, maxima, out=self.encoder_max)

    def merge(self, other: FeatureCollector) -> None:
        """Take in what another collector of the same shape and threshold saw of other positions."""
        if (other.threshold, other.token_counts.shape) != (self.threshold, self.token_counts.shape):
            raise ValueError("collectors of different thresholds, vocabularies or languages cannot be merged")
        np.maximum(self.max_activation, other.max_activation, out=self.max_activation)
        self.update_max(other.encoder_max)
        self._bound = strict_bound(self.max_activation, self.threshold)
        self._see(other.n_positions_total)
        self._counts_BGN += other._counts_BGN
        self.token_counts += other.token_counts
        for chunk in other._chunks:
            self._append(chunk)

    def finish(self) -> Collected:
        """The features as collected so far; the collector can go on."""
        entries = self._prune()
        entries = entries.take(_by_feature(entries.feature, entries.position, len(self._bound)))
        activation_counts = self._counts_BGN.transpose(2, 1, 0).astype(np.int64, order="C")
        return Collected(
            threshold=self.threshold,
            alive=self.max_activation > 0,
            n_active=activation_counts.sum(axis=(1, 2)),
            n_positions_total=self.n_positions_total,
            max_activation=self.max_activation.copy(),
            encoder_max=np.maximum(self.encoder_max, self.max_activation),
            token_counts=self.token_counts.copy(),
            activation_counts=activation_counts,
            **entries._asdict(),
        )

    def _append(self, entries: Entries) -> None:
        self._chunks.append(entries)
        self._n_entries += len(entries.value)
        if self._n_entries > self._prune_at:
            survivors = self._prune()
            # Prune again only after the collection has doubled: the work stays linear in the entries.
            self._prune_at = max(self._buffer_entries, 2 * len(survivors.value))

    def _prune(self) -> Entries:
        kept = [chunk.take(chunk.value > self._bound.take(chunk.feature)) for chunk in self._chunks]
        entries = Entries(*(np.concatenate(columns) for columns in zip(*kept, strict=True))) if kept else EMPTY
        self._chunks = [entries]
        self._n_entries = len(entries.value)
        return entries


def _by_feature(feature: Array, position: Array, n_features: int) -> Array:
    """Rows in order of feature, then position; a pair occurs once, so there is one such order."""
    if n_features <= 2**16 and not np.any(position[1:] < position[:-1]):
        # Collected in order, as a study does: numpy sorts 16-bit keys by radix, four times as fast as the key below.
        return np.argsort(feature.astype(np.uint16), kind="stable")
    span = int(position.max()) + 1 if len(position) else 1
    return np.argsort(feature.astype(np.int64) * span + position)


def strict_bound(maxima: Array, threshold: float) -> Array:
    """float32 b such that, for float32 v, v > b exactly when v > threshold x maximum in float64.

    The largest float32 not above the product: so a comparison in float32 is exact and pruning cannot
    depend on rounding.
    """
    exact = maxima.astype(np.float64) * threshold
    rounded = exact.astype(np.float32)
    return np.where(rounded > exact, np.nextafter(rounded, np.float32(-np.inf)), rounded)


def restrict(collected: Collected, maxima: Array) -> Collected:
    """Only the entries above threshold x `maxima` [N]. v1 takes `collected.encoder_max`, never below our maxima."""
    rows = collected.value > strict_bound(np.asarray(maxima, np.float32), collected.threshold)[collected.feature]
    names = Entries._fields
    return replace(collected, **{name: getattr(collected, name)[rows] for name in names})


@dataclass(frozen=True, eq=False, slots=True)
class TokenHistogram:
    """Entries counted by feature, token and document language; sorted by these three."""

    feature: Array  # int64
    token: Array  # int64
    language: Array  # int64
    count: Array  # int64


@dataclass(frozen=True, eq=False, slots=True)
class Groups:
    """Counts by feature and group (a token, a cluster); sorted by feature, then group; each pair once."""

    feature: Array  # int64
    group: Array  # int64
    count: Array  # int64


def token_histogram(collected: Collected) -> TokenHistogram:
    """Entries of `collected` counted by (feature, token, language): one sort of one integer key."""
    v, g = collected.vocab_size, collected.n_languages
    key = (collected.feature.astype(np.int64) * v + collected.token) * g + collected.language
    key.sort()
    starts = run_starts(key)
    count = np.diff(starts, append=len(key))
    feature_token, language = np.divmod(key[starts], g)
    feature, token = np.divmod(feature_token, v)
    return TokenHistogram(feature, token, language, count)


def group_counts(feature: Array, group: Array, count: Array) -> Groups:
    """Sum `count` over equal (feature, group): merges languages of a token histogram, or tokens into clusters."""
    if not len(feature):
        empty = np.empty(0, np.int64)
        return Groups(empty, empty, empty)
    span = int(group.max()) + 1
    key = feature.astype(np.int64) * span + group
    order = np.argsort(key, kind="stable")
    key = key[order]
    starts = run_starts(key)
    merged_feature, merged_group = np.divmod(key[starts], span)
    return Groups(merged_feature, merged_group, np.add.reduceat(count[order], starts))


def tokens_of(histogram: TokenHistogram) -> Groups:
    """The histogram with its languages merged: group = token."""
    return group_counts(histogram.feature, histogram.token, histogram.count)


@dataclass(frozen=True, eq=False, slots=True)
class ActivationHistogram:
    """Active positions counted by feature, document language and bin; sorted by these three, counts above 0 only."""

    feature: Array  # int64
    language: Array  # int64
    bin: Array  # int64, see `activation_edges`
    count: Array  # int64


def activation_histogram(collected: Collected) -> ActivationHistogram:
    """The rows of `collected.activation_counts` that are not 0."""
    feature, language, bin_ = np.nonzero(collected.activation_counts)
    return ActivationHistogram(feature, language, bin_, collected.activation_counts[feature, language, bin_])


class Examples(NamedTuple):
    """Examples of features, at most one per block, at its strongest position (the first one on ties)."""

    feature: Array  # int64
    rank: Array  # int64, 0 .. n - 1 within a feature
    block: Array  # int64
    t: Array  # int64, position in the block
    value: Array  # float32
    language: Array  # uint8, index of the document's language at that position


def top_examples(collected: Collected, n: int, block_length: int, each_language: int = 0) -> Examples:
    """The n strongest blocks of each feature, strongest first, equal values in order of blocks.

    A feature that is stronger in one language would show that one only: with `each_language` = m, the m strongest
    blocks of every language in which it has entries are among the examples, too.
    """
    examples = _examples(collected, block_length)
    # Positive floats order as their bits do: feature and falling value make one integer key, ties keep block order.
    falling = np.int64(0xFFFFFFFF) - examples.value.view(np.uint32).astype(np.int64)
    order = np.argsort(examples.feature << np.int64(32) | falling, kind="stable")
    examples = Examples(*(column[order] for column in examples))
    keep = _rank(examples.feature) < n
    if each_language:
        # Sorted by (feature, language) on top of the order above, the first m of a run are its strongest.
        pair = examples.feature * collected.n_languages + examples.language
        by_pair = np.argsort(pair, kind="stable")
        keep[by_pair[_rank(pair[by_pair]) < each_language]] = True
    return _ranked(Examples(*(column[keep] for column in examples)))


def first_examples(collected: Collected, n: int, block_length: int) -> Examples:
    """The first n blocks of each feature in order (v1 keeps 50): pass `restrict(collected, collected.encoder_max)`."""
    examples = _examples(collected, block_length)
    keep = _rank(examples.feature) < n
    return _ranked(Examples(*(column[keep] for column in examples)))


def _examples(collected: Collected, block_length: int) -> Examples:
    """One example per (feature, block), sorted by feature, then block; rank not yet set."""
    block, t = np.divmod(collected.position, block_length)
    feature = collected.feature.astype(np.int64)
    if not len(block):
        return Examples(feature, feature, block, t, collected.value, collected.language)
    starts = run_starts(feature * (int(block.max()) + 1) + block)
    top = np.maximum.reduceat(collected.value, starts)
    is_top = np.flatnonzero(collected.value == np.repeat(top, np.diff(starts, append=len(block))))
    # Every run has an entry that equals its maximum; the first of them is the first at or after the run's start.
    row = is_top[np.searchsorted(is_top, starts)]
    return Examples(feature[row], np.zeros_like(row), block[row], t[row], top, collected.language[row])


def _rank(sorted_key: Array) -> Array:
    """int64: place of each row within its run of equal neighbours, from 0."""
    starts = run_starts(sorted_key)
    return np.arange(len(sorted_key)) - np.repeat(starts, np.diff(starts, append=len(sorted_key)))


def _ranked(examples: Examples) -> Examples:
    return examples._replace(rank=_rank(examples.feature))


def run_starts(sorted_key: Array) -> Array:
    """Where runs of equal neighbours start; empty for an empty key."""
    if not len(sorted_key):
        return np.empty(0, np.int64)
    return np.flatnonzero(np.concatenate(([True], sorted_key[1:] != sorted_key[:-1])))
