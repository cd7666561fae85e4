"""The exact language rule of the paper's first version (METHOD.md section 5, `rule = "v1"`; en and ja only).

A feature's example speaks the language of its argmax token. The rule's known weaknesses (a digit takes the language of
the token before it; ':', 'é' and byte tokens count as Japanese) are kept as they were published: it is the option that
reproduces published counts, not the default.

Shapes: B blocks, T positions, V vocabulary, N features.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glottoscope.errors import InputError
from glottoscope.features.collect import Collected, Examples, first_examples, restrict

Array = NDArray[Any]

LANGUAGES = ("en", "ja")
EN, JA = 0, 1
N_EXAMPLES = 50
SHARE = 0.9

_ENGLISH = re.compile(r"""^[a-zA-Z\s"'(),.\-]+$""")
_DIGITS = re.compile(r"^[0-9]+$")


def v1_token_tables(token_texts: Sequence[str]) -> tuple[Array, Array]:
    """(english [V], digits [V]) bool: what the rule's two patterns say of every token's text, stripped."""
    stripped = [text.strip() for text in token_texts]
    english = np.fromiter((_ENGLISH.match(s) is not None for s in stripped), bool, len(stripped))
    digits = np.fromiter((_DIGITS.match(s) is not None for s in stripped), bool, len(stripped))
    return english, digits


def v1_position_language(tokens: Array, english: Array, digits: Array, mask: Array | None = None) -> Array:
    """Language the rule gives each position: uint8 [B, T], 0 = en, 1 = ja.

    Digits look at the token before, again and again; position 0 wraps to the last. Where `mask` [B, T] is False (BOS,
    padding) a position does not exist for the rule. A block of digits only, on which the published rule never ends, is
    Japanese ("anything else").
    """
    decides = ~digits[tokens] if mask is None else ~digits[tokens] & mask
    column = np.where(decides, np.arange(tokens.shape[1]), -1)
    before = np.maximum.accumulate(column, axis=1)
    before = np.where(before >= 0, before, before[:, -1:])
    language = np.where(english[tokens], EN, JA)
    resolved = np.take_along_axis(language, np.maximum(before, 0), axis=1)
    return np.where(before >= 0, resolved, JA).astype(np.uint8)


def v1_example_language(tokens: list[str], activations: list[float]) -> str:
    """Language ("en" | "ja") of one example: that of its argmax token, the first one on ties.

    Raises:
        InputError: an example without tokens, or with another number of activations.
    """
    if not tokens or len(tokens) != len(activations):
        raise InputError(f"an example has {len(tokens)} tokens and {len(activations)} activations: one for each is needed")
    english, digits = v1_token_tables(tokens)
    language = v1_position_language(np.arange(len(tokens))[None], english, digits)
    return LANGUAGES[language[0, int(np.argmax(activations))]]


def v1_class(en: int, ja: int) -> str:
    """Class ("en" | "ja" | "mixed") by a feature's numbers of English and Japanese examples: share strictly above 0.9.

    Raises:
        InputError: no examples: such a feature has no class.
    """
    n = en + ja
    if n == 0:
        raise InputError("a feature without examples has no language by rule v1: leave it out or call it unclassified")
    if en / n > SHARE:
        return "en"
    return "ja" if ja / n > SHARE else "mixed"


def v1_examples(collected: Collected, block_length: int, n: int = N_EXAMPLES) -> Examples:
    """v1's examples: the first n blocks in order with a position above threshold x the maximum before TopK."""
    return first_examples(restrict(collected, collected.encoder_max), n, block_length)


def v1_counts(examples: Examples, position_language: Array, n_features: int) -> Array:
    """Examples of each feature by language: int64 [N, 2]. `position_language` [B, T] from `v1_position_language`."""
    language = position_language[examples.block, examples.t]
    return np.bincount(examples.feature * 2 + language, minlength=2 * n_features).reshape(n_features, 2)


def v1_classify(counts: Array, alive: Array) -> Array:
    """Class names [N] of `counts` [N, 2]: dead, unclassified (no example), en, ja, mixed."""
    n = counts.sum(axis=1)
    share = counts / np.maximum(n, 1)[:, None]
    conditions = [~alive, n == 0, share[:, EN] > SHARE, share[:, JA] > SHARE]
    return np.select(conditions, ["dead", "unclassified", "en", "ja"], "mixed")
