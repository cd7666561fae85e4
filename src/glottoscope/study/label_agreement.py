"""Labels of a run against each other and against the measures of its features: the record that page and terminal show."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from glottoscope.features.agreement import measure_agreement, rater_agreement
from glottoscope.report.browser.labels import Label
from glottoscope.study.store import RunStore, read_parquet

if TYPE_CHECKING:
    from glottoscope.features.alignment import Interval

MEASURES = (
    "monosemanticity", "monosemanticity_hidden", "coherence", "coherence_token", "phi", "share", "h_token", "density",
    "max_activation",
)  # fmt: skip
INTERPRETABLE, TOKEN_LEVEL = "interpretable (2-4)", "token-level (4)"
DRAWS = 1000
SEED = 0

Place = tuple[str, int]  # setup, feature


def agreement_of(store: RunStore) -> Callable[[Sequence[Label]], dict[str, Any]]:
    """What makes the `agreement` of data/labels.json from labels of this run (`LabelStore.latest`).

    The function keeps its last answer and the measures it has read; several threads may call it.
    """
    measures: dict[str, dict[str, np.ndarray] | None] = {}
    last: list[tuple[tuple[Label, ...], dict[str, Any]]] = []

    def agreement(labels: Sequence[Label]) -> dict[str, Any]:
        graded = tuple(label for label in labels if label.granularity is not None)
        for known, answer in last:
            if known == graded:
                return answer
        answer = {"pairs": _pairs(graded), "measures": _measures(graded, store, measures)}
        last[:] = [(graded, answer)]
        return answer

    return agreement


def _pairs(labels: Sequence[Label]) -> list[dict[str, Any]]:
    """Every two raters on the features that both graded."""
    by_rater: dict[str, dict[Place, int]] = {}
    for label in labels:
        assert label.granularity is not None
        by_rater.setdefault(label.rater, {})[label.setup, label.feature] = label.granularity
    found = []
    for a, b in itertools.combinations(sorted(by_rater), 2):
        both = sorted(by_rater[a].keys() & by_rater[b].keys())
        if both:
            result = rater_agreement([by_rater[a][x] for x in both], [by_rater[b][x] for x in both], n_boot=DRAWS, seed=SEED)
            found.append(
                {
                    "a": a, "b": b, "n": result.n, "agreement": _rounded(result.agreement), **_interval("kappa", result.kappa),
                    **_interval("weighted_kappa", result.weighted_kappa), "confusion": result.confusion.tolist(),
                }
            )  # fmt: skip
    return found


def _measures(labels: Sequence[Label], store: RunStore, cache: dict[str, dict[str, np.ndarray] | None]) -> list[dict[str, Any]]:
    """AUC of each measure for both questions."""
    grades: dict[Place, list[int]] = {}
    for label in labels:
        assert label.granularity is not None
        grades.setdefault((label.setup, label.feature), []).append(label.granularity)
    for setup in {setup for setup, _ in grades} - cache.keys():
        cache[setup] = _measures_of(store, setup)
    found = []
    for against, answers in ((INTERPRETABLE, _interpretable(grades)), (TOKEN_LEVEL, _token_level(grades))):
        places = sorted(place for place in answers if cache[place[0]] is not None)
        if not places:
            continue
        scores = np.array([[_value(cache[setup], name, feature) for name in MEASURES] for setup, feature in places])
        results = measure_agreement(scores, [answers[x] for x in places], n_boot=DRAWS, seed=SEED)
        for name, result in zip(MEASURES, results, strict=True):
            if result.n:
                record = {"measure": name, "against": against, "n": result.n, "n_positive": result.n_positive}
                auc = _interval("auc", result.auc)
                found.append({**record, "auc": auc["auc"], "low": auc["auc_low"], "high": auc["auc_high"]})
    return found


def _interpretable(grades: dict[Place, list[int]]) -> dict[Place, bool]:
    """Whether most raters gave 2 to 4; a tie is no answer."""
    votes = {place: Counter(grade >= 2 for grade in given) for place, given in grades.items()}
    return {place: n[True] > n[False] for place, n in votes.items() if n[True] != n[False]}


def _token_level(grades: dict[Place, list[int]]) -> dict[Place, bool]:
    """Of the interpretable: whether most of those who gave 2 to 4 gave 4; a tie is no answer."""
    answers = _interpretable(grades)
    votes = {place: Counter(g == 4 for g in given if g >= 2) for place, given in grades.items() if answers.get(place)}
    return {place: n[True] > n[False] for place, n in votes.items() if n[True] != n[False]}


def _measures_of(store: RunStore, setup: str) -> dict[str, np.ndarray] | None:
    """Measure -> values [N], NaN where undefined; None where the run has no such features."""
    path = store.cells_dir / setup / "features.parquet"
    if not path.exists():
        return None
    table = read_parquet(path)
    order = np.argsort(table["feature"].to_numpy())
    return {
        name: table[name].cast("double").to_numpy(zero_copy_only=False)[order] for name in MEASURES if name in table.column_names
    }


def _value(measures: dict[str, np.ndarray] | None, name: str, feature: int) -> float:
    values = (measures or {}).get(name)
    return float(values[feature]) if values is not None and feature < len(values) else math.nan


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4) + 0.0


def _interval(name: str, interval: Interval) -> dict[str, float | None]:
    return {name: _rounded(interval.value), f"{name}_low": _rounded(interval.low), f"{name}_high": _rounded(interval.high)}


def print_agreement(record: dict[str, Any], console: Console) -> None:
    """The record in words for a terminal."""
    if record["pairs"]:
        shown = Table("raters", "features", "equal", "kappa", "weighted kappa", title="Raters", title_justify="left")
        for pair in record["pairs"]:
            kappas = [_words(pair, x, f"{x}_low", f"{x}_high") for x in ("kappa", "weighted_kappa")]
            shown.add_row(f"{pair['a']}, {pair['b']}", str(pair["n"]), f"{pair['agreement']:.0%}", *kappas)
        console.print(shown)
    for against in (INTERPRETABLE, TOKEN_LEVEL):
        rows = [r for r in record["measures"] if r["against"] == against and r["auc"] is not None]
        if rows:
            title = f"Measures against {against}: AUC, 0.5 is chance"
            shown = Table("measure", "features", against.split(" (")[0], "AUC", title=title, title_justify="left")
            for row in rows:
                shown.add_row(row["measure"], str(row["n"]), str(row["n_positive"]), _words(row, "auc", "low", "high"))
            console.print(shown)
    if not record["pairs"] and not any(r["auc"] is not None for r in record["measures"]):
        console.print("Agreement needs a second rater, or grades of both kinds (1 and 2-4).")


def _words(row: dict[str, Any], value: str, low: str, high: str) -> str:
    if row[value] is None:
        return "undefined"
    return f"{row[value]:.2f}" + ("" if row[low] is None else f" [{row[low]:.2f}, {row[high]:.2f}]")
