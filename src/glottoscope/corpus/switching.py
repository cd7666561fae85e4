"""Dictionary code switching: mine translation pairs of tokens from aligned sentences, and swap tokens by them.

Shape suffixes: P aligned pairs, V vocabulary, M dictionary entries, A and B candidate tokens of the two languages,
C a chunk of A.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from glottoscope.errors import InputError

# Entries of the co-occurrence matrix held at a time (8 bytes each, in a few arrays).
CHUNK_ENTRIES = 1 << 22


class Dictionary(NamedTuple):
    """Translation pairs of tokens, one to one: token a_M[i] of the first language is b_M[i] of the second.

    Fields:
        a: int32 [M] token ids of the first language, ascending.
        b: int32 [M] token ids of the second language; a and b share no token.
        phi: float64 [M] phi coefficient of "the sentence has a" and "its translation has b".
    """

    a: NDArray[np.int32]
    b: NDArray[np.int32]
    phi: NDArray[np.float64]

    def partners(self, vocab_size: int) -> NDArray[np.int64]:
        """int64 [V]: each token's translation, in both directions; a token outside the dictionary maps to itself."""
        partner_V = np.arange(vocab_size)
        partner_V[self.a] = self.b
        partner_V[self.b] = self.a
        return partner_V


def word_tokens(token_bytes: Sequence[bytes]) -> NDArray[np.bool_]:
    """bool [V]: the tokens made of letters alone (one leading space allowed), complete UTF-8, any script.

    Digits, punctuation, white space, mixtures and the pieces of a character are False. Special tokens are the caller's
    to take out: their names are letters.
    """

    def is_word(piece: bytes) -> bool:
        try:
            text = piece.decode("utf-8").removeprefix(" ")
        except UnicodeDecodeError:
            return False
        return bool(text) and all(unicodedata.category(character)[0] in "LM" for character in text)

    return np.fromiter((is_word(piece) for piece in token_bytes), dtype=bool, count=len(token_bytes))


def mine_dictionary(
    pairs_a: Sequence[Sequence[int]],
    pairs_b: Sequence[Sequence[int]],
    *,
    vocab_size: int,
    is_word: NDArray[np.bool_],
    min_phi: float = 0.25,
    min_count: int = 20,
    max_shared: float = 0.1,
) -> Dictionary:
    """Mutual-best token pairs by sentence co-occurrence over P aligned sentences.

    phi = (P n_ab - n_a n_b) / sqrt(n_a (P - n_a) n_b (P - n_b)), with n_a the sentences of the first language that hold
    token a, n_b the same for b, and n_ab the pairs that hold both. A pair is kept when b is a's best partner, a is b's
    best, and phi > min_phi. Ties go to the smaller token id.

    A token is a candidate of a language when `is_word` holds, at least `min_count` sentences of that language contain
    it, and the sentences of the other language that contain it are at most `max_shared` times as many (so words in
    both languages, names in Latin letters for example, are never swapped).

    Args:
        pairs_a, pairs_b: token ids of sentence i and of its translation, without special tokens.
        is_word: bool [V], for example `word_tokens(token_bytes)`.

    Raises:
        InputError: the two sides differ in number, `is_word` is not [V], or a token id lies outside the vocabulary.
    """
    if len(pairs_a) != len(pairs_b):
        raise InputError(f"aligned sentences differ in number: {len(pairs_a)} and {len(pairs_b)}; give one translation each")
    if is_word.shape != (vocab_size,):
        raise InputError(f"is_word has shape {is_word.shape}: it needs one entry per token, ({vocab_size},)")
    occurs_a_PV, occurs_b_PV = _occurrence(pairs_a, vocab_size), _occurrence(pairs_b, vocab_size)
    count_a_V = np.bincount(occurs_a_PV.indices, minlength=vocab_size)
    count_b_V = np.bincount(occurs_b_PV.indices, minlength=vocab_size)
    token_a_A = np.flatnonzero(is_word & (count_a_V >= min_count) & (count_b_V <= max_shared * count_a_V))
    token_b_B = np.flatnonzero(is_word & (count_b_V >= min_count) & (count_a_V <= max_shared * count_b_V))
    best_b_A, best_a_B, phi_A = _best_partners(
        occurs_a_PV[:, token_a_A].T.tocsr(), occurs_b_PV[:, token_b_B].tocsr(), n_pairs=len(pairs_a)
    )
    mutual_A = phi_A > min_phi
    mutual_A[mutual_A] = best_a_B[best_b_A[mutual_A]] == np.flatnonzero(mutual_A)
    return Dictionary(
        a=token_a_A[mutual_A].astype(np.int32),
        b=token_b_B[best_b_A[mutual_A]].astype(np.int32),
        phi=phi_A[mutual_A],
    )


