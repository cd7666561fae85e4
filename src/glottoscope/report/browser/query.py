"""The query of find.html: what its parameters mean, which features it finds, and the same list as JSON.

A setup is chosen by model, control, step, layer, lm_seed and seed; each takes a value, several with commas, or `all`.
Left out: model is the main one; control is `none` (all of them where the chosen models have no such setups); step is the
final one of each model, layer its middle one, lm_seed and seed the smallest. Features are chosen by the other parameters.
Whatever is wrong in a query is said in `problems`, and the parameter is left aside.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glottoscope.report.browser.codec import SCHEMA
from glottoscope.report.browser.index import Setup, final_steps, main_model, middle_layers
from glottoscope.report.browser.lists import FLAGS, FeatureList
from glottoscope.report.browser.texts import CLOSE, OPEN
from glottoscope.report.browser.twin import measures_of

if TYPE_CHECKING:
    from glottoscope.report.browser.labels import Label
    from glottoscope.report.browser.site import Site

MAX_FEATURES = 400_000  # loaded for one list
MAX_ROWS = 1_000  # of the list in JSON
PER_PAGE = 50
RANGES = {
    "R": "monosemanticity", "hidden": "monosemanticity_hidden", "coherence": "coherence", "phi": "phi", "density": "density",
    "share": "share", "max": "max_activation", "positions": "n_positions",
}  # fmt: skip
PLACES = ("model", "control", "step", "layer", "lm_seed", "seed")
SEARCHES = ("token", "text", "q")
QUERY_FLAGS = tuple(x for x in FLAGS if x != "alive")  # which has a parameter of its own
LABELS = ("1", "2", "3", "4", "any", "none", "note")
_REAL = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?", re.IGNORECASE)
NAMES = (*PLACES, "class", "flag", "alive", *RANGES, *SEARCHES, "lang", "label", "rater", "sort", "page", "per")


@dataclass(frozen=True, slots=True)
class Query:
    """A query that was read; what it leaves out has its default.

    Attributes:
        places: parameter -> its values; None: all of them. Without an entry: the default.
        classes: any of them. flags: (name, wanted). alive: None for dead and alive ones.
        ranges: column -> (low, high), both included. searches: parameter -> text. sort: (column, falling).
        problems: one plain sentence each.
    """

    places: dict[str, list[str] | None] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    flags: list[tuple[str, bool]] = field(default_factory=list)
    alive: bool | None = True
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    searches: dict[str, str] = field(default_factory=dict)
    lang: str | None = None
    label: str | None = None
    rater: str | None = None
    sort: tuple[str, bool] | None = None
    page: int | None = None
    per: int = PER_PAGE
    problems: list[str] = field(default_factory=list)


def folded(text: str) -> str:
    """Text as it is compared: NFKC, without case."""
    return unicodedata.normalize("NFKC", text).lower()


def parse(raw: Mapping[str, str], classes: Sequence[str], languages: Sequence[str]) -> Query:
    """Read the parameters of a query. Never fails: what cannot be read is a problem of the result."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    places: dict[str, list[str] | None] = {}
    ranges: dict[str, tuple[float, float]] = {}
    searches: dict[str, str] = {}
    for name, text in raw.items():
        text = text.strip()
        if name not in NAMES:
            problems.append(f"{_shown(name)} is not a parameter of this page")
        elif not text:
            continue
        elif name in PLACES:
            chosen = _place(name, text, problems)
            if chosen != []:
                places[name] = chosen
        elif name in RANGES:
            found = _range(text)
            if found is None:
                problems.append(f"{name}={_shown(text)} is not a range like 0.2..0.8")
            else:
                ranges[RANGES[name]] = found
        elif name in SEARCHES:
            searches[name] = text
        else:
            values |= _other(name, text, classes, languages, problems)
    # Whoever asks for dead features wants to see them.
    if "dead" in values.get("classes", ()) and "alive" not in values:
        values["alive"] = None
    return Query(places=places, ranges=ranges, searches=searches, problems=problems, **values)


def _shown(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}…"


def _place(name: str, text: str, problems: list[str]) -> list[str] | None:
    if text == "all":
        return None
    values = [x.strip() for x in text.split(",") if x.strip()]
    if name not in ("model", "control"):
        for bad in (x for x in values if not (x.isascii() and x.isdigit())):
            problems.append(f"{name}={_shown(bad)} is not a whole number, or all")
        values = [str(int(x)) for x in values if x.isascii() and x.isdigit() and len(x) < 19]
    return values


def _range(text: str) -> tuple[float, float] | None:
    low, dots, high = (x.strip() for x in text.partition(".."))
    if not dots or not (low or high) or not all(_REAL.fullmatch(x) for x in (low, high) if x):
        return None
    bounds = (float(low) if low else -math.inf, float(high) if high else math.inf)
    return None if bounds[0] > bounds[1] else bounds


