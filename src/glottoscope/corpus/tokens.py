"""Token blocks: encoded text cut into fixed lengths, with the language and document of every position.

Shape suffixes: B blocks, T positions, G languages, P aligned pairs.
Tokens are uint32 (vocabularies pass 65,536), languages are uint8 indices into the study's ordered languages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glottoscope.atomic import atomic_path, write_json
from glottoscope.corpus.readers import AlignedPair
from glottoscope.errors import InputError

PADDING = 255  # language of a padded position
_FLUSH_TOKENS = 1 << 20  # stream length at which blocks are cut: bounds the copies, not the result

Encode = Callable[[list[str]], list[list[int]]]
Mode = Literal["blocks", "document_start"]
Bos = Literal["document", "block", "none"]


class TokenBlocks(NamedTuple):
    """Blocks of tokens, in the order in which they are read."""

    tokens: NDArray[np.uint32]  # [B, T]
    language: NDArray[np.uint8]  # [B, T]; PADDING at padded positions, the document's language at BOS
    document: NDArray[np.uint32]  # [B, T] row in the documents table; at padding the row before it


class AlignedTokens(NamedTuple):
    """Aligned sentences, each alone in its row; one layer of rows per language."""

    tokens: NDArray[np.uint32]  # [G, P, T], padded on the right
    length: NDArray[np.int32]  # [G, P] tokens of the row, BOS included
    article: NDArray[np.int32]  # [P] articles numbered in order of appearance: the unit to resample
    ids: list[str]  # P sentence ids


def attention_mask(language_BT: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """bool [B, T]: the positions a language model attends to (all but padding)."""
    return np.asarray(language_BT) != PADDING


def position_mask(tokens_BT: NDArray[np.uint32], language_BT: NDArray[np.uint8], special_ids: Iterable[int]) -> NDArray[np.bool_]:
    """bool [B, T]: the positions that count. Padding, BOS and special tokens never do.

    The one function behind training, statistics, browser and intervention.
    """
    special = np.fromiter(special_ids, dtype=np.int64)
    return attention_mask(language_BT) & ~np.isin(tokens_BT, special)


def encoder(tokenizer: Any) -> Encode:
    """A function from texts to token ids, without special tokens, of a Hugging Face tokenizer (fast or slow)."""

    def encode(texts: list[str]) -> list[list[int]]:
        # verbose=False: documents longer than the model's context are meant to be cut later.
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    return encode


def pack(
    encoded: Iterable[tuple[int, Sequence[int]]],
    *,
    language: int,
    context_length: int,
    mode: Mode = "blocks",
    bos: Bos = "document",
    bos_id: int | None = None,
    pad_id: int = 0,
    drop_short: bool = True,
    max_tokens: int | None = None,
) -> TokenBlocks:
    """Cut encoded documents of one language into blocks.

    Args:
        encoded: (row in the documents table, token ids without BOS) of each document; read no further than needed.
        language: index of the language.
        context_length: T in mode "blocks", BOS included; in "document_start" the tokens after BOS, so that
            T = context_length + 1, or context_length with bos "none".
        mode: "blocks" fills every block, documents running on from one to the next; "document_start" takes the
            beginning of each document (the paper's first version: 64 tokens).
        bos: "document": before each document; "block": at the start of each block; "none".
        drop_short: drop the unfinished last block ("blocks") or every document shorter than context_length
            ("document_start"); otherwise they are padded on the right with `pad_id` and language PADDING.
        max_tokens: at most this many tokens, BOS and padding not counted, in whole blocks.

    Returns:
        Blocks in the order of the documents; none at all when the text is shorter than a block.

    Raises:
        InputError: bos asked for and no bos_id; context_length too small to hold a token.
    """
    if bos != "none" and bos_id is None:
        raise InputError(f'bos = "{bos}" needs a tokenizer with a BOS token: set bos = "none"')
    if context_length < (2 if bos == "block" and mode == "blocks" else 1):
        raise InputError(f"context_length = {context_length} leaves no room for a token: raise it")
    prefix = [] if bos == "none" or bos_id is None else [bos_id]
    if mode == "document_start":
        parts = _document_starts(encoded, context_length, prefix, drop_short)
        width = context_length + len(prefix)
    else:
        block_prefix = prefix if bos == "block" else []
        parts = _filled_blocks(encoded, context_length, [] if block_prefix else prefix, block_prefix, drop_short)
        width = context_length

    kept: list[tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.bool_]]] = []
    n_tokens = 0
    for tokens_BT, document_BT, real_BT in parts:
        counted_BT = real_BT & (tokens_BT != bos_id) if prefix else real_BT
        running_B = n_tokens + np.cumsum(counted_BT.sum(axis=1))
        n_kept = len(running_B)
        if max_tokens is not None:
            n_kept = int(np.searchsorted(running_B, max_tokens, side="right"))
        if n_kept:
            kept.append((tokens_BT[:n_kept], document_BT[:n_kept], real_BT[:n_kept]))
            n_tokens = int(running_B[n_kept - 1])
        if n_kept < len(running_B) or n_tokens == max_tokens:
            break
    if not kept:
        return TokenBlocks(np.zeros((0, width), np.uint32), np.zeros((0, width), np.uint8), np.zeros((0, width), np.uint32))
    tokens_BT, document_BT, real_BT = (np.concatenate(part) for part in zip(*kept, strict=True))
    tokens_BT[~real_BT] = pad_id
    language_BT = np.where(real_BT, np.uint8(language), np.uint8(PADDING))
    return TokenBlocks(tokens_BT, language_BT, document_BT)


_Part = tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.bool_]]  # tokens, document, real (not padded) [B, T]


def _document_starts(
    encoded: Iterable[tuple[int, Sequence[int]]], context_length: int, prefix: list[int], drop_short: bool
) -> Iterator[_Part]:
    width = context_length + len(prefix)
    rows: list[list[int]] = []
    documents: list[int] = []

    def part() -> _Part:
        tokens_BT = np.zeros((len(rows), width), np.uint32)
        real_BT = np.arange(width) < np.array([len(row) for row in rows])[:, None]
        tokens_BT[real_BT] = np.concatenate([np.asarray(row, np.uint32) for row in rows])
        return tokens_BT, np.repeat(np.asarray(documents, np.uint32)[:, None], width, axis=1), real_BT

    for document, ids in encoded:
        if len(ids) < context_length and (drop_short or not ids):
            continue
        rows.append([*prefix, *ids[:context_length]])
        documents.append(document)
        if len(rows) * width >= _FLUSH_TOKENS:
            yield part()
            rows, documents = [], []
    if rows:
        yield part()


def _filled_blocks(
    encoded: Iterable[tuple[int, Sequence[int]]],
    context_length: int,
    document_prefix: list[int],
    block_prefix: list[int],
    drop_short: bool,
) -> Iterator[_Part]:
    width = context_length - len(block_prefix)
    tokens: list[NDArray[np.uint32]] = []
    documents: list[NDArray[np.uint32]] = []
    waiting = 0

    def cut(n_blocks: int) -> _Part:
        """Cut n_blocks from the stream (padding the last one if it is short) and keep the rest."""
        nonlocal tokens, documents, waiting
        stream, row = np.concatenate(tokens), np.concatenate(documents)
        n = min(n_blocks * width, waiting)
        tokens, documents, waiting = [stream[n:]], [row[n:]], waiting - n
        missing = n_blocks * width - n
        tokens_BT = np.pad(stream[:n], (0, missing)).reshape(n_blocks, width)
        document_BT = np.pad(row[:n], (0, missing), mode="edge").reshape(n_blocks, width)
        real_BT = (np.arange(n_blocks * width) < n).reshape(n_blocks, width)
        if block_prefix:
            tokens_BT = np.insert(tokens_BT, 0, block_prefix[0], axis=1)
            document_BT = np.insert(document_BT, 0, document_BT[:, 0], axis=1)
            real_BT = np.insert(real_BT, 0, True, axis=1)
        return tokens_BT, document_BT, real_BT

    for document, ids in encoded:
        if not ids:
            continue
        stream = np.asarray([*document_prefix, *ids], np.uint32)
        tokens.append(stream)
        documents.append(np.full(len(stream), document, np.uint32))
        waiting += len(stream)
        if waiting >= max(_FLUSH_TOKENS, width):
            yield cut(waiting // width)
    n_blocks = waiting // width if drop_short else -(-waiting // width)
    if n_blocks:
        yield cut(n_blocks)


def interleave(per_language: Sequence[TokenBlocks], special_ids: Iterable[int] = ()) -> TokenBlocks:
    """Mix the languages 1:1 by counted tokens (METHOD: 1:1 in tokens, interleaved).

    Every language gives as many blocks as fit into the tokens of the smallest one, and a block comes when its
    language's running count reaches it: full blocks simply alternate. At any point the running counts of two
    languages differ by less than two blocks, and at the end by less than one.

    Args:
        per_language: blocks of each language, in the study's order, of one length T.
        special_ids: tokens that `position_mask` leaves out.

    Raises:
        InputError: a language has no block.
    """
    special = list(special_ids)
    sizes = [position_mask(b.tokens, b.language, special).sum(axis=1) for b in per_language]
    for index, size_B in enumerate(sizes):
        if not size_B.sum():
            raise InputError(f"language {index} (counted from 0) has too little text for one block: add text to it")
    ends = [np.cumsum(size_B) for size_B in sizes]
    budget = min(int(end_B[-1]) for end_B in ends)
    counts = [int(np.searchsorted(end_B, budget, side="right")) for end_B in ends]
    begin = np.concatenate([end_B[:n] - size_B[:n] for end_B, size_B, n in zip(ends, sizes, counts, strict=True)])
    owner = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((owner, begin))
    pieces = list(zip(per_language, counts, strict=True))
    return TokenBlocks(
        np.concatenate([blocks.tokens[:n] for blocks, n in pieces])[order],
        np.concatenate([blocks.language[:n] for blocks, n in pieces])[order],
        np.concatenate([blocks.document[:n] for blocks, n in pieces])[order],
    )


def encode_aligned(
    pairs: Sequence[AlignedPair], encode: Encode, *, bos_id: int | None, pad_id: int, max_length: int
) -> tuple[AlignedTokens, int]:
    """Encode aligned sentences, each alone, with BOS before it (none when bos_id is None).

    Args:
        max_length: longest row, BOS included; longer sentences are cut. T is the longest row that occurs.

    Returns:
        The tokens, and the number of sentences (of any language) that were cut.

    Raises:
        InputError: no pairs.
    """
    if not pairs:
        raise InputError("there are no aligned sentences to encode: check the aligned path, or leave it out")
    prefix = [] if bos_id is None else [bos_id]
    n_languages, room = len(pairs[0].texts), max_length - len(prefix)
    rows: list[list[int]] = []
    n_truncated = 0
    for language in range(n_languages):
        for start in range(0, len(pairs), 1024):
            for ids in encode([pair.texts[language] for pair in pairs[start : start + 1024]]):
                n_truncated += len(ids) > room
                rows.append([*prefix, *ids[:room]])
    length = np.array([len(row) for row in rows], np.int32)
    real = np.arange(length.max()) < length[:, None]
    tokens = np.full(real.shape, pad_id, np.uint32)
    tokens[real] = np.concatenate([np.asarray(row, np.uint32) for row in rows])
    numbers: dict[str, int] = {}
    article = np.array([numbers.setdefault(pair.article, len(numbers)) for pair in pairs], np.int32)
    shape = (n_languages, len(pairs))
    aligned = AlignedTokens(tokens.reshape(*shape, -1), length.reshape(shape), article, [pair.id for pair in pairs])
    return aligned, n_truncated


def write_blocks(directory: Path, name: str, blocks: TokenBlocks) -> None:
    """Write `NAME.tokens.npy`, `NAME.language.npy`, `NAME.document.npy`, each whole or not at all."""
    for field, array in blocks._asdict().items():
        _save(Path(directory) / f"{name}.{field}.npy", array)


def read_blocks(directory: Path, name: str, mmap: bool = True) -> TokenBlocks:
    """Read what `write_blocks` wrote; by default memory-mapped and read-only.

    Raises:
        InputError: a file is missing, truncated or no array, or the three differ in shape.
    """
    tokens, language, document = (_load(Path(directory) / f"{name}.{field}.npy", mmap) for field in TokenBlocks._fields)
    if not tokens.shape == language.shape == document.shape:
        raise InputError(f"{directory}: the arrays of {name!r} differ in shape: run the tokens stage again")
    return TokenBlocks(tokens, language, document)


def write_aligned(directory: Path, name: str, aligned: AlignedTokens) -> None:
    """Write `NAME.tokens.npy`, `NAME.length.npy`, `NAME.article.npy` and `NAME.ids.json`."""
    directory = Path(directory)
    for field in ("tokens", "length", "article"):
        _save(directory / f"{name}.{field}.npy", getattr(aligned, field))
    write_json(directory / f"{name}.ids.json", aligned.ids)


def read_aligned_tokens(directory: Path, name: str) -> AlignedTokens:
    """Read what `write_aligned` wrote.

    Raises:
        InputError: a file is missing or damaged.
    """
    directory = Path(directory)
    tokens, length, article = (_load(directory / f"{name}.{field}.npy", mmap=False) for field in ("tokens", "length", "article"))
    path = directory / f"{name}.ids.json"
    try:
        ids = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}): run the tokens stage again") from None
    return AlignedTokens(tokens, length, article, ids)


def _save(path: Path, array: NDArray[Any]) -> None:
    with atomic_path(path) as temporary:
        np.save(temporary, array, allow_pickle=False)


def _load(path: Path, mmap: bool) -> NDArray[Any]:
    try:
        return np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}): run the tokens stage again") from None
