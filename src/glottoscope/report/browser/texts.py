"""The text of a site: its tokens by rank, its blocks and aligned sentences, and pieces of it around a position.

Shapes: V vocabulary, B blocks, T positions of a block, S snippets, W tokens of a snippet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from glottoscope.errors import InputError
from glottoscope.report.browser.codec import SCHEMA
from glottoscope.report.browser.index import TEXT_FILE
from glottoscope.report.browser.source import SiteSource
from glottoscope.study.store import read_parquet

PADDING = 255  # language of a padded position, as the token store has it
TOKEN_LIMIT = 2000  # characters of a token that are kept
SNIPPET_LIMIT = 200  # characters of a snippet before, in and after its strongest place
OPEN, CLOSE = "\ue000", "\ue001"  # around the strongest place of a snippet
_CHUNK = 65_536  # blocks counted together


class Texts:
    """Tokens and text of the test split and of the aligned test sentences.

    Ranks order the tokens that occur there by falling count, then id; rank -1: the token does not occur.

    Raises:
        InputError: a file of the token store is missing or damaged.
    """

    def __init__(self, source: SiteSource) -> None:
        folder = source.store.tokens_dir
        self._source = source
        self.tokens = _load(folder / "test.tokens.npy")
        self.language = _load(folder / "test.language.npy")
        self.document = _load(folder / "test.document.npy")
        aligned = source.store.aligned_dir
        self.pair_tokens, self.pair_length = None, None
        if (aligned / "test.tokens.npy").exists():
            self.pair_tokens, self.pair_length = _load(aligned / "test.tokens.npy"), _load(aligned / "test.length.npy")
        self._pieces: pa.ChunkedArray = read_parquet(folder / "vocabulary.parquet")["bytes"]
        counts = self._counts(len(self._pieces))
        order = np.argsort(-counts, kind="stable")
        self.by_rank = order[: int(np.count_nonzero(counts))]
        self.rank = np.full(len(counts), -1, np.int32)
        self.rank[self.by_rank] = np.arange(len(self.by_rank), dtype=np.int32)

    def _counts(self, size: int) -> NDArray[np.int64]:
        """Occurrences of each token [V]."""
        counts = np.zeros(size, np.int64)
        for first in range(0, len(self.tokens), _CHUNK):
            real = np.asarray(self.language[first : first + _CHUNK]) != PADDING
            found = np.bincount(np.asarray(self.tokens[first : first + _CHUNK])[real], minlength=size)
            counts = counts + self._checked(found, size)
        if self.pair_tokens is not None and self.pair_length is not None:
            real = np.arange(self.pair_tokens.shape[2]) < np.asarray(self.pair_length)[..., None]
            counts = counts + self._checked(np.bincount(np.asarray(self.pair_tokens)[real], minlength=size), size)
        return counts

    def _checked(self, counts: NDArray[Any], size: int) -> NDArray[Any]:
        if len(counts) > size:
            folder = self._source.store.tokens_dir
            raise InputError(f"{folder}: the text holds token {len(counts) - 1}, the vocabulary ends at {size - 1}: run again")
        return counts

    @property
    def n_blocks(self) -> int:
        return len(self.tokens)

    @property
    def n_pairs(self) -> int:
        return 0 if self.pair_tokens is None else self.pair_tokens.shape[1]

    # ---- tokens

    @cached_property
    def strings(self) -> list[str]:
        """Text of the tokens by rank; bytes that are no characters are U+FFFD."""
        return [piece.decode("utf-8", "replace") for piece in self._ranked()]

    def _ranked(self) -> list[bytes]:
        return [bytes(x or b"") for x in self._pieces.take(pa.array(self.by_rank)).to_pylist()]

    def tokens_record(self) -> dict[str, Any]:
        """tokens.json."""
        parts, cut = {}, {}
        for rank, piece in enumerate(self._ranked()):
            if len(self.strings[rank]) > TOKEN_LIMIT:
                cut[str(rank)] = len(self.strings[rank])
            if not _is_text(piece):
                parts[str(rank)] = piece[:TOKEN_LIMIT].hex()
        special = [int(self.rank[x]) for x in self._source.special_ids if x < len(self.rank)]
        return {
            "schema": SCHEMA,
            "text": [text[:TOKEN_LIMIT] for text in self.strings],
            "bytes": parts,
            "special": sorted(x for x in special if x >= 0),
            "cut": cut,
        }

    # ---- blocks and pairs

    def text_record(self, number: int, blocks: NDArray[Any]) -> dict[str, Any]:
        """text/N.json: the wanted blocks of one file, without padding."""
        inside = blocks[blocks // TEXT_FILE == number]
        language, document = np.asarray(self.language[inside]), np.asarray(self.document[inside]).astype(np.int64)
        real = np.count_nonzero(language != PADDING, axis=1)
        ranks = [row[:n] for row, n in zip(self.rank[np.asarray(self.tokens[inside])].tolist(), real.tolist(), strict=True)]
        opens = np.diff(document, axis=1, prepend=-1) != 0
        opens &= np.arange(document.shape[1]) < real[:, None]
        documents: list[list[list[Any]]] = [[] for _ in ranks]
        for n, start in zip(*(x.tolist() for x in np.nonzero(opens)), strict=True):
            documents[n].append([start, self.document_id(int(document[n, start])), int(language[n, start])])
        names = [str(block) for block in inside.tolist()]
        return {
            "schema": SCHEMA,
            "first": number * TEXT_FILE,
            "blocks": dict(zip(names, ranks, strict=True)),
            "documents": dict(zip(names, documents, strict=True)),
        }

    def document_id(self, row: int) -> str:
        """Id of a document by its row in the token store; its number where it has none."""
        return self._document_ids.get(row) or str(row)

    @cached_property
    def _document_ids(self) -> dict[int, str]:
        table = read_parquet(self._source.store.tokens_dir / "documents.parquet")
        test = table.filter(pc.field("split") == "test")
        return dict(zip(test["row"].to_pylist(), test["id"].to_pylist(), strict=True))

    def pairs_record(self, number: int, pairs: NDArray[Any]) -> dict[str, Any]:
        """pairs/N.json: the wanted pairs of one file."""
        inside = pairs[pairs // TEXT_FILE == number].tolist()
        sides = {str(p): [self.side(p, 0), self.side(p, 1)] for p in inside}
        return {"schema": SCHEMA, "first": number * TEXT_FILE, "pairs": sides}

    def side(self, pair: int, language: int) -> list[int]:
        """Ranks of one sentence of a pair."""
        assert self.pair_tokens is not None and self.pair_length is not None
        return self.rank[np.asarray(self.pair_tokens[language, pair, : int(self.pair_length[language, pair])])].tolist()

    # ---- snippets

    @cached_property
    def _shown_pieces(self) -> pa.LargeBinaryArray:
        """Bytes of each token id, none for special tokens; the last entry is padding's."""
        pieces = [bytes(x or b"") for x in self._pieces.to_pylist()]
        for special in self._source.special_ids:
            if special < len(pieces):
                pieces[special] = b""
        return pa.array([*pieces, b""], pa.large_binary())

    def has(self, block: NDArray[Any], at: NDArray[Any]) -> bool:
        """Whether all these positions are in the text."""
        inside = (block >= 0) & (block < self.tokens.shape[0]) & (at >= 0) & (at < self.tokens.shape[1])
        return bool(inside.all())

    def snippets(self, block: NDArray[Any], at: NDArray[Any], start: NDArray[Any], length: int, width: int) -> list[str]:
        """Text of up to `width` tokens around each position, its strongest characters between OPEN and CLOSE.

        Args:
            block, at [S]: where. start [S], length: the window of the block that may be shown.
        """
        end = np.minimum(start + length, self.tokens.shape[1])
        low = np.clip(at - width // 2, start, np.maximum(start, end - width))
        column = low[:, None] + np.arange(width)
        inside = column < end[:, None]
        column = np.minimum(column, self.tokens.shape[1] - 1)
        tokens = np.asarray(self.tokens[block[:, None], column]).astype(np.int64)
        inside &= np.asarray(self.language[block[:, None], column]) != PADDING
        taken = self._shown_pieces.take(pa.array(np.where(inside, tokens, len(self._shown_pieces) - 1).reshape(-1)))
        _, ends, data = taken.buffers()
        size = tokens.size
        edges = np.frombuffer(ends, np.int64)[: size + 1] if size else np.zeros(1, np.int64)
        data = memoryview(data or b"")
        raw = np.frombuffer(data, np.uint8)
        first, last = edges[:-1:width], edges[width::width]
        peak = np.arange(len(block)) * width + np.clip(at - low, 0, width - 1)
        # A character is shown whole: from its first byte to the byte before the next character.
        a = _moved(raw, edges[peak], first, -1)
        b = _moved(raw, edges[peak + 1], last, 1)
        first = _moved(raw, first, a, 1)
        cuts = zip(first.tolist(), a.tolist(), b.tolist(), last.tolist(), strict=True)
        return [_snippet(data, *cut) for cut in cuts]


def _moved(raw: NDArray[np.uint8], place: NDArray[Any], limit: NDArray[Any], step: int) -> NDArray[np.int64]:
    """Places moved off the inner bytes of a character, not beyond the limits."""
    place = place.copy()
    for _ in range(3):
        inner = (place != limit) & (place < len(raw))
        inner[inner] = raw[place[inner]] & 0xC0 == 0x80
        place[inner] += step
    return place


def _snippet(data: memoryview, first: int, a: int, b: int, last: int) -> str:
    def text(begin: int, end: int) -> str:
        found = str(data[begin:end], "utf-8", "replace")
        return found.replace(OPEN, "").replace(CLOSE, "") if OPEN in found or CLOSE in found else found

    before, peak, after = text(first, a)[-SNIPPET_LIMIT:], text(a, b)[:SNIPPET_LIMIT], text(b, last)[:SNIPPET_LIMIT]
    return f"{before}{OPEN}{peak}{CLOSE}{after.rstrip(chr(0xFFFD))}"


def _is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


def _load(path: Path) -> NDArray[Any]:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}): run the tokens stage again") from None


class Used:
    """Numbers that some setup shows (blocks, pairs), gathered once and only when text is asked for."""

    def __init__(self, gather: Callable[[], NDArray[np.int64]]) -> None:
        self._gather, self._lock = gather, threading.Lock()
        self._numbers: NDArray[np.int64] | None = None

    @property
    def numbers(self) -> NDArray[np.int64]:
        with self._lock:
            if self._numbers is None:
                self._numbers = self._gather()
            return self._numbers

    @property
    def files(self) -> list[int]:
        """Text files that hold one of them."""
        return np.unique(self.numbers // TEXT_FILE).tolist()