def _other(name: str, text: str, classes: Sequence[str], languages: Sequence[str], problems: list[str]) -> dict[str, Any]:
    parts = [x.strip() for x in text.split(",") if x.strip()]
    if name == "class":
        for bad in (x for x in parts if x not in classes):
            problems.append(f"class={_shown(bad)} is not one of {', '.join(classes)}")
        return {"classes": [x for x in parts if x in classes]}
    if name == "flag":
        flags = [(x.removeprefix("!"), not x.startswith("!")) for x in parts]
        for bad, _ in (f for f in flags if f[0] not in QUERY_FLAGS):
            problems.append(f"flag={_shown(bad)} is not one of {', '.join(QUERY_FLAGS)}")
        return {"flags": [f for f in flags if f[0] in QUERY_FLAGS]}
    if name in ("page", "per"):
        if text.isascii() and text.isdigit() and int(text[:9]) > 0:
            return {name: int(text[:9])}
        problems.append(f"{name}={_shown(text)} is not a whole number above 0")
        return {}
    if name == "sort":
        column = _column(text.removeprefix("-"))
        if column is not None:
            return {"sort": (column, text.startswith("-"))}
    allowed = {
        "alive": ("1", "0", "all"), "lang": tuple(languages), "label": LABELS,
        "sort": (*RANGES, *_PLAIN_COLUMNS, "each also with a minus before it"),
    }  # fmt: skip
    if name == "rater":
        return {name: text}
    if text in allowed[name] and name != "sort":
        return {name: {"1": True, "0": False, "all": None}[text] if name == "alive" else text}
    problems.append(f"{name}={_shown(text)} is not one of {', '.join(allowed[name])}")
    return {}


_OF_SETUPS = ("setup", "model", "step", "layer")
_PLAIN_COLUMNS = (
    "feature", "class", "label", *_OF_SETUPS, "h_token", "h_semantic", "phi_null", "n_pairs_a", "n_pairs_b", "granularity",
    "examples",
)  # fmt: skip


def _column(name: str) -> str | None:
    return RANGES.get(name) or (name if name in (*_PLAIN_COLUMNS, *RANGES.values()) else None)


# ---- setups


def chosen_setups(site: Site, query: Query) -> list[Setup]:
    """The setups of a query, in the order of the site."""
    setups = site.setups
    places: dict[str, Any] = {"model": [main_model(setups)], **query.places}
    found = [s for s in setups if places["model"] is None or s.name in places["model"]]
    if "control" not in places:
        places["control"] = ["none"] if any(s.control == "none" for s in found) else None
    final, middle = final_steps(setups), middle_layers(site.source, setups)
    defaults: dict[str, Callable[[Setup], bool]] = {
        "control": lambda s: True,
        "step": lambda s: s.step == final[s.model],
        "layer": lambda s: s.layer == middle[s.model],
        "lm_seed": lambda s: s.lm_seed == min(x.lm_seed for x in setups if x.name == s.name),
        "seed": lambda s: s.sae_seed == min(x.sae_seed for x in setups if x.model == s.model),
    }
    for name, usual in defaults.items():
        column = "sae_seed" if name == "seed" else name
        if name not in places:
            found = [s for s in found if usual(s)]
        elif places[name] is not None:
            found = [s for s in found if str(getattr(s, column)) in places[name]]
    return found


# ---- features


def find(site: Site, raw: Mapping[str, str]) -> dict[str, Any]:
    """The list of a query: how many features it finds, and the rows of the page asked for, else the first 1,000."""
    query = parse(raw, site.source.classes, site.source.languages)
    problems = list(query.problems)
    setups = chosen_setups(site, query)
    if not setups:
        problems.append("the site has no such setup: choose another model, control, step, layer or seed")
    kept = _within_limit(setups, problems)
    labels = _labels(site, query)
    by_label = query.label is not None or query.rater is not None
    lists = [site.list(setup) for setup in kept]
    found = [np.flatnonzero(_matches(site, features, query, labels if by_label else None)) for features in lists]
    which = np.repeat(np.arange(len(kept)), [len(x) for x in found])
    feature = np.concatenate(found) if found else np.zeros(0, np.int64)
    order = _order(query, lists, found, which, feature, labels or [])
    first = 0 if query.page is None else (query.page - 1) * query.per
    size = MAX_ROWS if query.page is None else min(query.per, MAX_ROWS)
    rows = [(int(which[n]), int(feature[n])) for n in order[first : first + size].tolist()]
    return {
        "schema": SCHEMA,
        "query": {name: text for name, text in raw.items() if name in NAMES},
        "problems": problems,
        "setups": [setup.id for setup in kept],
        "total": len(order),
        "first": first,
        "per": query.per,
        "rows": [_row(site, lists[n], f) for n, f in rows],
    }


def _within_limit(setups: Sequence[Setup], problems: list[str]) -> list[Setup]:
    kept: list[Setup] = []
    total = sum(s.n_features for s in setups)
    for setup in setups:
        if kept and sum(s.n_features for s in kept) + setup.n_features > MAX_FEATURES:
            continue
        kept.append(setup)
    if len(kept) < len(setups):
        problems.append(
            f"these are {len(kept)} of {len(setups)} setups: {total:,} features are more than the {MAX_FEATURES:,} that one list "
            "holds; narrow model, step, layer or seed"
        )
    return kept


