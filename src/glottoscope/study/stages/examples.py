"""Examples of features: the strongest sequences with the feature's activation at every position shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from glottoscope.corpus.tokens import (
    TokenBlocks,
)
from glottoscope.features import v1
from glottoscope.features.collect import Collected, Examples, top_examples
from glottoscope.study.plan import Cell, seed_for
from glottoscope.study.stages.context import Context, Vocabulary
from glottoscope.study.stages.passes import Codes, Collecting, Setup, positions

TEXT_TOKENS = 1_000_000  # put together at a time, so that the bytes' index stays small


def choose_examples(context: Context, collected: Collected, width: int, key: Setup) -> Examples:
    """The examples kept of a setup: strongest first; under rule v1 its first ones, in order."""
    features = context.study.features
    if features.rule == "v1":
        examples = v1.v1_examples(collected, width, max(features.top_examples, v1.N_EXAMPLES))
    else:
        examples = top_examples(collected, features.top_examples, width, features.language_examples)
    alive = np.flatnonzero(collected.alive)
    if features.example_features is not None and len(alive) > features.example_features:
        rng = np.random.default_rng([seed_for(context.study, "examples"), *key])
        wanted = np.zeros(collected.n_features, bool)
        wanted[rng.choice(alive, features.example_features, replace=False)] = True
        examples = Examples(*(column[wanted[examples.feature]] for column in examples))
    return examples


class Windows(NamedTuple):
    """The feature's activations around each example."""

    start: NDArray[np.int64]  # [E] first position shown
    activations: NDArray[np.float32]  # [E, W]


def windows_of(
    context: Context, lm: Any, cell: Cell, blocks: TokenBlocks, layers: Sequence[int], setups: dict[Setup, Collecting],
    shown: dict[Setup, Examples],
) -> dict[Setup, Windows]:  # fmt: skip
    """A second look at the blocks that hold examples: activations of a feature at every position of its windows."""
    width = blocks.tokens.shape[1]
    window = min(width, context.study.features.example_window)
    result, order, keys = {}, {}, {}
    for key, examples in shown.items():
        start = np.clip(examples.t - window // 2, 0, width - window)
        result[key] = Windows(start, np.zeros((len(start), window), np.float32))
        # At most one example per (feature, block): the pair is a key, sorted for look-up.
        pair = examples.block * setups[key].sae.n + examples.feature
        order[key] = np.argsort(pair, kind="stable")
        keys[key] = pair[order[key]]
    for key, codes in _codes_again(context, lm, cell, blocks, layers, setups, shown):
        if not len(keys[key]):
            continue
        block, t = np.divmod(codes.position, width)
        pair = block[:, None] * setups[key].sae.n + codes.indices
        place = np.minimum(np.searchsorted(keys[key], pair), len(keys[key]) - 1)
        row, pick = np.nonzero((keys[key][place] == pair) & (codes.values > 0))
        example = order[key][place[row, pick]]
        column = t[row] - result[key].start[example]
        inside = (column >= 0) & (column < window)
        result[key].activations[example[inside], column[inside]] = codes.values[row, pick][inside]
    return result


def _codes_again(
    context: Context,
    lm: Any,
    cell: Cell,
    blocks: TokenBlocks,
    layers: Sequence[int],
    setups: dict[Setup, Collecting],
    shown: dict[Setup, Examples],
) -> Iterator[tuple[Setup, Codes]]:
    """Codes of the blocks that hold examples: the kept ones, or from another pass."""
    if all(setup.codes for setup in setups.values()):
        for key, setup in setups.items():
            yield from ((key, codes) for codes in setup.codes)
        return
    needed = np.unique(np.concatenate([e.block for e in shown.values()])) if shown else np.zeros(0, np.int64)
    for chunk in positions(context, lm, cell, blocks, layers, needed.astype(np.int64)):
        for key, setup in setups.items():
            values, indices = setup.sae.encode(chunk.states[key[0]])
            yield key, Codes(chunk.position, values.cpu().numpy(), indices.cpu().numpy())


def examples_table(
    context: Context, examples: Examples, windows: Windows, blocks: TokenBlocks, vocabulary: Vocabulary,
    documents: list[str],
) -> pa.Table:  # fmt: skip
    """The examples with their windows; documents and languages are those of the strongest position."""
    n, window = windows.activations.shape
    tokens = np.asarray(blocks.tokens[examples.block[:, None], windows.start[:, None] + np.arange(window)])
    document = pa.array(np.asarray(blocks.document[examples.block, examples.t]), pa.int64())
    language = pa.array(np.asarray(blocks.language[examples.block, examples.t]), pa.int64())
    offsets = pa.array(np.arange(n + 1, dtype=np.int32) * window)
    return pa.table({
        "feature": examples.feature.astype(np.int32),
        "rank": examples.rank.astype(np.int32),
        "document": pa.array(documents, pa.string()).take(document),
        "language": pa.array(context.token_info.languages, pa.string()).take(language),
        "block": examples.block.astype(np.int64),
        "position": examples.t.astype(np.int32),
        "window_start": windows.start.astype(np.int32),
        "value": examples.value.astype(np.float32),
        "tokens": pa.ListArray.from_arrays(offsets, pa.array(tokens.reshape(-1), pa.uint32())),
        "activations": pa.ListArray.from_arrays(offsets, pa.array(windows.activations.reshape(-1), pa.float32())),
        "text": pa.array(texts_of(vocabulary.piece, tokens), pa.string()),
    })  # fmt: skip


def texts_of(pieces: list[bytes], tokens: NDArray[Any]) -> list[str]:
    """Text of each row of token ids [E, W]; a character cut at its edge shows as U+FFFD."""
    vocabulary = pa.array(pieces, pa.large_binary())
    texts: list[str] = []
    step = max(1, TEXT_TOKENS // max(1, tokens.shape[1]))
    for first in range(0, len(tokens), step):
        rows = tokens[first : first + step]
        # Arrow lays the bytes of one token after those of the other: a row's text is one stretch of them.
        taken = vocabulary.take(pa.array(rows.reshape(-1)))
        _, ends, data = taken.buffers()
        edges = np.frombuffer(ends, np.int64)[: rows.size + 1 : rows.shape[1]].tolist()
        text = memoryview(data or b"")
        texts += [str(text[i:j], "utf-8", "replace") for i, j in pairwise(edges)]
    return texts


def document_ids(context: Context) -> list[str]:
    from glottoscope.study.store import read_parquet

    table = read_parquet(context.store.tokens_dir / "documents.parquet")
    mask = np.array(table["split"].to_pylist()) == "test"
    ids = np.array(table["id"].to_pylist(), dtype=object)[mask]
    rows = table["row"].to_numpy()[mask]
    by_row = np.full(int(rows.max()) + 1, "", dtype=object)
    by_row[rows] = ids
    return by_row.tolist()
