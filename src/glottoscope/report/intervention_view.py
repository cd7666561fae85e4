"""Views of the intervention table: which settings there are, and one row of a setting by what was done and measured."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from glottoscope.report.data import ReportData, distinct, numbers, where

SETTING = (
    *("experiment", "control", "model", "lm_seed", "sae_seed", "layers", "layer"),
    *("base_step", "donor_model", "donor_step", "mode", "scale"),
)
STUDY = "study"  # the experiment of the study file; those of the command line have other names
MODELESS = ("baseline", "donor", "reconstruction", "state", "state_replaced")  # arms without a choice of mode and scale
DRAWS = ("random", "random_other")
PERPLEXITY_TEXTS = ("documents", "sentences")
TRANSLATION_METRICS = ("comet", "chrf", "bleu", "exact", "recall")  # the first that is there is the main one
LOWER_IS_BETTER = ("nll", "ppl")
METRIC_NAMES = {
    "nll": "log perplexity",
    "ppl": "perplexity",
    "chrf": "chrF",
    "bleu": "BLEU",
    "exact": "exact match",
    "recall": "concept recall",
    "comet": "COMET",
}
TEXT_NAMES = {"documents": "held-out documents", "sentences": "aligned sentences", "translation": "translation"}


class Target(NamedTuple):
    """What is measured of one text: a metric in a language (`all`: tokens pooled) or a direction (`en-ja`)."""

    metric: str
    language: str


@dataclass(frozen=True, slots=True)
class Effect:
    """One row of the table; NaN where a number is undefined, None where a count is."""

    arm: str
    part: str | None
    text: str
    metric: str
    language: str
    alpha: float
    chosen: bool
    value: float
    change: float
    low: float
    high: float
    gap: float
    gap_low: float
    gap_high: float
    added_norm: float
    per_norm: float
    mass: float
    n_features: int | None
    n_units: int | None
    rank: int | None
    n_random: int | None
    rank_other: int | None
    n_random_other: int | None
    note: str | None

    @property
    def verdict(self) -> str:
        """better | worse | unclear (the interval holds 0) | unknown (no interval) | missing (no change)."""
        if not math.isfinite(self.change):
            return "missing"
        if not math.isfinite(self.low + self.high):
            return "unknown"
        if self.metric in LOWER_IS_BETTER:
            return "better" if self.high < 0 else "worse" if self.low > 0 else "unclear"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "unclear"


_COLUMNS = {
    "arm": "arm",
    "part": "part",
    "text": "text",
    "metric": "metric",
    "language": "language",
    "alpha": "alpha",
    "chosen": "chosen",
    "value": "value",
    "change": "change",
    "low": "change_low",
    "high": "change_high",
    "gap": "gap_closed",
    "gap_low": "gap_closed_low",
    "gap_high": "gap_closed_high",
    "added_norm": "added_norm",
    "per_norm": "change_per_norm",
    "mass": "mass",
    "n_features": "n_features",
    "n_units": "n_units",
    "rank": "rank",
    "n_random": "n_random",
    "rank_other": "rank_other",
    "n_random_other": "n_random_other",
    "note": "note",
}
_NOTES = re.compile(r"; (?=random(?:_other)?: )")
PROMPTS = "prompts: "  # begins a note on all translations of a direction
_DRAWS_NOTE = re.compile(r"random(?:_other)?: ")
# Null is NaN in these alone.
_REALS = ("alpha", "value", "change", "low", "high", "gap", "gap_low", "gap_high", "added_norm", "per_norm", "mass")


def _effect(row: dict[str, Any]) -> Effect:
    fields: dict[str, Any] = {name: row[column] for name, column in _COLUMNS.items()}
    fields |= {name: math.nan for name in _REALS if fields[name] is None}
    fields["chosen"] = bool(fields["chosen"])
    return Effect(**fields)


@dataclass(frozen=True)
class Setting:
    """One base, donor, place and way of patching, with its rows."""

    experiment: str
    control: str
    model: str
    lm_seed: int
    sae_seed: int
    layers: str
    layer: int
    base_step: int
    donor_model: str
    donor_step: int
    mode: str
    scale: str
    table: pa.Table

    @functools.cached_property
    def effects(self) -> dict[tuple[str, str | None, str, str, str], list[Effect]]:
        """(arm, part, text, metric, language) -> rows by alpha; random draws are left out."""
        out: dict[tuple[str, str | None, str, str, str], list[Effect]] = {}
        for row in self.table.filter(~pc.field("arm").isin(DRAWS)).select(list(_COLUMNS.values())).to_pylist():
            effect = _effect(row)
            rows = out.setdefault((effect.arm, effect.part, effect.text, effect.metric, effect.language), [])
            if all(effect.alpha != old.alpha and not math.isnan(effect.alpha) for old in rows):
                rows.append(effect)
        return {key: sorted(rows, key=lambda e: (math.isnan(e.alpha), e.alpha)) for key, rows in out.items()}

    def curve(self, arm: str, part: str | None, text: str, target: Target) -> list[Effect]:
        """Rows over alpha, measured ones only."""
        rows = self.effects.get((arm, part, text, target.metric, target.language), [])
        return [e for e in rows if math.isfinite(e.alpha) and math.isfinite(e.change)]

    def at(self, arm: str, part: str | None, text: str, target: Target) -> Effect | None:
        """The row at the chosen alpha; of an arm or a class without one, its only row; else None."""
        rows = self.effects.get((arm, part, text, target.metric, target.language), [])
        chosen = [e for e in rows if e.chosen]
        return chosen[0] if chosen else rows[0] if len(rows) == 1 else None

    def draws(self, arm: str, part: str, text: str, target: Target) -> np.ndarray:
        """Changes of the random draws matched to a part, float64 [draws], sorted."""
        return self._drawn.get((arm, part, text, target.metric, target.language), np.array([]))

    @functools.cached_property
    def _drawn(self) -> dict[tuple[str, ...], np.ndarray]:
        rows = self.table.filter(pc.field("arm").isin(DRAWS))
        changes = numbers(rows, "change")
        names = zip(*(rows[name].to_pylist() for name in ("arm", "part", "text", "metric", "language")), strict=True)
        places: dict[tuple[str, ...], list[int]] = {}
        for i, key in enumerate(names):
            if math.isfinite(changes[i]):
                places.setdefault(key, []).append(i)
        return {key: np.sort(changes[found]) for key, found in places.items()}

    def note(self, arm: str, part: str | None) -> str | None:
        """The first reason that the table gives for what is missing of this arm and part.

        Missing draws have no row of their own: the part's row says why, as `random_other: reason`.
        """
        rows = where(self.table, arm="part" if arm in DRAWS else arm, part=part)
        said = [piece for note in rows["note"].to_pylist() if note for piece in _NOTES.split(note)]
        if arm in DRAWS:
            return next((piece.removeprefix(f"{arm}: ") for piece in said if piece.startswith(f"{arm}: ")), None)
        return next((piece for piece in said if not _DRAWS_NOTE.match(piece) and not piece.startswith(PROMPTS)), None)

    def prompts(self, direction: str) -> str | None:
        """What the table says of the prompts of a direction, such as examples that did not fit."""
        said = where(self.table, text="translation", language=direction)["note"].to_pylist()
        pieces = [piece for note in dict.fromkeys(said) if note for piece in note.split("; ")]
        return next((piece.removeprefix(PROMPTS) for piece in pieces if piece.startswith(PROMPTS)), None)

    @functools.cached_property
    def alphas(self) -> list[float]:
        """Every alpha at which parts were added."""
        return [a for a in distinct(where(self.table, arm="part"), "alpha") if a is not None]

    def chosen_alphas(self, text: str) -> list[float]:
        """The alphas of a text's rows that the statements are about (one, where dev text chose for all parts alike)."""
        rows = where(self.table, arm="part", text=text, chosen=True)
        return [a for a in distinct(rows, "alpha") if a is not None]

    def dev_text(self, text: str) -> str | None:
        """The dev text that alpha was chosen on for a text: of its own kind where there is one."""
        found = {key[2] for key in self.effects}
        kinds = ["dev_documents"] if text == "documents" else ["dev_sentences", "dev_documents"]
        return next((name for name in (*kinds, "dev") if name in found), None)

    def tried_on_dev(self, text: str) -> list[float]:
        """The alphas that dev text chose from for a text."""
        dev = self.dev_text(text)
        rows = [e for key, found in self.effects.items() if key[2] == dev for e in found]
        return sorted({e.alpha for e in rows if math.isfinite(e.alpha)})

    def tokens(self, column: str) -> int | None:
        """base_tokens or donor_tokens."""
        return next((t for t in self.table[column].to_pylist() if t is not None), None)


