"""`glottoscope label`: grade a sample of a run's features in the terminal, or write the labels as CSV."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from glottoscope.atomic import write_text
from glottoscope.corpus.display import merge_spans
from glottoscope.errors import InputError
from glottoscope.report.browser.examples import Examples
from glottoscope.report.browser.labels import Label, LabelStore, clean_rater, default_rater, labels_csv
from glottoscope.report.browser.site import Site
from glottoscope.report.browser.texts import PADDING
from glottoscope.study.label_agreement import agreement_of, print_agreement
from glottoscope.study.label_keys import Keys, open_keys
from glottoscope.study.label_sampling import Choice, Item, chosen_setups, draw
from glottoscope.study.label_session import Session
from glottoscope.study.label_view import Example, Piece, View
from glottoscope.study.store import RunStore, read_parquet

__all__ = ["Choice", "agreement_of", "label", "write_csv"]

_FACTS = ("monosemanticity", "monosemanticity_hidden", "coherence", "phi", "density")


def label(
    run: Path,
    choice: Choice,
    *,
    n: int,
    blind: bool,
    seed: int,
    rater: str | None,
    console: Console,
    keys: Keys | None = None,
) -> None:
    """Ask for labels of a sample and say how they agree with measures and other raters.

    What this rater graded before is left out, so the same command goes on where it stopped.

    Args:
        n: size of the sample. seed: of the draw; raters with one seed see the same features.
        blind: show text only: not where a feature is from, what class it has, or any measure.
        rater: None for the user's name.
        keys: where answers come from; None for stdin.

    Raises:
        InputError: a run without features, a choice that fits none, a rater's name that is none.
    """
    from glottoscope.study.browsing import open_site

    name = default_rater() if rater is None else clean_rater(rater)
    site = open_site(run)
    store = site.labels
    setups = chosen_setups(site.record, choice)
    columns = {row["id"]: site.list(site.setup(row["id"])).columns for row in setups}
    items = draw(site.record, setups, columns, classes=choice.classes, n=n, seed=seed, shuffled=blind)
    graded = {(x.setup, x.feature) for x in store.latest() if x.rater == name and x.granularity is not None}
    _say_problems(store, console)
    open_items = [item for item in items if (item.setup, item.feature) not in graded]
    before = len(items) - len(open_items)
    console.print(f"{len(items)} feature(s) in the sample, {before} of them graded by {name} before", markup=False)
    if open_items:
        session = Session(
            open_items, _views(site, open_items, blind), store, rater=name, blind=blind, names=_names(site), console=console
        )
        try:
            session.run(open_keys() if keys is None else keys)
        finally:
            console.print(f"\n{session.done} label(s) saved in {store.path}", markup=False)
    else:
        console.print("All of it is done; a larger --sample or another --seed has more.")
    print_agreement(agreement_of(RunStore(run))(store.latest()), console)


def write_csv(run: Path, path: Path, rater: str | None, console: Console) -> None:
    """Write the labels of one rater, or of all, as CSV (columns: `report.browser.labels.CSV_COLUMNS`).

    Raises:
        InputError: no labels, or a path that cannot be written.
    """
    from glottoscope.study.browsing import open_site

    site = open_site(run)
    labels = site.labels.latest()
    _say_problems(site.labels, console)
    raters = sorted({x.rater for x in labels})
    if rater is not None:
        name = clean_rater(rater)
        labels = [x for x in labels if x.rater == name]
        if not labels:
            raise InputError(f"--rater {name}: has no labels in {site.labels.path}; there are {', '.join(raters) or 'none at all'}")
    if not labels:
        raise InputError(f"{site.labels.path}: no labels yet; `glottoscope label` and `glottoscope browse` take them")
    if path.is_dir():
        raise InputError(f"--csv {path} is a folder: name a file, as in {path / 'labels.csv'}")
    write_text(path, labels_csv(labels, {row["id"]: row["lm_seed"] for row in site.record["setups"]}))
    console.print(f"{path} written: {len(labels)} label(s) of {', '.join(sorted({x.rater for x in labels}))}", markup=False)
    if different := _differing(labels):
        console.print(
            f"{different} feature(s) have different labels of different raters: `features.labels` of a study takes one "
            "rater's, written with --rater NAME",
            markup=False,
        )


def _differing(labels: list[Label]) -> int:
    grades: dict[tuple[str, int], set[int]] = {}
    for x in labels:
        if x.granularity is not None:
            grades.setdefault((x.setup, x.feature), set()).add(x.granularity)
    return sum(len(found) > 1 for found in grades.values())


def _say_problems(store: LabelStore, console: Console) -> None:
    for problem in store.problems:
        console.print(f"note: {problem}", markup=False)


def _names(site: Site) -> dict[str, str]:
    return {x: site.source.language_names.get(x, x) for x in site.source.languages}


# ---- what a rater sees


def _views(site: Site, items: list[Item], blind: bool) -> dict[Item, View]:
    """The view of every item, setup by setup: a setup's examples are read once, whatever the order of asking."""
    pieces = _pieces(site)
    return {item: _view(site, item, pieces, blind) for item in sorted(items)}


