"""Which language a feature speaks: the document rule (default) and the script rule (METHOD.md section 5, ours).

Both rules count a feature's positions per language, leave out neutral positions, turn counts into rates by exposure and
class the shares; they differ in what gives a position its language. The published first rule is in `v1`.

Shapes: N features, G languages, V vocabulary, E entries.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glottoscope.errors import InputError
from glottoscope.features.collect import Collected

Array = NDArray[Any]

NEUTRAL = 254  # a position of no language; 255 stays padding
NO_LANGUAGE = 255
RESERVED = ("dead", "neutral", "unclassified", "mixed")
Z_95 = 1.959963984540054


class LanguageClasses(NamedTuple):
    """Classes of N features."""

    language: Array  # str: dead | neutral | unclassified | <language> | mixed
    share: Array  # float64, largest language's share of the rates; nan without counted positions
    share_low: Array  # float64, Wilson 95 %
    share_high: Array  # float64


def exposure_rates(counts: Array, exposure: Array) -> Array:
    """float64 [..., G]: `counts` as if every language had been seen as often as the most seen one.

    Equal exposures leave the counts the integers they are, so that 9 of 10 is .9 and not, by rounding, above it.
    """
    return counts * (exposure.max() / np.maximum(exposure, 1))


def neutral_tokens(has_letters: Array, counts: Array, exposure: Array, ratio: float = 0.1, min_count: int = 10) -> Array:
    """bool [V]: tokens that are evidence for no language.

    Without letters, or frequent in two languages: at least `min_count` times in each of the two languages where its
    rate is highest, and the lower rate at least `ratio` x the higher.

    Args:
        has_letters [V]: bool. counts [V, G]: positions by document language. exposure [G]: positions of each language.
    """
    if counts.shape[1] < 2:
        return ~has_letters
    rate = exposure_rates(counts, exposure)
    order = np.argsort(-rate, axis=1, kind="stable")[:, :2]
    top = np.take_along_axis(rate, order, axis=1)
    n_both = np.take_along_axis(counts, order, axis=1).min(axis=1)
    lower = np.divide(top[:, 1], top[:, 0], out=np.zeros(len(top)), where=top[:, 0] > 0)
    shared = (n_both >= min_count) & (lower >= ratio)
    return ~has_letters | shared


def token_language(counts: Array, exposure: Array, neutral: Array) -> Array:
    """uint8 [V]: the language in whose documents a token is most frequent by rate; 255 for neutral or unseen ones."""
    best = np.argmax(exposure_rates(counts, exposure), axis=1).astype(np.uint8)
    return np.where(neutral | (counts.sum(axis=1) == 0), np.uint8(NO_LANGUAGE), best)


def count_languages(feature: Array, language: Array, n_features: int, n_languages: int) -> tuple[Array, Array]:
    """Positions of each feature: (n_lang int64 [N, G], n_neutral int64 [N]).

    Args:
        feature [E]; language [E]: index of the language of each entry, any value >= G (NEUTRAL) is neutral.
    """
    column = np.minimum(language, n_languages).astype(np.int64)
    width = n_languages + 1
    counts = np.bincount(feature.astype(np.int64) * width + column, minlength=n_features * width)
    counts = counts.reshape(n_features, width)
    return counts[:, :n_languages], counts[:, n_languages]


def document_languages(collected: Collected, neutral: Array) -> Array:
    """uint8 [E]: the document's language at each entry, NEUTRAL where its token is in `neutral` [V]."""
    return np.where(neutral[collected.token], np.uint8(NEUTRAL), collected.language)


def wilson(share: Array, n: Array, z: float = Z_95) -> tuple[Array, Array]:
    """Wilson score interval (Wilson 1927) of a share seen in n positions; (nan, nan) where n is 0."""
    n = np.where(n > 0, n, np.nan).astype(np.float64)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # The score interval contains the share; at 0 and 1 rounding must not push it out.
    return np.minimum(np.maximum(centre - half, 0), share), np.maximum(np.minimum(centre + half, 1), share)


