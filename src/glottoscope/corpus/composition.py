"""What a bilingual language model reads: monolingual and parallel documents in fixed proportions, some code-switched.

Every row of a batch is a BOS and a run of T - 1 tokens of one stream. There is one stream per language (its documents)
and one of parallel documents (articles whose sentences stand beside their translations); a document begins with its own
BOS and a block may begin in the middle of one, as in ordinary packing. Which stream row r of the run reads, and which
block of it, is a closed formula of r, so that any step can be asked for at once, no state is kept, and the shares are
exact; each stream is read without repetition within an epoch, in an order drawn anew for every epoch.

Shape suffixes: B rows of a batch, T positions, S segments of an epoch, P aligned pairs, A articles, G languages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glottoscope.corpus.switching import Dictionary, swap_tokens
from glottoscope.errors import InputError

ORDERS = ("fixed", "random", "alternating")
PARALLEL = "aligned"
# Purposes of random numbers, the second entry of each seed; streams are numbered from STREAM on.
SWITCHING, STREAM = 0, 1
CACHED_EPOCHS = 2  # a batch can straddle two


class Segments(NamedTuple):
    """Pieces of a flat token array in reading order: start int64 [S], length int64 [S]."""

    start: NDArray[np.int64]
    length: NDArray[np.int64]


class BilingualText:
    """Training batches for a language model from monolingual documents and aligned sentences.

    Args:
        monolingual: language -> its documents, each an array of token ids without BOS. Languages are read 1:1 by
            tokens.
        aligned: articles in any order, each the list of its pairs in reading order, each pair one array of token ids
            per language. Empty: every row is monolingual, whatever `parallel_share` says.
        dictionary: translation pairs for code switching; None: nothing is switched.
        context_length: T, the BOS included.
        parallel_share: share of rows that are parallel; the others are monolingual.
        switched_share: share of ALL rows, parallel ones too, in which words are switched.
        switch_probability: probability of switching each word that the dictionary knows, in a switched row.
        order: how an article's sentences and translations follow each other, or several ways of which each article
            draws one per epoch:
            "fixed": a1 b1 a2 b2 ..., one order of languages for the article, drawn;
            "random": the order of languages is drawn for every sentence;
            "alternating": a1 b2 a3 b4 ..., the language changes with every sentence and nothing is said twice; the
            other sentences are a document of their own (b1 a2 b3 ...), so every sentence is read once in any order.
        bos_id: stands at the start of every row and of every document.
        vocab_size: V; needed with a dictionary only.
        separator: token ids put after each sentence of a parallel document (a line break, say). Sentences are encoded
            one by one, without the space that would join them.
        seed: every draw depends on (seed, step) alone.

    Raises:
        InputError: a stream holds less than one block, a pair lacks a language, a share lies outside 0..1, an unknown
            order, or a dictionary that does not fit `vocab_size`.
    """

    def __init__(
        self,
        monolingual: Mapping[str, Sequence[NDArray[Any]]],
        aligned: Sequence[Sequence[Sequence[NDArray[Any]]]] = (),
        dictionary: Dictionary | None = None,
        *,
        bos_id: int,
        seed: int,
        context_length: int = 128,
        parallel_share: float = 0.5,
        switched_share: float = 0.5,
        switch_probability: float = 0.4,
        order: str | Sequence[str] = ORDERS,
        vocab_size: int | None = None,
        separator: Sequence[int] = (),
    ) -> None:
        orders = (order,) if isinstance(order, str) else tuple(order)
        for name in orders or ("",):
            if name not in ORDERS:
                raise InputError(f"order {name!r} of parallel documents is unknown: use {', '.join(ORDERS)}")
        shares = {
            "parallel_share": parallel_share,
            "switched_share": switched_share,
            "switch_probability": switch_probability,
        }
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise InputError(f"{name} is {share}: it must lie between 0 and 1")
        self.languages = tuple(monolingual)
        self.context_length = context_length
        self.bos_id = bos_id
        self.seed = seed
        self.parallel_share = parallel_share if len(aligned) else 0.0
        self.switched_share = switched_share if dictionary is not None else 0.0
        self.switch_probability = switch_probability
        self._partner_V = None if dictionary is None else _partners(dictionary, vocab_size)
        block = context_length - 1
        self._streams = [
            _document_stream(documents, language, bos_id=bos_id, block=block, seed=(seed, STREAM + index))
            for index, (language, documents) in enumerate(monolingual.items())
        ]
        if self.parallel_share:
            self._streams.append(
                _parallel_stream(
                    aligned,
                    languages=self.languages,
                    orders=orders,
                    bos_id=bos_id,
                    separator=separator,
                    block=block,
                    seed=(seed, STREAM + len(self.languages)),
                )
            )

    def lm_batch(self, step: int, batch_size: int) -> NDArray[np.uint32]:
        """Rows step * batch_size ... of the run: uint32 [B, T], BOS first; a function of (seed, step, batch_size)."""
        row_B = np.arange(step * batch_size, (step + 1) * batch_size)
        tokens_BT = np.empty((batch_size, self.context_length), dtype=np.uint32)
        tokens_BT[:, 0] = self.bos_id
        stream_B, ordinal_B = self.streams_of(row_B)
        for index, stream in enumerate(self._streams):
            chosen_B = stream_B == index
            if chosen_B.any():
                tokens_BT[chosen_B, 1:] = stream.blocks(ordinal_B[chosen_B])
        if self._partner_V is not None and self.switched_share:
            rng = np.random.default_rng((self.seed, SWITCHING, step))
            switched_B = rng.random(batch_size) < self.switched_share
            tokens_BT[switched_B] = swap_tokens(tokens_BT[switched_B], self._partner_V, self.switch_probability, rng)
        return tokens_BT

    def streams_of(self, row_B: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The stream each row of the run reads, and the block's number in it: (stream int64 [B], ordinal int64 [B]).

        Streams: the languages in order, then the parallel documents. Parallel rows are spread evenly, and the
        monolingual rows between them go round the languages.
        """
        parallel_before_B = np.floor(row_B * self.parallel_share).astype(np.int64)
        is_parallel_B = np.floor((row_B + 1) * self.parallel_share).astype(np.int64) > parallel_before_B
        ordinal_B, language_B = np.divmod(row_B - parallel_before_B, len(self.languages))
        return (
            np.where(is_parallel_B, len(self.languages), language_B),
            np.where(is_parallel_B, parallel_before_B, ordinal_B),
        )

    def epochs(self, n_rows: int) -> dict[str, float]:
        """How often a run of `n_rows` rows reads each stream: language (and "aligned") -> epochs."""
        stream_R, _ = self.streams_of(np.arange(n_rows))
        names = (*self.languages, PARALLEL)
        return {names[index]: int((stream_R == index).sum()) / stream.n_blocks for index, stream in enumerate(self._streams)}