def _pieces(site: Site) -> list[bytes]:
    """Bytes of each token id; special tokens are no text."""
    found = read_parquet(site.source.store.tokens_dir / "vocabulary.parquet")["bytes"].to_pylist()
    special = set(site.source.special_ids)
    return [b"" if n in special else bytes(x or b"") for n, x in enumerate(found)]


def _view(site: Site, item: Item, pieces: list[bytes], blind: bool) -> View:
    setup = site.setup(item.setup)
    found, examples = site.list(setup), site.data(setup).examples
    rows = range(*examples.first[item.feature : item.feature + 2].tolist()) if examples is not None else ()
    shown = [_example(site, examples, row, pieces) for row in rows] if examples is not None else []
    ranks = {language: found.top[language][item.feature].tolist() for language in site.source.languages}
    tokens = {language: [site.texts.strings[r] for r in row if r >= 0] for language, row in ranks.items()}
    return View(shown, tokens, () if blind else _facts(site, item))


def _example(site: Site, examples: Examples, row: int, pieces: list[bytes]) -> Example:
    block, start, at = (int(x[row]) for x in (examples.block, examples.start, examples.at))
    window = slice(start, start + int(examples.length[row]))
    real = np.asarray(site.texts.language[block, window]) != PADDING
    ids = np.asarray(site.texts.tokens[block, window])[real].tolist()
    active = slice(examples.on.first[row], examples.on.first[row + 1])
    place, level = np.cumsum(examples.on.gap[active]), examples.on.level[active]
    levels = dict(zip(place.tolist(), level.tolist(), strict=True))
    code = int(examples.language[row])
    language = site.source.languages[code] if code >= 0 else ""
    return Example(language, merged([pieces[x] for x in ids], levels, at - start))


def merged(pieces: list[bytes], levels: Mapping[int, int], peak: int) -> list[Piece]:
    """Tokens joined to readable characters, each with its strongest level.

    Args:
        levels: position -> percent of the maximum; others are not active.
        peak: position of the strongest token.
    """
    spans = [span for span in merge_spans(pieces) if span.text]
    return [
        Piece(span.text, max(levels.get(n, 0) for n in range(span.start, span.end)), span.start <= peak < span.end)
        for span in spans
    ]


def _facts(site: Site, item: Item) -> tuple[str, ...]:
    columns: dict[str, Any] = site.list(site.setup(item.setup)).columns
    measures = [(name, site.source.measure(name), columns[name][item.feature]) for name in _FACTS if name in columns]
    words = [f"{m.label if m else name} {'undefined' if np.isnan(x) else f'{x:.3g}'}" for name, m, x in measures]
    return (f"{item.setup}, feature {item.feature}, class {item.name}", "; ".join(words))