def settings_of(table: pa.Table) -> list[dict[str, Any]]:
    """Every combination of the setting's columns that a part was added under, in order."""
    found = where(table, arm="part").select(list(SETTING)).group_by(list(SETTING)).aggregate([]).to_pylist()
    return sorted(found, key=lambda key: [(key[name] is not None, key[name]) for name in SETTING])


def setting_rows(table: pa.Table, key: dict[str, Any]) -> Setting:
    """The rows of one combination. Arms that know no mode and scale are taken from whatever mode they stand under."""
    rows = where(table, **{name: key[name] for name in SETTING if name not in ("mode", "scale")})
    own = (pc.field("mode") == key["mode"]) & (pc.field("scale") == key["scale"])
    return Setting(**key, table=rows.filter(own | pc.field("arm").isin(MODELESS)))


@dataclass(frozen=True)
class View:
    """The intervention table of a report: its main settings (one for each base step), their parts and targets.

    Parts, texts, languages and targets are those of the main settings; what other settings have beside them is theirs.
    """

    data: ReportData
    table: pa.Table
    keys: list[dict[str, Any]]  # of every setting
    main: list[Setting]  # by base step

    @functools.cached_property
    def told(self) -> pa.Table:
        """The rows of the main settings."""
        return pa.concat_tables([s.table for s in self.main])

    @functools.cached_property
    def languages(self) -> list[str]:
        """The study's languages that perplexity was measured in, in the study's order."""
        found = distinct(self.told.filter(pc.field("metric").isin(LOWER_IS_BETTER)), "language")
        return [code for code in self.data.languages if code in found]

    @functools.cached_property
    def parts(self) -> list[str]:
        """Every part that was tried on held-out text: languages, mixed, bilingual, bilingual_paper, the user's own, all."""
        return self.parts_of(self.told)

    def parts_of(self, table: pa.Table) -> list[str]:
        """`parts`, of some rows."""
        held_out = pc.field("text").isin([*PERPLEXITY_TEXTS, "translation"])
        found = distinct(where(table, arm="part").filter(held_out), "part")
        known = [*self.data.languages, "mixed", "bilingual", "bilingual_paper"]
        own = [name for name in found if name is not None and name not in (*known, "all")]
        return [name for name in (*known, *own, "all") if name in found]

    @functools.cached_property
    def classes(self) -> list[str]:
        """The parts that are a class: all but `all`."""
        return [part for part in self.parts if part != "all"]

    @functools.cached_property
    def texts(self) -> list[str]:
        """Texts with perplexity: documents before sentences."""
        found = distinct(self.told, "text")
        return [text for text in PERPLEXITY_TEXTS if text in found]

    def perplexity_targets(self, metric: str) -> list[Target]:
        """Pooled, then each language."""
        return [Target(metric, language) for language in ("all", *self.languages)]

    @functools.cached_property
    def translation_targets(self) -> list[Target]:
        """Metric by metric, the main one first, every direction; empty where nothing was translated."""
        rows = where(self.told, text="translation")
        measured = rows.filter(pc.field("value").is_valid())
        found = set(zip(measured["metric"].to_pylist(), measured["language"].to_pylist(), strict=True))
        order = [f"{a}-{b}" for a in self.data.languages for b in self.data.languages if a != b]
        known = {language for _, language in found}
        ways = [*(way for way in order if way in known), *sorted(known - {*order})]
        return [Target(metric, way) for metric in TRANSLATION_METRICS for way in ways if (metric, way) in found]

    def part_name(self, part: str | None) -> str:
        """A part as the report calls it (text of the user's own: escape it)."""
        if part is None:
            return ""
        return "all features" if part == "all" else self.data.language_name(part) if part in self.data.languages else part

    def language_name(self, language: str, arrow: str = " → ") -> str:
        """`pooled`, `English`, `English → Japanese`."""
        codes = self.data.languages
        for a in codes:
            for b in codes:
                if language == f"{a}-{b}":
                    return f"{self.data.language_name(a)}{arrow}{self.data.language_name(b)}"
        return "pooled" if language == "all" else self.data.language_name(language)