class _Stream:
    """A flat token array, read in blocks: segments in an order that depends on the epoch, cut every `block` tokens."""

    def __init__(
        self,
        tokens: NDArray[np.uint32],
        arrange: Callable[[np.random.Generator], Segments],
        *,
        n_tokens: int,
        block: int,
        seed: tuple[int, int],
    ) -> None:
        self.tokens = tokens
        self.arrange = arrange
        self.block = block
        self.n_blocks = n_tokens // block  # what is left over is another text in the next epoch
        self.seed = seed
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] = {}

    def blocks(self, ordinal_B: NDArray[np.int64]) -> NDArray[np.uint32]:
        """Blocks by their number in the run: uint32 [B, block]."""
        out = np.empty((ordinal_B.size, self.block), dtype=np.uint32)
        epoch_B, within_B = np.divmod(ordinal_B, self.n_blocks)
        for epoch in np.unique(epoch_B).tolist():
            start_S, end_S, shuffled = self._epoch(epoch)
            chosen_B = epoch_B == epoch
            position = shuffled[within_B[chosen_B], None] * self.block + np.arange(self.block)
            segment = np.searchsorted(end_S, position, side="right")
            out[chosen_B] = self.tokens[start_S[segment] + position]
        return out

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(offset [S] from a position in the epoch to the token array, end [S] of each segment, order of blocks)."""
        if epoch not in self._epochs:
            if len(self._epochs) >= CACHED_EPOCHS:
                del self._epochs[next(iter(self._epochs))]
            rng = np.random.default_rng((*self.seed, epoch))
            start_S, length_S = self.arrange(rng)
            end_S = np.cumsum(length_S)
            # Neighbouring blocks are one article: shuffled, so that a batch does not hold eight blocks of the same one.
            self._epochs[epoch] = (start_S - (end_S - length_S), end_S, rng.permutation(self.n_blocks))
        return self._epochs[epoch]


def _document_stream(
    documents: Sequence[NDArray[Any]], language: str, *, bos_id: int, block: int, seed: tuple[int, int]
) -> _Stream:
    """Documents in an order drawn for each epoch, a BOS before each."""
    bos = np.array([bos_id])
    tokens = _flat(chain.from_iterable((bos, document) for document in documents))
    _check_length(tokens.size, block, f"language {language!r}")
    length_S = np.array([1 + len(document) for document in documents], dtype=np.int64)
    start_S = np.cumsum(length_S) - length_S

    def arrange(rng: np.random.Generator) -> Segments:
        order_S = rng.permutation(length_S.size)
        return Segments(start_S[order_S], length_S[order_S])

    return _Stream(tokens, arrange, n_tokens=tokens.size, block=block, seed=seed)


def _parallel_stream(
    aligned: Sequence[Sequence[Sequence[NDArray[Any]]]],
    *,
    languages: tuple[str, ...],
    orders: tuple[str, ...],
    bos_id: int,
    separator: Sequence[int],
    block: int,
    seed: tuple[int, int],
) -> _Stream:
    """Articles in an order drawn for each epoch, each a document of sentences beside their translations."""
    n_languages = len(languages)
    if any(len(pair) != n_languages for article in aligned for pair in article):
        raise InputError(f"an aligned pair does not have one text for each language ({', '.join(languages)})")
    end = np.asarray(separator, dtype=np.uint32)
    texts = [text for article in aligned for pair in article for text in pair]
    tokens = _flat(chain(([bos_id],), chain.from_iterable((text, end) for text in texts)))
    length_PG = np.array([len(text) + end.size for text in texts], dtype=np.int64).reshape(-1, n_languages)
    start_PG = 1 + (np.cumsum(length_PG) - length_PG.ravel()).reshape(length_PG.shape)  # after the BOS at index 0
    pairs_A = np.array([len(article) for article in aligned], dtype=np.int64)
    article_P = np.repeat(np.arange(pairs_A.size), pairs_A)
    index_P = np.arange(article_P.size) - np.repeat(np.cumsum(pairs_A) - pairs_A, pairs_A)

    def arrange(rng: np.random.Generator) -> Segments:
        rank_A = rng.permutation(pairs_A.size)
        order_A = rng.integers(len(orders), size=pairs_A.size)
        slots_AG = rng.permuted(np.tile(np.arange(n_languages), (pairs_A.size, 1)), axis=1)
        slot_PG = slots_AG[article_P]
        is_random_P = np.array([name == "random" for name in orders])[order_A][article_P]
        slot_PG[is_random_P] = rng.permuted(np.tile(np.arange(n_languages), (is_random_P.sum(), 1)), axis=1)
        # Alternating: passes over the article, one per language; in pass q sentence i is in the language of slot q + i.
        is_alternating_A = np.array([name == "alternating" for name in orders])[order_A]
        is_alternating_P = is_alternating_A[article_P]
        pass_PG = np.zeros_like(slot_PG)
        pass_PG[is_alternating_P] = (slot_PG[is_alternating_P] - index_P[is_alternating_P, None]) % n_languages
        slot_PG[is_alternating_P] = 0
        # Documents: the passes that there are; each begins with a BOS, which sorts before its sentences.
        document_A, document_pass = np.nonzero(np.arange(n_languages) < np.where(is_alternating_A, n_languages, 1)[:, None])
        longest = int(pairs_A.max()) + 1
        rank_PG = rank_A[article_P][:, None] * n_languages + pass_PG
        key_PG = (rank_PG * longest + 1 + index_P[:, None]) * n_languages + slot_PG
        bos_key = (rank_A[document_A] * n_languages + document_pass) * longest * n_languages
        order_S = np.argsort(np.concatenate((bos_key, key_PG.ravel())), kind="stable")
        start_S = np.concatenate((np.zeros_like(bos_key), start_PG.ravel()))
        length_S = np.concatenate((np.ones_like(bos_key), length_PG.ravel()))
        return Segments(start_S[order_S], length_S[order_S])

    # The least tokens an epoch can have: one document per article (alternating articles have a BOS more).
    n_tokens = int(length_PG.sum()) + pairs_A.size
    _check_length(n_tokens, block, "the aligned sentences")
    return _Stream(tokens, arrange, n_tokens=n_tokens, block=block, seed=seed)


def _flat(pieces: Any) -> NDArray[np.uint32]:
    arrays = [np.asarray(piece, dtype=np.uint32) for piece in pieces]
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=np.uint32)


def _check_length(n_tokens: int, block: int, what: str) -> None:
    if n_tokens < block:
        raise InputError(f"{what}: {n_tokens} tokens do not fill one block of {block}; give more text or a shorter context_length")


def _partners(dictionary: Dictionary, vocab_size: int | None) -> NDArray[np.int64]:
    largest = int(max(dictionary.a.max(initial=-1), dictionary.b.max(initial=-1)))
    if vocab_size is None or largest >= vocab_size:
        raise InputError(
            f"vocab_size is {vocab_size} and the dictionary holds token {largest}: give the vocabulary size of the tokenizer"
        )
    return dictionary.partners(vocab_size)
