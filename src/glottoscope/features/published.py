"""`glottoscope measure`: our measures on feature examples of any origin, such as those that LLM-jp published.

A file of examples holds one feature per line:

    {"feature": 0, "language": {"en": 26, "ja": 24}, "granularity": 4,
     "examples": [{"tokens": [" The", ...], "activations": [0, 3, ...], "document_language": "en"}, ...]}

`language` (published counts) and `granularity` (a human label 1-4) are optional; `document_language` is needed by
`rule = "document"` alone. What a file cannot give (densities, embeddings, aligned sentences) is null. Rule v1
reproduces the published counts of LLM-jp's features.

Shapes: N features, X examples, E counted positions, G languages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from glottoscope.errors import InputError
from glottoscope.features import v1
from glottoscope.features.coherence import coherence
from glottoscope.features.collect import group_counts
from glottoscope.features.language import (
    NEUTRAL,
    LanguageClasses,
    classify,
    count_languages,
    neutral_tokens,
    script_language,
    script_languages,
    wilson,
)
from glottoscope.features.monosemanticity import entropies

Array = NDArray[Any]

RULES = ("v1", "script", "document")
THRESHOLD = 0.7
MIN_COUNT = 20
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TextSpan(Protocol):
    """Tokens start to end (exclusive) and the text that they make together."""

    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def text(self) -> str: ...


MergeSpans = Callable[[Sequence[str]], Sequence[TextSpan]]


@dataclass(frozen=True, slots=True)
class Example:
    """tokens and activations [T] of one example; language of its document, None where the file has none."""

    tokens: list[str]
    activations: Array
    document_language: str | None


@dataclass(frozen=True, slots=True)
class PublishedFeature:
    """One line of the file. published: counts by language code, empty where the file has none."""

    line: int
    feature: int
    examples: list[Example]
    published: dict[str, int]
    granularity: int | None


@dataclass(frozen=True, slots=True)
class _Positions:
    """Positions of all examples, flat, in order of the file.

    example, feature, token, span: row numbers into examples, features, distinct tokens, distinct span texts.
    counted: above THRESHOLD x the feature's maximum.
    """

    example: Array
    feature: Array
    token: Array
    span: Array
    document_language: Array
    counted: Array
    tokens: list[str]
    spans: list[str]


def measure_file(
    path: str | Path,
    *,
    rule: str = "v1",
    min_count: int = MIN_COUNT,
    languages: Sequence[str] = ("en", "ja"),
    merge_spans: MergeSpans | None = None,
) -> pa.Table:
    """Measure the features of one file of examples: a row per feature in the file's order, columns as features.parquet.

    Every example counts with its positions above 0.7 x the feature's maximum over the file. The classes come from
    v1: argmax tokens of the first 50 examples, no minimum count; script: the Unicode script of the characters at each
    counted position; document: the language of the example's document, without neutral tokens. What a
    file of examples cannot say is assumed: equal exposure to the languages.

    Args:
        rule: "v1" | "script" | "document".
        min_count: fewer counted positions are `unclassified` (not for v1, which has no minimum).
        languages: codes in order; `published_<code>` columns are the file's own counts.
        merge_spans: groups the tokens of an example into readable spans, so that byte tokens ("<0xE3>") are judged by
            the character that they make together. Without it a byte token has no script and is neutral.

    Raises:
        InputError: unknown rule, or a bad file: names its line and feature and what is wrong.
    """
    if rule not in RULES:
        raise InputError(f"rule {rule!r} is unknown: use {', '.join(RULES)}")
    if rule == "v1" and tuple(languages) != v1.LANGUAGES:
        raise InputError(f'rule = "v1" knows en and ja only, not {", ".join(languages)}: use "script" or "document"')
    features = read_examples(path)
    if rule == "document":
        _check_documents(path, features, languages)
    positions, maximum = _positions(features, languages, merge_spans)
    alive = maximum > 0
    if rule == "v1":
        n_lang, n_neutral, classes = _v1_rule(features, positions, alive)
    else:
        n_lang, n_neutral, classes = _position_rule(rule, positions, alive, languages, min_count)
    return _table(features, positions, maximum, n_lang, n_neutral, classes, languages)


def _v1_rule(features: list[PublishedFeature], positions: _Positions, alive: Array) -> tuple[Array, Array, LanguageClasses]:
    """Counts [N, 2] of examples by the language of their argmax token."""
    english, digits = v1.v1_token_tables(positions.tokens)
    lengths = np.bincount(positions.example)
    starts = np.cumsum(lengths) - lengths
    column = np.arange(len(positions.example)) - starts[positions.example]
    tokens_XT = np.zeros((len(lengths), lengths.max()), dtype=np.int64)
    mask_XT = np.zeros(tokens_XT.shape, dtype=bool)
    values_XT = np.full(tokens_XT.shape, -1.0)
    tokens_XT[positions.example, column] = positions.token
    mask_XT[positions.example, column] = True
    values_XT[positions.example, column] = np.concatenate([e.activations for f in features for e in f.examples])
    language_XT = v1.v1_position_language(tokens_XT, english, digits, mask_XT)
    language_X = language_XT[np.arange(len(lengths)), values_XT.argmax(axis=1)]  # argmax: the first one on ties

    feature_X = positions.feature[starts]
    is_example = np.bincount(positions.example, weights=positions.counted) > 0
    order = np.flatnonzero(is_example)
    n_of_feature = np.bincount(feature_X[order], minlength=len(alive))
    rank = np.arange(len(order)) - (np.cumsum(n_of_feature) - n_of_feature)[feature_X[order]]
    order = order[rank < v1.N_EXAMPLES]
    key = feature_X[order] * 2 + language_X[order]
    counts_N2 = np.bincount(key, minlength=2 * len(alive)).reshape(len(alive), 2)
    n = counts_N2.sum(axis=1)
    share = np.divide(counts_N2.max(axis=1), n, out=np.full(len(n), np.nan), where=n > 0)
    classes = LanguageClasses(v1.v1_classify(counts_N2, alive), share, *wilson(share, n))
    return counts_N2, np.zeros(len(alive), dtype=np.int64), classes


def _position_rule(
    rule: str, positions: _Positions, alive: Array, languages: Sequence[str], min_count: int
) -> tuple[Array, Array, LanguageClasses]:
    """Counts [N, G] of counted positions by script or document, and the neutral ones [N]."""
    if rule == "script":
        mapping = script_languages(languages)
        span_language = np.array([script_language(text, mapping) for text in positions.spans], dtype=np.uint8)
        language_E = span_language[positions.span]
    else:
        n_languages, n_spans = len(languages), len(positions.spans)
        key = positions.span * n_languages + positions.document_language
        counts_VG = np.bincount(key, minlength=n_spans * n_languages).reshape(n_spans, n_languages)
        has_letters = np.array([any(c.isalpha() for c in text) for text in positions.spans], dtype=bool)
        neutral = neutral_tokens(has_letters, counts_VG, counts_VG.sum(axis=0))
        language_E = np.where(neutral[positions.span], NEUTRAL, positions.document_language)
    counted = positions.counted
    n_lang, n_neutral = count_languages(positions.feature[counted], language_E[counted], len(alive), len(languages))
    exposure = np.ones(len(languages), dtype=np.int64)
    return n_lang, n_neutral, classify(n_lang, n_neutral, exposure, alive, languages, min_count=min_count)


def _positions(features: list[PublishedFeature], languages: Sequence[str], merge: MergeSpans | None) -> tuple[_Positions, Array]:
    """All positions of all examples, and the maximum [N] of every feature."""
    examples = [example for feature in features for example in feature.examples]
    feature_X = np.repeat(np.arange(len(features)), [len(feature.examples) for feature in features])
    lengths = np.array([len(example.tokens) for example in examples], dtype=np.int64)
    example_E = np.repeat(np.arange(len(examples)), lengths)
    feature_E = feature_X[example_E]
    values_E = np.concatenate([example.activations for example in examples])
    maximum_N = np.zeros(len(features))
    np.maximum.at(maximum_N, feature_E, values_E)

    token_ids: dict[str, int] = {}
    span_ids: dict[str, int] = {}
    token_E = [token_ids.setdefault(token, len(token_ids)) for example in examples for token in example.tokens]
    span_E = [span_ids.setdefault(text, len(span_ids)) for example in examples for text in _span_texts(example.tokens, merge)]
    index = {code: number for number, code in enumerate(languages)}
    document_X = np.array([index.get(example.document_language or "", 0) for example in examples], dtype=np.int64)
    return _Positions(
        example=example_E,
        feature=feature_E,
        token=np.array(token_E, dtype=np.int64),
        span=np.array(span_E, dtype=np.int64),
        document_language=document_X[example_E],
        counted=values_E > THRESHOLD * maximum_N[feature_E],
        tokens=list(token_ids),
        spans=list(span_ids),
    ), maximum_N


def _span_texts(tokens: list[str], merge: MergeSpans | None) -> list[str]:
    """Text of the span that each token belongs to."""
    if merge is None:
        return ["" if _BYTE_PIECE.fullmatch(token) else token for token in tokens]
    return [span.text for span in merge(tokens) for _ in range(span.start, span.end)]


def _table(
    features: list[PublishedFeature],
    positions: _Positions,
    maximum: Array,
    n_lang: Array,
    n_neutral: Array,
    classes: LanguageClasses,
    languages: Sequence[str],
) -> pa.Table:
    n_features = len(features)
    counted = positions.counted
    feature_E, token_E = positions.feature[counted], positions.token[counted]
    groups = group_counts(feature_E, token_E, np.ones(len(token_E), dtype=np.int64))
    n_positions = np.bincount(feature_E, minlength=n_features)
    by_token = coherence(groups, n_features)
    n_tokens = np.bincount(groups.feature, minlength=n_features)
    columns: dict[str, Any] = {
        "feature": pa.array([f.feature for f in features], pa.int64()),
        "alive": pa.array(maximum > 0),
        "density": pa.nulls(n_features, pa.float64()),
        "max_activation": _floats(maximum),
        "n_examples": pa.array([len(f.examples) for f in features], pa.int64()),
        "n_positions": pa.array(n_positions, pa.int64()),
        **{f"n_{code}": pa.array(n_lang[:, i], pa.int64()) for i, code in enumerate(languages)},
        "n_neutral": pa.array(n_neutral, pa.int64()),
        "language": pa.array([str(name) for name in classes.language], pa.string()),
        "share": _floats(classes.share),
        "share_low": _floats(classes.share_low),
        "share_high": _floats(classes.share_high),
        "h_token": _floats(entropies(groups, n_features)),
        "h_semantic": pa.nulls(n_features, pa.float64()),
        "monosemanticity": pa.nulls(n_features, pa.float64()),
        "monosemanticity_hidden": pa.nulls(n_features, pa.float64()),
        "coherence": pa.nulls(n_features, pa.float64()),
        "coherence_token": _floats(by_token.value),
        "coherence_short": pa.array(by_token.short),
        "single_token": pa.array(n_tokens == 1),
        "phi": pa.nulls(n_features, pa.float64()),
        "phi_null": pa.nulls(n_features, pa.float64()),
        "bilingual": pa.nulls(n_features, pa.bool_()),
        "bilingual_paper": pa.nulls(n_features, pa.bool_()),
        "granularity": pa.array([f.granularity for f in features], pa.int8()),
        **{f"published_{code}": pa.array([f.published.get(code) for f in features], pa.int64()) for code in languages},
    }
    return pa.table(columns)


def _floats(values: Array) -> pa.Array:
    """NaN, our "undefined", becomes null."""
    return pa.array(np.asarray(values, dtype=np.float64), pa.float64(), from_pandas=True)


def read_examples(path: str | Path) -> list[PublishedFeature]:
    """Read and check a file of feature examples (JSONL).

    Raises:
        InputError: a missing or empty file, invalid UTF-8 or JSON, missing or repeated features, tokens and activations
            of different length, activations that are negative, NaN or no numbers; all with the line.
    """
    path = Path(path)
    features = [_feature(f"{path}, line {line}", line, row) for line, row in _json_lines(path)]
    if not any(feature.examples for feature in features):
        raise InputError(f"{path}: no feature with an example in it")
    seen: dict[int, int] = {}
    for feature in features:
        if feature.feature in seen:
            where = f"{path}, line {feature.line}"
            raise InputError(f"{where}: feature {feature.feature} was on line {seen[feature.feature]} already")
        seen[feature.feature] = feature.line
    return features


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file of feature examples") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            raise InputError(f"{path}, line {number}: not valid UTF-8: save the file as UTF-8") from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not valid JSON ({error})") from None


def _feature(where: str, line: int, row: Any) -> PublishedFeature:
    if not isinstance(row, dict):
        raise InputError(f"{where}: not a JSON object with 'feature' and 'examples'")
    for name in ("feature", "examples"):
        if name not in row:
            raise InputError(f"{where}: the field {name!r} is missing (has {', '.join(row) or 'nothing'})")
    feature = row["feature"]
    if not _is_count(feature):
        raise InputError(f"{where}: feature {feature!r} is not a number 0, 1, 2 ...")
    where = f"{where}, feature {feature}"
    if not isinstance(row["examples"], list):
        raise InputError(f"{where}: 'examples' is not a list")
    published = row.get("language") or {}
    if not isinstance(published, dict) or not all(_is_count(n) for n in published.values()):
        raise InputError(f'{where}: \'language\' must give counts by language code, as {{"en": 26, "ja": 24}}')
    granularity = row.get("granularity")
    if granularity is not None and (not _is_count(granularity) or granularity not in (1, 2, 3, 4)):
        raise InputError(f"{where}: granularity {granularity!r} is not 1, 2, 3, 4 or null")
    examples = [_example(f"{where}, example {number}", example) for number, example in enumerate(row["examples"])]
    return PublishedFeature(line, feature, examples, published, granularity)


def _example(where: str, row: Any) -> Example:
    if not isinstance(row, dict):
        raise InputError(f"{where}: not a JSON object with 'tokens' and 'activations'")
    for name in ("tokens", "activations"):
        if not isinstance(row.get(name), list):
            raise InputError(f"{where}: the field {name!r} is missing or not a list")
    tokens, numbers = row["tokens"], row["activations"]
    if not tokens or len(tokens) != len(numbers):
        raise InputError(f"{where}: {len(tokens)} tokens and {len(numbers)} activations: one for each token is needed")
    if not all(isinstance(token, str) for token in tokens):
        raise InputError(f"{where}: tokens must be strings")
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in numbers):
        raise InputError(f"{where}: activations must be numbers")
    activations = np.array(numbers, dtype=np.float64)
    if not np.all(np.isfinite(activations)) or activations.min() < 0:
        raise InputError(f"{where}: activations must be finite and not negative (they are taken after ReLU)")
    return Example(tokens, activations, row.get("document_language"))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_documents(path: str | Path, features: list[PublishedFeature], languages: Sequence[str]) -> None:
    for feature in features:
        for number, example in enumerate(feature.examples):
            if example.document_language not in languages:
                raise InputError(
                    f"{path}, line {feature.line}, feature {feature.feature}, example {number}: document_language is "
                    f'{example.document_language!r}; rule = "document" needs one of {", ".join(languages)} everywhere'
                )