def swap_tokens(tokens: NDArray[Any], partner_V: NDArray[np.int64], probability: float, rng: np.random.Generator) -> NDArray[Any]:
    """A copy of `tokens` (any shape) in which each token that the dictionary knows is replaced by its translation,
    independently with `probability`, in either direction; partner_V is `Dictionary.partners`."""
    swap = rng.random(tokens.shape, dtype=np.float32) < probability
    return np.where(swap, partner_V[tokens], tokens).astype(tokens.dtype)


def _occurrence(sentences: Sequence[Sequence[int]], vocab_size: int) -> sparse.csr_array:
    """Binary [P, V]: sentence p holds token v."""
    length_P = np.fromiter((len(sentence) for sentence in sentences), dtype=np.int64, count=len(sentences))
    tokens = np.fromiter(chain.from_iterable(sentences), dtype=np.int64, count=int(length_P.sum()))
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab_size):
        raise InputError(
            f"aligned sentences hold token ids {tokens.min()} to {tokens.max()}, outside the vocabulary of "
            f"{vocab_size}: was another tokenizer used?"
        )
    occurs_PV = sparse.csr_array(
        (np.ones(tokens.size, dtype=np.int32), tokens, np.concatenate(([0], np.cumsum(length_P)))),
        shape=(len(sentences), vocab_size),
    )
    occurs_PV.sum_duplicates()
    occurs_PV.data[:] = 1
    return occurs_PV


def _best_partners(
    occurs_a_AP: sparse.csr_array, occurs_b_PB: sparse.csr_array, *, n_pairs: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Best partner of every candidate by phi, the first on ties: (best_b [A], best_a [B], phi of a and best_b [A])."""
    n_a_A = np.asarray(occurs_a_AP.sum(axis=1), dtype=np.float64)
    n_b_B = np.asarray(occurs_b_PB.sum(axis=0), dtype=np.float64)
    spread_a_A = np.sqrt(n_a_A * (n_pairs - n_a_A))
    spread_b_B = np.sqrt(n_b_B * (n_pairs - n_b_B))
    best_b_A = np.zeros(n_a_A.size, dtype=np.int64)
    phi_A = np.full(n_a_A.size, -np.inf)
    best_a_B = np.zeros(n_b_B.size, dtype=np.int64)
    phi_B = np.full(n_b_B.size, -np.inf)
    if not n_b_B.size:
        return best_b_A, best_a_B, phi_A
    chunk = max(1, CHUNK_ENTRIES // n_b_B.size)
    for start in range(0, n_a_A.size, chunk):
        rows = slice(start, start + chunk)
        together_CB = (occurs_a_AP[rows] @ occurs_b_PB).toarray()
        spread_CB = np.outer(spread_a_A[rows], spread_b_B)
        covariance_CB = n_pairs * together_CB.astype(np.float64) - np.outer(n_a_A[rows], n_b_B)
        # A token in every sentence has no spread: its phi is undefined and it has no partner.
        phi_CB = np.divide(covariance_CB, spread_CB, out=np.full(spread_CB.shape, -np.inf), where=spread_CB > 0)
        best_b_A[rows] = phi_CB.argmax(axis=1)
        phi_A[rows] = phi_CB.max(axis=1)
        highest_B = phi_CB.max(axis=0)
        higher_B = highest_B > phi_B  # strict: an earlier chunk's smaller token id wins a tie
        best_a_B[higher_B] = start + phi_CB.argmax(axis=0)[higher_B]
        phi_B[higher_B] = highest_B[higher_B]
    return best_b_A, best_a_B, phi_A
