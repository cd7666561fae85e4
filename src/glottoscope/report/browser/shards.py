"""Shards: what the page of a feature shows, 64 features a file.

Each feature has a record in plain JSON; the examples, nine tenths of the bytes, are packed column by column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glottoscope.report.browser.cache import Cache
from glottoscope.report.browser.codec import SCHEMA, rounded
from glottoscope.report.browser.examples import (
    Activations,
    Examples,
    Histogram,
    Pairs,
    read_activations,
    read_examples,
    read_pairs,
)
from glottoscope.report.browser.index import Setup
from glottoscope.report.browser.lists import FeatureList
from glottoscope.report.browser.neighbours import Neighbours
from glottoscope.report.browser.packing import SEPARATOR, pack, pack_lists, unpack, zigzag
from glottoscope.report.browser.source import SiteSource

TOKENS = 15  # of a language


@dataclass(frozen=True, eq=False, slots=True)
class SetupData:
    """A setup read once: its list and its flat arrays; None where a file is not there."""

    found: FeatureList
    examples: Examples | None
    histogram: Histogram | None
    pairs: Pairs | None
    activations: Activations | None

    @property
    def setup(self) -> Setup:
        return self.found.setup


def read_data(source: SiteSource, found: FeatureList, histogram: Histogram | None) -> SetupData:
    """Read what the shards of a setup are made from."""
    setup, maximum = found.setup, found.max_activation
    edges = source.activation_edges
    return SetupData(
        found,
        read_examples(setup, source.languages, maximum),
        histogram,
        read_pairs(setup, maximum),
        read_activations(setup, len(source.languages), len(edges) - 1) if edges is not None else None,
    )


class Shards:
    """Makes the records of features; `counterparts` are the same SAE's setups at other checkpoints, with their numbers.

    What `prepare` found for a whole setup is used; without it, what a record needs is computed for that record.
    """

    def __init__(self, source: SiteSource, rank: NDArray[np.int32], neighbours: Neighbours) -> None:
        self._source, self._rank, self._neighbours = source, rank, neighbours
        self._edges = [] if source.activation_edges is None else rounded(source.activation_edges, None)
        self._clusters: Cache[NDArray[np.int64]] = Cache(2)

    def prepare(self, data: SetupData) -> None:
        """Find the clusters of a whole setup at once."""
        histogram = data.histogram
        if histogram is not None and self._clusters.peek(data.setup.id) is None:
            labels = self._labels(data.setup, histogram.feature, histogram.token, histogram.count)
            if labels is not None:
                self._clusters.put(data.setup.id, labels)

    def record(self, data: SetupData, counterparts: Sequence[tuple[int, Setup]], first: int, last: int) -> dict[str, Any]:
        """features/A-B.json."""
        features = self.features(data, counterparts, first, last)
        return {
            "schema": SCHEMA,
            "setup": data.setup.id,
            "first": first,
            "features": {str(first + n): f for n, f in enumerate(features)},
            "examples": None if data.examples is None else _packed(data.examples, data.found.max_activation, first, last),
        }

    def features(self, data: SetupData, counterparts: Sequence[tuple[int, Setup]], first: int, last: int) -> list[dict[str, Any]]:
        """Records of the features from `first` to `last`, both included; {} for a dead one."""
        alive = data.found.alive
        wanted = np.arange(first, last + 1)[alive[first : last + 1]]
        near = self._neighbours.near(data.setup, wanted)
        over = [(number, self._neighbours.over(data.setup, other, wanted)) for number, other in counterparts]
        tokens = self._tokens(data, first, last)
        records: list[dict[str, Any]] = [{} for _ in range(first, last + 1)]
        for n, f in enumerate(wanted.tolist()):
            record = records[f - first]
            if tokens is not None:
                record["tokens"], record["clusters"] = tokens[f - first]
            record["activations"] = self._activations(data.activations, f)
            record["pairs"] = None if data.pairs is None else _pairs(data.pairs, f)
            record["near"] = near[n]
            record["over"] = [[number, *best] for number, found in over if (best := found[n]) is not None]
        return records

    def _tokens(self, data: SetupData, first: int, last: int) -> list[tuple[dict[str, Any], dict[str, Any]]] | None:
        """Most frequent tokens and number of clusters of each feature, by language."""
        histogram, languages = data.histogram, self._source.languages
        if histogram is None:
            return None
        g = len(languages)
        rows = slice(histogram.first[first * g], histogram.first[(last + 1) * g])
        token, count = histogram.token[rows], histogram.count[rows]
        whole = self._clusters.peek(data.setup.id)
        labels = self._labels(data.setup, histogram.feature[rows], token, count) if whole is None else whole[rows]
        names = [None] * len(token) if labels is None else _numbered(histogram.feature[rows], labels).tolist()
        entries = list(zip(self._rank[token].tolist(), count.tolist(), names, strict=True))
        edges = (histogram.first[first * g : (last + 1) * g + 1] - histogram.first[first * g]).tolist()
        distinct = [None] * (len(edges) - 1) if labels is None else _distinct(edges, labels)
        result = []
        for n in range(last + 1 - first):
            cuts = edges[n * g : (n + 1) * g + 1]
            tokens = {x: [list(e) for e in entries[cuts[k] : cuts[k + 1]][:TOKENS]] for k, x in enumerate(languages)}
            result.append((tokens, {x: distinct[n * g + k] for k, x in enumerate(languages)}))
        return result

    def _labels(self, setup: Setup, feature: NDArray[Any], token: NDArray[Any], count: NDArray[Any]) -> NDArray[np.int64] | None:
        """Cluster of each row; a token has one cluster in a feature, whatever the language."""
        if self._source.clusters is None or not len(token):
            return None
        span = len(self._rank)
        key, back = np.unique(feature.astype(np.int64) * span + token, return_inverse=True)
        total = np.bincount(back, weights=count, minlength=len(key)).astype(np.int64)
        labels = self._source.clusters(setup.model, setup.layer, *np.divmod(key, span), total)
        return None if labels is None else labels[back]

    def _activations(self, found: Activations | None, f: int) -> dict[str, Any] | None:
        if found is None:
            return None
        rows = slice(found.first[f], found.first[f + 1])
        bins, language, count = found.bin[rows], found.language[rows], found.count[rows]
        if not len(bins):
            return None
        low, high = int(bins.min()), int(bins.max())
        counts = np.zeros((len(self._source.languages), high - low + 1), np.int64)
        np.add.at(counts, (language, bins - low), count)
        return {"edges": self._edges[low : high + 2], **{x: counts[k].tolist() for k, x in enumerate(self._source.languages)}}


def _numbered(feature: NDArray[Any], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Clusters of each feature numbered from 0 in the order of their first rows: a label means nothing by itself."""
    key = feature.astype(np.int64) * (int(labels.max(initial=0)) + 1) + labels
    _, start, back = np.unique(key, return_index=True, return_inverse=True)
    rank = np.empty(len(start), np.int64)
    rank[np.argsort(start)] = np.arange(len(start))
    number = rank[back]
    # Counted through the shard so far; each feature starts again.
    opens = np.flatnonzero(np.diff(feature, prepend=-1))
    return number - np.repeat(number[opens], np.diff(opens, append=len(feature)))


