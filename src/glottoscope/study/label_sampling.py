"""Which features a person is asked about: drawn with a seed, evenly over setups and classes.

Each stratum (a setup and a class) has an order of its own, which the seed fixes, and a sample takes the first ones of each: a
larger sample holds the smaller one, two raters with one seed see the same features, and what is left to do can be told at any
time.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from glottoscope.errors import InputError

ALL = "all"
BILINGUAL = "bilingual"  # a flag on mixed features; asked for by name it is a stratum of its own


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The setups and classes to draw from, as options of the command line; "all" takes every one.

    Without `models`: the largest that is no control. Without `steps`, `layers`, `sae_seeds`: the last checkpoint, the middle
    layer and the first seed of each model. Without `classes`: every class that has features.
    """

    models: Sequence[str] = ()
    steps: Sequence[str] = ()
    layers: Sequence[str] = ()
    sae_seeds: Sequence[str] = ()
    classes: Sequence[str] = ()


class Item(NamedTuple):
    """One feature to look at: its setup's id, its number, and the class it was drawn from."""

    setup: str
    feature: int
    name: str


def chosen_setups(site: Mapping[str, Any], choice: Choice) -> list[Mapping[str, Any]]:
    """The setups of site.json that a choice means, in its order.

    Raises:
        InputError: an option that fits no setup; says which there are.
    """
    rows: list[Mapping[str, Any]] = list(site["setups"])
    if choice.models:
        rows = _matching(rows, "model", choice.models, "--model")
    else:
        own = [r for r in rows if r["name"] == site["default"]["model"]]
        rows = [r for r in own if r["lm_seed"] == min(x["lm_seed"] for x in own)]
    rows = _matching(rows, "step", choice.steps, "--step") if choice.steps else [r for r in rows if r["final"]]
    rows = _matching(rows, "layer", choice.layers, "--layer") if choice.layers else [r for r in rows if r["middle"]] or rows
    if choice.sae_seeds:
        return _matching(rows, "sae_seed", choice.sae_seeds, "--sae-seed")
    first = {r["model"]: min(x["sae_seed"] for x in rows if x["model"] == r["model"]) for r in rows}
    return [r for r in rows if r["sae_seed"] == first[r["model"]]]


def _matching(rows: Sequence[Mapping[str, Any]], key: str, wanted: Sequence[str], option: str) -> list[Mapping[str, Any]]:
    if ALL in wanted:
        return list(rows)
    there = {str(row[key]) for row in rows}
    for value in wanted:
        if value not in there:
            names = sorted(there, key=lambda x: (not x.isdigit(), int(x) if x.isdigit() else 0, x))
            raise InputError(f"{option} {value}: there is none among these setups; there are {', '.join(names)}, or {ALL}")
    return [row for row in rows if str(row[key]) in wanted]


def draw(
    site: Mapping[str, Any],
    setups: Sequence[Mapping[str, Any]],
    columns: Mapping[str, Mapping[str, npt.NDArray[np.float64]]],
    *,
    classes: Sequence[str],
    n: int,
    seed: int,
    shuffled: bool,
) -> list[Item]:
    """Draw n features (all, where there are fewer) that have examples to look at.

    Args:
        columns: setup id -> columns [N] of its list: `class` (index into the site's classes), `examples`, `bilingual`; NaN
            where unknown.
        classes: of these only; () for all.
        shuffled: in an order that tells nothing; else by setup, class and number.

    Raises:
        InputError: an unknown class, or no feature to draw.
    """
    known = [*site["classes"], BILINGUAL]
    if unknown := [c for c in classes if c not in (*known, ALL)]:
        raise InputError(f"--class {unknown[0]}: unknown; choose from {', '.join(known)}, or {ALL}")
    strata = [(row["id"], *stratum) for row in setups for stratum in _strata(site["classes"], columns[row["id"]], classes)]
    if not strata:
        raise InputError("no feature of these setups and classes has examples to look at: choose others")
    rng = np.random.default_rng(seed)
    taken = allotment([len(features) for _, _, features in strata], n, rng.permutation(len(strata)))
    items = []
    for (setup, name, features), count in zip(strata, taken, strict=True):
        order = np.random.default_rng([seed, zlib.crc32(f"{setup} {name}".encode())]).permutation(len(features))
        items += [Item(setup, int(f), name) for f in sorted(features[order[:count]].tolist())]
    return [items[x] for x in rng.permutation(len(items))] if shuffled else items


def _strata(
    names: Sequence[str], columns: Mapping[str, npt.NDArray[np.float64]], wanted: Sequence[str]
) -> list[tuple[str, npt.NDArray[np.int64]]]:
    """(class, features with examples) of one setup, in the order of the site's classes; empty ones are left out."""
    number_N = columns["class"]
    class_N = np.array([*names, ""], dtype=object)[np.where(np.isnan(number_N), len(names), number_N).astype(np.int64)]
    nothing_N = np.zeros(len(number_N))
    if BILINGUAL in wanted:
        class_N[columns.get("bilingual", nothing_N) > 0] = BILINGUAL
    asked = [*names, BILINGUAL] if not wanted or ALL in wanted else dict.fromkeys(wanted)
    seen_N = columns.get("examples", nothing_N) > 0
    strata = [(name, np.flatnonzero((class_N == name) & seen_N)) for name in asked]
    return [(name, features) for name, features in strata if len(features)]


def allotment(sizes: Sequence[int], n: int, order: Sequence[int] | npt.NDArray[np.int64]) -> list[int]:
    """How many of each stratum: as even as their sizes allow, n in all or everything; `order` gets the odd ones first."""
    taken = [0] * len(sizes)
    left = min(n, sum(sizes))
    while left:
        open_ones = [int(i) for i in order if taken[i] < sizes[i]]
        share = max(1, left // len(open_ones))
        for i in open_ones:
            more = min(share, sizes[i] - taken[i], left)
            taken[i] += more
            left -= more
    return taken
