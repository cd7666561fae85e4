"""Where features fire in aligned sentences, and the pairs that show a feature firing on both sides.

A pair is as good an example as its weaker side: pairs are ordered by the smaller of the two sides' maxima.

Shapes: M token positions, K active features a position, N features, P aligned pairs, E firing positions, R rows (pairs kept).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from glottoscope.features.collect import run_starts

Array = npt.NDArray[Any]


class FiringPositions(NamedTuple):
    """Positions of one language's sentences at which a feature fires: four arrays of one length E, 16 bytes a position."""

    feature: Array  # int32
    sentence: Array  # int32, row of the aligned pair
    t: Array  # int32, position in the sentence
    value: Array  # float32, > 0

    def take(self, rows: Array) -> FiringPositions:
        """The entries at `rows` (indices or a mask)."""
        return FiringPositions(*(column[rows] for column in self))


def firing_positions(
    values: npt.ArrayLike,
    indices: npt.ArrayLike,
    sentence: npt.ArrayLike,
    t: npt.ArrayLike,
    threshold: npt.ArrayLike,
    counted: npt.ArrayLike,
) -> FiringPositions:
    """The (feature, position) at which the feature is above its threshold and the position counts.

    Args:
        values, indices: [M, K] TopK activations and features; a pick with value 0 is not active.
        sentence, t: [M] row of the aligned pair of each position, and its place in the sentence.
        threshold: [N], see `bilingual.firing_threshold`; "above" is strict.
        counted: [M] True at positions that may count: no padding, no BOS, no neutral token.
    """
    values_MK, indices_MK = np.asarray(values), np.asarray(indices)
    threshold_N = np.asarray(threshold, dtype=np.float64)
    fires_MK = (values_MK > threshold_N.take(indices_MK)) & (values_MK > 0) & np.asarray(counted, dtype=bool)[:, None]
    fires = np.flatnonzero(fires_MK)
    m = fires // values_MK.shape[1]
    return FiringPositions(
        indices_MK.reshape(-1)[fires].astype(np.int32),
        np.asarray(sentence)[m].astype(np.int32),
        np.asarray(t)[m].astype(np.int32),
        values_MK.reshape(-1)[fires].astype(np.float32),
    )


class PairSide(NamedTuple):
    """One side of the pairs kept. Row r holds at[offsets[r] : offsets[r + 1]], rising, and the values there."""

    value: Array  # float32 [R], strongest of the sentence
    offsets: Array  # int64 [R + 1]
    at: Array  # int32, positions in the sentence
    level: Array  # float32, activations at them


class FiringPairs(NamedTuple):
    """Pairs in which a feature fires on both sides, sorted by feature, then rank."""

    feature: Array  # int32 [R]
    rank: Array  # int32 [R], 0 .. n - 1 within a feature
    pair: Array  # int32 [R]
    sides: tuple[PairSide, PairSide]


def strongest_pairs(sides: Sequence[Sequence[FiringPositions]], n: int) -> FiringPairs:
    """The n pairs of each feature whose weaker side is strongest, strongest first, equal ones in order of pairs.

    Args:
        sides: for both languages, `firing_positions` of chunks of the sentences, in any order; each position once.
        n: pairs kept of a feature at most.
    """
    runs = [_runs(parts) for parts in sides]
    # One integer per (feature, sentence), the same on both sides.
    span = 1 + max((int(r.entries.sentence.max(initial=0)) for r in runs), default=0)
    keys = [r.feature * span + r.sentence for r in runs]
    both, *rows = np.intersect1d(*keys, assume_unique=True, return_indices=True)
    weaker = np.minimum(*(r.value[row] for r, row in zip(runs, rows, strict=True)))
    feature, pair = np.divmod(both, span)
    # Positive floats order as their bits do: feature and falling value make one integer key, ties keep the order of pairs.
    order = np.argsort(feature << 32 | np.int64(0xFFFFFFFF) - weaker.view(np.uint32), kind="stable")
    starts = run_starts(feature)
    rank = np.arange(len(feature)) - np.repeat(starts, np.diff(starts, append=len(feature)))
    kept = rank < n
    order = order[kept]
    side_a, side_b = (_side(r, row[order]) for r, row in zip(runs, rows, strict=True))
    feature, rank, pair = (x.astype(np.int32) for x in (feature[order], rank[kept], pair[order]))
    return FiringPairs(feature, rank, pair, (side_a, side_b))


class _Runs(NamedTuple):
    """Entries of one side sorted by feature, sentence, t, and their runs of one (feature, sentence)."""

    entries: FiringPositions
    feature: Array  # int64, of each run
    sentence: Array  # int64
    value: Array  # float32, the maximum
    start: Array  # int64, its first entry
    length: Array  # int64


def _runs(parts: Sequence[FiringPositions]) -> _Runs:
    entries = FiringPositions(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    entries = entries.take(np.lexsort((entries.t, entries.sentence, entries.feature)))
    feature, sentence = entries.feature.astype(np.int64), entries.sentence.astype(np.int64)
    start = run_starts(feature * (1 + sentence.max(initial=0)) + sentence)
    value = np.maximum.reduceat(entries.value, start) if len(start) else entries.value
    return _Runs(entries, feature[start], sentence[start], value, start, np.diff(start, append=len(feature)))


def _side(runs: _Runs, rows: Array) -> PairSide:
    length = runs.length[rows]
    offsets = np.concatenate(([0], np.cumsum(length)))
    where = np.repeat(runs.start[rows] - offsets[:-1], length) + np.arange(offsets[-1])
    return PairSide(runs.value[rows], offsets, runs.entries.t[where], runs.entries.value[where])