def alpha_words(alphas: list[float]) -> str:
    """`0.4`; several where parts have their own."""
    return ", ".join(f"{a:g}" for a in alphas) or "none"


def layer_words(layers: str) -> str:
    """`layer 2`, `layers 1, 2 and 3 together`."""
    names = layers.split("+")
    return f"layer {names[0]}" if len(names) == 1 else f"layers {', '.join(names[:-1])} and {names[-1]} together"


def view_of(data: ReportData) -> View | None:
    """The intervention as the report shows it; None where the study made none.

    The main settings are the study file's own experiments; where it has none, those of the command line's name that comes
    first in the alphabet. Of these they are those of the report's main model (else of the last model that was patched),
    first seeds, one for each base step: parts added and scaled to the base, middle layer, latest donor before any other.
    """
    table = data.intervention
    keys = [] if table is None else settings_of(table)
    if table is None or not keys:
        return None
    names = {key["experiment"] for key in keys}
    shown = STUDY if STUDY in names else min(names)
    told = [key for key in keys if key["experiment"] == shown]
    patched = [key["model"] for key in told]
    model = data.main_model if data.main_model in patched else patched[-1]
    mine = [key for key in told if key["model"] == model]
    middle = data.middle_layer(model) if model in data.evolution["model"].to_pylist() else mine[0]["layer"]

    def preference(key: dict[str, Any]) -> tuple[Any, ...]:
        single = "+" not in str(key["layers"])
        distance = abs(key["layer"] - middle)
        way = (key["mode"] != "add", key["scale"] != "matched")
        return (
            key["control"] != "none",
            *way,
            not single,
            distance,
            -key["donor_step"],
            mine.index(key),
        )

    main = [
        setting_rows(table, min((k for k in mine if k["base_step"] == step), key=preference))
        for step in sorted({key["base_step"] for key in mine})
    ]
    return View(data, table, keys, main)
