"""The list of a setup: one column per measure, the top tokens, and short pieces of text to search and preview."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from glottoscope.errors import InputError
from glottoscope.report.browser.codec import SCHEMA, listed, rounded_array
from glottoscope.report.browser.examples import Histogram
from glottoscope.report.browser.index import Setup
from glottoscope.report.browser.source import SiteSource
from glottoscope.report.browser.texts import Texts
from glottoscope.study.store import read_parquet

TOP = 5  # tokens of a language in the list
SNIPPETS = 2  # of a language
SNIPPET_TOKENS = 24
FLAGS = ("alive", "bilingual", "bilingual_paper", "supportable", "single_token")
NUMBERS = (
    "share", "share_low", "share_high", "density", "max_activation", "h_token", "h_semantic", "monosemanticity",
    "monosemanticity_hidden", "coherence", "coherence_token", "phi", "phi_null",
)  # fmt: skip
COUNTS = ("n_positions", "n_neutral", "n_pairs_a", "n_pairs_b", "granularity")


@dataclass(frozen=True, eq=False, slots=True)
class FeatureList:
    """All features of a setup; the position is the feature.

    Attributes:
        columns: name -> float64 [N], NaN where unknown, rounded as the site shows them: what is searched and sorted is what
            is seen. `class` is an index into the site's classes.
        max_activation [N]: as the run has it.
        top: language -> int32 [N, TOP] ranks of tokens, most frequent first, -1 where there are fewer.
    """

    setup: Setup
    columns: dict[str, NDArray[np.float64]]
    max_activation: NDArray[np.float64]
    top: dict[str, NDArray[np.int32]]

    @property
    def n(self) -> int:
        return self.setup.n_features

    @property
    def alive(self) -> NDArray[np.bool_]:
        return self.columns["alive"] > 0


def read_list(source: SiteSource, setup: Setup, texts: Texts, histogram: Histogram | None) -> FeatureList:
    """Read features.parquet and count the examples.

    Raises:
        InputError: a damaged file, or one that does not hold the features that the run says it does.
    """
    path = setup.folder / "features.parquet"
    table = read_parquet(path)
    names = set(table.column_names)
    missing = [name for name in ("feature", "alive", "language", "max_activation") if name not in names]
    feature = _floats(table, "feature") if "feature" in names else np.zeros(0)
    order = np.argsort(feature, kind="stable")
    if missing or not np.array_equal(feature[order], np.arange(setup.n_features)):
        what = f"column(s) {', '.join(missing)} missing" if missing else f"features are not 0 to {setup.n_features - 1}"
        raise InputError(f"{path}: {what}: remove it and run the study again")
    columns: dict[str, NDArray[np.float64]] = {}
    languages = [f"n_{x}" for x in source.languages]
    for name in (*FLAGS, *NUMBERS, *COUNTS, *languages):
        if name in names:
            measure = source.measure(name)
            values = _floats(table, name)[order]
            columns[name] = rounded_array(values, measure.decimals if measure else None) if name in NUMBERS else values
    number = {name: n for n, name in enumerate(source.classes)}
    classes = [number.get(x, np.nan) for x in table["language"].to_pylist()]
    columns["class"] = np.array(classes, np.float64)[order]
    counts = example_counts(setup)
    if counts is not None:
        columns["examples"] = counts.astype(np.float64)
    top = {language: np.full((setup.n_features, TOP), -1, np.int32) for language in source.languages}
    if histogram is not None:
        for index, language in enumerate(source.languages):
            rows = histogram.first_rows(index, TOP)
            top[language][histogram.feature[rows], histogram.place[rows]] = texts.rank[histogram.token[rows]]
    return FeatureList(setup, columns, _floats(table, "max_activation")[order], top)


def example_counts(setup: Setup) -> NDArray[np.int64] | None:
    """Examples kept of every feature [N]; None where the setup has none."""
    table = read_columns(setup, "examples", ["feature"])
    if table is None:
        return None
    return np.bincount(table["feature"].to_numpy(), minlength=setup.n_features)[: setup.n_features]


def read_columns(setup: Setup, name: str, columns: list[str]) -> pa.Table | None:
    """Some columns of one of a setup's Parquet files; None where it is not there.

    Raises:
        InputError: it is damaged, or has no such column.
    """
    import pyarrow.parquet as pq

    path = setup.folder / f"{name}.parquet"
    if not path.exists():
        return None
    try:
        table = pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is damaged ({str(error).splitlines()[0]}): remove it and run the study again") from None
    if missing := [c for c in columns if c not in table.column_names]:
        raise InputError(f"{path}: column(s) {', '.join(missing)} missing: remove it and run the study again")
    return table


def _floats(table: pa.Table, name: str) -> NDArray[np.float64]:
    return table[name].cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False).astype(np.float64)


def list_record(found: FeatureList) -> dict[str, Any]:
    """list.json."""
    columns = {name: listed(values) for name, values in found.columns.items()}
    top = {language: [[x for x in row if x >= 0] for row in ranks.tolist()] for language, ranks in found.top.items()}
    return {"schema": SCHEMA, "setup": found.setup.id, "n": found.n, "columns": columns, "top": top}


Snippets = dict[str, list[list[str]]]  # language -> feature -> pieces of text


def read_snippets(source: SiteSource, setup: Setup, texts: Texts) -> Snippets:
    """Short pieces of text around the strongest position of each feature's first examples in each language."""
    result: Snippets = {language: [[] for _ in range(setup.n_features)] for language in source.languages}
    table = read_columns(setup, "examples", ["feature", "language", "block", "position", "window_start"])
    if table is None:
        return result
    columns = [table[c].to_numpy().astype(np.int64) for c in ("feature", "block", "position", "window_start")]
    names = table["language"].combine_chunks().dictionary_encode() if table.num_rows else None
    for language in source.languages:
        if names is None or language not in (known := names.dictionary.to_pylist()):
            continue
        rows = np.flatnonzero(names.indices.to_numpy(zero_copy_only=False) == known.index(language))
        feature = columns[0][rows]
        place = np.arange(len(rows)) - np.searchsorted(feature, feature)
        rows = rows[place < SNIPPETS]
        feature, block, at, start = (column[rows] for column in columns)
        if not texts.has(block, at):
            raise InputError(f"{setup.folder / 'examples.parquet'} names text that the run has not: run the study again")
        shown = texts.snippets(block, at, start, source.window, SNIPPET_TOKENS)
        for f, text in zip(feature.tolist(), shown, strict=True):
            result[language][f].append(text)
    return result


def snippets_record(setup: Setup, snippets: Snippets) -> dict[str, Any]:
    """snippets.json."""
    return {"schema": SCHEMA, "setup": setup.id, "snippets": snippets}