def _distinct(edges: list[int], labels: NDArray[np.int64]) -> list[Any]:
    """Number of different labels in each stretch of rows."""
    group = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
    span = int(labels.max(initial=0)) + 1
    return np.bincount(np.unique(group * span + labels) // span, minlength=len(edges) - 1).tolist()


def plain_examples(found: Examples, f: int) -> dict[str, Any]:
    """The examples of a feature in plain numbers."""
    begin, end = int(found.first[f]), int(found.first[f + 1])
    rows = slice(begin, end)
    return {
        "block": found.block[rows].tolist(),
        "at": found.at[rows].tolist(),
        "start": found.start[rows].tolist(),
        "length": found.length[rows].tolist(),
        "language": found.language[rows].tolist(),
        "value": rounded(found.value[rows], None),
        "on": found.on.pairs(begin, end),
    }


def _packed(found: Examples, maximum: NDArray[np.float64], first: int, last: int) -> dict[str, Any]:
    """The examples of a shard's features, one after the other, column by column: alike next to alike packs best.

    `count`, `max`: of each feature. `value`: the steps, zigzag, by which the activation falls from the maximum, in
    thousandths of it, each feature anew. `gap`: a list per example; `level`: as many numbers in all.
    """
    rows = slice(found.first[first], found.first[last + 1])
    on = slice(found.on.first[rows.start], found.on.first[rows.stop])
    top = maximum[found.feature[rows]]
    share = np.rint(np.divide(1000 * found.value[rows], top, out=np.full(len(top), 1000.0), where=top > 0)).astype(np.int64)
    fall = -np.diff(share, prepend=1000)
    opens = found.first[first : last + 1][np.diff(found.first[first : last + 2]) > 0] - rows.start
    fall[opens] = 1000 - share[opens]
    return {
        "count": np.diff(found.first[first : last + 2]).tolist(),
        "max": rounded(maximum[first : last + 1], None),
        "block": found.block[rows].tolist(),
        "at": pack(found.at[rows]),
        "start": _column(found.start[rows]),
        "length": _column(found.length[rows]),
        "language": _column(found.language[rows]),
        "value": pack(zigzag(fall)),
        "gap": pack_lists(np.diff(found.on.first[rows.start : rows.stop + 1]), found.on.gap[on]),
        "level": pack(found.on.level[on]),
    }


def _column(values: NDArray[Any]) -> str | int:
    """One number where all are alike."""
    return int(values[0]) if len(values) and bool((values == values[0]).all()) else pack(values)


def unpack_examples(shard: dict[str, Any], f: int) -> dict[str, Any] | None:
    """The examples of a feature of a shard in plain numbers, as assets/packed.js gives them; None where it has none."""
    packed, place = shard["examples"], f - shard["first"]
    if packed is None or not packed["count"][place]:
        return None
    begin = sum(packed["count"][:place])
    end = begin + packed["count"][place]
    columns = {name: packed[name] for name in ("at", "start", "length", "language", "value")}
    parts = {k: unpack(v)[begin:end] if isinstance(v, str) else [v] * (end - begin) for k, v in columns.items()}
    gaps, levels = [unpack(x) for x in packed["gap"].split(SEPARATOR)[:end]], unpack(packed["level"])
    ends = np.cumsum([0, *(len(x) for x in gaps)]).tolist()
    share = 1000 - np.cumsum([-(x + 1) // 2 if x % 2 else x // 2 for x in parts["value"]])
    return {
        "block": packed["block"][begin:end],
        **parts,
        "value": rounded(packed["max"][place] * share / 1000, None),
        "on": [[x for p in zip(gaps[n], levels[ends[n] : ends[n + 1]], strict=True) for x in p] for n in range(begin, end)],
    }


def _pairs(found: Pairs, f: int) -> list[dict[str, Any]]:
    begin, end = int(found.first[f]), int(found.first[f + 1])
    sides = zip(*(side.pairs(begin, end) for side in found.sides), strict=True)
    return [{"pair": p, "on": [a, b]} for p, (a, b) in zip(found.pair[begin:end].tolist(), sides, strict=True)]
