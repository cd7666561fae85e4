"""Text that interventions are measured on: held-out documents, aligned sentences alone, and dev text of both kinds.

Shape legend: G languages, P aligned pairs, U units (a document, or a sentence of one language).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from glottoscope.corpus.tokens import PADDING, AlignedTokens, TokenBlocks, read_aligned_tokens
from glottoscope.intervention.perplexity import Windows, windows
from glottoscope.study.config import InterventionConfig, TextCorpus
from glottoscope.study.stages.context import Context
from glottoscope.study.store import read_parquet


class Text(NamedTuple):
    """Windows of a text, and of each of its units the language and what a bootstrap resamples it with."""

    windows: Windows
    language: NDArray[np.int64]  # [U]
    group: NDArray[np.int64]  # [U] document (translations of each other share one) or article


def text_of(context: Context, config: InterventionConfig, name: str) -> Text:
    """The text "documents" (test split), "sentences" (aligned test), "dev_documents" (validation) or "dev_sentences"."""
    if name.endswith("documents"):
        return _documents(context, config, "validation" if name == "dev_documents" else "test")
    return _sentences(context, config, read_aligned_tokens(context.store.aligned_dir, "dev" if name == "dev_sentences" else "test"))


def _cut(context: Context, config: InterventionConfig, tokens: NDArray[np.integer], lengths: NDArray[np.int64]) -> Windows:
    corpus = context.study.corpus
    bos = None if isinstance(corpus, TextCorpus) and corpus.bos == "none" else context.token_info.bos_id
    window = config.window or context.token_info.block_length
    room = window - (bos is not None)
    return windows(tokens, lengths, window=window, stride=config.stride or max(1, room // 2), bos_id=bos)


def _documents(context: Context, config: InterventionConfig, split: str) -> Text:
    """Documents put together again from the blocks of a split, the first of each language up to its share of tokens."""
    tokens, language, document = _flat(context.blocks(split), context.token_info.bos_id)
    order = np.argsort(document, kind="stable")  # blocks of one document keep their order
    tokens, language, document = tokens[order], language[order], document[order]
    rows, first, lengths = np.unique(document, return_index=True, return_counts=True)
    of_language = language[first].astype(np.int64)
    keep = np.zeros(len(rows), bool)
    budget = config.tokens // len(context.token_info.languages)
    for g in range(len(context.token_info.languages)):
        mine = np.flatnonzero(of_language == g)
        n = max(1, int(np.searchsorted(np.cumsum(lengths[mine]), budget, side="right")))
        keep[mine[:n]] = True
    kept = np.repeat(keep, lengths)
    table = read_parquet(context.store.tokens_dir / "documents.parquet")
    ids = _ids_of(table, split, rows[keep])
    _, group = np.unique(ids, return_inverse=True)
    return Text(_cut(context, config, tokens[kept], lengths[keep]), of_language[keep], group.astype(np.int64))


def _flat(blocks: TokenBlocks, bos_id: int | None) -> tuple[NDArray[np.uint32], NDArray[np.uint8], NDArray[np.uint32]]:
    real = np.asarray(blocks.language) != PADDING
    if bos_id is not None:
        real &= np.asarray(blocks.tokens) != bos_id
    return np.asarray(blocks.tokens)[real], np.asarray(blocks.language)[real], np.asarray(blocks.document)[real]


def _ids_of(table: pa.Table, split: str, rows: NDArray[np.integer]) -> list[str]:
    mine = table.filter(pc.field("split") == split)
    name = dict(zip(mine["row"].to_pylist(), mine["id"].to_pylist(), strict=True))
    return [str(name[int(row)]) for row in rows]


def _sentences(context: Context, config: InterventionConfig, aligned: AlignedTokens) -> Text:
    n_languages = len(aligned.length)
    bos = context.token_info.bos_id
    prefix = int(bos is not None and bool((aligned.tokens[:, :, 0] == bos).all()))
    lengths = aligned.length - prefix  # [G, P]
    spent = np.cumsum(lengths.sum(axis=0))
    n = max(1, int(np.searchsorted(spent, config.tokens, side="right")))
    lengths = lengths[:, :n].reshape(-1).astype(np.int64)
    tokens = aligned.tokens[:, :n, prefix:].reshape(n_languages * n, -1)
    kept = tokens[np.arange(tokens.shape[1]) < lengths[:, None]]
    empty = lengths == 0
    language = np.repeat(np.arange(n_languages), n)
    group = np.tile(aligned.article[:n].astype(np.int64), n_languages)
    return Text(_cut(context, config, kept, lengths[~empty]), language[~empty], group[~empty])
