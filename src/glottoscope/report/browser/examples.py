"""A setup's examples, histograms and pairs as flat arrays, split by feature through offsets.

Shapes: N features, E examples, A active positions of all examples, R rows of a histogram, G languages.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from glottoscope.errors import InputError
from glottoscope.report.browser.index import Setup
from glottoscope.study.store import read_parquet

BATCH = 32_768  # examples whose activations are looked at together: 8 MB at a window of 64
_COLUMNS = ["feature", "rank", "language", "block", "position", "window_start", "value", "activations"]


@dataclass(frozen=True, eq=False, slots=True)
class Sparse:
    """Active positions of many rows.

    Attributes:
        first [rows + 1]: row i holds the entries first[i] to first[i + 1].
        gap [A]: distance from the active position before; of a row's first one its place in the row.
        level [A]: uint8, percent of the feature's maximum, 1 to 100.
    """

    first: NDArray[np.int64]
    gap: NDArray[np.int32]
    level: NDArray[np.uint8]

    def pairs(self, begin: int, end: int) -> list[list[int]]:
        """[gap, level, gap, level ...] of the rows from `begin` to `end`."""
        edges = self.first[begin : end + 1]
        rows = slice(edges[0], edges[-1])
        flat = np.stack([self.gap[rows], self.level[rows]], axis=1).reshape(-1).tolist()
        cuts = (2 * (edges - edges[0])).tolist()
        return [flat[a:b] for a, b in pairwise(cuts)]


@dataclass(frozen=True, eq=False, slots=True)
class Examples:
    """Examples of a setup, by feature and rank.

    Attributes:
        first [N + 1]: feature i has the examples first[i] to first[i + 1].
        feature, block, at, start, length, language [E]: `at` and `start` are positions in the block.
        value [E]: activation at the strongest position.
        on: active positions of each example's window.
    """

    first: NDArray[np.int64]
    feature: NDArray[np.int32]
    block: NDArray[np.int32]
    at: NDArray[np.int32]
    start: NDArray[np.int32]
    length: NDArray[np.int32]
    language: NDArray[np.int16]
    value: NDArray[np.float32]
    on: Sparse


@dataclass(frozen=True, eq=False, slots=True)
class Histogram:
    """Counted positions by feature, language and token; within these by falling count, then rank of the token.

    Attributes:
        feature, language, token, count, place [R]: `place` numbers the tokens of a feature and language from 0.
        first [N * G + 1]: the rows of feature f and language g start at first[f * G + g].
    """

    feature: NDArray[np.int32]
    language: NDArray[np.int32]
    token: NDArray[np.int32]
    count: NDArray[np.int64]
    place: NDArray[np.int32]
    first: NDArray[np.int64]

    def first_rows(self, language: int, n: int) -> NDArray[np.int64]:
        """Rows of the n most frequent tokens of every feature in a language."""
        return np.flatnonzero((self.language == language) & (self.place < n))


@dataclass(frozen=True, eq=False, slots=True)
class Pairs:
    """Aligned sentences in which a feature fires on both sides, by feature and rank."""

    first: NDArray[np.int64]  # [N + 1]
    pair: NDArray[np.int32]
    sides: tuple[Sparse, Sparse]


@dataclass(frozen=True, eq=False, slots=True)
class Activations:
    """Active positions by feature, language and bin of the activation."""

    first: NDArray[np.int64]  # [N + 1]
    language: NDArray[np.int32]
    bin: NDArray[np.int32]
    count: NDArray[np.int64]


def read_examples(setup: Setup, languages: tuple[str, ...], maximum: NDArray[np.float64]) -> Examples | None:
    """Read examples.parquet batch by batch; None where it is not there.

    Args:
        maximum [N]: of each feature, to which levels refer.

    Raises:
        InputError: a damaged file, or one whose rows are not in the order that a study writes.
    """
    path = setup.folder / "examples.parquet"
    if not path.exists():
        return None
    parts: list[tuple[NDArray[Any], ...]] = []
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH, columns=_COLUMNS):
                parts.append(_batch(batch, languages, maximum))
    except (pa.ArrowException, OSError, KeyError, IndexError) as error:
        raise InputError(f"{path} is damaged ({_line(error)}): remove it and run the study again") from None
    if not parts:
        parts.append(_batch(pa.record_batch({c: pa.array([], _type(c)) for c in _COLUMNS}), languages, maximum))
    feature, rank, language, block, at, start, value, length, active, gap, level = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    if np.any(language < 0) or np.any(feature >= setup.n_features):
        raise InputError(f"{path}: it names a language or a feature that the study has not: run the study again")
    if np.any(np.diff(feature.astype(np.int64) * (int(rank.max(initial=0)) + 1) + rank) <= 0):
        raise InputError(f"{path}: its rows are not in order of feature and rank: remove it and run the study again")
    on = Sparse(np.concatenate(([0], np.cumsum(active))), gap, level)
    return Examples(_offsets(feature, setup.n_features), feature, block, at, start, length, language, value, on)


def _type(column: str) -> pa.DataType:
    return {"language": pa.string(), "value": pa.float32(), "activations": pa.list_(pa.float32())}.get(column, pa.int32())


def _batch(batch: pa.RecordBatch, languages: tuple[str, ...], maximum: NDArray[np.float64]) -> tuple[NDArray[Any], ...]:
    columns = {name: batch.column(name) for name in _COLUMNS}
    feature, rank, block, at, start = (
        columns[c].to_numpy(zero_copy_only=False).astype(np.int32) for c in ("feature", "rank", "block", "position", "window_start")
    )
    number = {name: n for n, name in enumerate(languages)}
    coded = columns["language"].dictionary_encode()
    names = np.array([number.get(x, -1) for x in coded.dictionary.to_pylist()] or [-1], np.int16)
    language = names[coded.indices.to_numpy(zero_copy_only=False)]
    length, active, gap, level = _sparse(columns["activations"], maximum[feature])
    value = columns["value"].to_numpy(zero_copy_only=False).astype(np.float32)
    return feature, rank, language, block, at, start, value, length, active, gap, level


def _sparse(rows: pa.ListArray, maximum: NDArray[np.float64]) -> tuple[NDArray[Any], ...]:
    """Length of each row, its number of active positions, and their gaps and levels."""
    length = rows.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int32)
    values = rows.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    entry = np.flatnonzero(values > 0)
    ends = np.cumsum(length, dtype=np.int64)
    row = np.searchsorted(ends, entry, side="right")
    place = entry - (ends - length)[row]
    level = _levels(values[entry], maximum[row])
    return length, np.bincount(row, minlength=len(length)), _gaps(row, place), level


def _levels(values: NDArray[Any], maximum: NDArray[Any]) -> NDArray[np.uint8]:
    """Percent of the maximum, 1 to 100."""
    share = np.divide(values, maximum, out=np.ones(len(values)), where=maximum > 0)
    return np.clip(np.rint(100 * share), 1, 100).astype(np.uint8)


def _gaps(row: NDArray[Any], place: NDArray[Any]) -> NDArray[np.int32]:
    gap = np.diff(place, prepend=0)
    opens = np.diff(row, prepend=-1) != 0
    gap[opens] = place[opens]
    return gap.astype(np.int32)


def _offsets(feature: NDArray[Any], n: int) -> NDArray[np.int64]:
    return np.searchsorted(feature, np.arange(n + 1)).astype(np.int64)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_histogram(setup: Setup, n_languages: int, rank: NDArray[np.int32], by_rank: NDArray[np.int64]) -> Histogram | None:
    """Read histogram.parquet; None where it is not there.

    Args:
        rank [V]: of each token in the site, -1 where it has none. by_rank: the tokens in the order of their ranks.
    """
    path = setup.folder / "histogram.parquet"
    if not path.exists():
        return None
    table = read_parquet(path)
    feature, token, language = (table[c].to_numpy().astype(np.int32) for c in ("feature", "token", "language"))
    count = table["count"].to_numpy().astype(np.int64)
    inside = (language < n_languages) & (feature < setup.n_features) & (token < len(rank))
    if not inside.all() or np.any(rank[token] < 0):
        raise InputError(f"{path}: it holds features, languages or tokens that the run has not: run the study again")
    group, count = feature.astype(np.int64) * n_languages + language, np.maximum(count, 1)
    most, last = int(count.max(initial=1)), int(rank.max(initial=0))
    if (setup.n_features * n_languages) * (most + 1) * (last + 1) < 2**63:
        # One integer holds the whole order: numpy sorts these ten times as fast as it finds an order by three keys.
        key = np.sort((group * (most + 1) + (most - count)) * (last + 1) + rank[token])
        rest, place = np.divmod(key, last + 1)
        group, fall = np.divmod(rest, most + 1)
        token, count = by_rank[place], most - fall
    else:
        order = np.lexsort((rank[token], -count, group))
        group, token, count = group[order], token[order], count[order]
    first = _offsets(group, setup.n_features * n_languages)
    place = (np.arange(len(group)) - first[group]).astype(np.int32)
    feature, language = (x.astype(np.int32) for x in np.divmod(group, n_languages))
    return Histogram(feature, language, token.astype(np.int32), count, place, first)


def read_pairs(setup: Setup, maximum: NDArray[np.float64]) -> Pairs | None:
    """Read pairs.parquet; None where it is not there."""
    path = setup.folder / "pairs.parquet"
    if not path.exists():
        return None
    table = read_parquet(path).combine_chunks()
    feature = table["feature"].to_numpy().astype(np.int32)
    if np.any(np.diff(feature) < 0) or np.any(feature >= setup.n_features):
        raise InputError(f"{path}: its rows are not in order of the features: remove it and run the study again")
    sides = []
    for side in "ab":
        # Positions are given, not a dense row: each list says where the sentence fires.
        rows = table[f"at_{side}"].combine_chunks()
        length = rows.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        row = np.repeat(np.arange(len(length)), length)
        values = table[f"level_{side}"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        place = rows.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        if len(values) != len(place):
            raise InputError(f"{path}: at_{side} and level_{side} differ in length: remove it and run the study again")
        first = np.concatenate(([0], np.cumsum(length)))
        sides.append(Sparse(first, _gaps(row, place), _levels(values, maximum[feature][row])))
    pair = table["pair"].to_numpy().astype(np.int32)
    return Pairs(_offsets(feature, setup.n_features), pair, (sides[0], sides[1]))


def read_activations(setup: Setup, n_languages: int, n_bins: int) -> Activations | None:
    """Read activations.parquet; None where it is not there."""
    path = setup.folder / "activations.parquet"
    if not path.exists():
        return None
    table = read_parquet(path)
    feature, language, bin_ = (table[c].to_numpy().astype(np.int32) for c in ("feature", "language", "bin"))
    if np.any(language >= n_languages) or np.any((bin_ < 0) | (bin_ >= n_bins)) or np.any(np.diff(feature) < 0):
        raise InputError(f"{path}: languages, bins or the order of its rows are not the study's: run the study again")
    return Activations(_offsets(feature, setup.n_features), language, bin_, table["count"].to_numpy().astype(np.int64))