def _labels(site: Site, query: Query) -> list[Label] | None:
    """Labels that the query looks at; None where it asks for none."""
    if query.label is None and query.rater is None and (query.sort is None or query.sort[0] != "label"):
        return None
    found = site.labels.latest()
    return [x for x in found if query.rater is None or x.rater == query.rater]


def _matches(site: Site, features: FeatureList, query: Query, labels: list[Label] | None) -> NDArray[np.bool_]:
    """bool [N]: the features of a setup that the query finds."""
    nothing = np.full(features.n, np.nan)
    kept = np.ones(features.n, bool)
    if query.alive is not None:
        kept &= features.alive == query.alive
    if query.classes:
        kept &= np.isin(features.columns["class"], [site.source.classes.index(x) for x in query.classes])
    for name, wanted in query.flags:
        kept &= features.columns.get(name, nothing) == float(wanted)
    for name, (low, high) in query.ranges.items():
        values = features.columns.get(name, nothing)
        kept &= (values >= low) & (values <= high)
    if labels is not None:
        kept &= _labelled(features, query.label or "any", labels)
    for name, text in query.searches.items():
        kept &= _searched(site, features, name, folded(text), query.lang, kept)
    return kept


def _labelled(features: FeatureList, wanted: str, labels: list[Label]) -> NDArray[np.bool_]:
    own = [x for x in labels if x.setup == features.setup.id and x.feature < features.n]
    if wanted in ("any", "none"):
        chosen = own
    elif wanted == "note":
        chosen = [x for x in own if x.note]
    else:
        chosen = [x for x in own if x.granularity == int(wanted)]
    found = np.zeros(features.n, bool)
    found[[x.feature for x in chosen]] = True
    return ~found if wanted == "none" else found


def _searched(
    site: Site, features: FeatureList, name: str, needle: str, lang: str | None, among: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Features with a top token (token, q) or a piece of text (text, q) that holds the needle."""
    found = np.zeros(features.n, bool)
    languages = site.source.languages if lang is None else (lang,)
    if name != "text":
        # -1 stands for no token, and takes the last place.
        holds = np.append(site.tokens_with(needle), False)
        for language in languages:
            found |= holds[features.top[language]].any(axis=1)
    if name != "token":
        pieces = site.folded_snippets(features.setup)
        for f in np.flatnonzero(among & ~found).tolist():
            found[f] = any(needle in text for language in languages for text in pieces[language][f])
    return found


def plain(snippet: str) -> str:
    """A snippet without the marks around its strongest place."""
    return snippet.replace(OPEN, "").replace(CLOSE, "")


def _order(
    query: Query,
    lists: Sequence[FeatureList],
    found: Sequence[NDArray[Any]],
    which: NDArray[Any],
    feature: NDArray[Any],
    labels: list[Label],
) -> NDArray[np.int64]:
    """Places of the rows in the wanted order: nulls last, ties by setup, then feature."""
    if query.sort is None or not len(feature):
        return np.arange(len(feature))
    column, falling = query.sort
    if column == "feature":
        values = feature.astype(np.float64)
    elif column in _OF_SETUPS:
        values = np.array(_setup_keys(column, [x.setup for x in lists]), np.float64)[which]
    elif column == "label":
        values = np.concatenate([_grades(x, labels)[rows] for x, rows in zip(lists, found, strict=True)])
    else:
        values = np.concatenate([x.columns.get(column, np.full(x.n, np.nan))[rows] for x, rows in zip(lists, found, strict=True)])
    # lexsort puts NaN last, whichever way the numbers run.
    return np.lexsort((feature, which, -values if falling else values))


def _setup_keys(column: str, setups: Sequence[Setup]) -> list[int]:
    names = sorted({s.name for s in setups})
    keys: dict[str, Callable[[int, Setup], int]] = {
        "setup": lambda n, s: n, "model": lambda n, s: names.index(s.name), "step": lambda n, s: s.step,
        "layer": lambda n, s: s.layer,
    }  # fmt: skip
    return [keys[column](n, s) for n, s in enumerate(setups)]


def _grades(features: FeatureList, labels: list[Label]) -> NDArray[np.float64]:
    """Highest grade of each feature [N]; 0 where it has notes alone, NaN where it has no label."""
    found = np.full(features.n, np.nan)
    for label in labels:
        if label.setup == features.setup.id and label.feature < features.n:
            found[label.feature] = np.fmax(found[label.feature], label.granularity or 0)
    return found


def _row(site: Site, features: FeatureList, f: int) -> dict[str, Any]:
    setup = features.setup
    strings, snippets = site.texts.strings, site.snippets(setup)
    return {
        "id": f"{setup.id}:{f}",
        "setup": setup.id,
        "feature": f,
        "model": setup.name,
        "step": setup.step,
        "layer": setup.layer,
        **measures_of(site, features, f),
        "tokens": {x: [strings[r] for r in ranks[f].tolist() if r >= 0] for x, ranks in features.top.items()},
        "snippets": {x: [plain(text) for text in pieces[f]] for x, pieces in snippets.items()},
    }