def classify(
    n_lang: Array,
    n_neutral: Array,
    exposure: Array,
    alive: Array,
    languages: Sequence[str],
    *,
    min_count: int = 20,
    share: float = 0.9,
) -> LanguageClasses:
    """Class every feature, in this order: dead, neutral, unclassified, a language, mixed.

    Args:
        n_lang [N, G], n_neutral [N]: positions above the threshold, from `count_languages`.
        exposure [G]: counted positions by language; shares are of the rates n_lang / exposure.
        alive [N]: active at least once. languages: G codes.
        min_count: fewer counted (non-neutral) positions are `unclassified`.
        share: a language needs strictly more.

    The Wilson interval takes the counted positions as independent draws: neighbours in a document are not quite.

    Raises:
        InputError: a language code that is the name of a class; a language without counted positions.
    """
    for code in languages:
        if code in RESERVED:
            raise InputError(f"language code {code!r} is the name of a class: choose another code")
    if not np.all(exposure > 0):
        missing = [code for code, n in zip(languages, exposure, strict=True) if n == 0]
        raise InputError(f"no counted position in language {', '.join(missing)}: every language needs test documents")
    n_counted = n_lang.sum(axis=1)
    rate = exposure_rates(n_lang, exposure)
    total = rate.sum(axis=1)
    best = np.argmax(rate, axis=1)
    top_share = np.divide(rate.max(axis=1), total, out=np.full(len(total), np.nan), where=total > 0)
    low, high = wilson(top_share, n_counted)
    names = np.array(languages, dtype=object)
    is_neutral = (n_neutral > 0) & (n_neutral >= n_counted)
    conditions = [~alive, is_neutral, n_counted < min_count, top_share > share]
    language = np.select(conditions, ["dead", "neutral", "unclassified", names[best]], "mixed").astype(str)
    return LanguageClasses(language, top_share, low, high)


_JAPANESE = ("Han", "Hiragana", "Katakana")
_SCRIPTS_OF = {
    "ja": _JAPANESE,
    "zh": ("Han", "Bopomofo"),
    "ko": ("Hangul",),
    **dict.fromkeys(("ru", "uk", "bg", "sr", "mk", "be", "kk", "mn"), ("Cyrillic",)),
    **dict.fromkeys(("ar", "fa", "ur"), ("Arabic",)),
    **dict.fromkeys(("hi", "mr", "ne"), ("Devanagari",)),
    **dict.fromkeys(("he", "yi"), ("Hebrew",)),
    "el": ("Greek",),
    "th": ("Thai",),
    "bn": ("Bengali",),
    "ta": ("Tamil",),
    "te": ("Telugu",),
    "ka": ("Georgian",),
    "hy": ("Armenian",),
}
# The first word of these that occurs in a letter's Unicode name names its script.
_NAME_TO_SCRIPT = {
    "CJK": "Han",
    "IDEOGRAPHIC": "Han",
    **{
        script.upper(): script for script in {s for scripts in _SCRIPTS_OF.values() for s in scripts} | {"Latin"} if script != "Han"
    },
}


def script_languages(languages: Sequence[str]) -> dict[str, int]:
    """Script name -> index of the first language that is written in it (Latin where a code is not listed).

    Raises:
        InputError: a language is left without a script of its own, so that the rule cannot see it.
    """
    mapping: dict[str, int] = {}
    for index, code in enumerate(languages):
        scripts = [s for s in _SCRIPTS_OF.get(code.split("-")[0].lower(), ("Latin",)) if s not in mapping]
        if not scripts:
            raise InputError(f'rule = "script" cannot tell {code} from a language before it: use rule = "document"')
        mapping.update(dict.fromkeys(scripts, index))
    return mapping


@lru_cache(maxsize=65536)
def letter_script(character: str) -> str | None:
    """Script of a letter ("Latin", "Han", "Hiragana", ...); None for anything else. Full-width letters are letters."""
    if not unicodedata.category(character).startswith("L"):
        return None
    for word in unicodedata.name(character, "").replace("-", " ").split():
        if word in _NAME_TO_SCRIPT:
            return _NAME_TO_SCRIPT[word]
    return None


def script_language(text: str, mapping: Mapping[str, int]) -> int:
    """Language index of a character span by the script of most of its letters (the earlier one on ties); else NEUTRAL.

    Letters of scripts outside `mapping` are no evidence.
    """
    languages = [mapping[s] for s in map(letter_script, text) if s is not None and s in mapping]
    if not languages:
        return NEUTRAL
    return max(languages, key=languages.count)  # max keeps the first of equals
